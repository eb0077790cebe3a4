"""How a model answers the questions, and how exact the attribution is, computed from a scores file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple, NotRequired, TypedDict

import numpy as np

from ..errors import CheckpointError
from ..recipe import Question
from ..statistics import Interval, IntervalJSON, wilson
from .scores import Scores

SMALL = 0.1  # total probability of all answers; below it the model is about to say something else


class Tally(NamedTuple):
    """How many answers of how many are right. In JSON the list [right, total]."""

    right: int
    total: int

    @property
    def share(self) -> float:
        """0 to 1."""
        return self.right / max(self.total, 1)


class Mass(NamedTuple):
    """Total probability of all answers after the prompt, 0 to 1.

    median: over questions and controls. below: the share of them where it is below `SMALL`.
    """

    median: float
    below: float

    @property
    def small(self) -> bool:
        """True if the model hardly ever answers: then the attribution does not explain its answers."""
        return self.median < SMALL

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Mass:
        return cls(float(np.median(values)), float(np.mean(np.asarray(values) < SMALL)))


class MassJSON(TypedDict):
    """Total probability of all answers, 0 to 1. threshold: a median below it is small."""

    median: float
    below: float
    threshold: float


class AnswersJSON(TypedDict):
    """How a model answers. right, controls_right: counts; by answer and form: [right, total]; shares: 0 to 1.

    balanced: balanced accuracy over the answers. constant: an answer that, given to everything, would do as well; or
    null.
    """

    questions: int
    right: int
    controls: int
    controls_right: int
    right_by_answer: dict[str, Annotated[list[int], Tally]]
    right_by_form: dict[str, Annotated[list[int], Tally]]
    balanced: IntervalJSON
    constant: str | None
    wrong: list[str]
    mass: NotRequired[MassJSON]


@dataclass(frozen=True)
class Answers:
    """How a model answers. Shares and probabilities from 0 to 1.

    questions, controls: totals. by_answer, by_form: questions about bias by right answer and by form.
    balanced: balanced accuracy over the answers, controls included, with its 95 % interval (Wilson).
    constant: None if the model does better than one answer to everything, whose balanced accuracy is 1 / number of
        answers; else the answer that it gets right most often.
    mass: None if a scores file of an earlier version does not say.
    wrong: texts of the questions that are answered wrongly.
    """

    questions: Tally
    controls: Tally
    by_answer: dict[str, Tally]
    by_form: dict[str, Tally]
    balanced: Interval
    constant: str | None
    mass: Mass | None
    wrong: tuple[str, ...] = ()

    def __repr__(self) -> str:
        constant = f", constant {self.constant!r}" if self.constant else ""
        return f"Answers({self.questions.right} of {self.questions.total} right{constant})"

    @classmethod
    def of(cls, scores: Scores) -> Answers:
        questions, right = scores.questions, scores.correct
        non_controls = [i for i, q in enumerate(questions) if not q.control]
        controls = [i for i, q in enumerate(questions) if q.control]

        def tally(among: Sequence[int]) -> Tally:
            return Tally(int(right[list(among)].sum()), len(among))

        def tallies(key: Callable[[Question], str], among: Sequence[int]) -> dict[str, Tally]:
            keys = sorted({key(questions[i]) for i in among})
            return {k: tally([i for i in among if key(questions[i]) == k]) for k in keys}

        everywhere = tallies(lambda q: q.answer, non_controls + controls)
        low, high = np.mean([wilson(t.right, t.total) for t in everywhere.values()], 0)
        balanced = Interval(float(np.mean([t.share for t in everywhere.values()])), float(low), float(high))
        return cls(
            tally(non_controls),
            tally(controls),
            tallies(lambda q: q.answer, non_controls),
            tallies(lambda q: q.form, non_controls),
            balanced,
            _constant(everywhere, balanced),
            None if scores.p_answers is None else Mass.of(scores.p_answers),
            tuple(questions[i].text for i in non_controls if not right[i]),
        )

    def to_dict(self) -> AnswersJSON:
        record: AnswersJSON = {
            "questions": self.questions.total,
            "right": self.questions.right,
            "controls": self.controls.total,
            "controls_right": self.controls.right,
            "right_by_answer": {name: list(tally) for name, tally in self.by_answer.items()},
            "right_by_form": {name: list(tally) for name, tally in self.by_form.items()},
            "balanced": list(self.balanced),
            "constant": self.constant,
            "wrong": list(self.wrong),
        }
        if self.mass is not None:
            record["mass"] = {"median": self.mass.median, "below": self.mass.below, "threshold": SMALL}
        return record

    @classmethod
    def from_dict(cls, record: dict, where: str = "answers") -> Answers:
        """Inverse of `to_dict`. Earlier versions wrote `constant` as true or false, and no mass.

        Raises CheckpointError.
        """
        try:
            by_answer, by_form = (
                {str(name): Tally(*map(int, pair)) for name, pair in record[key].items()}
                for key in ("right_by_answer", "right_by_form")
            )
            constant, mass = record["constant"], record.get("mass")
            if constant is True:
                constant = max(by_answer, key=lambda name: by_answer[name].share)
            return cls(
                Tally(int(record["right"]), int(record["questions"])),
                Tally(int(record["controls_right"]), int(record["controls"])),
                by_answer,
                by_form,
                Interval.from_list(record["balanced"]),
                str(constant) if constant else None,
                mass and Mass(float(mass["median"]), float(mass["below"])),
                tuple(map(str, record["wrong"])),
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise CheckpointError(f"{where} has figures that kbne-edit did not write") from None


def _constant(by_answer: dict[str, Tally], balanced: Interval) -> str | None:
    if not balanced.low <= 1 / len(by_answer) <= balanced.high:
        return None
    return max(by_answer, key=lambda name: by_answer[name].share)


class AttributionJSON(AnswersJSON):
    """The answers, and how exact the attribution is.

    largest_residual: of completeness, relative to its question's largest score. nodes_per_layer: mean number.
    """

    largest_residual: float
    nodes_per_layer: float


@dataclass(frozen=True)
class AttributionSummary:
    """Summary of an attribution. In JSON one object: the answers' keys and these.

    largest_residual: of completeness, relative to its question's largest score. nodes_per_layer: mean number.
    """

    answers: Answers
    largest_residual: float
    nodes_per_layer: float

    @classmethod
    def of(cls, scores: Scores) -> AttributionSummary:
        return cls(Answers.of(scores), float(scores.residual.max()), float(scores.nodes.mean()))

    def to_dict(self) -> AttributionJSON:
        return {
            **self.answers.to_dict(),
            "largest_residual": self.largest_residual,
            "nodes_per_layer": self.nodes_per_layer,
        }

    @classmethod
    def from_dict(cls, record: dict, where: str = "attribution") -> AttributionSummary:
        """Inverse of `to_dict`. Raises CheckpointError."""
        answers = Answers.from_dict(record, where)
        try:
            return cls(answers, float(record["largest_residual"]), float(record["nodes_per_layer"]))
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{where} has figures that kbne-edit did not write") from None
