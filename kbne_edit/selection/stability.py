"""How far a selection depends on what was asked: resampled questions, and other ways of asking.

The literature leaves both open (generalisation and stability). Everything here is computed from kept scores; no model.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import EditError, InputError
from ..progress import progress
from .select import Asked, ballot, by_layer, combined, nothing, questions

if TYPE_CHECKING:
    from ..attribution.scores import Scores


class Resamples(NamedTuple):
    """What is selected from all questions, and from questions that were drawn anew.

    whole: neurons, as places in [L * F]. drawn: for each draw the questions (some of them more than once) and the
    neurons that they select.
    """

    scores: Scores
    asked: Asked
    rule: dict
    whole: np.ndarray
    drawn: list[tuple[np.ndarray, np.ndarray]]


def resample(
    scores: Scores,
    *,
    draws: int = 200,
    seed: int = 0,
    rule="paper",
    tau=0.1,
    beta=0.1,
    top=None,
    combine="union",
    only=None,
) -> Resamples:
    """A bootstrap over the questions of each dimension; controls are not resampled. Settings as of `select`.

    Files with as many questions in each dimension draw the same ones, so that two ways to ask them are compared in
    pairs.
    """
    asked = questions(scores, only=only)
    votes, rng, drawn = ballot(asked, rule, tau, beta, top, combine), np.random.default_rng(seed), []
    with progress("resamples of the questions", draws) as done:
        for _ in range(draws):
            own = {name: of_it[rng.integers(0, len(of_it), len(of_it))] for name, of_it in votes.dimensions.items()}
            mask = combined([votes.kept[name](of_it) for name, of_it in own.items()], combine)
            drawn.append((np.concatenate(list(own.values())), np.flatnonzero(mask)))
            done(1)
    settings = {"rule": rule, "tau": tau, "beta": beta, "combine": combine, "top": top}
    return Resamples(scores, asked, settings, np.flatnonzero(combined(list(votes.masks().values()), combine)), drawn)


def stability(scores: Scores | Resamples, **settings) -> dict:
    """How far the selection depends on which questions were asked. settings: as of `resample`.

    Returns {"neurons": {layer: {neuron: share of draws that select it}} of the selection from all questions, "jaccard":
    [mean, low, high] (95 % of the draws) between a draw's selection and that one, "size": the same of the number of
    neurons, "draws": draws}. Raises EditError if nothing is selected, and as `select` does.
    """
    found = scores if isinstance(scores, Resamples) else resample(scores, **settings)
    if not len(found.whole):
        raise EditError(nothing(**found.rule))
    times = sum(np.isin(found.whole, neurons) for _, neurons in found.drawn)
    shares = dict(zip(found.whole.tolist(), (times / len(found.drawn)).tolist(), strict=True))
    jaccard = [_jaccard(found.whole, neurons) for _, neurons in found.drawn]
    sizes = [len(neurons) for _, neurons in found.drawn]
    return {
        "neurons": by_layer(shares, found.scores.values.shape[2]),
        "jaccard": [float(np.mean(jaccard)), *_spread(jaccard)],
        "size": [float(np.mean(sizes)), *_spread(sizes)],
        "draws": len(found.drawn),
    }


def _spread(values: list) -> list[float]:
    return [float(q) for q in np.quantile(values, [0.025, 0.975])]


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / either if (either := len(a) + len(b) - both) else 1.0


def agreements(found: dict[str, Resamples]) -> list[dict]:
    """Each two ways to ask one model: other wording, prompt, language or context.

    Returns [{"a", "b": their names, "neurons": [of a, of b, of both], "jaccard": of the two selections, "rank":
    Spearman's correlation of all neurons' mean score / largest}], the latter two as [value, low, high] (95 % of the
    draws). Raises InputError if the models differ.
    """
    if len({(own.scores.base, own.scores.site) for own in found.values()}) > 1:
        raise InputError("stability: the scores are of different models or sites, so their neurons are not the same")
    pairs, files = list(combinations(found, 2)), found.items()
    whole = _correlations({name: _ranks(own.asked, own.asked.asked) for name, own in files}, pairs)
    drawn, draws = [], list(zip(*([(name, own, draw) for draw in own.drawn] for name, own in files), strict=True))
    with progress("agreement of the files", len(draws)) as done:
        for of_draw in draws:  # one by one, since the ranks of all draws would fill the memory
            drawn.append(_correlations({name: _ranks(own.asked, asked) for name, own, (asked, _) in of_draw}, pairs))
            done(1)
    result = []
    for (a, b), rank, *ranks in zip(pairs, whole, *drawn, strict=True):
        x, y = found[a], found[b]
        jaccard = [_jaccard(p, q) for (_, p), (_, q) in zip(x.drawn, y.drawn, strict=True)]
        result.append(
            {
                "a": a,
                "b": b,
                "neurons": [len(x.whole), len(y.whole), len(np.intersect1d(x.whole, y.whole))],
                "jaccard": [_jaccard(x.whole, y.whole), *_spread(jaccard)],
                "rank": [rank, *_spread(ranks)],
            }
        )
    return result


def _ranks(asked: Asked, which: np.ndarray) -> np.ndarray:
    """Ranks of the neurons' mean share in these questions, centred and of length 1, [L * F]; equals share a rank."""
    times = np.bincount(which)
    mean = sum(count * asked.share(q) for q, count in enumerate(times.tolist()) if count).ravel()
    _, place, counts = np.unique(mean, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    ranks -= ranks.mean()
    return ranks / max(float(np.linalg.norm(ranks)), 1e-30)


def _correlations(ranks: dict[str, np.ndarray], pairs: list[tuple[str, str]]) -> list[float]:
    return [float(ranks[a] @ ranks[b]) for a, b in pairs]
