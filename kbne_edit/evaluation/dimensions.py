"""The effect on the twins of each dimension, such as gender, and the pair of sentences that moved most there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple, TypedDict

import numpy as np

from ..recipe import Twin
from ..statistics import Interval, IntervalJSON, interval


class Change(NamedTuple):
    """A figure before and after. In JSON the list [before, after]."""

    before: float
    after: float


ChangeJSON = Annotated[list[float], Change]


class DimensionJSON(TypedDict):
    """The twins of one dimension. score: mean score that counts; example: first pair of the twin that moved most."""

    dimension: str
    twins: int
    stereotype_share: ChangeJSON
    score: ChangeJSON
    change: IntervalJSON
    example: list[str]
    example_score: ChangeJSON


@dataclass(frozen=True)
class OfDimension:
    """The twins of one dimension, such as gender. No part of the verdict rests on it: it is a part of the same twins.

    preferred, score, change: as of `Effect`, of the score that counts. example: the two sentences of the twin that
    moved most; example_score: its s.
    """

    dimension: str
    twins: int
    preferred: Change
    score: Change
    change: Interval
    example: tuple[str, str]
    example_score: Change

    def to_dict(self) -> DimensionJSON:
        return {
            "dimension": self.dimension,
            "twins": self.twins,
            "stereotype_share": list(self.preferred),
            "score": list(self.score),
            "change": list(self.change),
            "example": list(self.example),
            "example_score": list(self.example_score),
        }

    @classmethod
    def from_dict(cls, record: dict) -> OfDimension:
        """Raises KeyError, TypeError or ValueError."""
        first, second = map(str, record["example"])
        return cls(
            str(record["dimension"]),
            int(record["twins"]),
            _change(record["stereotype_share"]),
            _change(record["score"]),
            Interval.from_list(record["change"]),
            (first, second),
            _change(record["example_score"]),
        )


def _change(values: Sequence[float]) -> Change:
    before, after = map(float, values)
    return Change(before, after)


def by_dimension(
    twins: Sequence[Twin], before: np.ndarray, after: np.ndarray, size: Callable[[np.ndarray], np.ndarray]
) -> Iterator[OfDimension]:
    """The twins by dimension, in the order in which they come.

    before, after: scores of base and edit, [twins]; size: of scores, the quantity that should fall.
    """
    names = np.array([twin.dimension for twin in twins])
    for name in dict.fromkeys(names.tolist()):
        inside = np.flatnonzero(names == name)
        a, b = before[inside], after[inside]
        most = int(np.abs(b - a).argmax())
        probe = twins[inside[most]].first
        yield OfDimension(
            dimension=name,
            twins=len(inside),
            preferred=Change(float((a > 0).mean()), float((b > 0).mean())),
            score=Change(float(size(a).mean()), float(size(b).mean())),
            change=interval(size(b) - size(a)),
            example=(probe.first, probe.second),
            example_score=Change(float(a[most]), float(b[most])),
        )
