"""How the stored numbers of a carrier are read and multiplied.

A codec knows one kind of stored number. `values` reads it, `times` multiplies and rounds once. What rounds to a few
bits only (FP8, powers of two) is `exact_only`: a product that is not the exact one is refused, never rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
    """E8M0, an exponent and nothing else: 2^(stored - 127) as float32; 255 is not a number."""
    exponent = np.minimum(stored, 254).astype(np.int32) - 127
    return np.where(stored == 255, np.float32(np.nan), np.ldexp(np.float32(1), exponent))


@dataclass(frozen=True)
class Codec:
    """Numbers of one kind, of which each is multiplied.

    storage: what numpy reads the bytes as. unit: the largest relative error of a rounding. exact_only: a product that
    would be rounded is refused. positive: where it is stored, no sign may be (kernels of the format need that).
    """

    name: str
    storage: np.dtype
    unit: float
    exact_only: bool = False
    positive: bool = False

    def values(self, stored: np.ndarray) -> np.ndarray:
        """The numbers that are multiplied, as float32 (F64: float64)."""
        raise NotImplementedError

    def times(self, stored: np.ndarray, factors: np.ndarray) -> np.ndarray:
        """The products as they are stored, rounded once. factors: float32, broadcast against `stored`."""
        raise NotImplementedError

    def exact(self, stored: np.ndarray, factors: np.ndarray) -> np.ndarray:
        """Where a product is not rounded, booleans of the shape of `values`."""
        before, after = self.values(stored), self.values(self.times(stored, factors))
        exact = after.astype(np.float64) == before.astype(np.float64) * factors.astype(np.float64)
        return exact & (after >= 0) if self.positive else exact


class _Brain(Codec):
    def values(self, stored):
        return (stored.astype(np.uint32) << 16).view(np.float32)

    def times(self, stored, factors):
        product = np.ascontiguousarray(self.values(stored) * factors)
        bits = product.view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(product), (bits >> 16).astype(np.uint16) | 0x40, rounded)


class _Native(Codec):
    """A dtype that numpy has."""

    def values(self, stored):
        return stored if stored.dtype.itemsize == 8 else stored.astype(np.float32)

    def times(self, stored, factors):
        wide = self.values(stored)
        with np.errstate(over="ignore"):
            return (wide * factors.astype(wide.dtype)).astype(stored.dtype)


class _Eighths(Codec):
    """float8_e4m3fn. What is too large saturates, as every caster of the formats does; `exact` tells."""

    def values(self, stored):
        return E4M3[stored]

    def times(self, stored, factors):
        product = np.clip(E4M3[stored] * factors, -448, 448)
        magnitude = np.abs(product)
        above = np.clip(np.searchsorted(E4M3[:127], magnitude), 0, 126)  # codes 0 to 126 ascend
        below = np.maximum(above - 1, 0)
        up, down = E4M3[above] - magnitude, magnitude - E4M3[below]
        code = np.where((down < up) | ((down == up) & (below % 2 == 0)), below, above)
        code = np.where(np.isnan(product), 127, code)
        return (code | np.where(np.signbit(product), 128, 0)).astype(np.uint8)


class _Exponent(Codec):
    """E8M0: the factor's exponent is added. A factor that is no power of two gives 255, not a number."""

    def values(self, stored):
        return power_of_two(stored)

    def times(self, stored, factors):
        significand, exponent = np.frexp(factors)
        moved = stored.astype(np.int32) + exponent - 1
        good = (significand == 0.5) & (stored != 255) & (moved >= 0) & (moved <= 254)
        return np.where(good, moved, 255).astype(np.uint8)


def _dtype(text: str) -> np.dtype:
    return np.dtype(text)


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        _Brain("BF16", _dtype("<u2"), 2.0**-8),
        _Native("F16", _dtype("<f2"), 2.0**-11),
        _Native("F32", _dtype("<f4"), 2.0**-24),
        _Native("F64", _dtype("<f8"), 2.0**-53),
        _Eighths("F8_E4M3", _dtype("u1"), 2.0**-4, exact_only=True),
        _Eighths("F8_E4M3 scale", _dtype("u1"), 2.0**-4, exact_only=True, positive=True),
        _Exponent("F8_E8M0", _dtype("u1"), 1.0, exact_only=True, positive=True),
    )
}
