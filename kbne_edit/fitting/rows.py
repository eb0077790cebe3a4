"""From a unit's sentences to the rows of the fit.

For two groups A, B and two attributes X, Y a unit's four sentences AX, AY, BX, BY have log-probabilities per token, and

    association = (AX - AY - BX + BY) / 2     the stereotype itself: the interaction of group and attribute
    sentiment   = (AX - AY + BX - BY) / 2     X against Y, whoever
    prior       = (AX + AY - BX - BY) / 2     A against B, whatever
    level       = (AX + AY + BX + BY) / 4     how likely the unit is at all

and a contrast (`contrasts`), of which two sentences are read, has

    tone        =  AX - AY                    a bad attribute against a good one

All are divided by the mean number of scored tokens. What the sentences begin with in common cancels in all but the
level, so it is not scored. An answer is scored without its question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .passes import Scored
from .units import Sentence, Unit

PARTS = ("association", "sentiment", "prior")
KINDS = (*PARTS, "level", "tone")
_SQUARE = np.array([[1, -1, -1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [0.5, 0.5, 0.5, 0.5]]) / 2

_SECONDS = 120  # of CPU time for all units
_UNREAD = 0.1  # share of unknown tokens from which on a tokenizer cannot read a text

Encode = Callable[
    [Sentence], tuple[list[int], list[int]]
]  # ids of the context (with the prefix token) and of the whole


@dataclass(frozen=True)
class UnitRows:
    """A unit's scored sentences, and how the kinds of rows are made of them.

    sentences: ax, ay, bx, by; of a contrast ax, ay. mixture: [kinds, sentences], per token; a kind that the unit does
    not have is a row of NaN.
    """

    sentences: tuple[Scored, ...]
    mixture: np.ndarray


def unit_rows(unit: Unit, contrast: bool, encode: Encode) -> UnitRows:
    """contrast: only the tone of the unit's attributes is wanted."""
    square = unit.square
    sentences = [square.ax, square.ay] if contrast else [square.ax, square.ay, square.bx, square.by]
    pairs = [encode(sentence) for sentence in sentences]
    shared = len(commonprefix([tuple(whole) for _, whole in pairs])) - 1
    scored = tuple(
        _scored(whole, len(context) - 1 if sentence.question else max(shared, 0))
        for sentence, (context, whole) in zip(sentences, pairs, strict=True)
    )
    mixture = np.full((len(KINDS), len(scored)), np.nan)
    if contrast:
        mixture[KINDS.index("tone")] = (1, -1)
    else:
        mixture[: len(_SQUARE)] = _SQUARE
    return UnitRows(scored, mixture / np.mean([sum(sentence.weights) for sentence in scored]))


def _scored(ids: Sequence[int], start: int) -> Scored:
    return Scored(tuple(ids), tuple(float(position >= start) for position in range(len(ids) - 1)))


def encode_units(path: Path, units: Sequence[Unit], contrasts: Sequence[Unit]) -> list[UnitRows]:
    """Rows of every unit and of every contrast in the tokens of the model at `path`; every other question as a chat.

    The tokenizer and its template work in a child process, within limits of time and memory. Raises CheckpointError.
    """
    from ..models.confined import confined
    from ..models.loading import prepare, read_tokenizer

    every = [*units, *contrasts]

    def work() -> list[list]:
        tokenizer = read_tokenizer(path)
        result, questions = [], 0
        for unit in every:
            questions += bool(unit.square.ax.question)
            for sentence in _four(unit):
                result.append(list(encoded(tokenizer, sentence, chat=bool(questions % 2))))
        return result

    prepare()
    found = iter(confined(path, work, seconds=_SECONDS))
    result = []
    for number, unit in enumerate(every):
        known = {sentence: next(found) for sentence in _four(unit)}
        result.append(unit_rows(unit, number >= len(units), known.__getitem__))
    return result


def encode_texts(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of plain texts, the prefix token first. Raises InputError for a tokenizer that cannot read them."""
    from ..models.confined import confined
    from ..models.loading import prepare, read_tokenizer

    def work() -> list:
        tokenizer = read_tokenizer(path)
        return [[encoded(tokenizer, Sentence("", text), chat=False)[1] for text in texts], tokenizer.unk_token_id]

    prepare()
    found, unknown = confined(path, work, seconds=_SECONDS)
    if unknown is not None and sum(ids.count(unknown) for ids in found) > _UNREAD * sum(map(len, found)):
        raise InputError(f"the tokenizer of {path} cannot read the texts of a fit (unknown tokens): use another model")
    return found


def _four(unit: Unit) -> tuple[Sentence, ...]:
    return (unit.square.ax, unit.square.ay, unit.square.bx, unit.square.by)


def encoded(tokenizer: Any, sentence: Sentence, chat: bool) -> tuple[list[int], list[int]]:
    """Token ids of the context and of the whole, both after the prefix token (of a chat: after its own beginning)."""
    from ..models.prompts import render

    def plain(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    if sentence.question and chat and getattr(tokenizer, "chat_template", None):
        context = plain(render(tokenizer, sentence.question))
        return context, [*context, *plain(sentence.continuation.lstrip())]
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    whole = plain(sentence.text)
    begin = [] if first is None or whole[:1] == [first] else [first]
    return [*begin, *plain(sentence.context)], [*begin, *whole]
