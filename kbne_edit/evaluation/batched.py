"""Many edits of one model in one pass: shared layers are computed once, the others as a batch with an entry per edit.

Texts are packed into trees (`models.trees`), so a shared prefix is stored once. A pass starts with one batch entry.
Before the first edited layer it is repeated once per edit, and from there each entry has its own factors. So lower
layers are computed once for all edits, and the weights of upper layers are read once. The head is computed in blocks of
rows, so the logits of a whole pass are never held.

Legend: E edits, N tokens of a tree, K kept positions, D hidden size, F neurons of a layer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..attribution.head import after_head, at_head, before_head, head, is_plain
from ..edit import Edit
from ..errors import InputError
from ..families import end
from ..models.hooks import Tap, tapped
from ..models.masks import attention_mask, longest
from ..models.places import decoder_layers, is_recurrent, places
from ..models.trees import Tree, cut, unpacked
from ..recipe import Probe

TREE_TOKENS = 512  # of one tree: the cost of attention grows with its square
_BATCH_TOKENS = 4096  # of one pass, over all edits: bounds memory, and is enough to keep a matrix product busy
VOCABULARY_BLOCK = 2048  # rows of the head at a time: 33 MB of logits for all tokens of a pass
_HEAD_ROWS = 512  # positions that go through the head at once: it makes [rows, V] logits

# The last layer's output of the model itself, [K, D], by the tokens of a tree and the K of them that are kept
BaseStates = dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor]
Pair = tuple[Sequence[int], Sequence[int]]  # token ids of a context (one at least) and of its continuation


@dataclass(frozen=True)
class Scored:
    """Scores of continuations under each edit. logprobs: [E, n] float64, summed over the tokens, in nats."""

    logprobs: np.ndarray
    greedy: np.ndarray
    tokens: np.ndarray

    @property
    def per_token(self) -> np.ndarray:
        """Mean log-probability per token, [E, n]."""
        return self.logprobs / self.tokens


def sentence_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text after a beginning-of-text token, as lm-eval scores a text without a context.

    Some tokenizers (Qwen's) add none. Then the first word would not be scored, and the text would seem to begin in the
    middle: on a 0.6B model, such scores of twins correlate .35 with the proper ones.
    """
    ids = tokenizer(text)["input_ids"]
    start = getattr(tokenizer, "bos_token_id", None)
    start = getattr(tokenizer, "eos_token_id", None) if start is None else start
    return list(ids) if start is None or ids[:1] == [start] else [start, *ids]


def margins_of_edits(
    model: nn.Module,
    tokenizer: Any,
    probes: Sequence[Probe],
    edits: Sequence[Edit | None],
    *,
    temperature: float = 1.0,
    kept: BaseStates | None = None,
) -> np.ndarray:
    """m of every probe under every edit (None: the model itself), [E, probes], nats per token.

    m = mean log-probability per token of a probe's first sentence minus that of its second.
    temperature: divides the logits. kept: as of `score_edits`. Raises EditError if an edit does not fit the model.
    """
    rows = [sentence_ids(tokenizer, text) for probe in probes for text in (probe.first, probe.second)]
    pairs = [(row[:1], row[1:]) for row in rows]
    scored = score_edits(model, pairs, edits, temperature=temperature, kept=kept).per_token
    return scored[:, ::2] - scored[:, 1::2]


