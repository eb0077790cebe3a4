"""Attribution where rows cannot be packed: the whole prompt for every node, a layer's nodes as batch entries.

In a recurrent layer no mask keeps two rows apart. So each question runs by itself: once unscaled, and once for each
layer with a batch entry per node. That costs a pass over all layers for each layer, many times the cost of packed rows.

A block that the model uses several times (Zamba's) is scaled in all uses, and a neuron's score is the sum over them.
Below, N positions then stand for N positions of each use, one use after the other. The path of each use ends at the h
that this use has in the unscaled prompt, whatever the scaled earlier uses would make of it.

Legend: L layers, F neurons of a layer, N last positions that are scaled, T tokens of the prompt, n nodes, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..families import Site
from ..models.bounds import check_numbers
from ..models.hooks import Tap, tapped
from ..models.places import num_neurons, places
from .quadrature import Adaptive, Fixed, NodeValues


@dataclass(frozen=True)
class Question:
    """One question for one model. ids: the prompt, T tokens; answer, others: tokens of the right and the wrong answers.

    others: None attributes P(answer), else the log-odds. positions: N.
    """

    model: Any  # of transformers
    site: Site
    ids: Sequence[int]
    answer: Sequence[int]
    others: Sequence[int] | None = None
    positions: int = 1


@dataclass(frozen=True)
class Bare:
    """The unscaled prompt. h, gradient: [L, N, F] float32; value: the objective; next_token: [V]."""

    h: Tensor
    gradient: Tensor
    value: float
    next_token: Tensor


def integrate(question: Question, rule: Fixed | Adaptive) -> Bare:
    """Evaluate nodes until the rule requests no more."""
    bare = _bare(question)
    while request := rule.request():
        results = {layer: _nodes(question, layer, gammas, bare) for layer, gammas in request.items()}
        rule.accept(bare.h.flatten(1), bare.gradient.flatten(1), bare.value, results)
    return bare


def _bare(question: Question) -> Bare:
    layers, size = places(question.model, question.site), num_neurons(question.model)
    shape = (len(layers), question.positions * uses(question.model, question.site), size)
    h, shifts = torch.zeros(shape), [torch.zeros(1, *shape[1:], requires_grad=True) for _ in layers]
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(tapped(layer, question.site, _tap(None, shifts[index], question, h[index])))
        logits = _logits(question, 1)
        check_numbers(logits, question.model, "the base")
        value = _value(question, logits)
        # Within the taps: a model that is read layer by layer computes its layers again on the way back.
        gradients = torch.autograd.grad(value.sum(), shifts, allow_unused=True)
    gradient = torch.cat([torch.zeros(1, *shape[1:]) if g is None else g for g in gradients])
    return Bare(h, gradient, float(value.detach()), logits[0].detach().softmax(-1).cpu())


def _nodes(question: Question, layer: int, gammas: Tensor, bare: Bare) -> NodeValues:
    """The objective with one layer's h scaled by each gamma, [n]; every node is a batch entry."""
    count = question.positions * uses(question.model, question.site)
    shift = torch.zeros(len(gammas), count, num_neurons(question.model), requires_grad=True)
    blocks = places(question.model, question.site)[layer]
    if not blocks:  # a layer without a feed-forward block
        return NodeValues(shift.detach().flatten(1), torch.full((len(gammas),), bare.value))
    with tapped(blocks, question.site, _tap(gammas, shift, question, bare.h[layer])):
        value = _value(question, _logits(question, len(gammas)))
        (gradient,) = torch.autograd.grad(value.sum(), [shift], allow_unused=True)
    gradient = torch.zeros_like(shift) if gradient is None else gradient
    return NodeValues(gradient.flatten(1), value.detach())


def uses(model: Any, site: Site) -> int:
    """The largest number of times that the model uses one feed-forward block."""
    counts = [Counter(place.offset for place in layer) for layer in places(model, site)]
    return max(count for layer in counts for count in layer.values())


def _tap(gammas: Tensor | None, shift: Tensor, question: Question, h: Tensor) -> Tap:
    """Replaces h by gamma h + shift at the last N positions. shift: zeros [n, N, F], whose gradient is that of gamma h.

    gammas: [n]. None, for a single entry: leaves h unscaled and stores it in `h`, [N, F].
    """
    last, length = question.positions, len(question.ids)
    used: Counter[int] = Counter()  # how many uses each slice of neurons has had
    times = len(h) // last  # uses of a block: the backward pass may compute a layer again

    def tap(values: Tensor, tokens: Tensor | None, offset: int) -> Tensor:
        flat = values.reshape(-1, values.shape[-1])
        where = torch.arange(len(flat)) if tokens is None else tokens.cpu()
        entry, position = where // length, where % length - (length - last)
        rows = (position >= 0).nonzero()[:, 0]
        entry, position = entry[rows], position[rows] + last * (used[offset] % times)
        used[offset] += 1
        part = slice(offset, offset + values.shape[-1])
        if gammas is None:
            chosen = flat[rows.to(flat.device)]
            h[position, part] = chosen.detach().float().cpu()
            moved = chosen.float().cpu()
        else:
            moved = h[position, part] * gammas[entry, None]
        moved = (moved + shift[entry, position, part]).to(flat)
        return flat.index_copy(0, rows.to(flat.device), moved).view_as(values)

    return tap


def _logits(question: Question, count: int) -> Tensor:
    """Logits [count, V] float32 after the prompt, with `count` copies of it as batch entries."""
    device = question.model.get_input_embeddings().weight.device
    ids = torch.tensor([list(question.ids)] * count, device=device)
    with torch.enable_grad():
        return question.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()


def _value(question: Question, logits: Tensor) -> Tensor:
    """The objective, [n]. logits: [n, V]."""
    answer = logits[:, list(question.answer)].logsumexp(-1)
    if question.others is not None:
        return (answer - logits[:, list(question.others)].logsumexp(-1)).cpu()
    return (answer - logits.logsumexp(-1)).exp().cpu()
