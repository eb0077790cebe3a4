"""One prompt on its way through a model, layer by layer: its own tokens, and rows that scale h at its last position.

A (layer, gamma) pair is one *row*: a batch entry of one position, which attends to the prompt's keys and values. A row
that belongs to layer l equals the prompt below l, so a batch of rows starts empty and grows: layer l appends its
own rows as copies of the prompt's last position, then scales h in them. One way up and one way down serve all layers.

The model's own layers and head do the computing, with the arguments that the model itself would pass to them: a run of
`model.forward` whose layers do nothing but note how they were called (`_calls`). So masks, rotary tables, soft caps
and logit scales are the model's, for every architecture, and a layer's weights are needed only while that layer is
computed. Rejected: re-implementing the blocks (a second truth per family), and scaling rows within one call of
`model.forward` (it cannot stop between two layers, which a model larger than memory needs).
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .families import Site, decoder_layers, num_neurons, places
from .hooks import replaced, tapped
from .quadrature import Found, Nodes

_HEAD_ROWS = 192  # rows that go through the head at once: it makes [R, V] logits, and reads its weights each time


class Segment:
    """Tokens that follow those of an earlier segment, with their keys and values kept.

    hidden: what the next layer takes, [1, n, D]; it ends as the last layer's output.
    """

    def __init__(self, model: nn.Module, input_ids: Sequence[int], before: Segment | None = None):
        self.model, self.before = model, before
        self._ids = _ids(model, input_ids)
        self.length = self._ids.shape[1] + (before.length if before else 0)
        self.cache = _cache(decoder_layers(model), before.cache if before else None, before.length if before else 0)
        self._first, self.calls = _calls(model, self._ids, self.cache)

    def climb(self, index: int, layer: nn.Module) -> None:
        """Go through layer `index`; at layer 0, start anew."""
        if index == 0:
            self.hidden = self._first
        with torch.no_grad():
            self.hidden = self.calls[index].run(layer, self.hidden)

    def arrive(self) -> None:
        """Called once the last layer is done."""


class Prompt(Segment):
    """A question's tokens, as far as they are its own. What is known once it has climbed:

    h: the site's values at the last position, [L, F] float32 on the CPU; p: P(a*); value: the objective (P(a*), or
    with `other_ids` the log-odds of a* against the other answers); next_token: the model's distribution after the
    prompt, [V] float32 on the CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        input_ids: Sequence[int],
        answer_ids: Sequence[int],
        site: Site,
        before: Segment | None = None,
        other_ids: Sequence[int] | None = None,
    ):
        super().__init__(model, input_ids[before.length if before else 0 :], before)
        self.site, self.places, self.neurons = site, places(model, site), num_neurons(model)
        self._answer, self._other = list(answer_ids), other_ids and list(other_ids)
        self.base: list[Tensor]  # the last position's input to each layer, [1, 1, D]
        self.last_token = self._ids[:, -1:]

    def climb(self, index: int, layer: nn.Module) -> None:
        if index == 0:
            self.hidden, self.base, self._h = self._first, [], []
        self.base.append(self.hidden[:, -1:].clone())
        self._h.append(torch.zeros(self.neurons))
        with tapped(self.places[index], self.site, self._note):
            super().climb(index, layer)
        self.cache.layers[index].drop_last()

    def _note(self, h: Tensor, tokens: Tensor | None, offset: int) -> None:
        flat = h.reshape(-1, h.shape[-1])
        last = flat[-1:] if tokens is None else flat[tokens == self.hidden.shape[1] - 1]
        for values in last:  # one, or none if this expert was not chosen
            self._h[-1][offset : offset + len(values)] = values.float().cpu()

    def arrive(self) -> None:
        """The head, once the last layer is done."""
        with torch.no_grad():
            logits = head(self, self.hidden[:, -1:])
        self.h, self.value = torch.stack(self._h), self.objective(logits).item()
        self.next_token = logits[0].softmax(-1).cpu()
        self.p = float(self.next_token[self._answer].sum())

    def objective(self, logits: Tensor) -> Tensor:
        """What is attributed. logits: [R, V] -> [R]."""
        answer = torch.logsumexp(logits[:, self._answer], -1)
        if self._other:
            return answer - torch.logsumexp(logits[:, self._other], -1)
        return torch.exp(answer - torch.logsumexp(logits, -1))


