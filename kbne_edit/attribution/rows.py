"""Forward and backward passes of questions, layer by layer: their tokens, and rows that scale h at the last positions.

A (layer, gamma) pair of a question is one *row*: a copy of the question's last position (or its last N), which attends
to the keys and values before it. Below its layer l a row equals its question. So there are no rows at first, and each
layer l appends its own as copies of the question's last positions, then scales h in them. One forward and one backward
pass serve all layers.

The questions of a *pack* are side by side in one sequence, and so are all their rows; a mask keeps them apart. So a
layer processes hundreds of rows in one fast matrix product. Rejected: a batch with an entry per row, which would repeat
every question's keys and values for each of its rows.

The model's own layers and head do the computing, with the arguments that the model itself would pass: `calls.call_of`
runs `model.forward` up to that layer. So rotary tables, soft caps and logit scales are the model's own in every
architecture, and a layer's weights are needed only while it is computed. Rejected: re-implementing the blocks (a second
implementation per family), and scaling rows within one `model.forward` (which cannot pause between two layers, as a
model larger than memory needs).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..families import Site
from ..models.bounds import check_numbers, check_tokens
from ..models.hooks import tapped
from ..models.masks import attention_mask
from ..models.memory import activations
from ..models.places import decoder_layers, num_neurons, places, post_norm
from .calls import Call, call_of, new_cache
from .head import Surfaces, head, objective, of_logits
from .quadrature import NodeValues

if TYPE_CHECKING:
    from transformers import DynamicCache


class Tokens(NamedTuple):
    """Tokens side by side, [N] each. owner: their question (-1: shared by all); depth: position in their prompt.

    row: the row they belong to (-1: the prompt itself); fork: the depth at which that row branches off the prompt.
    """

    ids: np.ndarray
    owner: np.ndarray
    depth: np.ndarray
    row: np.ndarray
    fork: np.ndarray

    @classmethod
    def prompt(cls, ids: np.ndarray, owner: np.ndarray, depth: np.ndarray) -> Tokens:
        return cls(ids, owner, depth, np.full(len(ids), -1), depth)

    def before(self, other: Tokens) -> Tokens:
        return Tokens(*map(np.concatenate, zip(self, other, strict=True)))

    def seen_by(self, tokens: Tokens) -> np.ndarray:
        """Which of these tokens each of `tokens` attends to, [N, K]: earlier ones of its row, and of its prompt before
        the fork."""
        owner, depth, row, fork = (values[:, None] for values in tokens[1:])
        related = (self.owner == -1) | (self.owner == owner)
        return related & (self.depth <= depth) & ((self.row == row) | ((self.row == -1) & (self.depth < fork)))


NONE = Tokens(*(np.zeros(0, int) for _ in Tokens._fields))


class Segment:
    """Tokens that follow those of an earlier segment; their keys and values are kept.

    hidden: input of the next layer, [1, N, D], in the end the last layer's output. context: all tokens up to its end.
    """

    def __init__(self, model: nn.Module, tokens: Tokens, before: Segment | None = None):
        check_tokens(model, tokens.ids.tolist(), tokens.depth.tolist())
        self.model, self.tokens = model, tokens
        earlier = before.context if before else NONE
        self.context: Tokens = earlier.before(tokens)
        self.cache: DynamicCache = new_cache(decoder_layers(model), before.cache if before else None, len(earlier.ids))
        self._mask = _mask_of(model, tokens, self.context)

    def forward(self, index: int, layer: nn.Module) -> None:
        """Run layer `index`; layer 0 starts from the embeddings."""
        first, call = call_of(self.model, index, self.tokens.ids, self.tokens.depth, self._mask, self.cache)
        if index == 0:
            self.hidden = first
        self._run(index, layer, call)

    def _run(self, index: int, layer: nn.Module, call: Call) -> None:
        with torch.no_grad():
            self.hidden = call.run(layer, self.hidden)

    def finish(self) -> None:
        """Called after the last layer."""


def shared_prefix(model: nn.Module, input_ids: Sequence[int]) -> Segment:
    """The prefix that all prompts share."""
    count = len(input_ids)
    return Segment(model, Tokens.prompt(np.array(input_ids), np.full(count, -1), np.arange(count)))


@dataclass(frozen=True)
class TokenPrompts:
    """Q prompts and their answers as token ids; see `gradients.attribute`. positions: N."""

    input_ids: Sequence[Sequence[int]]
    answer_ids: Sequence[Sequence[int]]
    other_ids: Sequence[Sequence[int]] | None = None
    positions: int = 1

    def of(self, pack: range) -> TokenPrompts:
        """The prompts of a pack."""
        others = None if self.other_ids is None else [self.other_ids[q] for q in pack]
        return TokenPrompts(
            [self.input_ids[q] for q in pack], [self.answer_ids[q] for q in pack], others, self.positions
        )


class Pack(Segment):
    """Questions side by side, each with its tokens after the shared prefix. Attributes, set by the forward pass:

    h: the site's activations at the last N positions, [L, Q, N, F] float32 on the CPU; p: P(a*), [Q]; value: the
    objective (P(a*), or with `other_ids` the log-odds of a* against the other answers), [Q]; next_token: the model's
    distribution after each prompt, [Q, V] float32 on the CPU; turns: where a norm follows the block, the gamma at which
    it begins to saturate, sqrt(eps / mean(y^2)), [L, Q] (`quadrature.Path`). After the first rows also: gradient,
    d value / dh, shaped as h.
    """

    def __init__(
        self,
        model: Any,
        prompts: TokenPrompts,
        site: Site,
        before: Segment | None = None,
    ):
        input_ids, positions = prompts.input_ids, prompts.positions
        shared = len(before.context.ids) if before else 0
        lengths = [len(ids) - shared for ids in input_ids]
        super().__init__(
            model,
            Tokens.prompt(
                np.concatenate([ids[shared:] for ids in input_ids]),
                np.repeat(np.arange(len(lengths)), lengths),
                np.concatenate([np.arange(shared, shared + length) for length in lengths]),
            ),
            before,
        )
        self.count, self.positions = len(lengths), positions
        self.site, self.places, self.neurons = site, places(model, site), num_neurons(model)
        weight = model.get_input_embeddings().weight
        self.hidden_size, self.itemsize = weight.shape[-1], weight.element_size()
        self._norm = post_norm(model)
        # Indices of each question's last tokens, [Q, N].
        self.last = torch.tensor(np.cumsum(lengths))[:, None] + torch.arange(-positions, 0)
        self._others: Any  # Surfaces or None
        self._answers, self._others = Surfaces(prompts.answer_ids), prompts.other_ids and Surfaces(prompts.other_ids)
        self.base: list[Tensor]  # the last positions' input to each layer, [1, Q, D]
        self.gradient: Any = None  # a Tensor after the first rows
        self.turns: Any  # a Tensor or None
        self.on_next_token: Callable[[Tensor], None] | None = None  # called with next_token

    def _run(self, index: int, layer: nn.Module, call: Call) -> None:
        if index == 0:
            self.base, self.h = [], torch.zeros(len(self.places), *self.last.shape, self.neurons)
            self.turns = None if self._norm is None else torch.zeros(len(self.places), self.count)
        self.base.append(self.hidden[0, self.last.to(self.hidden.device)].clone())

        def note(h: Tensor, tokens: Tensor | None, offset: int) -> None:
            where = tokens.cpu() if tokens is not None else torch.arange(self.hidden.shape[1])
            at, whose, which = (where[:, None, None] == self.last).nonzero(as_tuple=True)  # an expert may have none
            h = h.flatten(0, -2)[at.to(h.device)].float().cpu()
            self.h[index, whose, which, offset : offset + h.shape[-1]] = h

        def turn(norm: nn.Module, args: tuple) -> None:
            y = args[0].flatten(0, -2)[self.last.to(args[0].device)].float()
            square = y.square().mean(-1).log().mean(-1).exp()  # over several positions the geometric mean
            self.turns[index] = (_eps(norm) / square.clamp_min(1e-30)).sqrt().cpu()

        with tapped(self.places[index], self.site, note), ExitStack() as stack:
            if self._norm is not None:
                handle = layer.get_submodule(self._norm).register_forward_pre_hook(turn)
                stack.callback(handle.remove)
            super()._run(index, layer, call)

    def finish(self) -> None:
        """Run the head, after the last layer."""
        with torch.no_grad():
            logits = head(self.model, self.hidden[:, self.last[:, -1]])
        check_numbers(logits, self.model, "the base")
        self.value = of_logits(logits, np.arange(self.count), self._answers, self._others).tolist()
        self.next_token = logits.softmax(-1).cpu()
        if self.on_next_token:
            self.on_next_token(self.next_token)
        self.p = [float(row[ids].sum()) for row, ids in zip(self.next_token, self._answers.ids, strict=True)]

    def rows(self, owner: np.ndarray) -> Tokens:
        """The tokens of one row for each of these questions."""
        last = self.last.numpy()[owner]
        depth = self.tokens.depth[last]
        whose, row, fork = (np.repeat(x, self.positions) for x in (owner, np.arange(len(owner)), depth[:, 0]))
        return Tokens(self.tokens.ids[last].ravel(), whose, depth.ravel(), row, fork)

    def objective(self, hidden: Tensor, owner: np.ndarray) -> Tensor:
        """The objective, [R]. hidden: the last layer's output for rows of the questions `owner`, [1, R, D]."""
        return objective(self.model, hidden, owner, self._answers, self._others)


