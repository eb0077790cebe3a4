"""The last layer's output for trees of tokens under many edits.

A pass starts with one batch entry. Before the first layer that any of its edits touches, it is repeated once per edit,
and from there each entry has its own factors. So layers below are computed once for all edits, and above a layer's
weights are read once for all of them.

A model in memory takes one pass after the other. Of a model whose layers are read when they run (`models.on_demand`),
each layer takes many passes before the next one is read: the same products, and so the same bits. Layers that hand a
state from token to token run whole; then the rows of many trees are batch entries of one pass, filled up at their end.

Legend: E edits, N tokens of a tree, K kept nodes, T rows of tokens, W their width, D hidden size, F neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..attribution.calls import Call, call_of, new_cache
from ..attribution.head import at_head
from ..edit import Edit
from ..families import end
from ..models import memory
from ..models.hooks import Tap, tapped
from ..models.masks import attention_mask
from ..models.on_demand import supply_of
from ..models.places import decoder_layers, is_recurrent, places
from ..models.streamed import Streamed
from ..models.trees import Tree, unpacked

_SHARE = 0.25  # of the free memory that hidden states may take where many passes go through a layer together
_WHOLE_TOKENS = 1 << 14  # of a pass of whole rows, over all edits


class Pass(Protocol):
    """A tree under some edits (None: the model itself). nodes: the tokens whose states are wanted, K."""

    @property
    def tree(self) -> Tree: ...
    @property
    def edits(self) -> Sequence[Edit | None]: ...
    @property
    def nodes(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class TreePass:
    """A `Pass`, and nothing more."""

    tree: Tree
    edits: Sequence[Edit | None]
    nodes: Sequence[int]


P = TypeVar("P", bound=Pass)


def states_of(model: nn.Module, passes: Iterable[P]) -> Iterator[tuple[P, Tensor]]:
    """Each pass with the last layer's output at its nodes, [E, K, D], in their order.

    Of a model that runs whole: what comes to its head. Raises EditError if an edit does not fit the model.
    """
    supply = supply_of(model)
    if supply is None:
        for part in passes:
            yield part, last_states(model, part.tree, part.edits)[:, list(part.nodes)]
        return
    for group in _groups(model, passes):
        run = _whole_rows if is_recurrent(model) else _together
        yield from zip(group, run(model, supply, group), strict=True)


def _groups(model: nn.Module, passes: Iterable[P]) -> Iterator[list[P]]:
    """As many passes as may be under way at once."""
    size = model.get_input_embeddings().weight.shape[-1]  # type: ignore[operator, union-attr]
    group: list[Any] = []
    free, taken = _SHARE * memory.available(), 0
    for part in passes:
        count = len(part.tree.tokens)
        bytes_ = 4 * (2 * len(part.edits) * count * size + 2 * count**2)
        if group and taken + bytes_ > free:
            yield group
            group, taken = [], 0
        group.append(part)
        taken += bytes_
    if group:
        yield group


@torch.inference_mode()
def _together(model: nn.Module, supply: Streamed, group: Sequence[Pass]) -> list[Tensor]:
    """One read of the weights: every layer takes all passes before the next one is read."""
    under_way = [_UnderWay(model, part) for part in group]
    for index, layer in supply.forward():
        for part in under_way:
            part.through(index, layer)
    return [part.hidden[:, part.nodes] for part in under_way]


class _UnderWay:
    """A pass between two layers. hidden: what the next layer takes, [1, N, D], later [E, N, D]."""

    def __init__(self, model: nn.Module, part: Pass):
        self._model, self._edits, self.nodes = model, part.edits, list(part.nodes)
        self._ids, self._depth = np.array(part.tree.tokens), np.array(part.tree.depth)
        self._mask = attention_mask(model, part.tree.seen, self._depth, self._depth)
        self._cache = new_cache(decoder_layers(model), None, 0, keep=False)
        for edit in filter(None, part.edits):
            edit.check([end(layer) for layer in places(model, edit.site)])
        touched = [layer for edit in part.edits if edit for layer in edit.factors]
        self._first = min(touched, default=len(decoder_layers(model)) - 1)
        self.hidden: Any = None  # a Tensor from the first layer on

    def through(self, index: int, layer: nn.Module) -> None:
        embedded, call = call_of(self._model, index, self._ids, self._depth, self._mask, self._cache)
        if index == 0:
            self.hidden = embedded
        count = len(self._edits)
        if index == self._first:
            self.hidden = self.hidden.repeat(count, 1, 1)
        if index >= self._first:
            kwargs = {name: _expanded(value, count) for name, value in call.kwargs.items()}
            call = Call(tuple(_expanded(value, count) for value in call.args), kwargs)
        with _scaled(self._model, [edit and _at(edit, index) for edit in self._edits], lambda: len(self._ids)):
            self.hidden = call.run(layer, self.hidden)


def _at(edit: Edit, layer: int) -> Edit | None:
    """The part of an edit that is in one layer."""
    return Edit(edit.site, {layer: edit.factors[layer]}) if layer in edit.factors else None


@torch.inference_mode()
def _whole_rows(model: nn.Module, supply: Streamed, group: Sequence[Pass]) -> Iterator[Tensor]:
    """Rows of tokens as batch entries, as many as `_WHOLE_TOKENS` allows; what is filled up at the end is not seen."""
    for part in group:
        rows = [[part.tree.tokens[node] for node in path] for path in part.tree.paths]
        width = max(map(len, rows))
        nodes: dict[Any, Any] = {}
        step = max(_WHOLE_TOKENS // (width * len(part.edits)), 1)
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            ids = torch.tensor([row + row[-1:] * (width - len(row)) for row in some])
            states = _states_at_head(model, part.edits, ids.to(model.get_input_embeddings().weight.device))  # type: ignore[operator, union-attr]
            states = states.view(len(part.edits), len(some), width, -1)
            for row, path in enumerate(part.tree.paths[start : start + step]):
                nodes |= {node: states[:, row, position] for position, node in enumerate(path)}
        yield torch.stack([nodes[node] for node in part.nodes], 1)


class _Reached(Exception):
    """Leaves a forward pass after the last layer."""

    def __init__(self, hidden: Tensor):
        self.hidden = hidden


@torch.inference_mode()
def last_states(model: nn.Module, tree: Tree, edits: Sequence[Edit | None]) -> Tensor:
    """The last layer's output for a tree under each edit, [E, N, D]; what comes to the head of a model that runs whole.

    Raises EditError if an edit does not fit the model.
    """
    if is_recurrent(model):
        return unpacked(tree, lambda ids: _states_at_head(model, edits, ids), model)
    device, depth = model.get_input_embeddings().weight.device, np.array(tree.depth)  # type: ignore[operator]
    return _states(
        model,
        edits,
        torch.tensor([tree.tokens], device=device),
        position_ids=torch.tensor([tree.depth], device=device),
        attention_mask=attention_mask(model, tree.seen, depth, depth),
    )


def _states(model: nn.Module, edits: Sequence[Edit | None], input_ids: Tensor, **kwargs: Any) -> Tensor:
    """The last layer's output for tokens [1, N] under each edit, [E, N, D]. kwargs: how the model sees the tokens."""
    layers = decoder_layers(model)
    touched = [layer for edit in edits if edit for layer in edit.factors]
    with ExitStack() as stack:
        stack.enter_context(_repeated(layers[min(touched, default=len(layers) - 1) :], len(edits)))
        stack.enter_context(_scaled(model, edits, lambda: input_ids.shape[1]))
        stack.enter_context(_left_after(layers[-1]))
        try:
            model(input_ids=input_ids, use_cache=False, **kwargs)
        except _Reached as reached:
            return reached.hidden
    raise AssertionError(f"{type(model).__name__} did not call its last layer")


