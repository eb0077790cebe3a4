"""The types of an evaluation: requests, columns of numbers per item, and figures of the columns' means."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..statistics import Clusters, Crossed

if TYPE_CHECKING:
    from .scoring import Scorer


class Answer(NamedTuple):
    """A model's score of one pair: log-probability, whether it is the greedy continuation, number of tokens."""

    logprob: float
    greedy: bool
    tokens: int

    @property
    def per_token(self) -> float:
        return self.logprob / self.tokens


@dataclass(frozen=True)
class Figure:
    """A function of column means. of: means [..., k] -> [...]. ideal: its best value (None: shown, not compared).

    An ideal of -inf: the lower, the better. binary: the 0/1 column whose mean it is, if there is one (then changes are
    tested by McNemar). excess: what decreases towards the ideal. unit: "percent", "nats" or "words".
    definition, source: one sentence each, printed by `evaluate --explain`.
    """

    name: str
    of: Callable[[np.ndarray], np.ndarray]
    ideal: float | None
    binary: int | None = None
    excess: str = "bias"
    unit: str = "percent"
    definition: str = ""
    source: str = ""

    @property
    def digits(self) -> int:
        """Number of decimals to print."""
        return 1 if self.unit == "percent" else 4

    def distance(self, means: np.ndarray) -> np.ndarray:
        """How far the figure is from its ideal."""
        return self.away(self.of(means))

    def away(self, value: Any) -> Any:
        """Distance of a value from the ideal; if that is -inf, the value itself, which has the same differences."""
        return value if self.ideal == -math.inf else abs(value - self.ideal)


@dataclass(frozen=True)
class Benchmark:
    """A task ready to be scored. pairs: of all items in order, `sizes[i]` of item i. groups: a name per item.

    read: (index of an item, answers) -> its columns [k]. clusters: a name per item. Items with the same name depend on
    each other (a StereoSet target, the words that a CrowS-Pairs pair exchanges, a question of BBQ, a twin, a scenario),
    so they are resampled, exchanged and split together, also across tasks. crossed: names of a second, crossed kind of
    cluster, if there is one (the names in a scenario).
    chance: accuracy of a guess, in percent; None: that of one right answer among as many as an item has.
    """

    name: str
    kind: str  # "bias", "capability", "knowledge" or "open" (shown, not judged)
    pairs: list
    sizes: list[int]
    groups: list[str]
    read: Callable[[int, list[Answer]], Sequence[float]]
    figures: tuple[Figure, ...]
    clusters: Sequence[str] = ()
    crossed: Sequence[str] = ()
    chance: float | None = None

    @property
    def chance_level(self) -> float:
        """Accuracy of a guess, in percent."""
        return 100 * float(np.mean([1 / size for size in self.sizes])) if self.chance is None else self.chance

    def drawn(self, items: Sequence[int] | np.ndarray | None = None) -> Clusters:
        """The clusters of these items (None: of all), as `statistics` takes them."""
        if not self.clusters:
            return None
        kept = range(len(self.clusters)) if items is None else items
        clusters = [self.clusters[i] for i in kept]
        return Crossed(clusters, [self.crossed[i] for i in kept]) if self.crossed else clusters

    def take(self, items: Sequence[int]) -> Benchmark:
        """The task with only these items."""
        starts = np.cumsum([0, *self.sizes])
        return replace(
            self,
            pairs=[pair for i in items for pair in self.pairs[starts[i] : starts[i + 1]]],
            read=lambda i, answers: self.read(items[i], answers),
            sizes=[self.sizes[i] for i in items],
            groups=[self.groups[i] for i in items],
            clusters=[self.clusters[i] for i in items],
            crossed=[self.crossed[i] for i in items] if self.crossed else (),
        )

    def measure(self, scorer: Scorer, update: Callable[[int], None] | None = None) -> np.ndarray:
        """Columns [n, k] of the scorer's model. update: called with the number of pairs since the last call."""
        return self.columns(scorer.score(self.pairs, update))

    def columns(self, answers: Sequence[tuple[float, bool]]) -> np.ndarray:
        """Columns [n, k] of a model's answers to `pairs`."""
        full = [Answer(*answer, len(pair[1])) for answer, pair in zip(answers, self.pairs, strict=True)]
        starts = np.cumsum([0, *self.sizes])
        return np.array([self.read(i, full[a:b]) for i, (a, b) in enumerate(zip(starts, starts[1:], strict=False))])


def sample(count: int, limit: int | None) -> list[int]:
    """A seeded sample of `count` items. Rejected: the first ones, because files are sorted by group."""
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(np.random.default_rng(0).choice(count, limit, replace=False).tolist())
