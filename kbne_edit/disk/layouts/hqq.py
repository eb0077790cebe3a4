"""HQQ: integers with a float scale and a float zero point for each group, W = (codes - zero) * scale.

With axis 1 the groups lie within rows. With axis 0 a group takes one weight from each of many rows.
"""

from __future__ import annotations

import numpy as np

from .base import Arrays, Carrier, Format, Parts, Read, Shape, numbers


class HQQ(Format):
    """W_q u8: the weights as [O I / g, g] (axis 0: [g, O I / g]), packed along the first axis; scale, zero, shape."""

    needs = ("W_q", "scale", "zero", "shape")
    may = (
        "nbits",
        "group_size",
        "axis",
        "packing",
        "unpack_view_dtype",
        "view_as_float",
        "quant_scale",
        "quant_zero",
        "compute_dtype",
        "offload_meta",
        "encoded_state_dict",
        "stores_quant_config",
        "channel_wise",
        "optimize",
        "round_zero",
    )

    def __init__(self, bits: int, group: int | None, axis: int):
        self.bits, self.group, self.axis = bits, group, axis
        self.name = f"HQQ, {bits} bits, axis {axis}"

    def fits(self, parts: Parts) -> bool:
        return super().fits(parts) and parts["W_q"].dtype == "U8" and self.bits in (1, 2, 4, 8)

    def shape(self, parts: Parts, read: Read) -> Shape:
        rows, columns = (int(n) for n in read("shape"))
        return rows, columns

    def carrier(self, parts: Parts, read: Read) -> Carrier | str:
        if self.axis != 1:
            return "groups along axis 0 mix the weights of many neurons: quantise with axis=1"
        rows, columns = self.shape(parts, read)
        group = self.group or columns
        if columns % group:
            return f"groups of {group} weights run over the ends of rows of {columns}"
        return Carrier("scale", 0, parts["scale"].dtype, view=(rows, columns // group))

    def dequantise(self, parts: Arrays, about: Parts) -> np.ndarray:
        rows, columns = (int(n) for n in parts["shape"])
        packed = parts["W_q"]
        # A byte packs rows from equal parts of the matrix, the first part in its highest bits.
        shifts = range(8 - self.bits, -1, -self.bits)
        codes = np.concatenate([(packed >> shift) & (2**self.bits - 1) for shift in shifts])
        scale, zero = (numbers(parts[name], about[name].dtype) for name in ("scale", "zero"))
        group = self.group or (columns if self.axis == 1 else rows)
        height = rows * columns // group if self.axis == 1 else group
        return ((codes[:height].astype(np.float32) - zero) * scale).reshape(rows, columns)
