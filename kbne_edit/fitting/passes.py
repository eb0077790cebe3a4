"""Gradients of log-probabilities with respect to the factors of all feed-forward neurons.

A leaf [B, F] of factors multiplies the neurons of each layer, one row per sequence of a batch. Sequences of a batch are
independent, so one backward pass of the summed objectives leaves each sequence's gradient in its row.

Legend: N sequences, B sequences of a batch, T positions, L layers, F neurons of a layer, P = sum of F over the layers,
K scored positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..attribution.head import head
from ..errors import InputError
from ..families import Site, end
from ..models.hooks import Tap, tapped
from ..models.places import Place, decoder_layers, places

_BATCH_TOKENS = 1024
_LOGITS = 1 << 23  # of one block of the head: it makes [K, V] logits, and reads its weights each time


@dataclass(frozen=True)
class Scored:
    """Token ids [T] and weights [T - 1] of the objective sum_t weights[t] log p(ids[t + 1])."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.ids) - 1 or len(self.ids) < 2:
            raise InputError(f"a sequence of {len(self.ids)} tokens has {len(self.weights)} weights of predictions")


@dataclass(frozen=True)
class Batch:
    """Gradients of some sequences.

    index: of the sequences, [B]; values: their objectives, [B]; gradients: [B, P], or [B, T, P] by position.
    """

    index: np.ndarray
    values: np.ndarray
    gradients: Tensor


def layer_sizes(model: nn.Module, site: Site) -> list[int]:
    """Neurons of each layer, [L]."""
    return [end(layer) for layer in places(model, site)]


def gradients(
    model: nn.Module,
    sequences: Sequence[Scored],
    site: Site = "down",
    at: Tensor | None = None,
    draw: torch.Generator | None = None,
    by_position: bool = False,
) -> Iterator[Batch]:
    """Value and gradient of every sequence's objective, batch by batch, in order of length.

    model: a causal language model of transformers, in eval mode, with requires_grad False for all weights.
    at: the factors at which the gradient is taken, [P] float32 (None: all 1). draw: draw the target tokens from the
    model, as the Fisher information requires, instead of reading them from the sequence. by_position: a separate
    gradient for the factors at each position; they sum to the sequence's. Gradients are float32 on the CPU.
    """
    layers = places(model, site)
    sizes = [end(layer) for layer in layers]
    start = torch.ones(sum(sizes)) if at is None else at
    most = _BATCH_TOKENS // 4 if by_position else _BATCH_TOKENS
    for index in batches([len(s.ids) for s in sequences], most):
        batch = [sequences[i] for i in index]
        width = max(len(s.ids) for s in batch) if by_position else 1
        leaves = _leaves(start, sizes, len(batch) * width, model)
        values, by_layer = _backward(model, (layers, site), batch, leaves, draw)
        rows = torch.cat([g.float().cpu() for g in by_layer], 1)
        yield Batch(np.array(index), values, rows.view(len(batch), width, -1) if by_position else rows)


def batches(lengths: Sequence[int], most: int = _BATCH_TOKENS) -> list[list[int]]:
    """Batches of sequences of similar length, at most `most` tokens with padding (but at least one sequence)."""
    result: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not result or (len(result[-1]) + 1) * lengths[i] > most:
            result.append([])
        result[-1].append(i)
    return result


def _leaves(start: Tensor, sizes: list[int], count: int, model: nn.Module) -> list[Tensor]:
    # In float32 whatever the model's dtype: bfloat16 has no number between 1 and 1.0078.
    parts = start.float().to(model.get_input_embeddings().weight.device).split(sizes)  # type: ignore[operator]
    return [part.repeat(count, 1).requires_grad_() for part in parts]


class _Padded:
    """A batch as tensors. ids: [B, T]; row, position, weight, target: [K], of every scored prediction."""

    def __init__(self, batch: Sequence[Scored], device: torch.device):
        self.width = max(len(s.ids) for s in batch)
        # Padding is at the end, where causal attention hides it from all scored tokens.
        ids = [[*s.ids, *[s.ids[-1]] * (self.width - len(s.ids))] for s in batch]
        weights = [[*s.weights, *[0.0] * (self.width - len(s.ids))] for s in batch]
        self.ids, table = torch.tensor(ids, device=device), torch.tensor(weights, device=device)
        self.row, self.position = table.nonzero(as_tuple=True)
        self.weight, self.target = table[self.row, self.position], self.ids[self.row, self.position + 1]


