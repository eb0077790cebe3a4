"""Regard parity: how a model's continuations speak of people of different groups (as in BOLD and HolisticBias).

Each neutral beginning is continued for every group, with the same random numbers. A continuation is scored twice: by
the model itself, log P(a good word) - log P(a bad word) after a fixed frame, minus the same with the group masked; and
by the words of two published lists. It is a secondary measure, because the judge is the model itself, with its own
bias.

Legend: B rows generated at once, G groups, T tokens.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..benchmark import Answer, Benchmark, Figure, sample
from .content import capital, fill, logsum, mapping, read_content, require_readable, text, texts

if TYPE_CHECKING:
    from ..scoring import Scorer

_SOURCE = "kbne-edit, docs/measures/regard_parity.md; after BOLD, arXiv:2101.11718, and HolisticBias, arXiv:2205.09209"
SAMPLES, TOKENS = 10, 16  # continuations of each beginning and group, and their length
_ROWS = 64  # generated at once


@dataclass(frozen=True)
class Regard:
    """Content of the measure. groups: {group: words}, the first is the reference; masked: words in place of a group."""

    masked: str
    judge: str
    good: tuple[str, ...]
    bad: tuple[str, ...]
    groups: Mapping[str, str]
    prefixes: tuple[str, ...]
    good_words: frozenset[str]
    bad_words: frozenset[str]

    @classmethod
    def from_dict(cls, data: Mapping) -> Regard:
        """Raises InputError where the content is not of this form."""
        lists = {key: frozenset(texts(data.get(key), key)) for key in ("good_words", "bad_words")}
        return cls(
            masked=text(data.get("masked"), "masked"),
            judge=text(data.get("judge"), "judge"),
            good=texts(data.get("good"), "good"),
            bad=texts(data.get("bad"), "bad"),
            groups={str(g): text(w, f"groups.{g}") for g, w in mapping(data.get("groups"), "groups").items()},
            prefixes=texts(data.get("prefixes"), "prefixes", 2),
            **lists,
        )

    def beginning(self, prefix: str, words: str) -> str:
        return fill(prefix, {"person": words, "Person": capital(words)})

    def by_words(self, continuation: str) -> int:
        """Number of good words minus number of bad ones."""
        words = re.findall(r"[a-z]+", continuation.casefold())
        return sum((word in self.good_words) - (word in self.bad_words) for word in words)


def regard_figures(groups: Sequence[str]) -> tuple[Figure, ...]:
    """Columns: regard of every group, then the words' balance of every group."""
    size = len(groups)

    def gap(start: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda m: m[..., start : start + size].max(-1) - m[..., start : start + size].min(-1)

    def against(i: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda m: m[..., i] - m[..., 0]

    judged = "log P(good word) - log P(bad word) in a fixed frame, less the same with the group masked"
    figures = [
        Figure(
            "largest gap",
            gap(0),
            0,
            unit="nats",
            definition=f"Largest less smallest mean regard over groups; regard is {judged}.",
            source=_SOURCE,
        ),
        Figure(
            "largest gap by words",
            gap(size),
            0,
            unit="words",
            definition="Largest less smallest mean over groups of good less bad words in a continuation, by two lists.",
            source=_SOURCE,
        ),
    ]
    for i, group in enumerate(groups[1:], 1):
        definition = f"Mean regard of {group} less that of {groups[0]}; regard is {judged}."
        title = f"{group} - {groups[0]}"
        figures.append(Figure(title, against(i), None, unit="nats", definition=definition, source=_SOURCE))
    return tuple(figures)


@dataclass(frozen=True)
class OpenEnded(Benchmark):
    """A benchmark whose requests are the model's own continuations, generated for every model."""

    content: Regard = field(kw_only=True)
    prefixes: tuple[str, ...] = field(kw_only=True)
    samples: int = field(kw_only=True)

    def take(self, items: Sequence[int]) -> OpenEnded:
        return open_ended(self.content, [self.prefixes[i] for i in items], self.samples)

    def measure(self, scorer: Scorer, update: Callable[[int], None] | None = None) -> np.ndarray:
        """Columns [n, 2 G]. Continuations are drawn with fixed seeds, the same for every group and model."""
        return np.array([self._item(scorer, prefix, number) for number, prefix in enumerate(self.prefixes)])

    def _item(self, scorer: Scorer, prefix: str, number: int) -> list[float]:
        content = self.content
        begun = [content.beginning(prefix, words) for words in content.groups.values()]
        rows = [scorer.tokenizer(start)["input_ids"] for start in begun for _ in range(self.samples)]
        seeds = [number * self.samples + k for _ in begun for k in range(self.samples)]
        drawn = continuations(scorer, rows, seeds)
        told = [f"{begun[i // self.samples]}{continued}" for i, continued in enumerate(drawn)]
        masked = [f"{content.beginning(prefix, content.masked)}{continued}" for continued in drawn]
        regard = np.subtract(self._judged(scorer, told), self._judged(scorer, masked))
        balance = np.array([content.by_words(continued) for continued in drawn], float)
        of_groups = (values.reshape(len(begun), self.samples).mean(1) for values in (regard, balance))
        return [float(value) for values in of_groups for value in values]

    def _judged(self, scorer: Scorer, told: Sequence[str]) -> np.ndarray:
        """log P(good) - log P(bad) of each text. [texts]"""
        content = self.content
        words = (*content.good, *content.bad)
        frames = [fill(content.judge, {"text": text}) for text in told]
        pairs = scorer.encode_pairs([(frame, f" {word}") for frame in frames for word in words])
        logp = np.array([answer[0] for answer in scorer.score(pairs)]).reshape(len(told), len(words))
        good = len(content.good)
        return np.array([logsum(row[:good]) - logsum(row[good:]) for row in logp])


def regard_benchmark(language: str, tokenizer: Any, limit: int | None, samples: int = SAMPLES) -> OpenEnded:
    """The beginnings of a language, at most `limit`. Raises NoDataError."""
    content = Regard.from_dict(read_content("regard", language))
    require_readable("regard_parity", tokenizer, [content.beginning(p, content.masked) for p in content.prefixes])
    return open_ended(content, [content.prefixes[i] for i in sample(len(content.prefixes), limit)], samples)


def open_ended(content: Regard, prefixes: Sequence[str], samples: int) -> OpenEnded:
    def read(_: int, __: list[Answer]) -> list[float]:
        raise TypeError("continuations are made by `measure`")

    return OpenEnded(
        name="regard_parity",
        kind="open",
        pairs=[],
        sizes=[0] * len(prefixes),
        groups=[""] * len(prefixes),
        read=read,
        figures=regard_figures(list(content.groups)),
        clusters=[f"regard {prefix}" for prefix in prefixes],
        content=content,
        prefixes=tuple(prefixes),
        samples=samples,
    )


def continuations(
    scorer: Scorer, rows: Sequence[Sequence[int]], seeds: Sequence[int], tokens: int = TOKENS
) -> list[str]:
    """Continuations of rows of token ids, sampled from the model; rows of one seed use the same random numbers."""
    result: list[str] = []
    for start in range(0, len(rows), _ROWS):
        part = slice(start, start + _ROWS)
        result += _draw(scorer, rows[part], seeds[part], tokens)
    return result


def _draw(scorer: Scorer, rows: Sequence[Sequence[int]], seeds: Sequence[int], tokens: int) -> list[str]:
    """Rows are padded on the left. A token is drawn by inverting the cumulative distribution at a seeded number."""
    import torch

    tokenizer, model = scorer.tokenizer, scorer.model
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    numbers = np.stack([np.random.default_rng(seed).random(tokens) for seed in seeds])
    # transformers renamed the argument and the field of the result.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    drawn = []
    cache = None
    with torch.inference_mode():
        for step in range(tokens):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **{name: cache})
            cache = out[name]
            running = out.logits[:, -1].double().softmax(-1).cumsum(-1)
            threshold = torch.tensor(numbers[:, step : step + 1], device=device) * running[:, -1:]
            ids = torch.searchsorted(running, threshold).clamp(max=running.shape[-1] - 1)
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            drawn.append(ids)
    return [_until_end(tokenizer, row) for row in torch.cat(drawn, 1).tolist()]


def _until_end(tokenizer: Any, ids: list[int]) -> str:
    end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
    return tokenizer.decode(ids[:end], skip_special_tokens=True).split("\n")[0]
