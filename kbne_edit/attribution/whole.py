"""Attribution where rows cannot be packed: the whole prompt for every node, the nodes of a layer as batch entries.

In a layer that hands a state from token to token no mask keeps two rows apart. So each question runs by itself: once
as it is, and once for each layer with as many batch entries as the quadrature asks for nodes. That costs a pass over
all layers for each layer, many times what packed rows cost.

A block that a model runs through several times (Zamba's) is scaled in all of its uses, and a neuron's score is the sum
over them: what is said of N positions below holds for N positions of each use, one use after the other. The path leads
from 0 to what h is in the prompt at each use, whatever the earlier uses would make of it.

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
from .quadrature import Adaptive, Fixed, Found


@dataclass(frozen=True)
class Question:
    """What is asked of a model. ids: the prompt, T tokens; answer, others: tokens of the right and the wrong answers.

    others: None attributes P(answer), else the log-odds of both. positions: N.
    """

    model: Any  # of transformers
    site: Site
    ids: Sequence[int]
    answer: Sequence[int]
    others: Sequence[int] | None = None
    positions: int = 1


@dataclass(frozen=True)
class Bare:
    """The prompt as it is. h, gradient: [L, N, F] float32; value: what is attributed; next_token: [V]."""

    h: Tensor
    gradient: Tensor
    value: float
    next_token: Tensor


def settle(question: Question, rule: Fixed | Adaptive) -> Bare:
    """Evaluate the nodes that the rule requests until it requests no more."""
    bare = _bare(question)
    while request := rule.request():
        found = {layer: _nodes(question, layer, gammas, bare) for layer, gammas in request.items()}
        rule.accept(bare.h.flatten(1), bare.gradient.flatten(1), bare.value, found)
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
    gradients = torch.autograd.grad(value.sum(), shifts, allow_unused=True)
    found = [torch.zeros(1, *shape[1:]) if gradient is None else gradient for gradient in gradients]
    return Bare(h, torch.cat(found), float(value.detach()), logits[0].detach().softmax(-1).cpu())


def _nodes(question: Question, layer: int, gammas: Tensor, bare: Bare) -> Found:
    """One layer's h scaled by each gamma, [n], every node a batch entry."""
    count = question.positions * uses(question.model, question.site)
    shift = torch.zeros(len(gammas), count, num_neurons(question.model), requires_grad=True)
    own = places(question.model, question.site)[layer]
    if not own:  # a layer without a feed-forward block
        return Found(shift.detach().flatten(1), torch.full((len(gammas),), bare.value))
    with tapped(own, question.site, _tap(gammas, shift, question, bare.h[layer])):
        value = _value(question, _logits(question, len(gammas)))
    (gradient,) = torch.autograd.grad(value.sum(), [shift], allow_unused=True)
    gradient = torch.zeros_like(shift) if gradient is None else gradient
    return Found(gradient.flatten(1), value.detach())


def uses(model: Any, site: Site) -> int:
    """How often the model runs through a feed-forward block, at most."""
    counts = [Counter(place.offset for place in layer) for layer in places(model, site)]
    return max(count for layer in counts for count in layer.values())


def _tap(gammas: Tensor | None, shift: Tensor, question: Question, h: Tensor) -> Tap:
    """gamma h + shift at the last N positions, so that the gradient of `shift`, [n, N, F] of zeros, is that of gamma h.

    gammas: [n]; None, for one entry, notes in h, [N, F], what it is there.
    """
    last, length = question.positions, len(question.ids)
    used: Counter[int] = Counter()  # how often the neurons from this one on were seen

    def tap(values: Tensor, tokens: Tensor | None, offset: int) -> Tensor:
        flat = values.reshape(-1, values.shape[-1])
        where = torch.arange(len(flat)) if tokens is None else tokens.cpu()
        entry, position = where // length, where % length - (length - last)
        rows = (position >= 0).nonzero()[:, 0]
        entry, position = entry[rows], position[rows] + last * used[offset]
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
    """Logits [count, V] float32 after the prompt, which every batch entry holds."""
    device = question.model.get_input_embeddings().weight.device
    ids = torch.tensor([list(question.ids)] * count, device=device)
    with torch.enable_grad():
        return question.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()


def _value(question: Question, logits: Tensor) -> Tensor:
    """What is attributed, [n]. logits: [n, V]."""
    answer = logits[:, list(question.answer)].logsumexp(-1)
    if question.others is not None:
        return (answer - logits[:, list(question.others)].logsumexp(-1)).cpu()
    return (answer - logits.logsumexp(-1)).exp().cpu()
