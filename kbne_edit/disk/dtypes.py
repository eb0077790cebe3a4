"""The table of the dtypes that a safetensors file can hold, and rounding to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import CheckpointError


@dataclass(frozen=True)
class DType:
    """One stored dtype.

    name: in safetensors; bits: of one value; torch: its name in torch, None if torch has none; numpy: the type that its
    bytes are read as, None if numpy has no such type (BF16 is read as uint16). precision: bits of the significand, the
    hidden one included; smallest: the smallest normal number. Both are 0 for dtypes that hold no plain weights.
    """

    name: str
    bits: int
    torch: str | None = None
    numpy: str | None = None
    precision: int = 0
    smallest: float = 0.0

    @property
    def editable(self) -> bool:
        """True if a weight can be multiplied in this dtype."""
        return self.precision > 0

    @property
    def unit(self) -> float:
        """u, the largest relative error of one rounding."""
        return 2.0**-self.precision


# In the order in which safetensors writes tensors to a file: the widest first.
DTYPES: dict[str, DType] = {
    dtype.name: dtype
    for dtype in (
        DType("U64", 64, "uint64", "<u8"),
        DType("I64", 64, "int64", "<i8"),
        DType("F64", 64, "float64", "<f8", 53, 2.0**-1022),
        DType("C64", 64, "complex64", "<c8"),
        DType("F32", 32, "float32", "<f4", 24, 2.0**-126),
        DType("U32", 32, "uint32", "<u4"),
        DType("I32", 32, "int32", "<i4"),
        DType("BF16", 16, "bfloat16", "<u2", 8, 2.0**-126),
        DType("F16", 16, "float16", "<f2", 11, 2.0**-14),
        DType("U16", 16, "uint16", "<u2"),
        DType("I16", 16, "int16", "<i2"),
        DType("F8_E8M0", 8, "float8_e8m0fnu"),
        DType("F8_E4M3", 8, "float8_e4m3fn"),
        DType("F8_E5M2", 8, "float8_e5m2"),
        DType("I8", 8, "int8", "i1"),
        DType("U8", 8, "uint8", "u1"),
        DType("BOOL", 8, "bool", "?"),
        DType("F6_E3M2", 6),
        DType("F6_E2M3", 6),
        DType("F4", 4),
    )
}


def storage(dtype: str, where: str) -> np.dtype:
    """The numpy type of an editable dtype's bytes. Raises CheckpointError for dtypes that hold no plain weights.

    where: the tensor's name, for the message.
    """
    kind = DTYPES[dtype]
    if not kind.editable:
        raise CheckpointError(f"{where} is stored as {dtype}: kbne-edit edits BF16, F16, F32 and F64 weights")
    return np.dtype(kind.numpy)


def to_float(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Stored values as float32 (F64: float64). raw: for BF16 an array of uint16, else of the dtype itself."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw if dtype == "F64" else raw.astype(np.float32)


def from_float(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round once, half to even, to the stored dtype. NaN stays NaN."""
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return values.astype(np.dtype(DTYPES[dtype].numpy).newbyteorder("="))
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), (bits >> 16).astype(np.uint16) | 0x40, rounded)
