"""From a unit's sentences to the rows of the fit.

For two groups A, B and two attributes X, Y a unit's four sentences AX, AY, BX, BY have log-probabilities per token, and

    association = (AX - AY - BX + BY) / 2     the stereotype itself: the interaction of group and attribute
    sentiment   = (AX - AY + BX - BY) / 2     X against Y, whoever
    prior       = (AX + AY - BX - BY) / 2     A against B, whatever
    level       = (AX + AY + BX + BY) / 4     how likely the unit is at all
    gap         = (A.. or B..) - unrelated    how much more likely it is than a sentence without sense
    unknown     = unknown - (two answers) / 2 questions only: how much likelier it is that the model says it cannot tell

All are divided by the mean number of scored tokens of the four sentences. What all four begin with cancels in the first
three, so it is not scored. An answer is scored without its question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path

import numpy as np

from .passes import Scored
from .units import Sentence, Unit

PARTS = ("association", "sentiment", "prior")
KINDS = (*PARTS, "level", "gap", "unknown")
_SQUARE = np.array([[1, -1, -1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [0.5, 0.5, 0.5, 0.5]]) / 2


@dataclass(frozen=True)
class UnitRows:
    """A unit's scored sentences, and how the kinds of rows are made of them.

    sentences: the square (ax, ay, bx, by), an unrelated one and, for a question, an unknown one.
    mixture: [kinds, sentences], per token; a kind that the unit does not have is a row of NaN.
    """

    sentences: tuple[Scored, ...]
    mixture: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens that a pass over the sentences reads."""
        return sum(len(sentence.ids) for sentence in self.sentences)


Encode = Callable[
    [Sentence], tuple[list[int], list[int]]
]  # ids of the context (with the prefix token) and of the whole


def unit_rows(unit: Unit, encode: Encode, number: int) -> UnitRows:
    """number: the unit's place among all, which decides whether group A or B stands beside the senseless sentence."""
    second = number % 2
    square = unit.square
    sentences = [square.ax, square.ay, square.bx, square.by, unit.unrelated[second], *unit.unknown[second : second + 1]]
    pairs = [encode(sentence) for sentence in sentences]
    shared = len(commonprefix([tuple(ids) for _, ids in pairs[:4]])) - 1
    scored = [
        _scored(ids, len(context) - 1 if s.question else shared)
        for s, (context, ids) in zip(sentences, pairs, strict=True)
    ]
    mixture = np.full((len(KINDS), len(scored)), np.nan)
    mixture[: len(_SQUARE)] = 0
    mixture[: len(_SQUARE), :4] = _SQUARE
    # Of ax, ay, bx, by those that share the context of the unrelated sentence, and of the unknown one.
    beside = _beside(unit, second)
    mixture[KINDS.index("gap")] = 0
    mixture[KINDS.index("gap"), beside] = 0.5
    mixture[KINDS.index("gap"), 4] = -1
    if unit.unknown:
        mixture[KINDS.index("unknown")] = 0
        mixture[KINDS.index("unknown"), beside] = -0.5
        mixture[KINDS.index("unknown"), 5] = 1
    return UnitRows(tuple(scored), mixture / np.mean([sum(s.weights) for s in scored[:4]]))


def _beside(unit: Unit, second: int) -> list[int]:
    square = unit.square
    context = unit.unrelated[second].context
    found = [i for i, s in enumerate((square.ax, square.ay, square.bx, square.by)) if context and s.context == context]
    return found if len(found) == 2 else ([2, 3] if second else [0, 1])


def _scored(ids: Sequence[int], start: int) -> Scored:
    return Scored(tuple(ids), tuple(float(position >= start) for position in range(len(ids) - 1)))


def encode_units(path: Path, units: Sequence[Unit]) -> list[UnitRows]:
    """Rows of every unit in the tokens of the model at `path`; questions through its chat template every other time.

    The tokenizer and its template work in a child process, within limits of time and memory. Raises CheckpointError.
    """
    from ..models.confined import confined
    from ..models.loading import prepare, read_tokenizer

    def work() -> list[list]:
        tokenizer = read_tokenizer(path)
        result, questions = [], 0
        for unit in units:
            questions += bool(unit.unknown)
            result += [list(encoded(tokenizer, sentence, chat=bool(questions % 2))) for sentence in unit.sentences]
        return result

    prepare()
    found = iter(confined(path, work))
    result = []
    for number, unit in enumerate(units):
        known = {sentence: next(found) for sentence in unit.sentences}
        result.append(unit_rows(unit, known.__getitem__, number))
    return result


def encoded(tokenizer, sentence: Sentence, chat: bool) -> tuple[list[int], list[int]]:
    """Token ids of the context and of the whole, both after the prefix token (of a chat: after its own beginning)."""
    from ..models.prompts import render

    if sentence.question and chat and getattr(tokenizer, "chat_template", None):
        context = tokenizer(render(tokenizer, sentence.question), add_special_tokens=False)["input_ids"]
        return context, [*context, *tokenizer(sentence.continuation.lstrip(), add_special_tokens=False)["input_ids"]]
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    context, whole = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (sentence.context, sentence.text)
    )
    begin = [] if first is None or whole[:1] == [first] else [first]
    return [*begin, *context], [*begin, *whole]