class Rows:
    """The rows of some layers of one prompt: up through the layers, through the head, and down again.

    keep: hold each layer's graph on the way up, so that nothing is computed twice; otherwise only the layer's input is
    held and the layer is computed again on the way down, so that its weights and activations can be let go.
    """

    def __init__(self, prompt: Prompt, nodes: dict[int, Nodes], keep: bool):
        self.prompt, self.nodes, self._keep = prompt, nodes, keep
        self._hidden: Tensor | None = None
        self._wanted: list[int] = []  # rows whose gradient is wanted
        self._held: dict[int, tuple] = {}
        self.found: dict[int, Found] = {}
        cache = _cache(decoder_layers(prompt.model), prompt.cache, prompt.length - 1, keep=False)
        _, self._calls = _calls(prompt.model, prompt.last_token, cache)

    def up(self, index: int, layer: nn.Module) -> None:
        """Append the rows of layer `index`, if any, and go through it."""
        nodes, start = self.nodes.get(index), 0 if self._hidden is None else len(self._hidden)
        if nodes is not None:
            own = self.prompt.base[index].expand(nodes.count, -1, -1)
            self._hidden = own if self._hidden is None else torch.cat([self._hidden.to(own.device), own])
            self._wanted += range(start, start + len(nodes.values))
        if self._hidden is None:
            return
        gammas = torch.cat(nodes) if nodes is not None else None
        if self._keep:
            with torch.enable_grad():
                self._held[index] = held = self._run(index, layer, self._hidden, start, gammas)
            self._hidden = held.output.detach()
            return
        wanted = [r for r in self._wanted if r < start]
        self._held[index] = (self._hidden[self._wanted], len(wanted))
        with torch.no_grad():
            self._hidden = self._run(index, layer, self._hidden, start, gammas).output

    def _run(self, index: int, layer: nn.Module, hidden: Tensor, start: int, gammas: Tensor | None) -> _Held:
        """Rows through one layer; those from `start` on have h scaled by gammas."""
        hidden, leaves = hidden.detach().requires_grad_(), []

        def scale(h: Tensor, tokens: Tensor | None, offset: int) -> Tensor:
            rows = torch.arange(len(hidden), device=h.device) if tokens is None else tokens
            own = rows >= start
            if not own.any():  # an expert that none of the layer's own rows was given to
                return h
            gamma = gammas.to(h)[rows[own] - start].view(-1, *[1] * (h.dim() - 1))
            leaf = (gamma * h[own].detach()).requires_grad_()
            leaves.append(_Leaf(rows[own] - start, offset, leaf))
            return h.index_put((own.nonzero()[:, 0],), leaf)

        if gammas is None:
            return _Held(hidden, [], self._calls[index].run(layer, hidden))
        with tapped(self.prompt.places[index], self.prompt.site, scale):
            output = self._calls[index].run(layer, hidden)
        return _Held(hidden, leaves, output)

    def head(self) -> None:
        """The objective of every row, and its gradient with respect to the last layer's output."""
        p, gradients = [], []
        for part in self._hidden.split(_HEAD_ROWS):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                value = self.prompt.objective(head(self.prompt, part))
                gradients.append(torch.autograd.grad(value.sum(), part)[0])
            p.append(value.detach().cpu())
        self._hidden, gradient = None, torch.cat(gradients)
        self._gradient = gradient if self._keep else gradient[self._wanted]
        sizes = [n for _, nodes in sorted(self.nodes.items()) for n in map(len, nodes)]
        shares = iter(torch.cat(p).split(sizes))
        self.found = {index: Found(torch.empty(0), next(shares), next(shares)) for index in sorted(self.nodes)}

    def down(self, index: int, layer: nn.Module) -> None:
        """The gradient one layer further down; at a layer that has rows, with respect to their h."""
        if index not in self._held:
            return
        nodes, held = self.nodes.get(index), self._held.pop(index)
        if not self._keep:
            hidden, start = held
            with torch.enable_grad():
                held = self._run(index, layer, hidden, start, nodes.values if nodes is not None else None)
        leaves = [leaf.values for leaf in held.leaves]
        inputs = [held.input] if index > min(self.nodes) else []
        found = torch.autograd.grad(held.output, leaves + inputs, self._gradient.to(held.output.device))
        if nodes is not None:
            self.found[index] = self.found[index]._replace(gradient=self._gathered(held, found, len(nodes.values)))
        own = 0 if nodes is None else nodes.count if self._keep else len(nodes.values)
        self._gradient = found[-1][: len(held.input) - own] if inputs else None

    def _gathered(self, held: _Held, found: Sequence[Tensor], count: int) -> Tensor:
        """The leaves' gradients as one [count, F]; zero for the experts that were not chosen."""
        result = torch.zeros(count, self.prompt.neurons)
        for leaf, gradient in zip(held.leaves, found, strict=False):
            kept = (leaf.rows < count).nonzero()[:, 0]
            flat = gradient[kept].flatten(1).float().cpu()
            result[leaf.rows[kept].cpu(), leaf.offset : leaf.offset + flat.shape[1]] = flat
        return result


