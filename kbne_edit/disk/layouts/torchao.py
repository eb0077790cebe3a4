"""torchao's tensors in safetensors: int8 and FP8 with a scale for each row.

The header's metadata describes each tensor's class and blocks; here the shapes suffice.
"""

from __future__ import annotations

import numpy as np

from .base import Arrays, Carrier, Format, Parts, Read, Shape, numbers, spread


class PerRow(Format):
    """_weight_qdata [O, I], _weight_scale f32 [O, 1] (or [O, G]); int8 with _weight_zero_point of the same shape."""

    name = "torchao 8 bits"
    needs = ("_weight_qdata", "_weight_scale")
    may = ("_weight_zero_point",)

    def fits(self, parts: Parts) -> bool:
        return super().fits(parts) and parts["_weight_qdata"].dtype in ("I8", "F8_E4M3")

    def shape(self, parts: Parts, read: Read) -> Shape:
        return parts["_weight_qdata"].shape

    def carrier(self, parts: Parts, read: Read) -> Carrier | str:
        scale = parts["_weight_scale"]
        if not scale.shape or scale.shape[0] != parts["_weight_qdata"].shape[0]:
            return "one scale for several rows: no neuron has a multiplier of its own"
        return Carrier("_weight_scale", 0, scale.dtype)

    def dequantise(self, parts: Arrays, about: Parts) -> np.ndarray:
        codes = numbers(parts["_weight_qdata"], about["_weight_qdata"].dtype)
        columns = codes.shape[1]
        if "_weight_zero_point" in parts:
            zero = numbers(parts["_weight_zero_point"], about["_weight_zero_point"].dtype)
            codes = codes - spread(zero.reshape(len(codes), -1), columns)
        scale = numbers(parts["_weight_scale"], about["_weight_scale"].dtype)
        return codes * spread(scale.reshape(len(scale) if scale.ndim else 1, -1), columns)
