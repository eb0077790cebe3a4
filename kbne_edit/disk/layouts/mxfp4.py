"""The MXFP4 experts of gpt-oss: all experts of a layer in one tensor of codes and one of exponents.

gpt-oss clamps up, so h is not linear in it and the exponents cannot take a factor. The codes of the down-projection
can: a column is multiplied code by code, exactly for 0 and -1 (and wherever all products are codes).
"""

from __future__ import annotations

import numpy as np

from .base import Arrays, Carrier, Format, Parts, Read, Shape
from .codecs import power_of_two
from .compressed_tensors import fp4


class MXFP4Experts(Format):
    """NAME_blocks u8 [E, O, I / 32, 16], NAME_scales u8 [E, O, I / 32]; the plain NAME is [E, I, O]."""

    name = "MXFP4 experts"
    needs = ("_blocks", "_scales")
    weight = ""
    columns = True

    def fits(self, parts: Parts) -> bool:
        return super().fits(parts) and len(parts["_blocks"].shape) == 4

    def shape(self, parts: Parts, read: Read) -> Shape:
        experts, rows, groups, half = parts["_blocks"].shape
        return experts, groups * half * 2, rows

    def carrier(self, parts: Parts, read: Read) -> Carrier | str:
        experts, rows, groups, half = parts["_blocks"].shape
        return Carrier("_blocks", 2, "F4 pair", view=(experts, rows, groups * half))

    def dequantise(self, parts: Arrays, about: Parts) -> np.ndarray:
        codes = fp4(parts["_blocks"])  # [E, O, I / 32, 32]
        values = codes * power_of_two(parts["_scales"])[..., None]
        return np.ascontiguousarray(values.reshape(*values.shape[:2], -1).swapaxes(1, 2))
