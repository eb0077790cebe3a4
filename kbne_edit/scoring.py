"""Log-likelihoods for lm-eval, with what requests share computed once.

lm-eval scores each (context, continuation) pair as a sentence of its own. But the sentences of one item begin alike
(three StereoSet sentences differ in one word, twelve BBQ answers follow one story), so most of that work is repeated.
Here the requests' token rows are sorted and packed into one long row as a *tree*: a token that several rows begin with
stands there once, and attention sees the tokens on the way from the root only. Positions count from the root. So
nothing is computed twice, nothing is padded, and a pass holds as many tokens as suits the machine.

The output head and the normalisation over the vocabulary, a third of the work on a small model, are computed at scored
positions only.

Rejected: a key/value cache of each beginning that its rows share. Beginnings of unlike length need batches of their
own, and on a CPU some fifty passes over the weights cost as much as the tokens they save.

Legend: N tokens of a tree, K kept positions, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .errors import InputError
from .masks import attention_mask, longest
from .progress import say

try:
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise InputError(f"evaluate needs lm-eval ({error}): install it with `pip install 'kbne-edit[eval]'`") from None

Pair = tuple[Sequence[int], Sequence[int]]  # token ids of the context and of the continuation

_TOKENS_CPU, _TOKENS = 512, 4096  # of one pass: attention within a pass grows with the square
_LOGIT_BYTES = 1 << 29  # of one pass: its tokens shrink as the vocabulary grows


class Scorer(HFLM):
    """lm-eval's model of transformers; log-likelihoods are computed as this module's head describes.

    Tokens, prefix token and truncation are HFLM's own, so the numbers are HFLM's up to rounding. `temperature` divides
    the logits (1: the model itself). Nothing is kept between calls, so a hooked and a bare model cannot mix.
    """

    def __init__(self, model: nn.Module, tokenizer):
        with quiet_lm_eval():
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1)
        self.temperature = 1.0
        self._tokens = self._tokens_of_a_pass()

    def _tokens_of_a_pass(self) -> int:
        most = _TOKENS_CPU if self.device.type == "cpu" else _TOKENS
        most = min(most, max(_LOGIT_BYTES // (4 * self.model.config.vocab_size), 64))
        return int(min(most, self.max_length, longest(self.model)))

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
        for part in _packs(rows, self._tokens):
            self._score_pack(rows[part], lookups[part], total, greedy)
            if update:
                update(sum(map(len, lookups[part])))
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    def _score_pack(self, rows, lookups: list[list[_Lookup]], total: np.ndarray, greedy: np.ndarray) -> None:
        try:
            pairs, values, hits = self._run_pack(rows, lookups)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise InputError("out of memory for a single item: use a smaller --dtype, or --device cpu") from None
            say(f"out of memory with {len(rows)} rows in a pass: going on with half")
            for half in (slice(0, len(rows) // 2), slice(len(rows) // 2, None)):
                self._score_pack(rows[half], lookups[half], total, greedy)
            return
        np.add.at(total, pairs, values)
        np.logical_and.at(greedy, pairs, hits)

    def _run_pack(self, rows, lookups: list[list[_Lookup]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One pass: (pair, log-probability, is it the likeliest token) of every token of every continuation."""
        tree, kept, index, target, owner = Tree(rows), {}, [], [], []
        for path, of_row in zip(tree.paths, lookups, strict=True):
            for pair, start, tokens in of_row:
                index += [kept.setdefault(node, len(kept)) for node in path[start : start + len(tokens)]]
                target += tokens
                owner += [pair] * len(tokens)
        logits = self.logits_at(tree, list(kept))
        places, wanted = (torch.tensor(x, device=logits.device) for x in (index, target))
        blocks = logits.split(64)  # no second tensor of the logits' size
        values = logits[places, wanted] - torch.cat([block.logsumexp(-1) for block in blocks])[places]
        hits = torch.cat([block.argmax(-1) for block in blocks])[places] == wanted
        return np.array(owner), values.double().cpu().numpy(), hits.cpu().numpy()

    def logits_of(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Logits [sum of lengths, V] float32 on the CPU, of every token of the rows."""
        trees = [Tree(rows[part]) for part in _packs(rows, self._tokens)]
        return torch.cat([self.logits_at(tree, [n for path in tree.paths for n in path]).cpu() for tree in trees])

    @torch.inference_mode()
    def logits_at(self, tree: Tree, keep: list[int]) -> Tensor:
        """Logits [K, V] float32 of the tree's tokens `keep`.

        The head is given the kept positions only, by a hook on its input; what a model does to its logits after the
        head (scales, soft caps) works element by element, and so does not mind.
        """
        index, depth = torch.tensor(keep, device=self.device), np.array(tree.depth)
        handle = self.model.get_output_embeddings().register_forward_pre_hook(
            lambda _, args: (args[0][:, index], *args[1:])
        )
        try:
            logits = self.model(
                input_ids=torch.tensor([tree.tokens], device=self.device),
                position_ids=torch.tensor([tree.depth], device=self.device),
                attention_mask=attention_mask(self.model, tree.seen, depth, depth), use_cache=False,
            ).logits[0]  # fmt: skip
        finally:
            handle.remove()
        return logits.float() if self.temperature == 1 else logits.float() / self.temperature


class Tree:
    """Rows of tokens, each shared beginning of neighbours once.

    tokens, depth: [N]; seen: [N, N], what each token is preceded by, itself included; paths: each row's tokens' places.
    """

    def __init__(self, rows: Sequence[Sequence[int]]):
        self.tokens: list[int] = []
        self.depth: list[int] = []
        self.paths: list[list[int]] = []
        previous, path = (), []
        for row in rows:
            shared = _common(previous, row)
            path = path[:shared] + list(range(len(self.tokens), len(self.tokens) + len(row) - shared))
            self.tokens += row[shared:]
            self.depth += range(shared, len(row))
            self.paths.append(path)
            previous = row
        self.seen = np.zeros((len(self.tokens),) * 2, bool)
        for path in self.paths:
            for length, node in enumerate(path, 1):
                self.seen[node, path[:length]] = True


class _Lookup(NamedTuple):
    """One pair within its row: its continuation's tokens are predicted from position `start` on."""

    pair: int
    start: int
    tokens: Sequence[int]


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


def _packs(rows: Sequence[Sequence[int]], tokens: int) -> Iterator[slice]:
    """Cut rows, in their order, into trees of at most `tokens` tokens (but one row at least)."""
    start, size = 0, 0
    for i, row in enumerate(rows):
        added = len(row) - (_common(rows[i - 1], row) if i > start else 0)
        if i > start and size + added > tokens:
            yield slice(start, i)
            start, size, added = i, 0, len(row)
        size += added
    if rows:
        yield slice(start, len(rows))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


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
