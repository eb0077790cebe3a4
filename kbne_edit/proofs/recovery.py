"""Recovers the edit of a directory that was made elsewhere from its weights."""

from __future__ import annotations

import numpy as np

from ..disk.checkpoint import Checkpoint
from ..disk.layouts.codecs import CODECS, Codec
from ..disk.names import MANIFEST
from ..disk.slots import Slot, by_neuron
from ..disk.tensors import read_raw
from ..edit import Edit
from ..errors import CheckpointError, FamilyError, shown
from ..families import SITES, Site


def recover(base: Checkpoint, baked: Checkpoint) -> Edit:
    """The edit that turns `base` into `baked`, computed from the weights. Raises CheckpointError if there is none."""
    for site in SITES:
        try:
            slots = [slot for layer in base.slots(site).values() for slot in layer]
        except FamilyError:
            if site != "down":  # a feed-forward block without a gate has no such site
                continue
            raise
        if factors := _factors(base, baked, slots):
            return Edit(site, factors)
    raise CheckpointError(
        f"{baked.path} has no {MANIFEST}, and {_why_none(base, baked)}: pass --edit with the edit that you expect"
    )


def _factors(base: Checkpoint, baked: Checkpoint, slots: list[Slot]) -> dict[int, dict[int, float]]:
    factors: dict[int, dict[int, float]] = {}
    for slot in slots:
        shape = base.shapes[slot.tensor]
        if (
            (len(shape) > 1 or slot.codec)
            and slot.block is None
            and baked.shapes.get(slot.tensor) == shape
            and _same_dtype(base, baked, slot.tensor)
        ):
            recovered = recover_slot(base, baked, slot)
            factors.setdefault(slot.layer, {}).update({slot.offset + n: factor for n, factor in recovered.items()})
    return {layer: recovered for layer, recovered in factors.items() if recovered}


def _same_dtype(base: Checkpoint, baked: Checkpoint, name: str) -> bool:
    return base.tensors[name][1].dtype == baked.tensors[name][1].dtype


def _why_none(base: Checkpoint, baked: Checkpoint) -> str:
    places: list[tuple[Site, Slot]] = [("down", slot) for layer in base.slots("down").values() for slot in layer]
    for _, slot in places:
        name = slot.tensor
        if name not in baked.tensors:
            return f"has no tensor {shown(name)}, which {base.path} has"
        if not _same_dtype(base, baked, name):
            old, new = base.tensors[name][1].dtype, baked.tensors[name][1].dtype
            return f"stores {shown(name)} as {new}, which {base.path} stores as {old}, so no factor can be recovered"
        if baked.shapes[name] != base.shapes[name]:
            shapes = list(baked.shapes[name]), list(base.shapes[name])
            return f"has {shown(name)} in the shape {shapes[0]}, which in {base.path} is {shapes[1]}"
    return f"no neuron of {base.path} is scaled in it"


def recover_slot(base: Checkpoint, baked: Checkpoint, slot: Slot) -> dict[int, float]:
    """{neuron of the slot: its factor} of the neurons that are scaled."""
    numbers = slot.numbers(base.tensors[slot.tensor][1])
    before, after = (by_neuron(_read(checkpoint, slot, numbers), slot) for checkpoint in (base, baked))
    factors = {}
    for i in np.flatnonzero((before != after).any(1)).tolist():
        if (factor := recover_factor(before[i], after[i], numbers.name)) is not None:
            factors[i] = factor
    return factors


def _read(checkpoint: Checkpoint, slot: Slot, numbers: Codec) -> np.ndarray:
    shard, tensor = checkpoint.tensors[slot.tensor]
    return np.frombuffer(read_raw(shard, tensor), numbers.storage).reshape(slot.shape(tensor))


def recover_factor(x: np.ndarray, y: np.ndarray, dtype: str) -> float | None:
    """The shortest decimal that scales the stored x [D] to exactly the stored y; None if there is none.

    Each weight confines the factor to an interval of numbers that round to its y. The middle of their intersection is
    the factor to within a rounding step. Its decimals are tried from the shortest on, because people choose short ones.
    """
    numbers = CODECS[dtype]
    wide, after = (numbers.values(v).astype(np.float64) for v in (x, y))
    use = np.isfinite(wide) & np.isfinite(after) & (np.abs(after) > numbers.smallest) & (wide != 0)
    middle = 0.0
    if use.any():
        ratio = after[use] / wide[use]
        slack = np.ldexp(numbers.unit, np.frexp(after[use])[1] - 1) / np.abs(wide[use])
        middle = float((np.max(ratio - slack) + np.min(ratio + slack)) / 2)
    for digits in range(1, 10):  # nine digits distinguish all float32 numbers
        factor = float(f"{middle:.{digits}g}")
        if numbers.times(x, np.array(factor, np.float32)).tobytes() == y.tobytes():
            return factor
    return None