class _Leaf(NamedTuple):
    """Scaled h of some of a layer's own rows. rows: which, [n]; offset: the first neuron; values: [n, …, F]."""

    rows: Tensor
    offset: int
    values: Tensor


class _Held(NamedTuple):
    """One layer's graph. input: [R, 1, D]; leaves: the scaled h of the layer's own rows; output: [R, 1, D]."""

    input: Tensor
    leaves: list[_Leaf]
    output: Tensor


# ----------------------------------------------------------------------------------------------- the model's own code


class _Layer(DynamicLayer):
    """One layer's keys and values: those of the segments before (one batch entry), then this segment's.

    Its length is known before the layer has run, since the model asks for it while it prepares masks. Sliding windows
    are left to the mask, so a prompt's keys and values are all kept. keep: False forgets what a pass adds.
    """

    def __init__(self, before: _Layer | None, length: int, keep: bool):
        super().__init__()
        self.before, self.length, self.keep = before, length, keep

    def get_seq_length(self, *_) -> int:
        return self.length

    def update(self, key_states, value_states, *args, **kwargs):
        if self.keep:
            self.keys, self.values, self.is_initialized = key_states, value_states, True
        rows = key_states.shape[0]
        chain = self.before.chain() if self.before else []
        earlier = [(k.expand(rows, *k.shape[1:]), v.expand(rows, *v.shape[1:])) for k, v in chain]
        keys, values = zip(*earlier, (key_states, value_states), strict=True)
        return torch.cat(keys, -2), torch.cat(values, -2)

    def chain(self) -> list[tuple[Tensor, Tensor]]:
        """(keys, values) of the segments before and of this one."""
        return [*(self.before.chain() if self.before else []), (self.keys, self.values)]

    def drop_last(self) -> None:
        if self.keys is not None:
            self.keys, self.values = self.keys[..., :-1, :].clone(), self.values[..., :-1, :].clone()


def _cache(layers: nn.ModuleList, before: DynamicCache | None, length: int, keep: bool = True) -> DynamicCache:
    cache = DynamicCache()
    earlier = before.layers if before else [None] * len(layers)
    cache.layers = [_Layer(old, length, keep) for old in earlier]
    return cache


class _Call(NamedTuple):
    """How the model calls one layer, apart from the hidden states."""

    args: tuple
    kwargs: dict

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        output = layer(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output  # some architectures wrap it


def _ids(model: nn.Module, input_ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(input_ids)], device=model.get_input_embeddings().weight.device)


def _forward(model: nn.Module, ids: Tensor, cache: DynamicCache):
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    return model(input_ids=ids, **{name: cache}, use_cache=True, logits_to_keep=1)


class _Output(Tensor):
    """A layer's output for models that take it bare and for models that take the first entry of a tuple."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # what is computed from it is a plain tensor

    def __getitem__(self, index):
        return self if isinstance(index, int) and index == 0 else super().__getitem__(index)


def _calls(model: nn.Module, ids: Tensor, cache: DynamicCache) -> tuple[Tensor, list[_Call]]:
    """(what the first layer takes, how each layer is called), without running one."""
    calls, seen = [], []

    def note(*args, **kwargs):
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        seen.append(hidden)
        calls.append(_Call(args, kwargs))
        return hidden.as_subclass(_Output)

    with torch.no_grad(), replaced(decoder_layers(model), note):
        _forward(model, ids, cache)
    return seen[0], calls


def head(prompt: Prompt, hidden: Tensor) -> Tensor:
    """Everything after the last layer, by the model's own code: [R, 1, D] -> logits [R, V] float32."""
    layers = decoder_layers(prompt.model)
    with replaced(layers, lambda *args, **kwargs: hidden.as_subclass(_Output)):
        logits = _forward(prompt.model, prompt.last_token.expand(len(hidden), -1), _cache(layers, None, 0, keep=False))
    return logits.logits[:, -1].float()