@torch.inference_mode()
def score_edits(
    model: nn.Module,
    pairs: Sequence[Pair],
    edits: Sequence[Edit | None],
    *,
    temperature: float = 1.0,
    update: Callable[[int], None] = lambda _: None,
    kept: BaseStates | None = None,
) -> Scored:
    """Log-probability of each continuation after its context under each edit, and whether it is the greedy one.

    pairs: short enough for the model (`shortened`). temperature: divides the logits. update: called with the number of
    pairs done since, times edits. kept: a cache of the unedited model's outputs, so that a flattened base needs no
    second pass.
    """
    rows, lookups = unique_rows(pairs)
    shape = (len(edits), len(pairs))
    total, greedy = np.zeros(shape), np.ones(shape, bool)
    for part in cut(rows, int(min(TREE_TOKENS, longest(model)))):
        tree = Tree(rows[part])
        lookup = TokenLookups.of(tree, lookups[part])
        step = max(_BATCH_TOKENS // len(tree.tokens), 1)
        for first in range(0, len(edits), step):
            some = edits[first : first + step]
            states = _states_at(model, tree, some, lookup.nodes, kept)
            logp, hits = _looked_up(model, states, lookup.index, lookup.target, temperature)
            for row in range(len(some)):
                np.add.at(total[first + row], lookup.pair, logp[row])
                np.logical_and.at(greedy[first + row], lookup.pair, hits[row])
            update(len(some) * sum(map(len, lookups[part])))
    return Scored(total, greedy, np.array([len(continuation) for _, continuation in pairs]))


def _states_at(
    model: nn.Module, tree: Tree, edits: Sequence[Edit | None], nodes: list[int], kept: BaseStates | None
) -> Tensor:
    """The last layer's output at some tokens of a tree, [E, K, D]."""
    key = (tuple(tree.tokens), tuple(nodes))
    if kept is not None and list(edits) == [None] and key in kept:
        return kept[key][None]
    states = last_states(model, tree, edits)[:, nodes]
    if kept is not None and None in edits:
        kept[key] = states[list(edits).index(None)].clone()
    return states


class Lookup(NamedTuple):
    """One pair in its row. The continuation's tokens are predicted from position `start` on."""

    pair: int
    start: int
    tokens: Sequence[int]


@dataclass(frozen=True)
class TokenLookups:
    """The token probabilities to look up in one pass over a tree. nodes: the K nodes to keep. For each of T tokens:
    pair; index: of the kept node that predicts it; target: the token.
    """

    nodes: list[int]
    pair: list[int]
    index: list[int]
    target: list[int]

    @classmethod
    def of(cls, tree: Tree, lookups: Sequence[Sequence[Lookup]]) -> TokenLookups:
        """lookups: of each row of the tree."""
        order: dict[int, int] = {}
        result = cls([], [], [], [])
        for path, of_row in zip(tree.paths, lookups, strict=True):
            for pair, start, tokens in of_row:
                result.index.extend(order.setdefault(node, len(order)) for node in path[start : start + len(tokens)])
                result.target.extend(tokens)
                result.pair.extend([pair] * len(tokens))
        result.nodes.extend(order)
        return result


def shortened(pairs: Sequence[Pair], longest_row: int) -> list[Pair]:
    """The pairs as a model of this context length can read them: a context that is too long loses its beginning.

    Raises InputError for a continuation that is too long by itself.
    """
    result: list[Pair] = []
    for pair, (context, continuation) in enumerate(pairs):
        room = longest_row + 1 - len(continuation)  # the continuation's last token is not read
        if room < 1:
            raise InputError(f"request {pair}: its continuation is longer than {longest_row} tokens: leave it out")
        result.append((context[-room:], continuation))
    return result


def unique_rows(pairs: Sequence[Pair]) -> tuple[list[tuple[int, ...]], list[list[Lookup]]]:
    """The distinct rows that a model has to read, sorted, and the lookups of each.

    A row is context + continuation without the last token, so answers of one token share a row. Raises InputError for
    an empty context or continuation.
    """
    by_row: dict[tuple[int, ...], list[Lookup]] = {}
    for pair, (context, continuation) in enumerate(pairs):
        if not len(context) or not len(continuation):
            raise InputError(f"request {pair}: context and continuation need a token each")
        row = (*context, *continuation[:-1])
        by_row.setdefault(row, []).append(Lookup(pair, len(row) - len(continuation), continuation))
    rows = sorted(by_row)
    return rows, [by_row[row] for row in rows]


def _looked_up(
    model: nn.Module, states: Tensor, index: list[int], target: list[int], temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """(log-probabilities [E, T], is it the likeliest token [E, T]) of tokens at kept positions. states: [E, K, D]."""
    if not is_recurrent(model) and is_plain(model, states[:1, :1]):
        return _by_blocks(model, states, index, target, temperature)
    at: Any
    place: Any
    count, kept = states.shape[:2]
    # In the order of positions, so that each block of logits serves only its own lookups.
    wanted: list[list[int]] = [[] for _ in range(kept)]
    for place, position in enumerate(index):
        wanted[position].append(place)
    logp, hits = np.zeros((count, len(index))), np.zeros((count, len(index)), bool)
    flat = states.flatten(0, 1)
    for start in range(0, len(flat), _HEAD_ROWS):
        logits = logits_of(model, flat[start : start + _HEAD_ROWS])
        if temperature != 1:
            logits = logits / temperature
        # A few rows at a time stay in the processor's cache.
        norm = torch.cat([rows.logsumexp(-1) for rows in logits.split(8)])
        largest = torch.cat([rows.amax(-1) for rows in logits.split(8)])
        places = [(r, *divmod(start + r, kept)) for r in range(len(logits))]
        looked = [(r, edit, place) for r, edit, position in places for place in wanted[position]]
        if not looked:
            continue
        at, edit, place = (np.array(column) for column in zip(*looked, strict=True))
        tokens = torch.tensor([target[p] for p in place.tolist()], device=logits.device)
        at = torch.from_numpy(at).to(logits.device)
        values = logits[at, tokens]
        logp[edit, place] = (values - norm[at]).double().cpu().numpy()
        hits[edit, place] = (values == largest[at]).cpu().numpy()
    return logp, hits


def _by_blocks(
    model: nn.Module, states: Tensor, index: list[int], target: list[int], temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """`_looked_up` in one pass over blocks of the head's rows, so that logits [E * K, V] are never held."""
    count, kept = states.shape[:2]
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    z = before_head(model, states.reshape(1, count * kept, -1)).to(output.weight.device)
    at = (torch.arange(count)[:, None] * kept + torch.tensor(index)).flatten().to(z.device)
    tokens = torch.tensor(target, device=z.device).repeat(count)
    values = torch.empty(len(at), device=z.device)
    largest, total = torch.full((len(z),), -torch.inf, device=z.device), torch.zeros(len(z), device=z.device)
    for start in range(0, len(output.weight), VOCABULARY_BLOCK):
        block = slice(start, start + VOCABULARY_BLOCK)
        bias = None if output.bias is None else output.bias[block].float()
        logits = nn.functional.linear(z, output.weight[block].float(), bias)
        if temperature != 1:
            logits /= temperature
        inside = ((tokens >= start) & (tokens < block.stop)).nonzero()[:, 0]
        values[inside] = logits[at[inside], tokens[inside] - start]
        new = torch.maximum(largest, logits.amax(1))
        total = total * (largest - new).exp() + logits.sub_(new[:, None]).exp_().sum(1)
        largest = new
    logp = values - (largest + total.log())[at]
    hits = values == largest[at]
    return logp.double().view(count, -1).cpu().numpy(), hits.view(count, -1).cpu().numpy()


@torch.inference_mode()
def logits_of(model: nn.Module, states: Tensor) -> Tensor:
    """Logits [K, V] float32 from outputs of `last_states`, [K, D]: norm, head and what follows it."""
    return after_head(model, states) if is_recurrent(model) else head(model, states[None])


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
    """`_states` of a model that runs whole, one step further: what it gives to its head.

    Its layers may hand on more than hidden states (keys and values, streams, the embedded tokens), so all of them run
    on every edit.
    """
    ids = input_ids.expand(len(edits), -1)
    with _scaled(model, edits, lambda: input_ids.shape[1]):
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
        return tuple(map(expanded, args)), {name: expanded(value) for name, value in kwargs.items()}

    def expanded(value: Any) -> Any:
        is_mask = isinstance(value, Tensor) and value.dim() == 4 and len(value) == 1
        return value.expand(count, -1, -1, -1) if is_mask else value

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(mask, with_kwargs=True).remove)
        stack.callback(layers[0].register_forward_pre_hook(repeat, with_kwargs=True).remove)
        yield


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
