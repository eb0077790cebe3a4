"""How far a selection depends on what was asked: resampled questions, and other ways of asking.

The literature leaves both open (generalisation and stability). Everything here is computed from kept scores; no model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .errors import EditError, InputError
from .selection import Asked, ballot, combined, nothing, questions

if TYPE_CHECKING:
    from .scores import Scores

DRAWS = 200
_TOP = 1000  # neurons of either side whose ranks are compared


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
    scores: Scores, *, draws: int = DRAWS, seed: int = 0, rule="paper", tau=0.1, beta=0.1, top=None, combine="union",
    only=None,
) -> Resamples:  # fmt: skip
    """A bootstrap over the questions of each dimension; controls are not resampled. Settings as of `select`.

    Files with as many questions in each dimension draw the same ones, so that two ways to ask them are compared in
    pairs.
    """
    asked = questions(scores, only=only)
    votes, rng, drawn = ballot(asked, rule, tau, beta, top, combine), np.random.default_rng(seed), []
    for _ in range(draws):
        own = {name: of_it[rng.integers(0, len(of_it), len(of_it))] for name, of_it in votes.dimensions.items()}
        mask = combined([votes.kept[name](of_it) for name, of_it in own.items()], combine)
        drawn.append((np.concatenate(list(own.values())), np.flatnonzero(mask)))
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
    shares: dict[int, dict[int, float]] = {}
    for place, count in zip(found.whole.tolist(), times.tolist(), strict=True):
        layer, neuron = divmod(place, found.scores.values.shape[2])
        shares.setdefault(layer, {})[neuron] = count / len(found.drawn)
    jaccard = [_jaccard(found.whole, neurons) for _, neurons in found.drawn]
    sizes = [len(neurons) for _, neurons in found.drawn]
    return {
        "neurons": shares, "jaccard": [float(np.mean(jaccard)), *_spread(jaccard)],
        "size": [float(np.mean(sizes)), *_spread(sizes)], "draws": len(found.drawn),
    }  # fmt: skip


def _spread(values: list) -> list[float]:
    return [float(q) for q in np.quantile(values, [0.025, 0.975])]


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / either if (either := len(a) + len(b) - both) else 1.0


def agreement(a: Resamples, b: Resamples) -> dict:
    """Two ways to ask one model: other wording, prompt, language or context.

    Returns {"neurons": [of a, of b, of both], "jaccard": of the two selections, "rank": Spearman's correlation of the
    neurons' mean score / largest over the 1000 highest of either}, the latter two as [value, low, high] (95 % of the
    draws). Raises InputError if the models differ.
    """
    if a.scores.base != b.scores.base or a.scores.site != b.scores.site:
        raise InputError("stability: the scores are of different models or sites, so their neurons are not the same")
    rank = _rank(a, b)
    pairs = list(zip(a.drawn, b.drawn, strict=True))
    jaccard = [_jaccard(x, y) for (_, x), (_, y) in pairs]
    return {
        "neurons": [len(a.whole), len(b.whole), len(np.intersect1d(a.whole, b.whole))],
        "jaccard": [_jaccard(a.whole, b.whole), *_spread(jaccard)],
        "rank": [rank(a.asked.asked, b.asked.asked), *_spread([rank(x, y) for (x, _), (y, _) in pairs])],
    }


def _rank(a: Resamples, b: Resamples) -> Callable[[np.ndarray, np.ndarray], float]:
    """A function: questions of a, questions of b -> the rank correlation of what the neurons do in them."""
    means = [np.mean([found.asked.share(q).ravel() for q in found.asked.asked.tolist()], 0) for found in (a, b)]
    top = np.unique(np.concatenate([np.argsort(-mean)[:_TOP] for mean in means]))
    tables = [np.array([s.asked.share(q).ravel()[top] for q in range(len(s.asked.scores))]) for s in (a, b)]

    def rank(*drawn: np.ndarray) -> float:
        ranks = [np.argsort(np.argsort(table[own].mean(0))) for table, own in zip(tables, drawn, strict=True)]
        return float(np.corrcoef(*ranks)[0, 1])

    return rank
