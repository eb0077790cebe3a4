"""GPTQ and AWQ: 4-bit integers in int32 words, transposed, with one float16 scale for each row of W and group.

`scales` is [G, O]: column i scales row i of W. GPTQ's `g_idx` maps inputs to groups (act-order shuffles them); it does
not concern rows.
"""

from __future__ import annotations

import numpy as np

from .base import Arrays, Carrier, Format, Parts, Read, Shape, bit_stream, nibbles, numbers


class GPTQ(Format):
    """qweight int32 [I bits / 32, O], qzeros int32 [G, O bits / 32], scales f16 [G, O], g_idx int32 [I].

    offset: added to a stored zero point: 1 in the first version of the format, 0 in the second.
    """

    needs = ("qweight", "qzeros", "scales")
    may = ("g_idx",)

    def __init__(self, bits: int, group: int, offset: int):
        self.bits, self.group, self.offset = bits, group, offset
        self.name = f"GPTQ, {bits} bits"

    def shape(self, parts: Parts, read: Read) -> Shape:
        words, rows = parts["qweight"].shape
        return rows, words * 32 // self.bits

    def carrier(self, parts: Parts, read: Read) -> Carrier | str:
        return Carrier("scales", 1, parts["scales"].dtype)

    def dequantise(self, parts: Arrays, about: Parts) -> np.ndarray:
        columns = parts["qweight"].shape[0] * 32 // self.bits
        rows = parts["qweight"].shape[1]
        codes = bit_stream(parts["qweight"].T, self.bits, columns)  # [O, I]
        zeros = bit_stream(parts["qzeros"], self.bits, rows) + self.offset  # [G, O]
        zeros &= 2**self.bits - 1
        size = self.group if self.group > 0 else columns
        groups = parts.get("g_idx", np.arange(columns) // size)
        scales = numbers(parts["scales"], about["scales"].dtype)
        return (codes - zeros[groups].T).astype(np.float32) * scales[groups].T


class AWQ(Format):
    """The layout "gemm": qweight int32 [I, O / 8], qzeros int32 [G, O / 8], scales f16 [G, O].

    The nibbles of a word hold its eight rows in the order 0 2 4 6 1 3 5 7.
    """

    name = "AWQ, 4 bits"
    needs = ("qweight", "qzeros", "scales")
    _ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # of the nibbles, to put the rows in order

    def shape(self, parts: Parts, read: Read) -> Shape:
        columns, words = parts["qweight"].shape
        return words * 8, columns

    def carrier(self, parts: Parts, read: Read) -> Carrier | str:
        return Carrier("scales", 1, parts["scales"].dtype)

    def dequantise(self, parts: Arrays, about: Parts) -> np.ndarray:
        codes, zeros = self._rows(parts["qweight"]), self._rows(parts["qzeros"])
        columns = len(codes)
        groups = np.arange(columns) // -(-columns // len(zeros))
        scales = numbers(parts["scales"], about["scales"].dtype)
        return ((codes - zeros[groups]).astype(np.float32) * scales[groups]).T

    def _rows(self, words: np.ndarray) -> np.ndarray:
        return nibbles(words, 1)[..., self._ORDER].reshape(len(words), -1).astype(np.int32)
