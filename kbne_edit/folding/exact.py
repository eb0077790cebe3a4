"""Which factors of a quantised neuron are not exact.

A power of two is exact in every supported format, unless a scale leaves its range. Any other factor costs one rounding
of float scales; numbers of a few bits are never rounded. Rows of FP8 blocks share a scale. Where the codes of a row
would saturate, the block's scale takes the factor, and the codes of the block's other rows its inverse.
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

SUBNORMAL = 2.0**-10  # half the smallest step of float8_e4m3fn: the largest error of halving a subnormal code
RESCUED = 2.0**-18  # the relative error of a neuron in a rescued block: SUBNORMAL over the largest code, 448


def quantised_targets(checkpoint: Checkpoint, target: Target) -> tuple[list[Target], np.ndarray]:
    """The targets of the carriers of a target's neurons, and True for neurons that cannot take their factor, [k]."""
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
    """For codes that share a byte: a factor for each half of every byte with an edited neuron, float32 [k, 2]."""
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
    """Codes and scales of whole blocks: all rows of every block with an edited neuron, whether they change or not.

    So the undo file holds whole blocks, and can restore codes and scales together.
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
    """(factor of the block's scales, True if codes are rounded). The factor is 1 where the codes can take the factors.

    codes: [rows of the block, I] as stored; factors: float32 [rows], 1 for rows that are not edited. None if even with
    the largest factor a code saturates, or is rounded outside the subnormal range.
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
    """The edit with each factor moved by the largest rounding of its products, up or down by a seeded draw."""
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