class Rows:
    """The rows of a pack's questions: forward through the layers, through the head, and backward.

    gammas: per question {layer: [n]}. bare: True adds one row per question in which nothing is scaled; its gradients,
    at gamma = 1 in every layer, become the pack's. graphs: bytes that the layers' graphs may take in the forward pass.
    As many of the last layers as fit keep their graph. The others keep their input only, and are computed again in the
    backward pass.
    """

    def __init__(self, pack: Pack, gammas: Sequence[dict[int, Tensor]], graphs: float, bare: bool):
        self.pack, self._gammas, self._each = pack, gammas, pack.positions
        self._bare, self._lowest = pack.count if bare else 0, 0 if bare else min(min(g) for g in gammas if g)
        self._kept = self._first_kept(graphs)  # layers from here on keep their graph
        self._hidden: Any = None  # a Tensor in the forward pass
        self._gradient: Any  # a Tensor in the backward pass
        self._owner = np.zeros(0, int)  # of each row
        self._start: dict[int, int] = {}  # {layer: index of its first row}
        self._held: dict[int, Any] = {}  # {layer: _Held, or its input only}
        self._cache = new_cache(decoder_layers(pack.model), pack.cache, len(pack.context.ids), keep=False)
        self.gradients: dict[int, Tensor] = {}  # {layer: gradients of its rows}

    def _first_kept(self, graphs: float) -> int:
        count, size = len(self.pack.places), self.pack.hidden_size
        new = [sum(len(gammas.get(index, ())) for gammas in self._gammas) for index in range(count)]
        rows = self._each * (self._bare + np.cumsum(new))
        needs = [activations(float(n), size, self.pack.itemsize) for n in rows[::-1]]  # from the last layer down
        return count - int(np.searchsorted(np.cumsum(needs), graphs, "right"))

    def forward(self, index: int, layer: nn.Module) -> None:
        """Append the rows of layer `index`, if any, and run it."""
        if index < self._lowest:
            return
        self._append(index)
        if index >= self._kept:
            with torch.enable_grad():
                self._held[index] = held = self._run(index, layer, self._hidden)
            self._hidden = held.output.detach()
        else:
            self._held[index] = self._hidden
            with torch.no_grad():
                self._hidden = self._run(index, layer, self._hidden).output

    def _append(self, index: int) -> None:
        counts = [len(gammas.get(index, ())) for gammas in self._gammas]
        bare = np.arange(self._bare if index == 0 else 0)
        owner = np.concatenate([bare, np.repeat(np.arange(len(counts)), counts)])
        self._start[index] = len(self._owner) + len(bare)
        self._owner = np.concatenate([self._owner, owner])
        new = self.pack.base[index][torch.from_numpy(owner)].flatten(0, 1)[None]
        self._hidden = new if self._hidden is None else torch.cat([self._hidden.to(new.device), new], 1)

    def _run(self, index: int, layer: nn.Module, hidden: Tensor) -> _Held:
        """Run the rows through one layer. In the layer's own rows, h is scaled by their gammas."""
        pack, start, hidden = self.pack, self._start[index] * self._each, hidden.detach().requires_grad_()
        of_rows = torch.cat([torch.zeros(self._start[index]), *(g[index] for g in self._gammas if index in g)])
        gammas = of_rows.repeat_interleave(self._each)
        scaled: list[_Leaf] = []
        bare: list[_Leaf] = []

        def tap(h: Tensor, tokens: Tensor | None, offset: int) -> Tensor:
            flat = h.flatten(0, -2)
            where = torch.arange(len(flat), device=h.device) if tokens is None else tokens
            for leaves, mask in (scaled, where >= start), (bare, where < self._bare * self._each):
                at = mask.nonzero()[:, 0]
                if not len(at):  # none of them was routed to this expert
                    continue
                part = flat[at]
                if leaves is scaled:
                    part = (gammas.to(h)[where[at], None] * part.detach()).requires_grad_()
                leaves.append(_Leaf(where[at] - (start if leaves is scaled else 0), offset, part))
                flat = flat.index_put((at,), part)
            return flat.view_as(h)

        tokens = pack.rows(self._owner[: hidden.shape[1] // self._each])
        mask = _mask_of(pack.model, tokens, pack.context.before(tokens))
        _, call = call_of(pack.model, index, tokens.ids, tokens.depth, mask, self._cache)
        with tapped(pack.places[index], pack.site, tap):
            return _Held(hidden, scaled, bare, call.run(layer, hidden))

    def head(self) -> None:
        """The objective of every row, and its gradient with respect to the last layer's output."""
        last = slice(self._each - 1, None, self._each)
        with torch.enable_grad():
            part = self._hidden[:, last].detach().requires_grad_()
            value = self.pack.objective(part, self._owner)
            (gradient,) = torch.autograd.grad(value.sum(), part)
        self._gradient, self._values = torch.zeros_like(self._hidden), value.detach().cpu()
        self._gradient[:, last], self._hidden = gradient, None

    def backward(self, index: int, layer: nn.Module) -> None:
        """Backpropagate through layer `index`; if it has rows of its own, keep the gradient of their h."""
        if index < self._lowest:
            return
        held = self._held.pop(index)
        if index < self._kept:
            with torch.enable_grad():
                held = self._run(index, layer, held)
        leaves, inputs = [*held.scaled, *held.bare], [held.input] if index > self._lowest else []
        wanted = [leaf.values for leaf in leaves] + inputs
        gradients = torch.autograd.grad(held.output, wanted, self._gradient.to(held.output.device)) if wanted else ()
        start = self._start[index] * self._each
        self.gradients[index] = self._gathered(held.scaled, gradients, held.input.shape[1] - start)
        if self._bare:
            if self.pack.gradient is None:
                self.pack.gradient = torch.zeros_like(self.pack.h)
            unscaled = self._gathered(held.bare, gradients[len(held.scaled) :], self._bare * self._each)
            self.pack.gradient[index] = unscaled.view_as(self.pack.gradient[index])
        self._gradient = gradients[-1][:, :start] if inputs else None

    def _gathered(self, leaves: list[_Leaf], gradients: Sequence[Tensor], count: int) -> Tensor:
        """The leaves' gradients by row, [rows, N * F] for `count` tokens; zero for experts that were not chosen."""
        result = torch.zeros(count, self.pack.neurons)
        for leaf, gradient in zip(leaves, gradients, strict=False):
            result[leaf.tokens.cpu(), leaf.offset : leaf.offset + gradient.shape[-1]] = gradient.float().cpu()
        return result.view(count // self._each, self._each * self.pack.neurons)

    def results(self) -> list[dict[int, NodeValues]]:
        """The values at each question's nodes, by layer."""
        result: list[dict[int, NodeValues]] = [{} for _ in self._gammas]
        for index, gradients in self.gradients.items():
            start = 0
            for of_question, gammas in zip(result, self._gammas, strict=True):
                if index in gammas:
                    end = start + len(gammas[index])
                    p = self._values[self._start[index] + start : self._start[index] + end]
                    of_question[index], start = NodeValues(gradients[start:end], p), end
        return result


class _Leaf(NamedTuple):
    """Activations of some tokens, [n, F'], as the layer continues with them. tokens: their indices among the rows'
    tokens; offset: the first neuron."""

    tokens: Tensor
    offset: int
    values: Tensor


class _Held(NamedTuple):
    """One layer's graph. input, output: [1, N, D]; scaled: h of the layer's own rows; bare: h of the unscaled rows."""

    input: Tensor
    scaled: list[_Leaf]
    bare: list[_Leaf]
    output: Tensor


def _eps(norm: nn.Module) -> float:
    """What an RMS norm adds to the mean square; its name differs between modules of transformers."""
    return next(getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name))


def _mask_of(model: nn.Module, tokens: Tokens, context: Tokens) -> Tensor | dict:
    """The attention mask of `tokens`, which are the last of their context."""
    return attention_mask(model, context.seen_by(tokens), tokens.depth, context.depth)