def _hidden(
    model: nn.Module, where: tuple[list[list[Place]], Site], padded: _Padded, count: int, leaves: list[Tensor]
) -> Tensor:
    """The last layer's output at the scored positions, [K, D]. leaves: [B, F] or [B T, F] of each layer."""
    layers, site = where
    with ExitStack() as stack:
        for layer, leaf in zip(layers, leaves, strict=True):
            at = leaf[0].detach()  # all rows begin with the same factors
            tap = _tap(leaf, count, padded.width, None if bool((at == 1).all()) else at)
            stack.enter_context(tapped(layer, site, tap))
        return last_hidden(model, padded.ids)[padded.row, padded.position]


def _backward(
    model: nn.Module,
    where: tuple[list[list[Place]], Site],
    batch: list[Scored],
    leaves: list[Tensor],
    draw: torch.Generator | None,
) -> tuple[np.ndarray, tuple[Tensor, ...]]:
    """Each sequence's objective [B] and the leaves' gradients of their sum.

    The head runs in blocks, forward and backward, before the backward pass of the layers, so its logits are never held
    together.
    """
    padded = _Padded(batch, leaves[0].device)
    hidden = _hidden(model, where, padded, len(batch), leaves)
    values, back = torch.zeros(len(batch), dtype=torch.float64), []
    parts = (hidden.detach(), padded.weight, padded.target, padded.row)
    for block, counts, wanted, owner in zip(*(x.split(_block(model)) for x in parts), strict=True):
        block.requires_grad_()
        logits = head(model, block[None])
        wanted = wanted if draw is None else _drawn(logits.detach(), draw)
        terms = counts * (logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(-1))
        back.append(torch.autograd.grad(terms.sum(), block)[0])
        values.index_add_(0, owner.cpu(), terms.detach().double().cpu())
    return values.numpy(), torch.autograd.grad(hidden, leaves, torch.cat(back))


@torch.no_grad()
def objectives(
    model: nn.Module,
    sequences: Sequence[Scored],
    site: Site = "down",
    at: Tensor | None = None,
    temperature: float = 1.0,
) -> np.ndarray:
    """Every sequence's objective, [N], without gradients. at: factors [P]; temperature: divides the logits."""
    layers = places(model, site)
    sizes = [end(layer) for layer in layers]
    start = torch.ones(sum(sizes)) if at is None else at
    result = np.zeros(len(sequences))
    for index in batches([len(s.ids) for s in sequences]):
        batch = [sequences[i] for i in index]
        leaves = [leaf.detach() for leaf in _leaves(start, sizes, len(batch), model)]
        padded = _Padded(batch, leaves[0].device)
        hidden = _hidden(model, (layers, site), padded, len(batch), leaves)
        parts = (hidden, padded.weight, padded.target, padded.row)
        for block, counts, wanted, owner in zip(*(x.split(_block(model)) for x in parts), strict=True):
            logits = head(model, block[None]) / temperature
            terms = counts * (logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(-1))
            np.add.at(result, np.array(index)[owner.cpu().numpy()], terms.double().cpu().numpy())
    return result


@dataclass(frozen=True)
class Divergence:
    """kl: mean KL(base || edited) per token, in nats; perplexity: of the texts' own tokens."""

    kl: float
    perplexity: float


