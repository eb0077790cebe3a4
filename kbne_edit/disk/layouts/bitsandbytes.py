"""bitsandbytes: int8 with a scale for each row, and the 4-bit codes NF4 and FP4 with a scale for each 64 weights.

The 4-bit codes count weights through the whole matrix, so blocks lie within rows only where I is a multiple of 64.
With double quantisation the scales are themselves codes that share a scale with other rows: no row can be multiplied.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from .base import Arrays, Carrier, Format, Parts, Read, Shape, numbers


class Int8(Format):
    """weight int8 [O, I], SCB f32 [O]: the largest weight of each row."""

    name = "bitsandbytes int8"
    needs = ("weight", "SCB")
    may = ("weight_format",)

    def shape(self, parts: Parts, read: Read) -> Shape:
        return parts["weight"].shape

    def carrier(self, parts: Parts, read: Read) -> Carrier | str:
        return Carrier("SCB", 0, parts["SCB"].dtype)

    def dequantise(self, parts: Arrays, about: Parts) -> np.ndarray:
        scale = numbers(parts["SCB"], about["SCB"].dtype).reshape(-1, 1) * np.float32(1 / 127)
        return parts["weight"].astype(np.float32) * scale


class FourBits(Format):
    """weight u8 [O I / 2, 1], weight.absmax f32 [O I / 64], weight.quant_map f32 [16], weight.quant_state: JSON."""

    needs: tuple[str, ...] = ("weight", "weight.absmax", "weight.quant_map")
    may = ("weight.nested_absmax", "weight.nested_quant_map")

    def __init__(self, kind: str):
        self.name, self._state = f"bitsandbytes {kind}", f"weight.quant_state.bitsandbytes__{kind}"
        self.needs = (*FourBits.needs, self._state)

    def shape(self, parts: Parts, read: Read) -> Shape:
        rows, columns = self._about(read)["shape"]
        return rows, columns

    def _about(self, read: Read) -> dict[str, Any]:
        return json.loads(bytes(read(self._state)))

    def carrier(self, parts: Parts, read: Read) -> Carrier | str:
        if "weight.nested_absmax" in parts:
            return "double quantisation: the scales of 256 blocks share one, so no neuron has a multiplier of its own"
        about = self._about(read)
        rows, columns = about["shape"]
        if columns % about["blocksize"]:
            return f"blocks of {about['blocksize']} weights run over the ends of rows of {columns}"
        return Carrier("weight.absmax", 0, "F32", view=(rows, columns // about["blocksize"]))

    def dequantise(self, parts: Arrays, about: Parts) -> np.ndarray:
        state = json.loads(bytes(parts[self._state]))
        absmax = numbers(parts["weight.absmax"], about["weight.absmax"].dtype)
        if "weight.nested_absmax" in parts:
            coarse = np.repeat(parts["weight.nested_absmax"], state["nested_blocksize"])[: len(absmax)]
            absmax = parts["weight.nested_quant_map"][parts["weight.absmax"]] * coarse
            absmax = absmax + np.float32(state["nested_offset"])
        packed = parts["weight"].reshape(-1)
        codes = np.stack([packed >> 4, packed & 15], -1).reshape(-1, state["blocksize"])
        return (parts["weight.quant_map"][codes] * absmax[:, None]).reshape(state["shape"]).astype(np.float32)
