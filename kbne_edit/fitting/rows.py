"""From a unit's sentences to the rows of the fit.

For two groups A, B and two attributes X, Y a unit's four sentences AX, AY, BX, BY have log-probabilities per token, and

    association = (AX - AY - BX + BY) / 2     the stereotype itself: the interaction of group and attribute
    sentiment   = (AX - AY + BX - BY) / 2     X against Y, for either group
    prior       = (AX + AY - BX - BY) / 2     A against B, for either attribute
    level       = (AX + AY + BX + BY) / 4     the likelihood of the unit

and a contrast (`contrasts`), which has two sentences, has

    tone        =  AX - AY                    a bad attribute against a good one

and a public pair (`public`) has `pair`, the stereotyped sentence against the other one. All are divided by the mean
number of scored tokens. A common prefix of the sentences cancels in all but the level, so it is not scored. An answer
is scored without its question. A unit that is a question also has

    guess       = the two answers that name a group or an attribute, against "it cannot be told"

each divided by its own number of tokens, because answers differ in length.
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
KINDS = (*PARTS, "level", "tone", "guess", "pair")
MEASURED = (*PARTS, "guess", "pair")  # sentiment also by tone
_SQUARE = np.array([[1, -1, -1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [0.5, 0.5, 0.5, 0.5]]) / 2

_SECONDS = 120  # of CPU time for all units
_UNREAD = 0.1  # share of unknown tokens above which a tokenizer cannot read a text

Encode = Callable[
    [Sentence], tuple[list[int], list[int]]
]  # ids of the context (with the prefix token) and of the whole


@dataclass(frozen=True)
class UnitRows:
    """A unit's scored sentences, and the weights of its kinds of rows.

    sentences: ax, ay, bx, by; of a contrast ax, ay. mixture: [kinds, sentences], per token; a kind that the unit does
    not have is a row of NaN.
    """

    sentences: tuple[Scored, ...]
    mixture: np.ndarray


def unit_rows(unit: Unit, kind: str, encode: Encode) -> UnitRows:
    """kind: "tone" of a contrast, "pair" of a public pair; "" of a unit, whose square is read."""
    square = unit.square
    sentences = [square.ax, square.ay] if kind else [square.ax, square.ay, square.bx, square.by]
    pairs = [encode(sentence) for sentence in sentences]
    shared = len(commonprefix([tuple(whole) for _, whole in pairs])) - 1
    scored = [
        _scored(whole, len(context) - 1 if sentence.question else max(shared, 0))
        for sentence, (context, whole) in zip(sentences, pairs, strict=True)
    ]
    mixture = np.full((len(KINDS), len(scored) + (0 if kind else len(unit.unknown))), np.nan)
    tokens = np.mean([sum(sentence.weights) for sentence in scored])
    if kind:
        mixture[KINDS.index(kind)] = np.array([1, -1]) / tokens
        return UnitRows(tuple(scored), mixture)
    mixture[: len(_SQUARE)] = 0
    mixture[: len(_SQUARE), : len(scored)] = _SQUARE / tokens
    for sentence in unit.unknown:
        context, whole = encode(sentence)
        scored.append(_scored(whole, len(context) - 1))
    if unit.unknown:
        mixture[KINDS.index("guess")] = _guess(scored)
    return UnitRows(tuple(scored), mixture)


def _guess(scored: Sequence[Scored]) -> np.ndarray:
    """Weights of ax, ay, bx, by and the two unknown answers, each of which shares its question with two of the four."""
    tokens = [sum(sentence.weights) for sentence in scored]
    result = np.zeros(len(scored))
    for i in (4, 5):
        question = scored[i].ids[: len(scored[i].ids) - int(tokens[i])]
        result[i] = -0.5 / tokens[i]
        for j in range(4):
            if scored[j].ids[: len(question)] == question:
                result[j] += 0.25 / tokens[j]
    return result


def _scored(ids: Sequence[int], start: int) -> Scored:
    return Scored(tuple(ids), tuple(float(position >= start) for position in range(len(ids) - 1)))


def encode_units(
    path: Path, units: Sequence[Unit], contrasts: Sequence[Unit] = (), public: Sequence[Unit] = ()
) -> list[UnitRows]:
    """Rows of every unit, contrast and public pair in the tokens of the model at `path`; every other question as a
    chat.

    The tokenizer and its template work in a child process, within limits of time and memory. Raises CheckpointError.
    """
    from ..models.confined import confined
    from ..models.loading import prepare, read_tokenizer

    kinds = [""] * len(units) + ["tone"] * len(contrasts) + ["pair"] * len(public)
    every = [(unit, _read(unit, kind), kind) for unit, kind in zip((*units, *contrasts, *public), kinds, strict=True)]

    def work() -> list[list]:
        tokenizer = read_tokenizer(path)
        result, questions = [], 0
        for unit, sentences, _ in every:
            questions += bool(unit.square.ax.question)
            for sentence in sentences:
                result.append(list(encoded(tokenizer, sentence, chat=bool(questions % 2))))
        return result

    prepare()
    results = iter(confined(path, work, seconds=_SECONDS))
    result = []
    for unit, sentences, kind in every:
        known = {sentence: next(results) for sentence in sentences}
        result.append(unit_rows(unit, kind, known.__getitem__))
    return result


def encode_texts(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of plain texts, the prefix token first. Raises InputError for a tokenizer that cannot read them."""
    from ..models.confined import confined
    from ..models.loading import prepare, read_tokenizer

    def work() -> list:
        tokenizer = read_tokenizer(path)
        return [[encoded(tokenizer, Sentence("", text), chat=False)[1] for text in texts], tokenizer.unk_token_id]

    prepare()
    token_ids, unknown = confined(path, work, seconds=_SECONDS)
    if unknown is not None and sum(ids.count(unknown) for ids in token_ids) > _UNREAD * sum(map(len, token_ids)):
        raise InputError(f"the tokenizer of {path} cannot read the texts of a fit (unknown tokens): use another model")
    return token_ids


def _read(unit: Unit, kind: str) -> tuple[Sentence, ...]:
    square = unit.square
    return (square.ax, square.ay) if kind else (square.ax, square.ay, square.bx, square.by, *unit.unknown)


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
