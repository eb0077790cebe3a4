"""The interface of a quantised format.

A quantised matrix W [O, I] is stored as several tensors, its parts: `NAME.qweight`, `NAME.scales` and so on. A format
knows the shape of W, how to dequantise it, and which part can be multiplied to multiply a row of W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from .codecs import CODECS

Shape = tuple[int, ...]
Read = Callable[[str], np.ndarray]


@dataclass(frozen=True)
class Part:
    """A tensor as its header describes it."""

    dtype: str
    shape: Shape


Parts = Mapping[str, Part]
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Carrier:
    """The part of a matrix that takes the factors of its rows.

    axis: the axis of the rows; codec: how the numbers are multiplied, a key of `CODECS`; view: the shape to read the
    tensor in, if not its own. block: where rows share a scale, (the part of scales, how many rows share one); then
    `part` holds the codes.
    """

    part: str
    axis: int
    codec: str
    view: Shape | None = None
    block: tuple[str, int] | None = None


class Format:
    """One way to store a matrix. Subclasses set the class attributes and write the three methods.

    name: for messages. needs: required parts; may: optional parts. weight: suffix of the tensor's name in the
    unquantised checkpoint. columns: True if the carrier holds the matrix's own columns, not the rows of another matrix.
    """

    name = ""
    needs: tuple[str, ...] = ()
    may: tuple[str, ...] = ()
    weight = ".weight"
    columns = False

    def fits(self, parts: Parts) -> bool:
        """True if a matrix with these parts has this format."""
        return all(part in parts for part in self.needs)

    def shape(self, parts: Parts, read: Read) -> Shape:
        """[O, I] of the matrix. read: returns a part as it is stored, for formats that store the shape."""
        raise NotImplementedError

    def carrier(self, parts: Parts, read: Read) -> Carrier | str:
        """What carries the factors of rows, or the reason why nothing can."""
        raise NotImplementedError

    def dequantise(self, parts: Arrays, about: Parts) -> np.ndarray:
        """The matrix, [O, I] float32. parts: each tensor as it is stored (BF16 as uint16, FP8 as uint8)."""
        raise NotImplementedError


def numbers(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Stored numbers of a dtype as float32."""
    return CODECS[dtype].values(stored).astype(np.float32) if dtype in CODECS else stored.astype(np.float32)


def spread(scales: np.ndarray, size: int) -> np.ndarray:
    """Scales of groups along the last axis, [..., G], as one number for each of `size` columns, [..., size]."""
    return np.repeat(scales, -(-size // scales.shape[-1]), -1)[..., :size]


def spread_blocks(scales: np.ndarray, shape: Shape, block: tuple[int, int]) -> np.ndarray:
    """Scales of blocks, [ceil(O / a), ceil(I / b)], as one number for each element of [O, I]."""
    return np.repeat(np.repeat(scales, block[0], -2), block[1], -1)[: shape[0], : shape[1]]


def nibbles(words: np.ndarray, axis: int) -> np.ndarray:
    """The eight 4-bit numbers of each 32-bit word, from the lowest on, as a new axis after `axis`."""
    words = words.view(np.uint32)
    return np.stack([(words >> (4 * k)) & 15 for k in range(8)], axis + 1)


def bit_stream(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """`count` numbers of so many bits, side by side in the little-endian bytes of the last axis: [..., count] int32."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return octets[..., :count].astype(np.int32)
    if bits in (2, 4):
        places = [(octets >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        return np.stack(places, -1).reshape(*octets.shape[:-1], -1)[..., :count].astype(np.int32)
    flat = np.unpackbits(octets, axis=-1, bitorder="little")[..., : count * bits]
    flat = flat.reshape(*octets.shape[:-1], count, bits).astype(np.int32)
    return (flat << np.arange(bits, dtype=np.int32)).sum(-1, dtype=np.int32)
