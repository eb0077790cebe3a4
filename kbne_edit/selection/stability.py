"""How much a selection depends on the questions: resampled questions, and other ways of asking.

Everything here is computed from scores files, without a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NotRequired, TypedDict

import numpy as np

from ..errors import EditError, InputError
from ..progress import progress
from ..rule import Rule
from ..statistics import Interval
from .questions import Questions, by_layer
from .votes import votes_of

if TYPE_CHECKING:
    from ..attribution.scores import Scores


class Draw(NamedTuple):
    """One resample: indices of its questions, with repetitions, and of the neurons they select, in [L * F]."""

    questions: np.ndarray
    neurons: np.ndarray


@dataclass(frozen=True)
class Resamples:
    """The selection from all questions (`whole`: neurons as indices in [L * F]) and from resamples (`drawn`)."""

    questions: Questions = field(repr=False)
    rule: Rule
    whole: np.ndarray
    drawn: tuple[Draw, ...] = field(repr=False)

    @property
    def neurons_per_layer(self) -> int:
        return self.questions.scores.shape[2]


@dataclass(frozen=True)
class Stability:
    """How much a selection depends on which questions were asked.

    neurons: {layer: {neuron: share of the resamples that select it}}, for the neurons selected from all questions.
    jaccard: overlap of a resample's selection with that selection; size: number of neurons in a resample's selection;
    both with an interval of 95 % of the resamples. draws: number of resamples.
    """

    neurons: dict[int, dict[int, float]]
    jaccard: Interval
    size: Interval
    draws: int

    def to_dict(self) -> dict[str, Any]:
        return {"neurons": self.neurons, "jaccard": self.jaccard, "size": self.size, "draws": self.draws}

    def at_least(self, share: float) -> int:
        """The number of neurons that at least this share of the resamples select."""
        return sum(value >= share for neurons in self.neurons.values() for value in neurons.values())


@dataclass(frozen=True)
class Agreement:
    """Two ways to ask one model. neurons: numbers selected by a, by b, by both. rank: Spearman's, over all neurons."""

    a: str
    b: str
    neurons: tuple[int, int, int]
    jaccard: Interval
    rank: Interval

    def to_dict(self) -> dict[str, Any]:
        return {"a": self.a, "b": self.b, "neurons": list(self.neurons), "jaccard": self.jaccard, "rank": self.rank}


class StabilityJSON(TypedDict):
    """What `stability --json` prints. files: by path; nothing: those that select nothing; pairs: of files.

    in_files: {layer: {neuron: share of the files that select it}}, for three files and more.
    """

    files: dict[str, Annotated[dict[str, Any], Stability]]
    nothing: list[str]
    pairs: list[Annotated[dict[str, Any], Agreement]]
    in_files: NotRequired[dict[int, dict[int, Interval]]]


def resample(
    scores: Scores | Questions,
    rule: Rule | str = Rule(),  # noqa: B008
    *,
    draws: int = 200,
    seed: int = 0,
    only: Sequence[bool] | None = None,
) -> Resamples:
    """A bootstrap over the questions of each dimension; controls are not resampled. rule, only: as of `select`.

    Files with equally many questions in each dimension draw the same questions, so that two ways to ask are compared
    pairwise.
    """
    rule = Rule(rule) if isinstance(rule, str) else rule
    questions = Questions.of(scores, only)
    votes, rng, drawn = votes_of(questions, rule), np.random.default_rng(seed), []
    with progress("resamples of the questions", draws) as done:
        for _ in range(draws):
            sample = {name: q[rng.integers(0, len(q), len(q))] for name, q in votes.dimensions.items()}
            mask = votes.combined([votes.kept[name](q) for name, q in sample.items()])
            drawn.append(Draw(np.concatenate(list(sample.values())), np.flatnonzero(mask)))
            done(1)
    whole = np.flatnonzero(votes.combined(list(votes.masks().values())))
    return Resamples(questions, rule, whole, tuple(drawn))


def stability(scores: Scores | Questions | Resamples, rule: Rule | str = Rule(), **settings: Any) -> Stability:  # noqa: B008
    """How much the selection depends on which questions were asked. rule, settings: as of `resample`.

    Raises EditError if nothing is selected, and as `select` does.
    """
    resamples = scores if isinstance(scores, Resamples) else resample(scores, rule, **settings)
    if not len(resamples.whole):
        raise EditError(resamples.rule.nothing())
    times: Any = sum(np.isin(resamples.whole, draw.neurons) for draw in resamples.drawn)
    shares = dict(zip(resamples.whole.tolist(), (times / len(resamples.drawn)).tolist(), strict=True))
    overlaps = [_jaccard(resamples.whole, draw.neurons) for draw in resamples.drawn]
    sizes = [len(draw.neurons) for draw in resamples.drawn]
    return Stability(
        by_layer(shares, resamples.neurons_per_layer),
        Interval(float(np.mean(overlaps)), *_spread(overlaps)),
        Interval(float(np.mean(sizes)), *_spread(sizes)),
        len(resamples.drawn),
    )


def _spread(values: Sequence[float]) -> list[float]:
    return [float(q) for q in np.quantile(values, [0.025, 0.975])]


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / either if (either := len(a) + len(b) - both) else 1.0


def agreements(resamples: dict[str, Resamples]) -> list[Agreement]:
    """Compare every two ways to ask one model (wording, prompt, language, context). Intervals: 95 % of the resamples.

    Raises InputError if the models differ.
    """
    if len({(sample.questions.base, sample.questions.site) for sample in resamples.values()}) > 1:
        raise InputError("stability: the scores are of different models or sites, so their neurons are not the same")
    ranks: Any  # of the neurons in one draw, then of one pair in all draws
    pairs, files = list(combinations(resamples, 2)), resamples.items()
    whole_ranks = {name: _ranks(sample.questions, sample.questions.non_controls) for name, sample in files}
    whole = _correlations(whole_ranks, pairs)
    drawn = []
    draws = list(zip(*([(name, sample, draw) for draw in sample.drawn] for name, sample in files), strict=True))
    with progress("agreement of the files", len(draws)) as done:
        for of_draw in draws:  # one by one: the ranks of all resamples would fill the memory
            ranks = {name: _ranks(sample.questions, draw.questions) for name, sample, draw in of_draw}
            drawn.append(_correlations(ranks, pairs))
            done(1)
    result = []
    for (a, b), rank, *ranks in zip(pairs, whole, *drawn, strict=True):
        x, y = resamples[a], resamples[b]
        overlaps = [_jaccard(p.neurons, q.neurons) for p, q in zip(x.drawn, y.drawn, strict=True)]
        counts = (len(x.whole), len(y.whole), len(np.intersect1d(x.whole, y.whole)))
        jaccard = Interval(_jaccard(x.whole, y.whole), *_spread(overlaps))
        result.append(Agreement(a, b, counts, jaccard, Interval(rank, *_spread(ranks))))
    return result


def _ranks(questions: Questions, which: np.ndarray) -> np.ndarray:
    """Ranks of the neurons' mean shares in these questions, [L * F], centred, with norm 1; ties share a rank."""
    mean = questions.mean_share(which).ravel()
    _, place, counts = np.unique(mean, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    ranks -= ranks.mean()
    return ranks / max(float(np.linalg.norm(ranks)), 1e-30)


def _correlations(ranks: dict[str, np.ndarray], pairs: list[tuple[str, str]]) -> list[float]:
    return [float(ranks[a] @ ranks[b]) for a, b in pairs]
