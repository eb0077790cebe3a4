"""Log-likelihoods for lm-eval, with what requests share computed once.

lm-eval scores each (context, continuation) pair as a sentence of its own. But the sentences of one item begin alike
(three StereoSet sentences differ in one word, twelve BBQ answers follow one story), so most of that work is repeated.
Here the requests' token rows are sorted and cut into runs with a common beginning of L tokens, by the cut that leaves
the fewest tokens to compute. A run's beginning is run once and leaves a key/value cache, which its rows then share.

Runs with the same L go together in one batch: so no beginning is padded, the ends are padded on the right only, where
causal attention never looks, and no mask or position has to be made by hand, for any architecture. Ends of unlike
length go in passes of their own where the padding would cost more than a pass. The output head and the normalisation
over the vocabulary, a third of the work on a small model, are computed at scored positions only.

Legend: R rows of a batch, T positions, N kept positions, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from inspect import signature
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .errors import InputError
from .progress import say

try:
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise InputError(f"evaluate needs lm-eval ({error}): install it with `pip install 'kbne-edit[eval]'`") from None

Pair = tuple[Sequence[int], Sequence[int]]  # token ids of the context and of the continuation

_RUN = 64  # rows of one run: bounds the search for the best cut
_PASS = 24  # tokens that cost as much as one more pass does: reading the weights
_MAX_TOKENS = 4096  # of one pass
_LOGIT_BYTES = 1 << 29  # of one pass: the tokens of a pass shrink as the vocabulary grows


class Scorer(HFLM):
    """lm-eval's model of transformers; log-likelihoods are computed as this module's head describes.

    Tokens, prefix token and truncation are HFLM's own, so the numbers are HFLM's up to rounding. `temperature` divides
    the logits (1: the model itself). Nothing is kept between calls, so a hooked and a bare model cannot mix.
    """

    def __init__(self, model: nn.Module, tokenizer):
        with quiet_lm_eval():
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1)
        self.temperature = 1.0
        self._tokens = max(min(_MAX_TOKENS, _LOGIT_BYTES // (4 * model.config.vocab_size)), 64)
        names = signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs=None) -> list[tuple[float, bool]]:
        """What lm-eval calls, with [((context, continuation), context ids, continuation ids), …]."""
        return self.score([(context, continuation) for _, context, continuation in requests])

    def encode_pairs(self, requests: Sequence[tuple[str, str]]) -> list[Pair]:
        """(context, continuation) as lm-eval's loglikelihood turns it into tokens, special cases and all."""
        from lm_eval.api.instance import Instance

        found: list[Pair] = []

        def collect(encoded, **_):
            found.extend((context, continuation) for _, context, continuation in encoded)
            return []

        instances = [Instance("loglikelihood", {}, request, 0) for request in requests]
        self._loglikelihood_tokens = collect  # shadows the method for this one call
        try:
            self.loglikelihood(instances, disable_tqdm=True)
        finally:
            del self._loglikelihood_tokens
        return found

    def score(self, pairs: Sequence[Pair], update: Callable[[int], None] | None = None) -> list[tuple[float, bool]]:
        """(log-probability, is the greedy continuation) of each pair. update: called with the pairs done since."""
        rows, lookups = _unique(pairs, self.max_length)
        total, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
        for batch in _batches(_runs(rows), self._tokens):
            self._score_batch(batch, rows, lookups, total, greedy)
            if update:
                update(sum(len(lookups[row]) for run in batch for row in range(run.start, run.end)))
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    def _score_batch(self, batch: list[_Run], rows, lookups, total: np.ndarray, greedy: np.ndarray) -> None:
        try:
            found = self._run_batch(batch, rows, lookups)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise InputError("out of memory for a single item: use a smaller --dtype, or --device cpu") from None
            say(f"out of memory with {len(batch)} runs of rows in a batch: going on with half")
            for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                self._score_batch(half, rows, lookups, total, greedy)
            return
        for pairs, values, hits in found:
            np.add.at(total, pairs, values)
            np.logical_and.at(greedy, pairs, hits)

    @torch.inference_mode()
    def _run_batch(self, batch: list[_Run], rows, lookups) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """One pass over the runs' beginnings, some over the rows' ends: (pair, log-probability, greedy) arrays."""
        length, wanted = batch[0].length, _Wanted()
        ends = [(number, row) for number, run in enumerate(batch) for row in range(run.start, run.end)]
        for number, row in ends:
            wanted.add(number, lookups[row], 0, length)
        ends = sorted((end for end in ends if len(rows[end[1]]) > length), key=lambda end: -len(rows[end[1]]))
        cache = DynamicCache(config=self.model.config)
        results = [self._pass([rows[run.start][:length] for run in batch], wanted, cache if ends else None)]
        for start, end in _cut([len(rows[row]) - length for _, row in ends], self._tokens):
            wanted, part = _Wanted(), ends[start:end]
            for place, (_, row) in enumerate(part):
                wanted.add(place, lookups[row], length, len(rows[row]))
            branch = _branch(cache, torch.tensor([number for number, _ in part], device=self.device))
            results.append(self._pass([rows[row][length:] for _, row in part], wanted, branch))
        return [result for result in results if result is not None]

    def _pass(self, tokens: list[tuple[int, ...]], wanted: _Wanted, cache: DynamicCache | None):
        logits = self.logits_at(tokens, list(wanted.places), cache)
        if not wanted.places:
            return None
        index, target = (torch.tensor(x, device=logits.device) for x in (wanted.index, wanted.target))
        norm = torch.cat([block.logsumexp(-1) for block in logits.split(64)])
        values = logits[index, target] - norm[index]
        hits = torch.cat([block.argmax(-1) for block in logits.split(64)])[index] == target
        return np.array(wanted.pair), values.double().cpu().numpy(), hits.cpu().numpy()

    def logits_at(
        self, tokens: Sequence[Sequence[int]], places: list[tuple[int, int]], cache: DynamicCache | None = None
    ) -> Tensor:
        """Logits [N, V] float32 at the (row, position) `places` of rows of tokens, padded on the right to one length.

        The head is given the kept positions only, by a hook on its input; what a model does to its logits after the
        head (scales, soft caps) works element by element, and so does not mind.
        """
        width = max(map(len, tokens))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in tokens], device=self.device)
        flat = torch.tensor([row * width + position for row, position in places or [(0, 0)]], device=self.device)
        handle = self.model.get_output_embeddings().register_forward_pre_hook(
            lambda _, args: (args[0].flatten(0, 1)[flat][None], *args[1:])
        )
        try:
            kwargs = {self._cache_name: cache} if cache is not None else {}
            logits = self.model(input_ids=ids, use_cache=cache is not None, **kwargs).logits[0]
        finally:
            handle.remove()
        return logits.float() if self.temperature == 1 else logits.float() / self.temperature


