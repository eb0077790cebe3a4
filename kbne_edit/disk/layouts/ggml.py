"""The tensor types of GGUF: blocks along a row, each with a scale at a fixed position in it.

A row consists of whole blocks, so a row of W is multiplied by multiplying the scale of each block (and the offset, if
the type has one). Scales are half floats; MXFP4 has an exponent, and IQ1_M spreads the bits of one half float over four
words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .codecs import CODECS, Codec


@dataclass(frozen=True)
class BlockType:
    """One type. weights, size: weights and bytes per block; fields: byte offsets of the numbers to multiply."""

    name: str
    weights: int
    size: int
    fields: tuple[int, ...] = ()


# By their numbers in a file.
TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18, (0,)),
    3: BlockType("Q4_1", 32, 20, (0, 2)),
    6: BlockType("Q5_0", 32, 22, (0,)),
    7: BlockType("Q5_1", 32, 24, (0, 2)),
    8: BlockType("Q8_0", 32, 34, (0,)),
    10: BlockType("Q2_K", 256, 84, (80, 82)),
    11: BlockType("Q3_K", 256, 110, (108,)),
    12: BlockType("Q4_K", 256, 144, (0, 2)),
    13: BlockType("Q5_K", 256, 176, (0, 2)),
    14: BlockType("Q6_K", 256, 210, (208,)),
    16: BlockType("IQ2_XXS", 256, 66, (0,)),
    17: BlockType("IQ2_XS", 256, 74, (0,)),
    18: BlockType("IQ3_XXS", 256, 98, (0,)),
    19: BlockType("IQ1_S", 256, 50, (0,)),
    20: BlockType("IQ4_NL", 32, 18, (0,)),
    21: BlockType("IQ3_S", 256, 110, (0,)),
    22: BlockType("IQ2_S", 256, 82, (0,)),
    23: BlockType("IQ4_XS", 256, 136, (0,)),
    24: BlockType("I8", 1, 1),
    25: BlockType("I16", 1, 2),
    26: BlockType("I32", 1, 4),
    27: BlockType("I64", 1, 8),
    28: BlockType("F64", 1, 8),
    29: BlockType("IQ1_M", 256, 56, (48,)),
    30: BlockType("BF16", 1, 2),
    34: BlockType("TQ1_0", 256, 54, (52,)),
    35: BlockType("TQ2_0", 256, 66, (64,)),
    39: BlockType("MXFP4", 32, 17, (0,)),
}


@dataclass(frozen=True)
class BlockCodec(Codec):
    """Rows of blocks, [..., bytes] uint8: multiplies the scales of each block and nothing else."""

    kind: BlockType = TYPES[8]

    def values(self, stored: np.ndarray) -> np.ndarray:
        blocks = self._blocks(stored)
        values = [self._number.values(self._get(blocks, field)) for field in self.kind.fields]
        return np.concatenate(values, -1)

    def times(self, stored: np.ndarray, factors: np.ndarray) -> np.ndarray:
        blocks = self._blocks(stored).copy()
        for field in self.kind.fields:
            self._put(blocks, field, self._number.times(self._get(blocks, field), factors))
        return blocks.reshape(stored.shape)

    def _blocks(self, stored: np.ndarray) -> np.ndarray:
        return stored.reshape(*stored.shape[:-1], stored.shape[-1] // self.kind.size, self.kind.size)

    @property
    def _number(self) -> Codec:
        return CODECS["F8_E8M0" if self.kind.name == "MXFP4" else "F16"]

    def _get(self, blocks: np.ndarray, field: int) -> np.ndarray:
        """One scale of each block, [..., blocks], as `_number` stores it."""
        if self.kind.name == "MXFP4":
            return blocks[..., field]
        if self.kind.name == "IQ1_M":
            words = np.ascontiguousarray(blocks[..., field : field + 8]).view("<u2")
            bits = np.zeros(words.shape[:-1], np.uint16)
            for k in range(4):
                bits |= (words[..., k] >> 12) << (4 * k)
            return bits.view("<f2")
        return np.ascontiguousarray(blocks[..., field : field + 2]).view("<f2")[..., 0]

    def _put(self, blocks: np.ndarray, field: int, numbers: np.ndarray) -> None:
        if self.kind.name == "MXFP4":
            blocks[..., field] = numbers
            return
        if self.kind.name == "IQ1_M":
            words = np.ascontiguousarray(blocks[..., field : field + 8]).view("<u2")
            bits = numbers.view("<u2")
            for k in range(4):
                words[..., k] = (words[..., k] & 0x0FFF) | (((bits >> (4 * k)) & 15) << 12)
            blocks[..., field : field + 8] = words.view(np.uint8)
            return
        blocks[..., field : field + 2] = np.ascontiguousarray(numbers)[..., None].view(np.uint8)


def _codec(kind: BlockType) -> BlockCodec:
    number = CODECS["F8_E8M0" if kind.name == "MXFP4" else "F16"]
    about = (number.unit, number.exact_only, number.positive, number.smallest)
    return BlockCodec(f"GGUF {kind.name}", np.dtype("u1"), *about, kind)


CODECS.update({codec.name: codec for kind in TYPES.values() if kind.fields for codec in [_codec(kind)]})
