"""Integrated gradients of P(a*) with respect to feed-forward neurons (method, section 2).

    score_i = h_i * integral_0^1 dP(a* | gamma h) / dh_i dgamma        for each layer alone, at the last position

Legend: Q questions, L layers, F neurons per layer, T positions, D hidden size, V vocabulary, R rows.

Questions go up and down the layers together or one by one (`rows`), for the nodes that their quadrature asks for
(`quadrature`). A model in memory takes them one by one and keeps each layer's graph; a model larger than memory
(`streaming`) takes as many together as the budget holds, so that its weights are read twice for all of them. The
beginning that all prompts share is computed once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os.path import commonprefix
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .errors import InputError
from .families import Site, decoder_layers
from .progress import say
from .quadrature import Adaptive, Fixed, Found, Nodes, quadrature
from .rows import Prompt, Rows, Segment

TOLERANCE = 0.01  # completeness residual of a layer, relative to the question's largest score


@dataclass(frozen=True)
class Attribution:
    """One question's scores and what they cost.

    scores: [L, F] float32. p: P(a*). p_zero: what is attributed, with h of layer l = 0, [L]. residual: |sum_i score_i -
    (value - p_zero)| relative to the largest |score| of the question, [L], where value is what is attributed. nodes:
    gradient evaluations spent on each layer, [L]. next_token: the model's distribution after the prompt, [V] float32.
    """

    scores: Tensor
    p: float
    p_zero: np.ndarray
    residual: np.ndarray
    nodes: np.ndarray
    next_token: Tensor


class Layers(Protocol):
    """Who supplies a model's layers. model: everything else is resident; keep: the layers are, too.

    up, down: yield (index, layer) in order, each layer ready to compute until the next one is asked for.
    group: how many of the prompts, of these lengths, may be on their way at once; shared: tokens that all of them begin
    with; nodes: gradient evaluations of each layer.
    """

    model: nn.Module
    keep: bool
    max_rows: float

    def up(self) -> Iterable[tuple[int, nn.Module]]: ...
    def down(self) -> Iterable[tuple[int, nn.Module]]: ...
    def group(self, lengths: Sequence[int], shared: int, nodes: Sequence[int]) -> int: ...


class Resident:
    """A model that is in memory (or spread over devices by a dispatcher)."""

    keep = True

    def __init__(self, model: nn.Module):
        self.model, self.max_rows = model, float("inf")

    def up(self):
        return enumerate(decoder_layers(self.model))

    def down(self):
        return reversed(list(enumerate(decoder_layers(self.model))))

    def group(self, lengths, shared, nodes):
        return 1


def attribute(
    model: nn.Module,
    input_ids: Sequence[Sequence[int]],
    answer_ids: Sequence[Sequence[int]],
    *,
    site: Site = "down",
    quadrature: str = "gauss",
    tolerance: float = TOLERANCE,
    other_ids: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Integrated-gradient scores of every neuron for every question, float32 [Q, L, F] on the CPU.

    model: causal language model of transformers; float32 weights are advised (scores inherit the model's precision).
    input_ids: Q prompts as token ids. answer_ids: Q lists with the ids of the right answer's surface forms; P(a*) is
    the sum of their probabilities. quadrature: "gauss" (Gauss-Legendre, refined per layer until the completeness
    residual is below `tolerance`), "gauss-N" (N nodes, fixed), "riemann-N" (N nodes linspace(0, 1, N), sum / N; the
    published code uses N = 20). other_ids: Q lists with the ids of the wrong answers' surface forms; with them not
    P(a*) is attributed but the log-odds log P(a*) / P(others), which do not saturate. Raises InputError for an empty
    prompt or answer or an unknown quadrature.
    """
    found = attributions(model, input_ids, answer_ids, site, quadrature, tolerance, other_ids=other_ids)
    results = [result.scores for result in found]
    if not results:
        raise InputError("attribute: no questions given")
    return torch.stack(results)


