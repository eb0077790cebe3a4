"""The second proof: the model behaves as the hooks.

The base with run-time hooks against the baked directory, loaded by plain transformers. Bit-equal where every factor is
a power of two; otherwise within the rounding noise, which is computed (see `noise`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..disk.checkpoint import Checkpoint
from ..disk.dtypes import DTYPES, to_float
from ..disk.slots import by_neuron
from ..disk.tensors import read_array, read_raw
from ..errors import CheckpointError
from ..folding.exact import moved
from ..folding.plan import Plan
from ..folding.target import Target
from ..models.bounds import check_numbers, check_tokens
from ..models.dequantised import own_dtype
from ..models.libraries import library, load_by_library
from ..models.loading import foreign, load_model, load_tokenizer
from ..models.memory import SHARE, available, in_memory
from .outcome import BehaviourProof

if TYPE_CHECKING:
    import torch

NOISE_FACTOR = 4  # the largest of some 10^5 near-normal differences varies by less than this between two draws
_NOISE_DRAWS = 3
_TOKENS = 8  # of each greedy continuation
_TEXTS = (
    "The committee read both applications twice before it",
    "Water boils sooner on a mountain because",
    "She asked the engineer what he thought of the plan, and he said",
    "In the morning the two neighbours met at the market and",
)


def behaviour_proof(plan: Plan, baked: Checkpoint) -> tuple[BehaviourProof, ...]:
    """The second proof of a plan, in float32 and in the checkpoint's own dtype; site by site if the model is too large.

    Raises CheckpointError if a directory cannot be loaded.
    """
    if in_memory(plan.checkpoint) > SHARE * available():
        return (_rows_by_rows(plan, baked) if plan.checkpoint.quantised else _site_by_site(plan, baked),)
    import torch

    if plan.checkpoint.quantised:
        own = getattr(torch, own_dtype(plan.checkpoint))
        return tuple(_whole_quantised(plan, baked, dtype) for dtype in dict.fromkeys((torch.float32, own)))
    first = next(iter(plan.targets))
    own = getattr(torch, DTYPES[plan.checkpoint.tensors[first][1].dtype].torch or "float32")
    return tuple(_whole_model(plan, baked, dtype, own) for dtype in dict.fromkeys((torch.float32, own)))


def proof_texts(base: Checkpoint) -> list[list[int]]:
    """Token ids of the texts that the proof runs; seeded ones where the tokenizer knows no word."""
    try:
        tokenizer = load_tokenizer(base.path)
        with foreign(base.path):
            probes = [tokenizer(text)["input_ids"] for text in _TEXTS]
        if all(probes):
            return probes
    except CheckpointError:
        pass
    # A directory without a tokenizer (or with one that knows no word) can be proven all the same.
    size = base.config.get("vocab_size", 64)
    return np.random.default_rng(0).integers(0, size, (len(_TEXTS), 12)).tolist()


class Outcome(NamedTuple):
    """logits: of all positions, [N, V] float32; routes: per probe which experts each position took, [T, any]."""

    logits: np.ndarray
    texts: list[list[int]]
    routes: list[np.ndarray]


def _run(model: Any, probes: list[list[int]], tokens: int = 0) -> Outcome:
    """Logits and routes of the probes, and greedy continuations of `tokens` tokens."""
    import torch

    from ..models.experts import chosen
    from ..models.places import places

    logits, texts, routes = [], [], []
    experts = [p.module for found in places(model, "down") for p in found if p.experts]
    for ids in probes:
        check_tokens(model, ids, [len(ids) - 1 + tokens])  # the continuation takes positions, too
    with torch.no_grad():
        for ids in probes:
            routed: list[torch.Tensor] = []
            notes = [
                m.register_forward_pre_hook(lambda m, args, r=routed: r.append(chosen(*args, experts=m)))
                for m in experts
            ]
            logits.append(model(torch.tensor([ids])).logits[0].float().numpy())
            for note in notes:
                note.remove()
            routes.append(torch.cat(routed, -1).numpy() if routed else np.zeros((len(ids), 0)))
            ids = list(ids)
            for _ in range(tokens):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            texts.append(ids)
    return Outcome(np.concatenate(logits), texts, routes)


def _whole_model(plan: Plan, baked: Checkpoint, dtype: torch.dtype, own: torch.dtype) -> BehaviourProof:
    from ..models.hooks import hooked
    from .noise import rounding_noise

    base, edit = plan.checkpoint, plan.edit
    probes, tokens = proof_texts(base), _tokens(dtype)
    model = load_model(base.path, dtype)
    with hooked(model, edit):
        reference = _run(model, probes, tokens)
        noise = 0.0 if edit.exact else last_rounding(reference.logits, dtype)
        for seed in range(0 if edit.exact else _NOISE_DRAWS):
            with rounding_noise(model, edit, own, seed):
                noise = max(noise, logit_difference(_run(model, probes), reference))
    _forbid_nonsense(model, probes, reference)
    del model
    got = _run(load_model(baked.path, dtype), probes, tokens)
    return _compared("whole model", dtype, reference, got, None if edit.exact else noise)


def _forbid_nonsense(model: Any, probes: list[list[int]], reference: Outcome) -> None:
    """Raise InputError where the hooked model gives no numbers, of the base if that gives none either."""
    import torch

    if not np.isfinite(reference.logits).all():
        check_numbers(torch.from_numpy(_run(model, probes).logits), model, "the base")
        check_numbers(torch.from_numpy(reference.logits), model, "the model with this edit")


def _whole_quantised(plan: Plan, baked: Checkpoint, dtype: torch.dtype) -> BehaviourProof:
    """The whole model, by the format's own library where it is installed, else by our reader.

    Where products are rounded, h_i errs by the unit of what is rounded: draws with the factors moved by so much give
    the noise. Activations are quantised only where all is exact: a single code of theirs that turns moves the logits by
    more than any bound.
    """
    base, reader = plan.checkpoint, library(plan.checkpoint)
    if reader is None or reader == "gguf":
        return _read_by(reader or "kbne-edit", plan, baked, dtype, _load_own)
    try:
        with foreign(base.path):
            return _read_by(reader, plan, baked, dtype, load_by_library)
    except CheckpointError:  # not every library computes in every dtype on a CPU
        return _read_by("kbne-edit", plan, baked, dtype, _load_own)


def _load_own(checkpoint: Checkpoint, dtype: torch.dtype, native: bool) -> Any:
    return load_model(checkpoint.path, dtype)


def _read_by(
    reader: str, plan: Plan, baked: Checkpoint, dtype: torch.dtype, load: Callable[..., Any]
) -> BehaviourProof:
    from ..models.hooks import hooked

    probes, tokens = proof_texts(plan.checkpoint), _tokens(dtype)
    model = load(plan.checkpoint, dtype, plan.exact)
    with hooked(model, plan.edit):
        reference = _run(model, probes, tokens)
    noise = None if plan.exact else last_rounding(reference.logits, dtype)
    for seed in range(0 if plan.exact else _NOISE_DRAWS):
        with hooked(model, moved(plan.edit, plan.targets.values(), seed)):
            noise = max(noise or 0.0, logit_difference(_run(model, probes), reference))
    del model
    got = _run(load(baked, dtype, plan.exact), probes, tokens)
    return _compared(f"whole model, read by {reader}", dtype, reference, got, noise)


def _tokens(dtype: torch.dtype) -> int:
    return _TOKENS if str(dtype) == "torch.float32" else 0


def _compared(how: str, dtype: torch.dtype, reference: Outcome, got: Outcome, noise: float | None) -> BehaviourProof:
    """noise: None where the two must be equal bit for bit."""
    difference, equal = logit_difference(got, reference), np.array_equal(got.logits, reference.logits)
    same = got.logits.argmax(1) == reference.logits.argmax(1)
    texts = [a == b for a, b in zip(reference.texts, got.texts, strict=True)]
    return BehaviourProof(
        dtype=str(dtype).removeprefix("torch."),
        how=how,
        holds=bool(equal) if noise is None else difference <= NOISE_FACTOR * noise,
        bit_equal=bool(equal),
        difference=difference,
        noise=noise or 0.0,
        positions=len(same),
        kl=kl_divergence(reference.logits, got.logits),
        top1=float(same.mean()),
        greedy=float(np.mean(texts)) if _tokens(dtype) else None,
        rerouted=1 - float(same_route(got, reference).mean()) if reference.routes[0].size else None,
    )


def logit_difference(got: Outcome, reference: Outcome) -> float:
    """Largest logit difference, relative to the logits' standard deviation.

    A router's choice is not continuous: where rounding turned it, at this position or one before, another function is
    computed, and the difference says nothing about rounding. Such positions are left out, and counted ("rerouted").
    """
    kept = same_route(got, reference)
    largest = np.abs(got.logits - reference.logits)[kept].max(initial=0)
    return float(largest / max(float(reference.logits.std()), 1e-30))


def last_rounding(logits: np.ndarray, dtype: torch.dtype) -> float:
    """Deviation of the rounding of the largest logit, relative to the logits' standard deviation.

    It is there however little an edit changes: a few small draws of noise may move no logit over a rounding step, and
    the edit one.
    """
    import torch

    step = torch.finfo(dtype).eps * 2 ** np.floor(np.log2(max(float(np.abs(logits).max()), 1e-30)))
    return float(step / 12**0.5 / max(float(logits.std()), 1e-30))


def same_route(got: Outcome, reference: Outcome) -> np.ndarray:
    """Positions up to which every router chose the same experts, [N]."""
    pairs = zip(got.routes, reference.routes, strict=True)
    return np.concatenate([np.logical_and.accumulate((a == b).all(1)) for a, b in pairs])


def kl_divergence(reference: np.ndarray, got: np.ndarray) -> float:
    """Mean KL(reference || got) over positions, in nats."""
    a, b = (x.astype(np.float64) - x.max(1, keepdims=True) for x in (reference, got))
    a, b = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (a, b))
    return float((np.exp(a) * (a - b)).sum(1).mean())


def _site_by_site(plan: Plan, baked: Checkpoint) -> BehaviourProof:
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
        x = np.random.default_rng(0).standard_normal((8, old.shape[edit.site == "gate"]), np.float32)
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


def _rows_by_rows(plan: Plan, baked: Checkpoint) -> BehaviourProof:
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
    return checkpoint.read_plain(name)[slot.start : slot.start + slot.neurons]
