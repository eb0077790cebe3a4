"""How the stored numbers of a carrier are read and multiplied.

A codec handles one kind of stored number. `values` reads it, `times` multiplies and rounds once. Kinds of very few bits
(FP8, powers of two) are `exact_only`: an inexact product is refused, never rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...errors import CheckpointError
from ..dtypes import DTYPES, from_float, to_float


def _e4m3() -> np.ndarray:
    """All 256 numbers of float8_e4m3fn, [256] float32: sign, 4 bits of exponent (bias 7), 3 of significand."""
    byte = np.arange(256)
    exponent, significand = (byte >> 3) & 15, byte & 7
    value = np.where(exponent == 0, significand / 8 * 2.0**-6, (1 + significand / 8) * 2.0 ** (exponent - 7.0))
    value = np.where((byte & 127) == 127, np.nan, value)
    return np.where(byte >> 7, -value, value).astype(np.float32)


E4M3 = _e4m3()
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)  # E2M1


def power_of_two(stored: np.ndarray) -> np.ndarray:
    """E8M0, an exponent and nothing else: 2^(stored - 127) as float32; 255 is NaN."""
    exponent = np.minimum(stored, 254).astype(np.int32) - 127
    return np.where(stored == 255, np.float32(np.nan), np.ldexp(np.float32(1), exponent))


@dataclass(frozen=True)
class Codec:
    """One kind of stored number.

    storage: the numpy type of the bytes. unit: the largest relative error of one rounding. exact_only: products that
    would be rounded are refused. positive: negative numbers are not allowed (kernels of the format need that).
    smallest: the smallest normal number.
    """

    name: str
    storage: np.dtype
    unit: float
    exact_only: bool = False
    positive: bool = False
    smallest: float = 0.0

    def values(self, stored: np.ndarray) -> np.ndarray:
        """The numbers that are multiplied, as float32 (F64: float64)."""
        raise NotImplementedError

    def times(self, stored: np.ndarray, factors: np.ndarray) -> np.ndarray:
        """The products as they are stored, rounded once. factors: float32, broadcast against `stored`."""
        raise NotImplementedError

    def exact(self, stored: np.ndarray, factors: np.ndarray) -> np.ndarray:
        """True where a product is exact, in the shape of `values`."""
        before, after = self.values(stored), self.values(self.times(stored, factors))
        exact = after.astype(np.float64) == before.astype(np.float64) * factors.astype(np.float64)
        return exact & (after >= 0) if self.positive else exact


class _Plain(Codec):
    """A dtype of plain weights."""

    def values(self, stored: np.ndarray) -> np.ndarray:
        return to_float(stored, self.name)

    def times(self, stored: np.ndarray, factors: np.ndarray) -> np.ndarray:
        wide = self.values(stored)
        with np.errstate(over="ignore"):
            return from_float(wide * factors.astype(wide.dtype), self.name)


class _Eighths(Codec):
    """float8_e4m3fn. Too large numbers saturate, as in all conversions to the format; `exact` detects it."""

    def values(self, stored: np.ndarray) -> np.ndarray:
        return E4M3[stored]

    def times(self, stored: np.ndarray, factors: np.ndarray) -> np.ndarray:
        product = np.clip(E4M3[stored] * factors, -448, 448)
        magnitude = np.abs(product)
        above = np.clip(np.searchsorted(E4M3[:127], magnitude), 0, 126)  # codes 0 to 126 ascend
        below = np.maximum(above - 1, 0)
        up, down = E4M3[above] - magnitude, magnitude - E4M3[below]
        code = np.where((down < up) | ((down == up) & (below % 2 == 0)), below, above)
        code = np.where(np.isnan(product), 127, code)
        return (code | np.where(np.signbit(product), 128, 0)).astype(np.uint8)


class _Exponent(Codec):
    """E8M0: adds the factor's exponent. A factor that is not a power of two gives 255, which is NaN."""

    def values(self, stored: np.ndarray) -> np.ndarray:
        return power_of_two(stored)

    def times(self, stored: np.ndarray, factors: np.ndarray) -> np.ndarray:
        significand, exponent = np.frexp(factors)
        moved = stored.astype(np.int32) + exponent - 1
        good = (significand == 0.5) & (stored != 255) & (moved >= 0) & (moved <= 254)
        return np.where(good, moved, 255).astype(np.uint8)


class _Pair(Codec):
    """Two 4-bit floats in a byte, the first in its low half. factors: [..., 2], one for each of the two."""

    def values(self, stored: np.ndarray) -> np.ndarray:
        return FP4[np.stack([stored & 15, stored >> 4], -1)]

    def times(self, stored: np.ndarray, factors: np.ndarray) -> np.ndarray:
        product = np.clip(self.values(stored) * factors, -6, 6)
        distance = np.abs(np.abs(product)[..., None] - FP4[:8])
        codes = distance.argmin(-1).astype(np.uint8) | np.where(np.signbit(product), 8, 0).astype(np.uint8)
        codes = np.where(factors == 1, np.stack([stored & 15, stored >> 4], -1), codes)
        return (codes[..., 0] | codes[..., 1] << 4).astype(np.uint8)


_BYTE = np.dtype("u1")
CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        *(
            _Plain(kind.name, np.dtype(kind.numpy), kind.unit, smallest=kind.smallest)
            for kind in DTYPES.values()
            if kind.editable
        ),
        _Eighths("F8_E4M3", _BYTE, 2.0**-4, exact_only=True),
        _Eighths("F8_E4M3 scale", _BYTE, 2.0**-4, exact_only=True, positive=True),
        _Eighths("F8_E4M3 rescued", _BYTE, 2.0**-4),  # rounds only in the lowest range
        _Pair("F4 pair", _BYTE, 2.0**-2, exact_only=True),
        _Exponent("F8_E8M0", _BYTE, 1.0, exact_only=True, positive=True),
    )
}


def codec_of(name: str, where: str) -> Codec:
    """The codec of a carrier's numbers. Raises CheckpointError where they cannot be multiplied. where: the tensor."""
    if name not in CODECS:
        raise CheckpointError(f"{where} is stored as {name}: kbne-edit edits BF16, F16, F32 and F64 weights")
    return CODECS[name]
