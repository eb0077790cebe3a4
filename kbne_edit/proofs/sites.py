"""The second proof for models that do not fit into memory: each edited projection by itself, on seeded inputs.

By the first proof all other tensors are identical, so only these projections can differ.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    """Compares each edited projection on seeded inputs: W (factor h) of the base and W' h of the output."""
    base, edit, seen = plan.checkpoint, plan.edit, _Seen()
    for name, target in plan.targets.items():
        dtype, index = base.tensors[name][1].dtype, target.neurons
        old, new = (  # [neurons, D]
            to_float(by_neuron(read_array(*c.tensors[name]), target.slot), dtype).astype(np.float32)
            for c in (base, baked)
        )
        scale = np.ones(len(old), np.float32)
        scale[index] = target.factors
        x = _inputs(old.shape[edit.site != "down"])
        reference: Any
        spread: Any
        if edit.site == "down":
            reference, got = (x * scale) @ old, x @ new
            spread = np.sqrt(((x * scale)[:, index] ** 2) @ (old[index] ** 2))
        else:
            reference, got = (x @ old.T) * scale, x @ new.T
            spread = np.sqrt((x**2) @ (old[index] ** 2).T) * np.abs(target.factors)
        unit = max(DTYPES[dtype].unit, 2.0**-24) / 3**0.5  # as in `noise`
        seen.compare(reference, got, unit * spread.max())
    return seen.proof(edit.exact)


def rows_by_rows(plan: Plan, baked: Checkpoint) -> BehaviourProof:
    """Compares each edited matrix of a quantised checkpoint on seeded inputs: factor (W x) of the base and W' x.

    Matrices are read by kbne-edit (GGUF: by the gguf package), one at a time.
    """
    seen = _Seen()
    for target in plan.targets.values():
        old, new = (_plain_rows(checkpoint, target) for checkpoint in (plan.checkpoint, baked))
        if old is None or new is None:
            continue
        scale = np.ones(len(old), np.float32)
        for neuron, factor in plan.edit.factors[target.slot.layer].items():
            if 0 <= neuron - target.slot.offset < len(old):
                scale[neuron - target.slot.offset] = factor
        columns = target.slot.codec == "F4 pair"  # of the down-projection itself
        x = _inputs(old.shape[0 if columns else 1])
        reference, got = ((x * scale) @ old, x @ new) if columns else ((x @ old.T) * scale, x @ new.T)
        seen.compare(reference, got, max(target.unit, 2.0**-24) * float(np.abs(reference).max()))
    return seen.proof(plan.exact)


def _inputs(size: int) -> np.ndarray:
    """Seeded, [8, size]."""
    return np.random.default_rng(0).standard_normal((8, size), np.float32)


@dataclass
class _Seen:
    """The figures over all projections. difference, noise: the largest, in standard deviations of the output."""

    difference: float = 0.0
    noise: float = 0.0
    equal: bool = True
    positions: int = 0

    def compare(self, reference: np.ndarray, got: np.ndarray, noise: float) -> None:
        """Add one projection. noise: the rounding noise of its output."""
        deviation = max(float(reference.std()), 1e-30)
        self.difference = max(self.difference, float(np.abs(got - reference).max()) / deviation)
        self.noise = max(self.noise, float(noise) / deviation)
        self.equal = self.equal and bool(np.array_equal(got, reference))
        self.positions += len(reference)

    def proof(self, exact: bool) -> BehaviourProof:
        """exact: the outputs must be equal."""
        return BehaviourProof(
            dtype="float32",
            how="site by site",
            holds=self.equal if exact else self.difference <= NOISE_FACTOR * self.noise,
            bit_equal=self.equal,
            difference=self.difference,
            noise=self.noise,
            positions=self.positions,
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
