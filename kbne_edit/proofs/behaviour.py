"""The second proof: the model behaves as the hooks.

It compares the base with run-time hooks and the baked directory, both loaded by plain transformers, one after the
other. They must agree bit for bit if every factor is a power of two, else within the rounding noise, which is computed
(see `noise`).

Each model is loaded once, in the dtype of its weights, and compared in that dtype and in float32 (see
`models.widening`). Both run the same texts, in float32 followed by the greedy continuation of the base with hooks. A
text is continued alike if both models have the same top token at each position of the continuation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..disk.checkpoint import Checkpoint
from ..disk.dtypes import DTYPES
from ..errors import CheckpointError
from ..folding.exact import moved
from ..folding.plan import Plan
from ..models import memory
from ..models.dequantised import own_dtype
from ..models.libraries import library, load_by_library
from ..models.loading import foreign, load_model
from .outcome import BehaviourProof
from .passes import (
    NOISE_FACTOR,
    Outcome,
    Texts,
    check_finite,
    kl_divergence,
    last_rounding,
    logit_difference,
    proof_texts,
    run,
    same_route,
)
from .sites import rows_by_rows, site_by_site

if TYPE_CHECKING:
    import torch

_FEWEST_DRAWS, _DIFFERENCES = 3, 100_000


def behaviour_proof(plan: Plan, baked: Checkpoint) -> tuple[BehaviourProof, ...]:
    """The second proof of a plan, in float32 and in the dtype of the weights.

    A model that does not fit in memory is read layer by layer: the same passes, so the same figures. If not even that
    fits, each edited site is compared by itself. Raises CheckpointError if a directory cannot be loaded.
    """
    way = memory.way(plan.checkpoint)
    if way == "too large":
        return (rows_by_rows(plan, baked) if plan.checkpoint.quantised else site_by_site(plan, baked),)
    import torch

    if plan.checkpoint.quantised:
        stored = getattr(torch, own_dtype(plan.checkpoint))
        if way == "layer by layer":
            reader = "gguf" if plan.checkpoint.gguf else "kbne-edit"
            return _layer_by_layer(plan, baked, stored, f"read by {reader}")
        return _whole_quantised(plan, baked, stored)
    first = next(iter(plan.targets))
    stored = getattr(torch, DTYPES[plan.checkpoint.tensors[first][1].dtype].torch or "float32")
    return _layer_by_layer(plan, baked, stored) if way == "layer by layer" else _whole_model(plan, baked, stored)


class Load(Protocol):
    """Loads the causal model of a checkpoint. native: with activations quantised as the format says."""

    def __call__(self, checkpoint: Checkpoint, dtype: torch.dtype, native: bool) -> Any: ...


def _load_plainly(checkpoint: Checkpoint, dtype: torch.dtype, native: bool) -> Any:
    return load_model(checkpoint.path, dtype)


def _load_on_demand(checkpoint: Checkpoint, dtype: torch.dtype, native: bool) -> Any:
    from ..models.on_demand import on_demand

    return on_demand(checkpoint, dtype)


def _layer_by_layer(plan: Plan, baked: Checkpoint, stored: torch.dtype, reader: str = "") -> tuple[BehaviourProof, ...]:
    """The passes of the whole model, with layers that are read when they run. reader: of a quantised format."""
    import torch

    how = ", ".join(filter(None, ("whole model", reader, "layer by layer")))
    compare = _Comparison(how, plan, baked, stored, _load_on_demand)
    dtypes = dict.fromkeys((torch.float32, stored))
    return tuple(proof for dtype in dtypes for proof in compare.proofs(dtype, (dtype,)))


def _whole_model(plan: Plan, baked: Checkpoint, stored: torch.dtype) -> tuple[BehaviourProof, ...]:
    """In float32 and in the dtype `stored`; from one load each where that gives the same result."""
    import torch

    from ..models.widening import narrow_dtype

    dtypes = tuple(dict.fromkeys((torch.float32, stored)))
    compare = _Comparison("whole model", plan, baked, stored, _load_plainly)
    if narrow_dtype(plan.checkpoint) == stored == narrow_dtype(baked) and (proofs := compare.proofs(stored, dtypes)):
        return proofs
    return tuple(proof for dtype in dtypes for proof in compare.proofs(dtype, (dtype,)))


def _whole_quantised(plan: Plan, baked: Checkpoint, stored: torch.dtype) -> tuple[BehaviourProof, ...]:
    """In float32 and in the dtype `stored`, by the format's own library if it is installed, else by kbne-edit's reader.

    kbne-edit's reader and the gguf package give float32, which is then rounded: one load serves both dtypes.
    Activations are quantised only if everything is exact: one activation code that flips moves the logits beyond any
    bound.
    """
    import torch

    reader, dtypes = library(plan.checkpoint), tuple(dict.fromkeys((torch.float32, stored)))

    def proofs(
        reader: str, load: Load, loaded: torch.dtype, dtypes: tuple[torch.dtype, ...]
    ) -> tuple[BehaviourProof, ...]:
        how = f"whole model, read by {reader}"
        return _Comparison(how, plan, baked, stored, load).proofs(loaded, dtypes)

    if reader is None or reader == "gguf":
        return proofs(reader or "kbne-edit", _load_plainly, torch.float32, dtypes)
    result: list[BehaviourProof] = []
    for dtype in dtypes:
        try:
            with foreign(plan.checkpoint.path):
                result += proofs(reader, load_by_library, dtype, (dtype,))
        except CheckpointError:  # not every library computes in every dtype on a CPU
            result += proofs("kbne-edit", _load_plainly, dtype, (dtype,))
    return tuple(result)


@dataclass(frozen=True)
class _Comparison:
    """What is compared, and how both are loaded. stored: the dtype that products were rounded to."""

    how: str
    plan: Plan
    baked: Checkpoint
    stored: torch.dtype
    load: Load

    def proofs(self, loaded: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> tuple[BehaviourProof, ...]:
        """One entry per dtype, from models loaded in `loaded`; () if each dtype needs a load of its own."""
        references = self._references(loaded, dtypes)
        if references is None:
            return ()
        model = self.load(self.baked, loaded, self.plan.exact)
        return tuple(self._compared(model, reference, loaded) for reference in references)

    def _references(self, loaded: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> list[_Reference] | None:
        """The outcomes of the base with hooks. Its model is freed on return: two are never in memory."""
        import torch

        from ..models.hooks import hooked
        from ..models.widening import can_widen

        model = self.load(self.plan.checkpoint, loaded, self.plan.exact)
        if len(dtypes) > 1 and loaded != torch.float32 and not can_widen(model):
            return None
        with hooked(model, self.plan.edit):
            continued = Texts.continued(model, proof_texts(self.plan.checkpoint))
        references = []
        for dtype in dtypes:
            # In 16 bits near ties break by chance, so continuations are compared in float32.
            texts = continued if dtype == torch.float32 else continued.without_continuations
            with _computing_in(dtype, model, loaded):
                with hooked(model, self.plan.edit):
                    outcome = run(model, texts)
                check_finite(model, texts, outcome)
                noise = None if self.plan.exact else self._noise(model, texts, outcome, dtype)
            references.append(_Reference(dtype, texts, outcome, noise))
        return references

    def _noise(self, model: Any, texts: Texts, reference: Outcome, dtype: torch.dtype) -> float:
        """How far rounding alone moves the logits: the largest difference in as many draws as `NOISE_FACTOR` assumes.

        A tiny model has few logits, so three draws of bfloat16 may move none of them.
        """
        noise = last_rounding(reference.logits, dtype)
        for seed in range(max(_FEWEST_DRAWS, -(-_DIFFERENCES // reference.logits.size))):
            with self._drawn(model, seed):
                noise = max(noise, logit_difference(run(model, texts), reference))
        return noise

    @contextmanager
    def _drawn(self, model: Any, seed: int) -> Iterator[None]:
        """The base with hooks and one draw of rounding noise.

        In a quantised format h_i has the relative error of its rounded scale, so the factors are moved by that much.
        """
        from ..models.hooks import hooked
        from .noise import rounding_noise

        plan = self.plan
        if plan.checkpoint.quantised:
            with hooked(model, moved(plan.edit, plan.targets.values(), seed)):
                yield
            return
        with hooked(model, plan.edit), rounding_noise(model, plan.edit, self.stored, seed):
            yield

    def _compared(self, model: Any, base: _Reference, loaded: torch.dtype) -> BehaviourProof:
        """The proof in one dtype. model: the output, loaded in `loaded`."""
        import torch

        dtype, texts, reference, noise = base.dtype, base.texts, base.outcome, base.noise
        with _computing_in(dtype, model, loaded):
            got = run(model, texts)
        difference, equal = logit_difference(got, reference), np.array_equal(got.logits, reference.logits)
        same = got.logits.argmax(1) == reference.logits.argmax(1)
        rerouted = 1 - float(same_route(got, reference).mean()) if reference.routes[0].size else None
        return BehaviourProof(
            dtype=str(dtype).removeprefix("torch."),
            how=self.how,
            holds=bool(equal) if noise is None else difference <= NOISE_FACTOR * noise,
            bit_equal=bool(equal),
            difference=difference,
            noise=noise or 0.0,
            positions=len(same),
            kl=kl_divergence(reference.logits, got.logits),
            top1=float(same.mean()),
            greedy=float(np.mean([same[where].all() for where in texts.written])) if dtype == torch.float32 else None,
            rerouted=rerouted,
        )


@dataclass(frozen=True)
class _Reference:
    """The base with hooks in one dtype. noise: None if the output must equal it bit for bit."""

    dtype: torch.dtype
    texts: Texts
    outcome: Outcome
    noise: float | None


@contextmanager
def _computing_in(dtype: torch.dtype, model: Any, loaded: torch.dtype) -> Iterator[None]:
    """float32 is computed first: a model loaded in it is rounded for good."""
    import torch

    from ..models.widening import narrow_, widened

    if dtype == loaded:
        yield
    elif loaded == torch.float32:
        narrow_(model, dtype)
        yield
    else:
        with widened(model):
            yield
