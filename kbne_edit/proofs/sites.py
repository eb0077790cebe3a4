"""The second proof where the model does not fit: each edited projection by itself, on seeded inputs.

All other tensors are identical by the first proof, so the projections are all that can differ.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..disk.checkpoint import Checkpoint
from ..disk.dtypes import DTYPES, to_float
from ..disk.slots import by_neuron
from ..disk.tensors import read_array, read_raw
from ..folding.plan import Plan
from ..folding.target import Target
from .outcome import BehaviourProof
from .passes import NOISE_FACTOR


def site_by_site(plan: Plan, baked: Checkpoint) -> BehaviourProof:
    """Each edited projection on seeded inputs: W (factor h) from the base against W' h from the baked directory.

    All other tensors are identical by the first proof, so the projections are all that can differ.
    """
    base, edit = plan.checkpoint, plan.edit
    worst, noise, equal, rows = 0.0, 0.0, True, 0
    for name, target in plan.targets.items():
        dtype, index = base.tensors[name][1].dtype, target.neurons
        old, new = (  # [neurons, D]
            to_float(by_neuron(read_array(*c.tensors[name]), target.slot), dtype).astype(np.float32)
            for c in (base, baked)
        )
        scale = np.ones(len(old), np.float32)
        scale[index] = target.factors
        x = np.random.default_rng(0).standard_normal((8, old.shape[edit.site != "down"]), np.float32)
        reference: Any
        spread: Any
        if edit.site == "down":
            reference, got = (x * scale) @ old, x @ new
            spread = np.sqrt(((x * scale)[:, index] ** 2) @ (old[index] ** 2))
        else:
            reference, got = (x @ old.T) * scale, x @ new.T
            spread = np.sqrt((x**2) @ (old[index] ** 2).T) * np.abs(target.factors)
        unit = max(DTYPES[dtype].unit, 2.0**-24) / 3**0.5  # as in `noise`
        worst = max(worst, float(np.abs(got - reference).max() / max(float(reference.std()), 1e-30)))
        noise = max(noise, float(unit * spread.max() / max(float(reference.std()), 1e-30)))
        equal &= np.array_equal(got, reference)
        rows += len(x)
    return BehaviourProof(
        dtype="float32",
        how="site by site",
        holds=bool(equal) if edit.exact else worst <= NOISE_FACTOR * noise,
        bit_equal=bool(equal),
        difference=worst,
        noise=noise,
        positions=rows,
    )


def rows_by_rows(plan: Plan, baked: Checkpoint) -> BehaviourProof:
    """Each edited matrix of a quantised checkpoint on seeded inputs: factor (W x) from the base against W' x.

    By our reader (of GGUF: by the gguf package), a matrix in memory at a time.
    """
    worst, noise, equal, rows = 0.0, 0.0, True, 0
    for target in plan.targets.values():
        old, new = (_plain_rows(checkpoint, target) for checkpoint in (plan.checkpoint, baked))
        if old is None or new is None:
            continue
        scale = np.ones(len(old), np.float32)
        for neuron, factor in plan.edit.factors[target.slot.layer].items():
            if 0 <= neuron - target.slot.offset < len(old):
                scale[neuron - target.slot.offset] = factor
        columns = target.slot.codec == "F4 pair"  # of the down-projection itself
        x = np.random.default_rng(0).standard_normal((8, old.shape[0 if columns else 1]), np.float32)
        reference, got = ((x * scale) @ old, x @ new) if columns else ((x @ old.T) * scale, x @ new.T)
        spread = float(reference.std()) or 1e-30
        worst = max(worst, float(np.abs(got - reference).max()) / spread)
        noise = max(noise, max(target.unit, 2.0**-24) * float(np.abs(reference).max()) / spread)
        equal &= np.array_equal(got, reference)
        rows += len(x)
    return BehaviourProof(
        dtype="float32",
        how="site by site",
        holds=bool(equal) if plan.exact else worst <= NOISE_FACTOR * noise,
        bit_equal=bool(equal),
        difference=worst,
        noise=noise,
        positions=rows,
    )


def _plain_rows(checkpoint: Checkpoint, target: Target) -> np.ndarray | None:
    """The rows of a target's neurons, dequantised, [neurons, D]; None for a bias, and for the scales of a block."""
    slot, tensor = target.slot, checkpoint.tensors[target.slot.tensor][1]
    if checkpoint.gguf is not None:
        if len(tensor.shape) < 2:
            return None
        from gguf import GGMLQuantizationType, dequantize

        raw = read_raw(*checkpoint.tensors[slot.tensor])
        stored = by_neuron(np.frombuffer(raw, np.uint8).reshape(tensor.shape), slot)
        return dequantize(stored, GGMLQuantizationType[tensor.dtype])
    name = checkpoint.layout.matrix_of(slot.tensor) if checkpoint.layout else None
    if slot.codec is None or name is None:
        return None
    if slot.experts:
        matrix = checkpoint.read_plain(name)  # [E, F, D]
        return matrix.reshape(-1, matrix.shape[-1])
    return checkpoint.read_plain(name)[slot.along]