class Neutral:
    """Texts on which the cost of factors is measured. For the base, only the last layer's output is kept."""

    def __init__(self, model: nn.Module, texts: Sequence[Sequence[int]], site: Site = "down"):
        self._model, self._site = model, site
        self._texts = [Scored(tuple(ids), (1.0,) * (len(ids) - 1)) for ids in texts]
        self._base = list(self._passes(None))

    @torch.no_grad()
    def _passes(self, at: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """(last layer's output, tokens to predict) of each batch."""
        layers = places(self._model, self._site)
        sizes = [end(layer) for layer in layers]
        start = torch.ones(sum(sizes)) if at is None else at
        for index in batches([len(s.ids) for s in self._texts]):
            batch = [self._texts[i] for i in index]
            leaves = [leaf.detach() for leaf in _leaves(start, sizes, len(batch), self._model)]
            padded = _Padded(batch, leaves[0].device)
            yield _hidden(self._model, (layers, self._site), padded, len(batch), leaves), padded.target

    @cached_property
    def base(self) -> Divergence:
        """Of the model itself."""
        return self.measure()

    @torch.no_grad()
    def measure(self, at: Tensor | None = None, temperature: float = 1.0) -> Divergence:
        """at: factors [P] (None: the base). temperature: divides the edited logits."""
        kl, loss, count = 0.0, 0.0, 0
        edited = self._base if at is None else self._passes(at)
        for (base, _), (hidden, target) in zip(self._base, edited, strict=True):
            for p, q, wanted in zip(*(x.split(_block(self._model)) for x in (base, hidden, target)), strict=True):
                p = head(self._model, p[None]).log_softmax(-1)
                q = (head(self._model, q[None]) / temperature).log_softmax(-1)
                kl += float((p.exp() * (p - q)).sum(-1).double().sum())
                loss -= float(q.gather(1, wanted[:, None]).double().sum())
                count += len(wanted)
        return Divergence(kl / count, float(np.exp(loss / count)))


def _block(model: nn.Module) -> int:
    """Number of positions that go through the head at once."""
    return max(64, _LOGITS // model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]


class _Reached(Exception):
    """Leaves the model's forward pass after the last layer."""


def last_hidden(model: nn.Module, ids: Tensor) -> Tensor:
    """The last layer's output [B, T, D]. ids: [B, T]."""
    outputs = []

    def leave(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)
        raise _Reached

    handle = decoder_layers(model)[-1].register_forward_hook(leave)
    try:
        model(input_ids=ids, use_cache=False)
    except _Reached:
        return outputs[0]
    finally:
        handle.remove()
    raise AssertionError(f"{type(model).__name__} did not call its last layer")


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token from each distribution, [K], by its cumulative sum: torch.multinomial limits the vocabulary's size."""
    mass = logits.softmax(-1).cumsum(-1)
    level = torch.rand(len(mass), 1, generator=generator).to(mass.device) * mass[:, -1:]
    return torch.searchsorted(mass, level)[:, 0].clamp(max=mass.shape[-1] - 1)


class _Times(torch.autograd.Function):
    """Neurons [B, T, F] times factors [B, F], [B, T, F] or None (all 1), where only the factors' gradient is needed.

    Plain autograd would compute the product in the factors' float32, forward and backward, and cost a sixth of a pass.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, leaf: Tensor, at: Tensor | None) -> Tensor:
        ctx.save_for_backward(h, at)
        ctx.by_position = leaf.dim() == 3
        return h.view_as(h) if at is None else (h * at).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = outer
        h, at = ctx.saved_tensors
        each = h * grad
        summed = each.float() if ctx.by_position else each.sum(1, dtype=torch.float32)
        return grad if at is None else (grad * at).to(grad.dtype), summed, None


def _tap(leaf: Tensor, count: int, width: int, at: Tensor | None) -> Tap:
    """leaf: [B, F] or [B T, F]. count, width: B and T of the padded batch, which identify an expert's tokens.

    at: the layer's factors, [F]; None: all 1.
    """
    each = leaf.shape[0] // count  # positions that have factors of their own

    def tap(h: Tensor, tokens: Tensor | None, offset: int) -> Tensor:
        scale = leaf[:, offset : offset + h.shape[-1]]
        if tokens is not None:
            return (h * scale[tokens if each > 1 else tokens // width]).to(h.dtype)
        factors = None if at is None else at[offset : offset + h.shape[-1]]
        shaped = scale.view(count, each, -1) if each > 1 else scale
        return _Times.apply(h.view(count, width, -1), shaped, factors).view(h.shape)

    return tap
