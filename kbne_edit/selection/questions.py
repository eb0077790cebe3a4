"""The questions of a selection: their scores, and the properties of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np

from ..errors import InputError
from ..families import Site

if TYPE_CHECKING:
    from ..attribution.scores import Scores

T = TypeVar("T")


@dataclass(frozen=True)
class Questions:
    """Scores [Q, L, F] with the properties of each question, as columns of length Q.

    dimension, answer, form: names. control: True where a question is a control. twin: index of a question's twin, -1
    for none. keep: False leaves a question out. site, base: of the scores.

    Raises InputError on construction if no question is left.
    """

    scores: np.ndarray
    dimension: np.ndarray
    answer: np.ndarray
    form: np.ndarray
    control: np.ndarray
    twin: np.ndarray
    keep: np.ndarray
    site: Site = "down"
    base: str | None = None

    def __post_init__(self) -> None:
        if not (self.keep & ~self.control).any():
            raise InputError("select: no question is left to select from")

    @classmethod
    def of(cls, scores: Scores | Questions, only: Sequence[bool] | None = None) -> Questions:
        """From a scores file. only: False leaves a question out."""
        if not isinstance(scores, Questions):
            known = scores.questions
            place = {q.text: i for i, q in enumerate(known) if q.control}
            scores = cls.of_arrays(
                scores.values,
                dimensions=[q.dimension for q in known],
                answers=[q.answer for q in known],
                forms=[q.form for q in known],
                controls=[q.control for q in known],
                twins=[place.get(q.twin, -1) for q in known],
                site=cast("Site", scores.site),
                base=scores.base,
            )
        return scores if only is None else replace(scores, keep=np.array(only, bool))

    @classmethod
    def of_arrays(
        cls, scores: np.ndarray | Sequence, *, site: Site = "down", base: str | None = None, **known: Sequence
    ) -> Questions:
        """From scores [Q, L, F]. known: dimensions, answers, forms, controls, twins, each optional."""
        scores = np.asarray(scores)

        def column(name: str, default: object) -> np.ndarray:
            return np.array(known.pop(name, None) or [default] * len(scores))

        columns = (
            column("dimensions", "all"),
            np.array([f"{answer}" for answer in column("answers", "")]),
            column("forms", ""),
            column("controls", False).astype(bool),
            column("twins", -1),
        )
        if known:
            raise InputError(f"select: unknown columns {', '.join(sorted(known))}")
        return cls(scores, *columns, np.ones(len(scores), bool), site, base)

    @cached_property
    def non_controls(self) -> np.ndarray:
        """Indices of the questions in use that are not controls."""
        return np.flatnonzero(self.keep & ~self.control)

    @cached_property
    def controls(self) -> np.ndarray:
        """Indices of the controls in use."""
        return np.flatnonzero(self.keep & self.control)

    @cached_property
    def unrelated(self) -> np.ndarray:
        """Indices of the controls that are not the twin of a question."""
        return np.setdiff1d(self.controls, self.twin[self.non_controls])

    @cached_property
    def dimensions(self) -> dict[str, np.ndarray]:
        """{dimension: indices of its questions}, in the order of the questions."""
        questions = self.non_controls
        names = self.dimension[questions]
        return {str(name): questions[names == name] for name in dict.fromkeys(names.tolist())}

    @cached_property
    def half(self) -> np.ndarray:
        """0 or 1 for each question, [Q]: controls of one answer and form alternate."""
        seen: dict[tuple, int]
        half, seen = np.zeros(len(self.scores), int), {}
        for q in self.controls.tolist():
            kind = (self.answer[q], self.form[q])
            half[q] = seen[kind] = 1 - seen.get(kind, 1)
        return half

    def without(self, questions: np.ndarray) -> Questions:
        """A copy without some questions."""
        keep = self.keep.copy()
        keep[questions] = False
        return replace(self, keep=keep)

    def share(self, q: int) -> np.ndarray:
        """Scores of a question relative to its largest, [L, F]."""
        return self.scores[q] / max(float(self.scores[q].max()), 1e-30)

    def mean_share(self, which: Sequence[int] | np.ndarray) -> np.ndarray:
        """Mean share over questions, [L, F]. A question that is listed twice counts twice."""
        times = np.bincount(np.asarray(which, int))
        return sum(count * self.share(q) for q, count in enumerate(times.tolist()) if count) / max(times.sum(), 1)


def by_layer(values: dict[int, T], neurons: int) -> dict[int, dict[int, T]]:
    """{layer: {neuron: value}} from {index in [L * F]: value}. neurons: F."""
    result: dict[int, dict[int, T]] = {}
    for place, value in values.items():
        layer, neuron = divmod(place, neurons)
        result.setdefault(layer, {})[neuron] = value
    return result