def attributions(
    layers: Layers | nn.Module,
    input_ids: Sequence[Sequence[int]],
    answer_ids: Sequence[Sequence[int]],
    site: Site = "down",
    quadrature: str = "gauss",
    tolerance: float = TOLERANCE,
    only: Sequence[int] | None = None,
    other_ids: Sequence[Sequence[int]] | None = None,
) -> Iterator[Attribution]:
    """`attribute`, question by question as they are finished.

    layers: a model in memory, or who supplies its layers. only: indices of the questions to compute, in this order;
    all the others still have their say in what counts as the common beginning, so that a question's scores have the
    same bytes whichever others are computed beside it.
    """
    layers = Resident(layers) if isinstance(layers, nn.Module) else layers
    count = len(decoder_layers(layers.model))
    first = _quadrature(quadrature, count, tolerance).request()
    if len(input_ids) != len(answer_ids):
        raise InputError(f"attribute: {len(input_ids)} prompts but {len(answer_ids)} answers")
    for index, (ids, answer) in enumerate(zip(input_ids, answer_ids, strict=True)):
        if not len(ids) or not len(answer):
            raise InputError(f"attribute: {'prompt' if not len(ids) else 'answer'} of question {index} has no token")
    nodes = [len(first[layer].values) for layer in range(count)]
    todo = list(range(len(input_ids)) if only is None else only)
    with _still(layers.model):
        trunk = _trunk(layers.model, input_ids)
        fresh = trunk
        while todo:
            fit = layers.group([len(input_ids[q]) for q in todo], trunk.length if trunk else 0, nodes)
            group, todo = todo[:fit], todo[fit:]
            others = [other_ids[q] if other_ids else None for q in group]
            prompts = [
                Prompt(layers.model, input_ids[q], answer_ids[q], site, trunk, other)
                for q, other in zip(group, others, strict=True)
            ]
            rules = [_quadrature(quadrature, count, tolerance) for _ in group]
            yield from _group(layers, fresh, prompts, rules)
            fresh = None


_quadrature = quadrature  # the functions above have a parameter of that name


def _trunk(model: nn.Module, input_ids: Sequence[Sequence[int]]) -> Segment | None:
    """The beginning that all prompts share; each keeps at least its last token for itself."""
    shared = len(commonprefix([tuple(ids) for ids in input_ids]))
    shared = min(shared, *(len(ids) - 1 for ids in input_ids)) if len(input_ids) > 1 else 0
    return Segment(model, input_ids[0][:shared]) if shared else None


def _group(
    layers: Layers, trunk: Segment | None, prompts: list[Prompt], rules: list[Fixed | Adaptive]
) -> Iterator[Attribution]:
    """Prompts that go up and down together, until every quadrature is content. trunk: if it has not climbed yet."""
    climbing = [*([trunk] if trunk else []), *prompts]
    while requests := {q: request for q, rule in enumerate(rules) if (request := rule.request())}:
        found = _answer(layers, climbing, [(prompts[q], nodes) for q, nodes in requests.items()])
        climbing = []
        for q, answer in zip(requests, found, strict=True):
            rules[q].accept(prompts[q].h, prompts[q].value, answer)
    for prompt, rule in zip(prompts, rules, strict=True):
        yield _finish(prompt, rule)


Wanted = list[tuple[Prompt, dict[int, Nodes]]]


def _answer(layers: Layers, climbing: list[Segment], wanted: Wanted) -> list[dict[int, Found]]:
    """`sweep`, with half as many rows at once wherever a device runs out of memory."""
    rows = sum(nodes.count for _, request in wanted for nodes in request.values())
    divisible = any(len(request) > 1 for _, request in wanted)
    if rows <= layers.max_rows or not divisible:
        try:
            return sweep(layers, climbing, wanted)
        except torch.OutOfMemoryError:
            if not divisible:
                raise InputError("out of memory with the rows of one layer: use --device cpu or --memory") from None
        layers.max_rows = rows // 2
        say(f"out of memory with {rows} rows: going on with {layers.max_rows} at once")
    first, second = _halves(wanted)
    lower = _answer(layers, climbing, first)
    upper = _answer(layers, [], second)
    return [a | b for a, b in zip(lower, upper, strict=True)]


def _halves(wanted: Wanted) -> tuple[Wanted, Wanted]:
    """Each prompt's layers, cut in two."""
    cut = [(prompt, sorted(request.items())) for prompt, request in wanted]
    first = [(prompt, dict(items[: (len(items) + 1) // 2])) for prompt, items in cut]
    return first, [(prompt, dict(items[(len(items) + 1) // 2 :])) for prompt, items in cut]


def sweep(layers: Layers, climbing: list[Segment], wanted: Wanted) -> list[dict[int, Found]]:
    """One way up and one way down for these rows; prompts that have not climbed yet go ahead of their rows."""
    rows = [Rows(prompt, nodes, layers.keep) for prompt, nodes in wanted if nodes]
    for index, layer in layers.up():
        for traveller in climbing:
            traveller.climb(index, layer)
        for batch in rows:
            batch.up(index, layer)
    for traveller in climbing:
        traveller.arrive()
    for batch in rows:
        batch.head()
    for index, layer in layers.down():
        for batch in rows:
            batch.down(index, layer)
    done = iter(rows)
    return [next(done).found if nodes else {} for _, nodes in wanted]


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


def _finish(prompt: Prompt, rule: Fixed | Adaptive) -> Attribution:
    scores = prompt.h * rule.gradients
    largest = max(scores.abs().max().item(), 1e-30)
    residual = np.abs(scores.sum(1).double().numpy() - (prompt.value - rule.p_zero)) / largest
    return Attribution(scores, prompt.p, rule.p_zero, residual, rule.nodes, prompt.next_token)
