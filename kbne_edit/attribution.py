"""Integrated gradients of P(a*) with respect to feed-forward neurons (method, section 2).

    score_i = h_i * integral_0^1 dP(a* | gamma h) / dh_i dgamma        for each layer alone, at the last position

Legend: Q questions, L layers, F neurons per layer, T positions, D hidden size, V vocabulary, R rows.

How a question is computed. The prompt's first T-1 tokens are run once and leave a key/value cache. After that only the
last position matters, so a (layer, node) pair is one *row*: a batch entry of one position. A row that belongs to layer
l equals the base row below l, so the batch starts empty and grows: layer l appends its nodes' rows as copies of the
base row, then scales h in them. One forward pass and one backward pass over this growing batch serve all layers.

The model's own layers and head do the computing, with the arguments that the model itself passes to them (recorded
from a pass over the last token). So masks, rotary tables, soft caps and logit scales are the model's, for every
architecture. Rejected: re-implementing the blocks (a second truth per family), and scaling rows through one call of
`model.forward` (it cannot go layer by layer, which a model larger than memory needs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .errors import InputError
from .families import Site, decoder_layers, num_neurons, site_modules

GAUSS_NODES = 4  # per interval: enough for all layers but the first, whose integrand turns sharply near gamma = 0
TOLERANCE = 0.01  # completeness residual of a layer, relative to the question's largest score
# Intervals that are dense near 0: where the first layer starts, and the first refinement of any other layer; later
# refinements halve the intervals that need it. A pass over few rows costs nearly what one over many does, so the
# layer that is known to be hard does not wait for one.
_GRADED = (0.0, 1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 4, 1.0)
_ROUNDS = 8
_MAX_ROWS = 192  # rows of one pass: bounds memory (the head makes [R, V] logits); more layers go in groups


@dataclass(frozen=True)
class Attribution:
    """One question's scores and what they cost.

    scores: [L, F] float32. p: P(a*). p_zero: P(a* | h of layer l = 0), [L]. residual: |sum_i score_i - (p - p_zero)|
    relative to the largest |score| of the question, [L]. nodes: gradient evaluations spent on each layer, [L].
    next_token: the model's distribution after the prompt, [V] float32.
    """

    scores: Tensor
    p: float
    p_zero: np.ndarray
    residual: np.ndarray
    nodes: np.ndarray
    next_token: Tensor


def attribute(
    model: nn.Module,
    input_ids: Sequence[Sequence[int]],
    answer_ids: Sequence[Sequence[int]],
    *,
    site: Site = "down",
    quadrature: str = "gauss",
    tolerance: float = TOLERANCE,
) -> Tensor:
    """Integrated-gradient scores of every neuron for every question, float32 [Q, L, F] on the CPU.

    model: causal language model of transformers; float32 weights are advised (scores inherit the model's precision).
    input_ids: Q prompts as token ids. answer_ids: Q lists with the ids of the right answer's surface forms; P(a*) is
    the sum of their probabilities. quadrature: "gauss" (Gauss-Legendre, refined per layer until the completeness
    residual is below `tolerance`), "gauss-N" (N nodes, fixed), "riemann-N" (N nodes linspace(0, 1, N), sum / N; the
    published code uses N = 20). Raises InputError for an empty prompt or answer or an unknown quadrature.
    """
    results = [result.scores for result in attributions(model, input_ids, answer_ids, site, quadrature, tolerance)]
    if not results:
        raise InputError("attribute: no questions given")
    return torch.stack(results)


def attributions(
    model: nn.Module,
    input_ids: Sequence[Sequence[int]],
    answer_ids: Sequence[Sequence[int]],
    site: Site = "down",
    quadrature: str = "gauss",
    tolerance: float = TOLERANCE,
) -> Iterator[Attribution]:
    """`attribute`, question by question as they are finished."""
    kind, _, number = quadrature.partition("-")
    if kind not in ("gauss", "riemann") or not (number.isdigit() and int(number) if number else quadrature == "gauss"):
        raise InputError(f"quadrature {quadrature!r} is unknown: use gauss, gauss-N or riemann-N")
    if len(input_ids) != len(answer_ids):
        raise InputError(f"attribute: {len(input_ids)} prompts but {len(answer_ids)} answers")
    for index, (ids, answer) in enumerate(zip(input_ids, answer_ids, strict=True)):
        if not len(ids) or not len(answer):
            raise InputError(f"attribute: {'prompt' if not len(ids) else 'answer'} of question {index} has no token")
        with _still(model):
            prompt = Prompt(model, ids, answer, site)
            yield _adaptive(prompt, tolerance) if not number else _fixed(prompt, kind, int(number))


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """No dropout and no weight gradients within the context (half of a backward pass would go into them)."""
    training, wanted = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval()
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        model.train(training)
        for parameter in wanted:
            parameter.requires_grad_(True)


def _rule(kind: str, n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1]."""
    if kind == "riemann":
        return torch.linspace(0, 1, n), torch.full((n,), 1 / n)
    x, w = np.polynomial.legendre.leggauss(n)
    return torch.tensor((x + 1) / 2, dtype=torch.float32), torch.tensor(w / 2, dtype=torch.float32)


def _fixed(prompt: Prompt, kind: str, n: int) -> Attribution:
    """The same nodes for every layer."""
    x, w = _rule(kind, n)
    zero = torch.zeros(1)
    result = prompt.rows({layer: torch.cat([zero, x]) for layer in range(len(prompt.h))})
    gradients = torch.stack([(w.to(r.gradient)[:, None] * r.gradient[1:]).sum(0) for r in result.values()])
    p_zero = np.array([r.p[0].item() for r in result.values()])
    return _finish(prompt, gradients, p_zero, np.full(len(prompt.h), n))


def _adaptive(prompt: Prompt, tolerance: float) -> Attribution:
    """Composite Gauss-Legendre on intervals that are split where completeness fails.

    Completeness holds on each interval alone: integral_a^b = P(b) - P(a). The residuals of a layer's intervals are
    added without sign, so that errors of opposite sign cannot hide each other.
    """
    layers = range(len(prompt.h))
    graded = list(zip(_GRADED, _GRADED[1:], strict=False))
    meshes = {layer: graded if layer == 0 else [(0.0, 1.0)] for layer in layers}
    first = prompt.rows({layer: _interval_nodes(mesh) for layer, mesh in meshes.items()})
    parts = {layer: _merge(prompt.h[layer], [], meshes[layer], first[layer], {1.0: prompt.p}) for layer in layers}
    nodes = np.array([GAUSS_NODES * len(meshes[layer]) for layer in layers])
    for _ in range(_ROUNDS):
        largest = max(abs(prompt.h[la] * sum(p.gradient for p in parts[la])).max().item() for la in layers)
        allowed = tolerance * max(largest, 1e-30)
        bad = [layer for layer in layers if sum(p.residual for p in parts[layer]) > allowed]
        if not bad:
            break
        todo = {layer: graded if len(parts[layer]) == 1 else _split(parts[layer], allowed) for layer in bad}
        result = prompt.rows({layer: _interval_nodes(todo[layer]) for layer in bad})
        for layer in bad:
            parts[layer] = _merge(prompt.h[layer], parts[layer], todo[layer], result[layer], {})
            nodes[layer] += GAUSS_NODES * len(todo[layer])
    gradients = torch.stack([sum(p.gradient for p in parts[layer]) for layer in layers])
    return _finish(prompt, gradients, np.array([parts[layer][0].p_start for layer in layers]), nodes)


class _Part(NamedTuple):
    """One interval's share of a layer's integral. gradient: [F]."""

    start: float
    end: float
    p_start: float
    p_end: float
    gradient: Tensor
    residual: float


def _part(h: Tensor, start: float, end: float, p_start: float, p_end: float, p: Tensor, gradient: Tensor) -> _Part:
    _, w = _rule("gauss", GAUSS_NODES)
    integral = (end - start) * (w.to(gradient)[:, None] * gradient).sum(0)
    return _Part(start, end, p_start, p_end, integral, abs((h * integral).sum().item() - (p_end - p_start)))


def _split(parts: list[_Part], allowed: float) -> list[tuple[float, float]]:
    """New intervals in place of those that are not good enough yet."""
    share = allowed / len(parts)
    bad = [part for part in parts if part.residual > share]
    return [half for a, b, *_ in bad for half in ((a, (a + b) / 2), ((a + b) / 2, b))]


def _interval_nodes(intervals: list[tuple[float, float]]) -> Tensor:
    """Each interval's start (for completeness) and its Gauss-Legendre nodes."""
    x, _ = _rule("gauss", GAUSS_NODES)
    return torch.cat([torch.cat([torch.tensor([a]), a + (b - a) * x]) for a, b in intervals])


def _merge(
    h: Tensor, old: list[_Part], intervals: list[tuple[float, float]], rows: Rows, known: dict[float, float]
) -> list[_Part]:
    """Put the new intervals in the place of the old ones that they divide. known: P at further points."""
    step = GAUSS_NODES + 1
    p_at = known | {part.end: part.p_end for part in old} | {part.start: part.p_start for part in old}
    p_at |= {a: rows.p[i * step].item() for i, (a, _) in enumerate(intervals)}
    new = [
        _part(
            h,
            a,
            b,
            p_at[a],
            p_at[b],
            rows.p[i * step + 1 : (i + 1) * step],
            rows.gradient[i * step + 1 : (i + 1) * step],
        )
        for i, (a, b) in enumerate(intervals)
    ]
    kept = [p for p in old if not any(a >= p.start and b <= p.end for a, b in intervals)]
    return sorted(kept + new, key=lambda part: part.start)


def _finish(prompt: Prompt, gradients: Tensor, p_zero: np.ndarray, nodes: np.ndarray) -> Attribution:
    scores = prompt.h * gradients
    largest = max(scores.abs().max().item(), 1e-30)
    residual = np.abs(scores.sum(1).double().cpu().numpy() - (prompt.p - p_zero)) / largest
    return Attribution(scores.cpu(), prompt.p, p_zero, residual, nodes, prompt.next_token)


class _PrefixCache(DynamicCache):
    """A key/value cache that can be frozen: then `update` returns prefix + new without keeping the new."""

    frozen = False

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if not self.frozen:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if layer is None or not layer.is_initialized:  # a prompt of one token has no prefix
            return key_states, value_states
        rows = key_states.shape[0]
        keys, values = (t.expand(rows, *t.shape[1:]) for t in (layer.keys, layer.values))
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


def _first(output):
    """A layer's hidden states; some architectures wrap them in a tuple."""
    return output[0] if isinstance(output, tuple) else output


class Rows(NamedTuple):
    """What one layer's rows gave. p: P(a* | gamma h), [n]; gradient: dP/dh, [n, F]."""

    p: Tensor
    gradient: Tensor


class Prompt:
    """One prompt with its prefix computed: evaluates rows of any layers and nodes.

    h: the site's values at the last position, [L, F] float32; p: P(a* | h); next_token: the whole distribution, [V].
    """

    def __init__(self, model: nn.Module, input_ids: Sequence[int], answer_ids: Sequence[int], site: Site):
        self._model, self._site = model, site
        self._layers, self._modules = decoder_layers(model), site_modules(model, site)
        self._neurons = num_neurons(model)
        device = model.get_input_embeddings().weight.device
        self._answer = torch.tensor(list(answer_ids), device=device)
        ids = torch.tensor([list(input_ids)], device=device)
        self._last = ids[:, -1:]
        self._cache = _PrefixCache(config=model.config)
        with torch.no_grad():
            if ids.shape[1] > 1:
                self._forward(ids[:, :-1], use_cache=True, logits_to_keep=1)
            self._cache.frozen = True
            with _recorded(self._layers) as self._calls, _tapped(self._modules, self._tap) as taps:
                logits = self._forward(self._last).logits
        self.h = torch.stack([tap.reshape(-1)[: self._neurons].float() for tap in taps])
        self.p = self._probability(logits).item()
        self.next_token = logits[0, -1].float().softmax(-1)

    def _forward(self, ids: Tensor, **kwargs):
        name = "cache" if "cache" in signature(self._model.forward).parameters else "past_key_values"
        return self._model(input_ids=ids, **{name: self._cache}, **{"use_cache": True, **kwargs})

    def _tap(self, module: nn.Module, hook: Callable[[Tensor], Tensor | None]):
        """Register `hook` on the tensor that holds the site's neurons."""
        if self._site == "down":
            return module.register_forward_pre_hook(
                lambda _, args: None if (new := hook(args[0])) is None else (new, *args[1:])
            )
        return module.register_forward_hook(lambda _, args, output: hook(output))

    def _probability(self, logits: Tensor) -> Tensor:
        """P(a*), summed over the answer's tokens. logits: [R, 1, V] -> [R] float32."""
        logits = logits[:, -1].float()
        return torch.exp(torch.logsumexp(logits[:, self._answer], -1) - torch.logsumexp(logits, -1))

    def rows(self, nodes: dict[int, Tensor]) -> dict[int, Rows]:
        """P and its gradient with h of one layer scaled by gamma, for {layer: gammas [n]}."""
        result, group = {}, {}
        for layer, gammas in sorted(nodes.items()):
            if group and sum(map(len, group.values())) + len(gammas) > _MAX_ROWS:
                result |= self._batch(group)
                group = {}
            group[layer] = gammas
        return result | self._batch(group)

    def _batch(self, nodes: dict[int, Tensor]) -> dict[int, Rows]:
        """One forward and one backward pass over a batch that grows with depth."""
        leaves: dict[int, Tensor] = {}
        with torch.enable_grad():
            hidden = None
            for layer in range(min(nodes), len(self._layers)):
                hidden = self._advance(hidden, layer, nodes.get(layer), leaves)
            p = self._probability(self._head(hidden))
            gradients = torch.autograd.grad(p.sum(), list(leaves.values()))
        counts = [len(gammas) for _, gammas in sorted(nodes.items())]
        result = {}
        for layer, part, gradient in zip(leaves, p.detach().split(counts), gradients, strict=True):
            flat = gradient.reshape(gradient.shape[0], -1)[:, : self._neurons]
            result[layer] = Rows(part, flat.float())
        return result

    def _advance(self, hidden: Tensor | None, layer: int, gammas: Tensor | None, leaves: dict[int, Tensor]) -> Tensor:
        """Run the rows through one layer; with gammas, append that layer's own rows first."""
        base, args, kwargs, _ = self._calls[layer]
        if gammas is None:
            return _first(self._layers[layer](hidden, *args, **kwargs))
        own = base.expand(len(gammas), -1, -1)
        start = 0 if hidden is None else hidden.shape[0]
        hidden = own if hidden is None else torch.cat([hidden, own])

        def scale(h: Tensor) -> Tensor:
            factor = gammas.to(h).view(-1, *[1] * (h.dim() - 1))
            tail = h[start:].detach()
            if tail.shape[-1] > self._neurons:  # fused gate_up: only the gate half is scaled
                factor = torch.cat(
                    [factor.expand_as(tail[..., : self._neurons]), torch.ones_like(tail[..., self._neurons :])], -1
                )
            leaves[layer] = (factor * tail).requires_grad_()
            return torch.cat([h[:start], leaves[layer]])

        handle = self._tap(self._modules[layer], scale)
        try:
            return _first(self._layers[layer](hidden, *args, **kwargs))
        finally:
            handle.remove()

    def _head(self, hidden: Tensor) -> Tensor:
        """Everything after the last layer, by the model's own code: [R, 1, D] -> logits [R, 1, V]."""
        wrapped = self._calls[-1].wrapped
        with _replaced(self._layers, lambda *args, **kwargs: (hidden,) if wrapped else hidden):
            return self._forward(self._last.expand(hidden.shape[0], -1)).logits


class _Call(NamedTuple):
    hidden: Tensor
    args: tuple
    kwargs: dict
    wrapped: bool


@contextmanager
def _recorded(layers: nn.ModuleList) -> Iterator[list[_Call]]:
    """Record how the model calls each of its layers."""
    calls: list[_Call] = []

    def hook(module, args, kwargs, output):
        if not args:
            kwargs = dict(kwargs)
            args = (kwargs.pop("hidden_states"),)
        calls.append(_Call(args[0], args[1:], kwargs, isinstance(output, tuple)))

    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _tapped(modules: list[nn.Module], tap: Callable) -> Iterator[list[Tensor]]:
    """Record the site's tensor of each module."""
    taps: list[Tensor] = []
    handles = [tap(module, taps.append) for module in modules]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _replaced(layers: nn.ModuleList, forward: Callable) -> Iterator[None]:
    """Every layer answers with `forward` instead of its own."""
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
