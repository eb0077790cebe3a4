"""Integrated gradients of P(a*) with respect to feed-forward neurons (arXiv:2601.21864; docs/method.md, section 2).

    score_i = h_i * integral_0^1 dP(a* | gamma h) / dh_i dgamma        each layer separately, at the last position

With the last N positions instead, gamma scales h at all of them, and the score is the sum over them.

Legend: Q questions, L layers, F neurons per layer, T positions, D hidden size, V vocabulary, R rows.

Questions pass through the layers forward and backward in packs (`rows`), for the nodes that their quadrature requests
(`quadrature`). A model in memory processes one pack at a time and keeps each layer's graph. A model larger than memory
(`streamed`) processes as many packs together as the budget holds, and reads its weights twice for all of them. The
prefix that all prompts share is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from os.path import commonprefix
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models.masks import longest
from ..models.memory import GRAPHS, ROWS
from ..models.places import decoder_layers, is_recurrent, post_norm
from ..progress import say
from .names import TOLERANCE, Integral
from .quadrature import Adaptive, Fixed, NodeValues, Path, quadrature
from .rows import Pack, Rows, Segment, TokenPrompts, shared_prefix
from .whole import Question, integrate, uses


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
    """Supplies a model's layers one after the other.

    model: the model; everything but the layers is in memory. graphs: bytes that the layers' graphs may take between the
    forward and the backward pass; other layers are computed again. max_rows: how many rows may run at once.
    forward, backward: yield (index, layer) in order; a layer is ready to compute until the next one is requested.
    group: how many of the packs may run at once; packs: numbers of their questions' tokens; rows, bare: tokens of each
    question's rows, by layer, and of its unscaled row.
    """

    model: nn.Module
    graphs: float
    max_rows: float

    def forward(self) -> Iterable[tuple[int, nn.Module]]: ...
    def backward(self) -> Iterable[tuple[int, nn.Module]]: ...
    def group(self, packs: Sequence[Sequence[int]], rows: Sequence[int], bare: int) -> int: ...


class Resident:
    """Supplies the layers of a model in memory (possibly dispatched over devices). graphs: as of `Layers`."""

    def __init__(self, model: nn.Module, graphs: float = GRAPHS):
        self.max_rows: float
        self.model, self.graphs, self.max_rows = model, graphs, ROWS

    def forward(self) -> Iterable[tuple[int, nn.Module]]:
        return enumerate(decoder_layers(self.model))

    def backward(self) -> Iterable[tuple[int, nn.Module]]:
        return reversed(list(enumerate(decoder_layers(self.model))))

    def group(self, packs: Sequence[Sequence[int]], rows: Sequence[int], bare: int) -> int:
        return 1


def attribute(
    model: nn.Module,
    input_ids: Sequence[Sequence[int]],
    answer_ids: Sequence[Sequence[int]],
    integral: Integral | None = None,
) -> Tensor:
    """Integrated-gradient scores of every neuron for every question, float32 [Q, L, F] on the CPU.

    model: a causal language model of transformers; use float32 weights (scores inherit the model's precision).
    input_ids: Q prompts as token ids. answer_ids: Q lists with the ids of the right answer's surface forms; P(a*) is
    the sum of their probabilities. integral: what is integrated, where, and how. Raises InputError for an empty
    answer, a prompt shorter than the positions to scale or an unknown quadrature.
    """
    results = [result.scores for result in attributions(model, input_ids, answer_ids, integral)]
    if not results:
        raise InputError("attribute: no questions given")
    return torch.stack(results)


def attributions(
    layers: Layers | Any,
    input_ids: Sequence[Sequence[int]],
    answer_ids: Sequence[Sequence[int]],
    integral: Integral | None = None,
    *,
    only: Sequence[int] | None = None,
    on_next_token: Callable[[Tensor], None] | None = None,
) -> Iterator[Attribution]:
    """`attribute`, yielding each question when it is finished.

    layers: a model in memory, or its `Layers`. only: indices of the questions to yield, in this order. The other
    questions of their packs are computed as well, and all questions determine the shared prefix, so a question's
    scores have the same bytes whichever others are yielded. on_next_token: called with the next-token distribution
    [n, V] of n prompts as soon as it is known, before any gradient.
    """
    layers = Resident(layers) if isinstance(layers, nn.Module) else layers
    integral = integral or Integral()
    site, positions, other_ids = integral.site, integral.positions, integral.other_ids
    _check(input_ids, answer_ids, positions)
    prompts = TokenPrompts(input_ids, answer_ids, other_ids, positions)
    wanted = range(len(input_ids)) if only is None else only
    if is_recurrent(layers.model):
        questions: Any = (
            Question(layers.model, site, input_ids[q], answer_ids[q], other_ids[q] if other_ids else None, positions)
            for q in wanted
        )
        count = positions * uses(layers.model, site)
        rule = partial(_rule, integral.quadrature, layers.model, integral.tolerance, count)
        yield from _unpacked(layers, questions, rule, on_next_token)
        return
    every = packs(layers.model, input_ids, integral.quadrature, positions)
    todo = [pack for pack in every if not set(pack).isdisjoint(wanted)]
    rule = partial(_rule, integral.quadrature, layers.model, integral.tolerance, positions)
    rows = [positions * len(gammas) for gammas in rule().request().values()]
    shared = _shared(input_ids, positions)
    with _frozen(layers.model):
        prefix = fresh = shared_prefix(layers.model, input_ids[0][:shared]) if shared and todo else None
        while todo:
            fit = layers.group([[len(input_ids[q]) - shared for q in pack] for pack in todo], rows, positions)
            group, todo = todo[:fit], todo[fit:]
            running = [Pack(layers.model, prompts.of(pack), site, prefix) for pack in group]
            rules = [[rule() for _ in pack] for pack in group]
            _integrate(layers, fresh, running, rules, on_next_token)
            for pack, questions, of_pack in zip(group, running, rules, strict=True):
                for slot, (q, done) in enumerate(zip(pack, of_pack, strict=True)):
                    if q in wanted:
                        yield _finish(questions, slot, done)
            fresh = None


def _unpacked(
    layers: Layers,
    questions: Iterable[Question],
    rule: Callable[[], Fixed | Adaptive],
    on_next_token: Callable[[Tensor], None] | None,
) -> Iterator[Attribution]:
    """Question by question, for a model whose rows cannot be packed."""
    with _frozen(layers.model):
        for question in questions:
            quadrature = rule()
            bare = integrate(question, quadrature)
            if on_next_token:
                on_next_token(bare.next_token[None])
            p = float(bare.next_token[list(question.answer)].sum())
            yield _attribution(bare.h, bare.value, p, bare.next_token, quadrature)


def packs(
    model: nn.Module, input_ids: Sequence[Sequence[int]], quadrature: str = "gauss", positions: int = 1
) -> list[range]:
    """Which questions run side by side. Depends on the model and all questions, not on those to yield."""
    rows = positions * sum(map(len, _rule(quadrature, model, TOLERANCE, positions).request().values()))
    shared, most, result = _shared(input_ids, positions), longest(model), []
    start, tokens = 0, 0
    for q, ids in enumerate(input_ids):
        more = q + 1 - start
        tokens += len(ids) - shared
        if q > start and (more * rows > ROWS or shared + tokens + more * rows > most):
            result.append(range(start, q))
            start, tokens = q, len(ids) - shared
    return [*result, range(start, len(input_ids))] if len(input_ids) else result


def _rule(name: str, model: nn.Module, tolerance: float, positions: int) -> Fixed | Adaptive:
    return quadrature(name, len(decoder_layers(model)), tolerance, positions)


def _check(input_ids: Sequence[Sequence[int]], answer_ids: Sequence[Sequence[int]], positions: int) -> None:
    if len(input_ids) != len(answer_ids):
        raise InputError(f"attribute: {len(input_ids)} prompts but {len(answer_ids)} answers")
    for index, (ids, answer) in enumerate(zip(input_ids, answer_ids, strict=True)):
        if not len(ids) or not len(answer):
            raise InputError(f"attribute: {'prompt' if not len(ids) else 'answer'} of question {index} has no token")
        if not 1 <= positions <= len(ids):
            raise InputError(
                f"attribute: {positions} positions are to be scaled, and question {index} has {len(ids)} tokens"
            )


def _shared(input_ids: Sequence[Sequence[int]], positions: int) -> int:
    """The length of the prefix that all prompts share. The scaled positions are never part of it."""
    shared = len(commonprefix([tuple(ids) for ids in input_ids]))
    return min(shared, *(len(ids) - positions for ids in input_ids)) if len(input_ids) > 1 else 0


def _integrate(
    layers: Layers,
    prefix: Segment | None,
    running: list[Pack],
    rules: list[list[Fixed | Adaptive]],
    on_next_token: Callable[[Tensor], None] | None,
) -> None:
    """Run the running together, forward and backward, until no quadrature requests another node.

    prefix: the shared prefix, None if it was computed before.
    """
    for pack in running:
        pack.on_next_token = on_next_token
    segments = [*([prefix] if prefix else []), *running]
    bare = True
    of_pack: Any  # rules, later results
    refined = isinstance(rules[0][0], Adaptive)
    if refined and post_norm(layers.model):
        # The nodes depend on where the norm saturates, which only a forward pass of the prompts shows.
        sweep(layers, segments, [], bare=False)
        segments = []
        for pack, of_pack in zip(running, rules, strict=True):
            for q, rule in enumerate(of_pack):
                rule.paths = [Path(turn) for turn in pack.turns[:, q].tolist()]
    while True:
        requests = [[rule.request() for rule in of_pack] for of_pack in rules]
        active = [p for p, of_pack in enumerate(requests) if any(of_pack)]
        if not active:
            return
        results = _evaluate(layers, segments, [(running[p], requests[p]) for p in active], bare)
        segments, bare = [], False
        for p, of_pack in zip(active, results, strict=True):
            for q, result in enumerate(of_pack):
                if requests[p][q]:
                    h, at_one = (values[:, q].flatten(1) for values in (running[p].h, running[p].gradient))
                    rules[p][q].accept(h, at_one, running[p].value[q], result)


Wanted = list[tuple[Pack, list[dict[int, Tensor]]]]


def _evaluate(layers: Layers, segments: list[Segment], wanted: Wanted, bare: bool) -> list[list[dict[int, NodeValues]]]:
    """`sweep`, with half as many rows at once if a device runs out of memory or the mask would be too large."""
    sizes = [
        pack.positions * sum(len(gammas) for request in of_pack for gammas in request.values())
        for pack, of_pack in wanted
    ]
    free = min(
        longest(layers.model) - len(pack.context.ids) - pack.count * pack.positions - size
        for (pack, _), size in zip(wanted, sizes, strict=True)
    )
    divisible = any(len(request) > 1 for _, of_pack in wanted for request in of_pack)
    if not divisible and free < 0:
        most = longest(layers.model)
        raise InputError(f"a prompt is too long: with its rows it must fit into {most} tokens: shorten it")
    if (sum(sizes) <= layers.max_rows and free >= 0) or not divisible:
        try:
            return sweep(layers, segments, wanted, bare)
        except torch.OutOfMemoryError:
            if not divisible:
                raise InputError("out of memory with the rows of one layer: use --device cpu or --memory") from None
        layers.max_rows = sum(sizes) // 2
        say(f"out of memory with {sum(sizes)} rows: continuing with {layers.max_rows} at once")
    first, second = _halves(wanted)
    lower = _evaluate(layers, segments, first, bare)
    upper = _evaluate(layers, [], second, False)
    return [[a | b for a, b in zip(*pair, strict=True)] for pair in zip(lower, upper, strict=True)]


def _halves(wanted: Wanted) -> tuple[Wanted, Wanted]:
    """Each question's layers, split in two."""
    first, second = [], []
    for pack, of_pack in wanted:
        split = [(sorted(request.items()), (len(request) + 1) // 2) for request in of_pack]
        first.append((pack, [dict(items[:middle]) for items, middle in split]))
        second.append((pack, [dict(items[middle:]) for items, middle in split]))
    return first, second


def sweep(layers: Layers, segments: list[Segment], wanted: Wanted, bare: bool) -> list[list[dict[int, NodeValues]]]:
    """One forward and one backward pass for these rows.

    segments: those without hidden states yet; in each layer they run before the rows. bare: as of `Rows`.
    """
    rows = [Rows(pack, request, layers.graphs, bare) if bare or any(request) else None for pack, request in wanted]
    active = [batch for batch in rows if batch]
    for index, layer in layers.forward():
        for segment in segments:
            segment.forward(index, layer)
        for batch in active:
            batch.forward(index, layer)
    for segment in segments:
        segment.finish()
    for batch in active:
        batch.head()
    for index, layer in layers.backward():
        for batch in active:
            batch.backward(index, layer)
    return [
        batch.results() if batch else [{} for _ in of_pack] for batch, (_, of_pack) in zip(rows, wanted, strict=True)
    ]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No dropout and no weight gradients within the context (weight gradients would take half of a backward pass)."""
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


def _finish(pack: Pack, slot: int, rule: Fixed | Adaptive) -> Attribution:
    return _attribution(pack.h[:, slot], pack.value[slot], pack.p[slot], pack.next_token[slot], rule)


def _attribution(h: Tensor, value: float, p: float, next_token: Tensor, rule: Fixed | Adaptive) -> Attribution:
    """One question's attribution by a finished quadrature. h: [L, N, F]; value: what is attributed, at gamma = 1."""
    scores = (h * rule.gradients.view_as(h)).sum(1)
    largest = max(scores.abs().max().item(), 1e-30)
    residual = np.abs(scores.sum(1).double().numpy() - (value - rule.p_zero)) / largest
    return Attribution(scores, p, rule.p_zero, residual, rule.nodes, next_token)
