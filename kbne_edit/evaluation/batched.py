"""Many edits of one model in one pass: shared layers are computed once, the others as a batch with an entry per edit.

Texts are packed into trees (`models.trees`), so a shared prefix is stored once, and a pass takes a tree under many
edits (`states`). The head is computed in blocks of rows, so the logits of a whole pass are never held.

Legend: E edits, N tokens of a tree, K kept positions, D hidden size, F neurons of a layer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..attribution.head import after_head, before_head, head, is_plain
from ..edit import Edit
from ..errors import InputError
from ..models.masks import longest
from ..models.places import is_recurrent
from ..models.trees import Tree, cut
from ..recipe import Probe
from .states import states_of
from .workers import answers, share

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
    request = _Request(pairs, edits, temperature)
    parts = answers(request, lambda: request.run(model, update, kept))
    return Scored(
        np.sum([part.logprobs for part in parts], 0),  # each text is scored by one process, and 0 by the others
        np.logical_and.reduce([part.greedy for part in parts]),
        np.array([len(continuation) for _, continuation in pairs]),
    )


class Part(NamedTuple):
    """A process's share: 0 and True for texts that another one scores. logprobs, greedy: [E, n]."""

    logprobs: np.ndarray
    greedy: np.ndarray


@dataclass(frozen=True)
class _Request:
    """What `score_edits` is asked."""

    pairs: Sequence[Pair]
    edits: Sequence[Edit | None]
    temperature: float

    def answer(self, scorer: Any) -> Part:
        return self.run(scorer.model)

    @torch.inference_mode()
    def run(
        self, model: nn.Module, update: Callable[[int], None] = lambda _: None, kept: BaseStates | None = None
    ) -> Part:
        """This process's share of the trees. update, kept: as of `score_edits`."""
        rows, lookups = unique_rows(self.pairs)
        shape = (len(self.edits), len(self.pairs))
        part = Part(np.zeros(shape), np.ones(shape, bool))
        trees = list(cut(rows, int(min(TREE_TOKENS, longest(model)))))
        own = share(trees)
        update(len(self.edits) * sum(len(of_row) for tree in trees if tree not in own for of_row in lookups[tree]))
        passes = _passes(own, rows, lookups, self.edits)
        for one, states in _with_kept(model, passes, kept):
            lookup = one.lookup
            logp, hits = _looked_up(model, states, lookup.index, lookup.target, self.temperature)
            for row in range(len(one.edits)):
                np.add.at(part.logprobs[one.first + row], lookup.pair, logp[row])
                np.logical_and.at(part.greedy[one.first + row], lookup.pair, hits[row])
            update(len(one.edits) * one.lookups)
        return part


def score_share(model: nn.Module, pairs: Sequence[Pair], temperature: float, update: Callable[[int], None]) -> Part:
    """This process's share of what `score_edits` gives for the model as it is, [1, n]."""
    return _Request(pairs, [None], temperature).run(model, update)


@dataclass(frozen=True)
class _Pass:
    """A tree under the edits from number `first` on, and what is looked up in it: so many lookups."""

    tree: Tree
    edits: Sequence[Edit | None]
    lookup: TokenLookups
    first: int
    lookups: int

    @property
    def nodes(self) -> list[int]:
        return self.lookup.nodes

    @property
    def key(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(self.tree.tokens), tuple(self.nodes)


def _passes(
    trees: Sequence[slice],
    rows: Sequence[tuple[int, ...]],
    lookups: Sequence[Sequence[Lookup]],
    edits: Sequence[Edit | None],
) -> Iterator[_Pass]:
    """trees: the rows of each."""
    for part in trees:
        tree = Tree(rows[part])
        lookup = TokenLookups.of(tree, lookups[part])
        step = max(_BATCH_TOKENS // len(tree.tokens), 1)
        for first in range(0, len(edits), step):
            yield _Pass(tree, edits[first : first + step], lookup, first, sum(map(len, lookups[part])))


def _with_kept(model: nn.Module, passes: Iterable[_Pass], kept: BaseStates | None) -> Iterator[tuple[_Pass, Tensor]]:
    """Each pass with the last layer's output at its kept nodes, [E, K, D]: from `kept` if it is there."""
    if kept is None:
        yield from states_of(model, passes)
        return
    known = []

    def unknown() -> Iterator[_Pass]:
        for part in passes:
            if list(part.edits) == [None] and part.key in kept:
                known.append(part)
            else:
                yield part

    for part, states in states_of(model, unknown()):
        if None in part.edits:
            kept[part.key] = states[list(part.edits).index(None)].clone()
        yield part, states
    for part in known:
        yield part, kept[part.key][None]


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
            part = "continuation" if len(context) else "context"
            raise InputError(f"the {part} of text {pair + 1} has no token in this model's tokenizer: leave it out")
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