class _Lookup(NamedTuple):
    """One pair within its row: its continuation's tokens are predicted from position `start` on."""

    pair: int
    start: int
    tokens: Sequence[int]


class _Run(NamedTuple):
    """Sorted rows start..end with a common beginning of `length` tokens."""

    start: int
    end: int
    length: int


class _Wanted:
    """Positions whose logits are kept, each once, and which token of which pair is looked up in them."""

    def __init__(self) -> None:
        self.places: dict[tuple[int, int], int] = {}
        self.index: list[int] = []
        self.target: list[int] = []
        self.pair: list[int] = []

    def add(self, row: int, lookups: list[_Lookup], low: int, high: int) -> None:
        """The lookups at positions low..high, counted from `low` within the pass."""
        for pair, start, tokens in lookups:
            for position in range(max(start, low), min(start + len(tokens), high)):
                place = (row, position - low)
                self.index.append(self.places.setdefault(place, len(self.places)))
                self.target.append(tokens[position - start])
                self.pair.append(pair)


def _unique(pairs: Sequence[Pair], max_length: int) -> tuple[list[tuple[int, ...]], list[list[_Lookup]]]:
    """Rows that the model has to read, sorted and each once, and each row's lookups.

    A row is context + continuation without its last token; too long a row loses its beginning, as in HFLM. Answers of
    one token have the same row: their logits are computed once.
    """
    found: dict[tuple[int, ...], list[_Lookup]] = {}
    for pair, (context, continuation) in enumerate(pairs):
        row = tuple([*context, *continuation][-(max_length + 1) :][:-1])
        if not len(context) or not len(continuation) or len(continuation) > max_length:
            raise InputError(f"request {pair}: context and continuation need a token each, and at most {max_length}")
        found.setdefault(row, []).append(_Lookup(pair, len(row) - len(continuation), continuation))
    rows = sorted(found)
    return rows, [found[row] for row in rows]


def _runs(rows: list[tuple[int, ...]]) -> list[_Run]:
    """Cut sorted rows into runs with a common beginning: the cut that saves the most tokens (k - 1) L in all."""
    common = [_common(a, b) for a, b in zip(rows, rows[1:], strict=False)]
    saved, cut = [0] * (len(rows) + 1), [0] * (len(rows) + 1)
    for end in range(1, len(rows) + 1):
        saved[end], cut[end] = saved[end - 1], end - 1
        length = len(rows[end - 1])
        for start in range(end - 2, max(end - _RUN, 0) - 1, -1):
            length = min(length, common[start])
            if not length:
                break
            if saved[start] + (end - 1 - start) * length > saved[end]:
                saved[end], cut[end] = saved[start] + (end - 1 - start) * length, start
    runs, end = [], len(rows)
    while end:
        start = cut[end]
        runs.append(_Run(start, end, min([len(rows[end - 1]), *common[start : end - 1]])))
        end = start
    return runs


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _batches(runs: list[_Run], tokens: int) -> Iterator[list[_Run]]:
    """Runs whose beginnings have the same length, at most `tokens` of them together (but one run at least)."""
    for length, same in groupby(sorted(runs, key=lambda run: (run.length, run.start)), lambda run: run.length):
        found, step = list(same), max(tokens // length, 1)
        yield from (found[i : i + step] for i in range(0, len(found), step))


def _cut(sizes: list[int], tokens: int) -> list[tuple[int, int]]:
    """Cut falling sizes into passes (start, end): each row is padded to its pass's first, and the sum is least."""
    least, cut = [0.0] + [math.inf] * len(sizes), [0] * (len(sizes) + 1)
    for start, size in enumerate(sizes):
        for end in range(start + 1, min(start + max(tokens // size, 1), len(sizes)) + 1):
            if (cost := least[start] + _PASS + (end - start) * size) < least[end]:
                least[end], cut[end] = cost, start
    passes, end = [], len(sizes)
    while end:
        passes.append((cut[end], end))
        end = cut[end]
    return passes


def _branch(cache: DynamicCache, owner: Tensor) -> DynamicCache:
    """A cache whose rows are the given rows of `cache`, which stays as it is."""
    branch = copy(cache)
    branch.layers = [copy(layer) for layer in cache.layers]
    branch.batch_select_indices(owner)
    return branch


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """No advice of lm-eval on how it is called: its own command line is meant, not this one."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
