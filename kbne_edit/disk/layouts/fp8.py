"""FP8 as DeepSeek and Qwen publish it: one scale for each 128x128 block, or one for the whole matrix."""

from __future__ import annotations

import numpy as np

from .base import Arrays, Carrier, Format, Parts, Read, Shape, numbers, spread_blocks

_ACTIVATIONS = ("activation_scale", "input_scale")


class FP8(Format):
    """weight e4m3 [O, I], weight_scale_inv [ceil(O / a), ceil(I / b)], or of one number."""

    needs = ("weight", "weight_scale_inv")
    may = _ACTIVATIONS

    def __init__(self, block: tuple[int, int] | None):
        self.block = block
        self.name = f"FP8 in blocks of {block[0]}x{block[1]}" if block else "FP8, one scale a matrix"

    def fits(self, parts: Parts) -> bool:
        return super().fits(parts) and parts["weight"].dtype == "F8_E4M3"

    def shape(self, parts: Parts, read: Read) -> Shape:
        return parts["weight"].shape

    def carrier(self, parts: Parts, read: Read) -> Carrier | str:
        if self.block:
            return Carrier("weight", 0, "F8_E4M3", block=("weight_scale_inv", self.block[0]))
        return Carrier("weight", 0, "F8_E4M3")

    def dequantise(self, parts: Arrays, about: Parts) -> np.ndarray:
        codes = numbers(parts["weight"], "F8_E4M3")
        scale = numbers(parts["weight_scale_inv"], about["weight_scale_inv"].dtype)
        return codes * (spread_blocks(scale, codes.shape, self.block) if self.block else scale.reshape(-1))
