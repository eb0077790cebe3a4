"""Where the product of a factor and a quantised neuron's multipliers is not exact.

A power of two is exact in every supported format, unless a multiplier leaves the range of its numbers. Other factors
are one rounding of float scales; numbers of a few bits are never rounded. Rows of FP8 blocks share a scale: there the
block's scale takes the factor and the codes of its other rows the inverse, where the codes alone would saturate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from ..disk.checkpoint import Checkpoint
from ..disk.layouts.codecs import CODECS
from ..disk.slots import Slot
from ..edit import Edit
from .target import Target

SUBNORMAL = 2.0**-10  # half the smallest step of float8_e4m3fn: what halving a code of the lowest range can cost
RESCUED = 2.0**-18  # the relative error of a neuron in a rescued block: SUBNORMAL over the largest code, 448


def quantised_targets(checkpoint: Checkpoint, target: Target) -> tuple[list[Target], np.ndarray]:
    """What happens to the carriers of a target's neurons, and which of them cannot take their factors, booleans [k]."""
    if target.slot.block is not None:
        return _rescued(checkpoint, target)
    if target.slot.codec == "F4 pair":
        return _paired(checkpoint, target)
    shard, tensor = checkpoint.tensors[target.slot.tensor]
    codec = target.slot.numbers(tensor)
    whole = np.memmap(shard.path, codec.storage, "r", tensor.start, target.slot.shape(tensor))
    stored = whole[target.where]
    factors = target.factors[:, None] if stored.ndim > 1 else target.factors
    each = codec.exact(stored.T if target.by_column else stored, factors)
    exact = np.asarray(each.reshape(len(target.index), -1).all(1))
    rounds = ~np.array([codec.exact_only or _is_exact(float(factor)) for factor in target.factors])
    return [replace(target, unit=codec.unit if (rounds & ~exact).any() else 0.0)], ~(exact | rounds)


def _is_exact(factor: float) -> bool:
    """True for 0 and powers of two of either sign."""
    return factor == 0 or abs(math.frexp(factor)[0]) == 0.5


def _paired(checkpoint: Checkpoint, target: Target) -> tuple[list[Target], np.ndarray]:
    """Of codes that share a byte: a factor for each half of the bytes that hold a neuron, float32 [k, 2]."""
    assert target.expert is not None
    shard, tensor = checkpoint.tensors[target.slot.tensor]
    codec = target.slot.numbers(tensor)
    shape = target.slot.shape(tensor)
    where, inverse = np.unique(np.stack([target.expert, target.index // 2]), axis=1, return_inverse=True)
    factors = np.ones((where.shape[1], 2), np.float32)
    factors[inverse, target.index % 2] = target.factors
    made = replace(target, expert=where[0], index=where[1], factors=factors)
    whole = np.memmap(shard.path, codec.storage, "r", tensor.start, shape)
    exact: Any = np.asarray(codec.exact(whole[made.where], factors[:, None, :])).all(1)  # [k, 2]
    return [made], ~exact[inverse, target.index % 2]


def _rescued(checkpoint: Checkpoint, target: Target) -> tuple[list[Target], np.ndarray]:
    """Codes and scales of whole blocks of rows: all rows of the blocks that hold a neuron, whether they change or not.

    So the undo file holds the blocks whole, however their codes and scales were changed.
    """
    assert target.slot.block is not None
    scales, height = target.slot.block
    shard, tensor = checkpoint.tensors[target.slot.tensor]
    codes = np.memmap(shard.path, np.uint8, "r", tensor.start, tensor.shape)
    blocks = np.unique(target.index // height)
    bad = np.zeros(len(target.index), bool)
    rows, factors, multipliers, rounded = [], [], [], False
    for block in blocks:
        inside = np.arange(block * height, min((block + 1) * height, len(codes)))
        here = target.index // height == block
        wanted = np.ones(len(inside), np.float32)
        wanted[target.index[here] - inside[0]] = target.factors[here]
        scale, error = _block_scale(codes[inside], wanted)
        if scale is None:
            bad |= here
        rounded |= error
        rows.append(inside)
        multipliers.append(scale or 1.0)
        factors.append(wanted / np.float32(scale or 1.0))
    slot = replace(target.slot, codec="F8_E4M3 rescued")
    made = replace(
        target, slot=slot, index=np.concatenate(rows), factors=np.concatenate(factors), unit=RESCUED if rounded else 0.0
    )
    scale_slot = Slot(scales, slot.layer, 0, 0, checkpoint.shapes[scales][0])
    return [made, Target(scale_slot, blocks, np.array(multipliers, np.float32))], bad


def _block_scale(codes: np.ndarray, factors: np.ndarray) -> tuple[float | None, bool]:
    """(the multiplier of a block's scales, whether codes are rounded): 1 where the codes alone can take the factors.

    codes: [rows of the block, I] as stored; factors: float32 [rows], 1 for those that are not edited. None where even
    the largest factor as the multiplier leaves a code that saturates, or is rounded above the lowest range.
    """
    codec = CODECS["F8_E4M3 rescued"]
    best: tuple[float | None, bool] = (None, False)
    largest = float(np.abs(factors).max())
    for scale in dict.fromkeys((1.0, largest)):
        if not _is_exact(scale):
            continue
        wide = (factors / np.float32(scale))[:, None]
        error = np.abs(codec.values(codec.times(codes, wide)) - codec.values(codes) * wide).max()
        if error == 0:
            return scale, False
        if error <= SUBNORMAL:
            best = (scale, True)
    return best


def moved(edit: Edit, targets: Iterable[Target], seed: int) -> Edit:
    """The edit with each factor moved by as much as its stored products may be rounded, up or down by a seeded draw."""
    draws = np.random.default_rng(seed)
    factors = {layer: dict(neurons) for layer, neurons in edit.factors.items()}
    for target in targets:
        slot = target.slot
        if target.unit:
            for index in target.neurons[(target.neurons >= 0) & (target.neurons < slot.neurons * (slot.experts or 1))]:
                neuron = slot.offset + int(index)
                factor = factors[slot.layer].get(neuron, 1.0)
                factors[slot.layer][neuron] = factor * (1 + target.unit * float(draws.choice((-1, 1))))
    return replace(edit, factors=factors, base=None)
