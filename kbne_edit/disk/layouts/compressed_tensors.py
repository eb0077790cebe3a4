"""The layouts of compressed-tensors, as llm-compressor writes them.

pack-quantized (integers of 1 to 8 bits in int32 words), int-quantized and float-quantized (one byte a weight), and the
4-bit floats: MXFP4 (a power of two for each 32 weights) and NVFP4 (an FP8 scale for each 16, one divisor for all).
"""

from __future__ import annotations

import numpy as np

from .base import Arrays, Carrier, Format, Parts, Read, Shape, bit_stream, numbers, spread, spread_blocks
from .codecs import FP4, power_of_two

_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")


class PackQuantized(Format):
    """weight_packed int32 [O, ceil(I bits / 32)], weight_scale [O, G], weight_shape [2]; zero points packed along O."""

    needs = ("weight_packed", "weight_scale", "weight_shape")
    may = ("weight_zero_point", "weight_g_idx", *_ACTIVATIONS)

    def __init__(self, bits: int):
        self.bits, self.name = bits, f"compressed-tensors pack-quantized W{bits}"

    def fits(self, parts: Parts) -> bool:
        return super().fits(parts) and parts["weight_packed"].dtype == "I32"

    def shape(self, parts: Parts, read: Read) -> Shape:
        rows, columns = (int(n) for n in read("weight_shape"))
        return rows, columns

    def carrier(self, parts: Parts, read: Read) -> Carrier | str:
        return Carrier("weight_scale", 0, parts["weight_scale"].dtype)

    def dequantise(self, parts: Arrays, about: Parts) -> np.ndarray:
        rows, columns = (int(n) for n in parts["weight_shape"])
        middle = 1 << (self.bits - 1)
        scale = numbers(parts["weight_scale"], about["weight_scale"].dtype)
        codes = bit_stream(parts["weight_packed"], self.bits, columns) - middle
        groups = np.arange(columns) // -(-columns // scale.shape[1])
        if "weight_g_idx" in parts and (parts["weight_g_idx"] >= 0).all():
            groups = parts["weight_g_idx"]
        if "weight_zero_point" in parts:
            packed = np.ascontiguousarray(parts["weight_zero_point"].T)  # [G, words]
            zero = bit_stream(packed, self.bits, rows).T - middle
            codes = codes - zero[:, groups]
        return codes.astype(np.float32) * scale[:, groups]


class Naive(Format):
    """weight [O, I] of one byte each, weight_scale of the matrix, of each row, of groups in a row, or of blocks."""

    needs = ("weight", "weight_scale")
    may = ("weight_zero_point", *_ACTIVATIONS)

    def __init__(self, block: tuple[int, int] | None = None):
        self.block = block
        self.name = "compressed-tensors 8 bits" + (f" in blocks of {block[0]}x{block[1]}" if block else "")

    def fits(self, parts: Parts) -> bool:
        return super().fits(parts) and parts["weight"].dtype in ("I8", "F8_E4M3")

    def shape(self, parts: Parts, read: Read) -> Shape:
        return parts["weight"].shape

    def carrier(self, parts: Parts, read: Read) -> Carrier | str:
        weight, scale = parts["weight"], parts["weight_scale"]
        if self.block:
            return Carrier("weight", 0, weight.dtype, block=("weight_scale", self.block[0]))
        if scale.shape and scale.shape[0] == weight.shape[0]:
            return Carrier("weight_scale", 0, scale.dtype)
        if weight.dtype == "I8":
            return "one scale for the whole matrix of integers: no row has a multiplier of its own"
        return Carrier("weight", 0, weight.dtype)

    def dequantise(self, parts: Arrays, about: Parts) -> np.ndarray:
        codes = numbers(parts["weight"], about["weight"].dtype)
        scale = numbers(parts["weight_scale"], about["weight_scale"].dtype)
        if "weight_zero_point" in parts:
            zero = numbers(parts["weight_zero_point"], about["weight_zero_point"].dtype)
            codes = codes - self._wide(zero, codes.shape)
        return codes * self._wide(scale, codes.shape)

    def _wide(self, scale: np.ndarray, shape: Shape) -> np.ndarray:
        if self.block:
            return spread_blocks(scale, shape, self.block)
        if scale.ndim == 2 and scale.shape[1] > 1:
            return spread(scale, shape[1])
        return scale.reshape(-1, 1)


def fp4(packed: np.ndarray) -> np.ndarray:
    """4-bit floats, two a byte and the first in the low half: [..., n] bytes to [..., 2 n] float32."""
    return FP4[np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)]


class MXFP4(Format):
    """weight_packed u8 [O, I / 2], weight_scale u8 [O, I / 32]: exponents, biased by 127."""

    name = "compressed-tensors MXFP4"
    needs = ("weight_packed", "weight_scale")
    may = _ACTIVATIONS

    def fits(self, parts: Parts) -> bool:
        kinds = {part: about.dtype for part, about in parts.items()}
        return super().fits(parts) and kinds["weight_packed"] == "U8" and kinds["weight_scale"] in ("U8", "F8_E8M0")

    def shape(self, parts: Parts, read: Read) -> Shape:
        rows, half = parts["weight_packed"].shape
        return rows, 2 * half

    def carrier(self, parts: Parts, read: Read) -> Carrier | str:
        return Carrier("weight_scale", 0, "F8_E8M0")

    def dequantise(self, parts: Arrays, about: Parts) -> np.ndarray:
        codes = fp4(parts["weight_packed"])
        return codes * spread(power_of_two(parts["weight_scale"]), codes.shape[1])


class NVFP4(Format):
    """weight_packed u8 [O, I / 2], weight_scale e4m3 [O, I / 16], weight_global_scale f32 [1]: what divides them.

    The global scale is never touched: serving engines run gate and up as one matrix, with one such scale.
    """

    name = "compressed-tensors NVFP4"
    needs = ("weight_packed", "weight_scale", "weight_global_scale")
    may = _ACTIVATIONS

    def fits(self, parts: Parts) -> bool:
        return super().fits(parts) and parts["weight_scale"].dtype == "F8_E4M3"

    def shape(self, parts: Parts, read: Read) -> Shape:
        rows, half = parts["weight_packed"].shape
        return rows, 2 * half

    def carrier(self, parts: Parts, read: Read) -> Carrier | str:
        return Carrier("weight_scale", 0, "F8_E4M3 scale")

    def dequantise(self, parts: Arrays, about: Parts) -> np.ndarray:
        codes = fp4(parts["weight_packed"])
        whole = numbers(parts["weight_global_scale"], about["weight_global_scale"].dtype)
        return codes * spread(numbers(parts["weight_scale"], "F8_E4M3") / whole, codes.shape[1])