def _states_at_head(model: nn.Module, edits: Sequence[Edit | None], input_ids: Tensor) -> Tensor:
    """`_states` of a model that runs whole, one step further: what it gives to its head. input_ids: [T, W] ->
    [E * T, W, D], all rows of the first edit first.

    Its layers may hand on more than hidden states (keys and values, streams, the embedded tokens), so all of them run
    on every edit.
    """
    ids = input_ids.repeat(len(edits), 1)
    with _scaled(model, edits, input_ids.numel):
        return at_head(model, lambda: model(input_ids=ids, use_cache=False))


@contextmanager
def _repeated(layers: nn.ModuleList, count: int) -> Iterator[None]:
    """What comes to the first of these layers, [1, N, D], is repeated: [count, N, D]."""

    def repeat(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (args[0].repeat(count, 1, 1), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"].repeat(count, 1, 1)}

    # XGLM checks its size; elsewhere it would be broadcast
    def mask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        expanded = {name: _expanded(value, count) for name, value in kwargs.items()}
        return tuple(_expanded(value, count) for value in args), expanded

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(mask, with_kwargs=True).remove)
        stack.callback(layers[0].register_forward_pre_hook(repeat, with_kwargs=True).remove)
        yield


def _expanded(value: Any, count: int) -> Any:
    """A mask for so many batch entries; anything else as it is."""
    is_mask = isinstance(value, Tensor) and value.dim() == 4 and len(value) == 1
    return value.expand(count, -1, -1, -1) if is_mask else value


@contextmanager
def _left_after(layer: nn.Module) -> Iterator[None]:
    def leave(_: nn.Module, __: Any, output: Any) -> None:
        raise _Reached(output[0] if isinstance(output, tuple) else output)

    handle = layer.register_forward_hook(leave)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def in_one_batch(model: nn.Module, edits: Sequence[Edit | None]) -> Iterator[None]:
    """Within the context a batch holds as many rows for each edit, one edit after the other.

    Raises EditError if an edit does not fit the model.
    """
    size = 0

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal size
        hidden = args[0] if args else kwargs["hidden_states"]
        size = hidden.shape[0] * hidden.shape[1] // len(edits)

    handle = decoder_layers(model)[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        with _scaled(model, edits, lambda: size):
            yield
    finally:
        handle.remove()


@contextmanager
def _scaled(model: nn.Module, edits: Sequence[Edit | None], tokens: Callable[[], int]) -> Iterator[None]:
    """Every edit has its own part of the batch. tokens: of one edit in the pass that runs."""
    edit: Edit | None
    with ExitStack() as stack:
        for site in dict.fromkeys(edit.site for edit in edits if edit):
            layers = places(model, site)
            sizes = [end(layer) for layer in layers]
            at_site = [edit if edit and edit.site == site else None for edit in edits]
            for edit in filter(None, at_site):
                edit.check(sizes)
            for layer in sorted({layer for edit in at_site if edit for layer in edit.factors}):
                factors = torch.ones(len(edits), sizes[layer])
                for row, edit in enumerate(at_site):
                    if edit and (neurons := edit.factors.get(layer)):
                        factors[row, list(neurons)] = torch.tensor(list(neurons.values()))
                stack.enter_context(tapped(layers[layer], site, _tap(factors, tokens)))
        yield


def _tap(factors: Tensor, tokens: Callable[[], int]) -> Tap:
    """factors: [E, F]. The product is taken in float32 and rounded once, as in `models.hooks`."""

    def tap(h: Tensor, which: Tensor | None, offset: int) -> Tensor:
        scale = factors[:, offset : offset + h.shape[-1]].to(h.device)
        if which is not None:  # of an expert: which of the E * N tokens these are
            return (h * scale[which.to(scale.device) // tokens()]).to(h.dtype)
        by_edit = h.reshape(len(scale), -1, h.shape[-1])
        return (by_edit * scale[:, None]).to(h.dtype).view_as(h)

    return tap
