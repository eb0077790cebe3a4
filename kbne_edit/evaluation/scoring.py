"""Log-likelihoods for lm-eval, with what requests share computed once.

lm-eval scores each (context, continuation) pair separately. But the sentences of one item begin alike (three StereoSet
sentences differ in one word, twelve BBQ answers follow one story), so most of that work is repeated. Here the token
rows are sorted and packed into trees (`trees`), so that nothing is computed twice.

Legend: K kept positions, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..edit import Edit
from ..errors import InputError
from ..models.hooks import hooked
from ..models.loading import load_tokenizer
from ..models.on_demand import load_that_fits, supply_of
from ..models.trees import Tree, cut, logits_at, tokens_of_a_pass
from ..progress import say
from .batched import Lookup, Pair, Part, TokenLookups, score_share, shortened, unique_rows
from .workers import announce, answers, share

try:
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise InputError(f"evaluate needs lm-eval ({error}): install it with `pip install 'kbne-edit[eval]'`") from None


class Scorer(HFLM):
    """lm-eval's HFLM with the log-likelihoods of this module.

    Tokens, prefix token and truncation are HFLM's, so the numbers are HFLM's up to rounding. `temperature` divides the
    logits (1: the model itself). Nothing is kept between calls, so results with and without hooks cannot mix.
    """

    def __init__(self, model: nn.Module, tokenizer: Any):
        with quiet_lm_eval():
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1)
        self.temperature = 1.0
        self._edit: Edit | None = None
        self._tokens = min(tokens_of_a_pass(self.model), self.max_length)

    def _create_tokenizer(self, model: Any, tokenizer: Any, **_: Any) -> None:
        """lm-eval's takes transformers' own classes alone, and ours works in another process (`load_tokenizer`)."""
        self.tokenizer = tokenizer

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """The method that lm-eval calls, with [((context, continuation), context ids, continuation ids), …]."""
        return self.score([(context, continuation) for _, context, continuation in requests])

    def encode_pairs(self, requests: Sequence[tuple[str, str]]) -> list[Pair]:
        """(context, continuation) as token ids, by lm-eval's loglikelihood with all its special cases."""
        from lm_eval.api.instance import Instance

        result: list[Pair] = []

        def collect(encoded: Any, **_: Any) -> list[tuple[float, bool]]:
            result.extend((context, continuation) for _, context, continuation in encoded)
            return []

        instances = [Instance("loglikelihood", {}, request, 0) for request in requests]
        self._loglikelihood_tokens = collect  # type: ignore[method-assign, assignment] # shadows the method for this one call
        try:
            self.loglikelihood(instances, disable_tqdm=True)
        finally:
            del self._loglikelihood_tokens
        return result

    def score(self, pairs: Sequence[Pair], update: Callable[[int], None] | None = None) -> list[tuple[float, bool]]:
        """(log-probability, is the greedy continuation) of each pair. update: called with the number of pairs since."""
        request = _Request(pairs, self.temperature, self._edit)
        parts = answers(request, lambda: self._share(pairs, update or (lambda _: None)))
        total = np.sum([part.logprobs for part in parts], 0)
        greedy = np.logical_and.reduce([part.greedy for part in parts])
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    @contextmanager
    def edited(self, edit: Edit | None) -> Iterator[None]:
        """Within the context the model is the one with this edit, by hooks; None: as it is."""
        with hooked(self.model, edit) if edit else nullcontext():
            self._edit = edit
            try:
                yield
            finally:
                self._edit = None

    def _share(self, pairs: Sequence[Pair], update: Callable[[int], None] = lambda _: None) -> Part:
        """This process's share of the pairs, [n]: 0 and True for the others."""
        pairs = shortened(pairs, self.max_length)
        if supply_of(self.model):  # each pass would read all weights: as many together as the memory holds
            scored = score_share(self.model, pairs, self.temperature, update)
            return Part(scored.logprobs[0], scored.greedy[0])
        rows, lookups = unique_rows(pairs)
        part = Part(np.zeros(len(pairs)), np.ones(len(pairs), bool))
        packs = list(cut(rows, self._tokens))
        own = share(packs)
        update(sum(len(of_row) for pack in packs if pack not in own for of_row in lookups[pack]))
        for pack in own:
            self._score_pack(rows[pack], lookups[pack], part.logprobs, part.greedy)
            update(sum(map(len, lookups[pack])))
        return part

    def _score_pack(
        self, rows: list[tuple[int, ...]], lookups: list[list[Lookup]], total: np.ndarray, greedy: np.ndarray
    ) -> None:
        try:
            pairs, values, hits = self._run_pack(rows, lookups)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise InputError("out of memory for a single item: use a smaller --dtype, or --device cpu") from None
            say(f"out of memory with {len(rows)} rows in a pass: continuing with half")
            for half in (slice(0, len(rows) // 2), slice(len(rows) // 2, None)):
                self._score_pack(rows[half], lookups[half], total, greedy)
            return
        np.add.at(total, pairs, values)
        np.logical_and.at(greedy, pairs, hits)

    def _run_pack(
        self, rows: list[tuple[int, ...]], lookups: list[list[Lookup]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One pass: (pair, log-probability, is it the likeliest token) of every token of every continuation."""
        tree = Tree(rows)
        lookup = TokenLookups.of(tree, lookups)
        logits = self.logits_at(tree, lookup.nodes)
        places, wanted = (torch.tensor(x, device=logits.device) for x in (lookup.index, lookup.target))
        blocks = logits.split(64)  # no second tensor of the logits' size
        values = logits[places, wanted] - torch.cat([block.logsumexp(-1) for block in blocks])[places]
        hits = torch.cat([block.argmax(-1) for block in blocks])[places] == wanted
        return np.array(lookup.pair), values.double().cpu().numpy(), hits.cpu().numpy()

    def logits_at(self, tree: Tree, keep: list[int]) -> Tensor:
        """Logits [K, V] float32 of the tree's tokens `keep`, divided by the temperature."""
        logits = logits_at(self.model, tree, keep)
        return logits if self.temperature == 1 else logits / self.temperature


@dataclass(frozen=True)
class _Request:
    """What `Scorer.score` is asked, and of which model."""

    pairs: Sequence[Pair]
    temperature: float
    edit: Edit | None

    def answer(self, scorer: Scorer) -> Part:
        scorer.temperature = self.temperature
        with scorer.edited(self.edit):
            return scorer._share(self.pairs)


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Silences lm-eval's advice, which concerns its own command line."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True)
class _Load:
    """Arguments of `scorers`, for another process."""

    path: Path
    base: Path
    device: str
    dtype: str

    def load(self) -> Scorer:
        return scorers(self.base, self.device, self.dtype)(self.path)


def scorers(base: Path, device: str, dtype: str) -> Callable[[Path], Scorer]:
    """Loads the model of a directory, with the tokenizer of the base."""
    tokenizer = load_tokenizer(base)

    def scorer(path: Path) -> Scorer:
        announce(_Load(path, base, device, dtype))
        return Scorer(load_that_fits(path, getattr(torch, dtype), device), tokenizer)

    return scorer
