"""How far a selection depends on what was asked: resampled questions, and other ways of asking.

The literature leaves both open (generalisation and stability). Everything here is computed from kept scores; no model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import EditError, InputError
from .selection import ballot, combined, nothing, questions, selection

if TYPE_CHECKING:
    from .scores import Scores

_TOP = 1000  # neurons of either side whose ranks are compared


def stability(
    scores: Scores, *, draws: int = 200, seed: int = 0, rule="paper", tau=0.1, beta=0.1, top=None, combine="union",
    only=None,
) -> dict:  # fmt: skip
    """A bootstrap over the questions of each dimension; controls are not resampled.

    Returns {"neurons": {layer: {neuron: share of draws that select it}} of the selection from all questions, "jaccard":
    [mean, low, high] (95 % of the draws) between a draw's selection and that one, "size": the same of the number of
    neurons, "draws": draws}. Settings and errors as of `select`.
    """
    votes = ballot(questions(scores, only=only), rule, tau, beta, top, combine)
    rng = np.random.default_rng(seed)
    whole = combined(list(votes.masks().values()), combine)
    if not whole.any():
        raise EditError(nothing(rule, tau, beta, combine, top))
    times, jaccard, sizes = np.zeros(int(whole.sum())), [], []
    for _ in range(draws):
        drawn = {name: asked[rng.integers(0, len(asked), len(asked))] for name, asked in votes.dimensions.items()}
        mask = combined([votes.kept[name](asked) for name, asked in drawn.items()], combine)
        times += mask[whole]
        jaccard.append((mask & whole).sum() / (mask | whole).sum())
        sizes.append(mask.sum())
    shares: dict[int, dict[int, float]] = {}
    for (layer, neuron), count in zip(np.argwhere(whole).tolist(), times.tolist(), strict=True):
        shares.setdefault(layer, {})[neuron] = count / draws
    return {"neurons": shares, "jaccard": _spread(jaccard), "size": _spread(sizes), "draws": draws}


def _spread(values: list) -> list[float]:
    return [float(np.mean(values)), *(float(q) for q in np.quantile(values, [0.025, 0.975]))]


def agreement(a: Scores, b: Scores, **settings) -> dict:
    """Two scores files of the same model: other wording, prompt, language or context. settings: as of `select`.

    Returns {"jaccard": of the two selections, "neurons": [of a, of b, of both], "rank": Spearman's correlation of the
    neurons' mean score / largest over the 1000 highest of either}. Raises InputError if the models differ.
    """
    if a.base != b.base or a.site != b.site:
        raise InputError("stability: the scores are of different models or sites, so their neurons are not the same")
    masks = []
    for scores in (a, b):
        try:
            masks.append(np.any(list(selection(scores, **settings).dimensions.values()), 0))
        except EditError:  # nothing selected is a finding, too
            masks.append(np.zeros(scores.values.shape[1:], bool))
    both, either = (masks[0] & masks[1]).sum(), (masks[0] | masks[1]).sum()
    means = [_mean_share(scores) for scores in (a, b)]
    top = np.unique(np.concatenate([np.argsort(-mean)[:_TOP] for mean in means]))
    ranks = [np.argsort(np.argsort(mean[top])) for mean in means]
    return {
        "neurons": [int(masks[0].sum()), int(masks[1].sum()), int(both)],
        "jaccard": float(both / either) if either else 1.0,
        "rank": float(np.corrcoef(*ranks)[0, 1]),
    }


def _mean_share(scores: Scores) -> np.ndarray:
    """score / largest, averaged over the questions that are no controls, [L * F]."""
    asked = [scores.values[i] for i, q in enumerate(scores.questions) if not q.control]
    return np.mean([s / max(float(s.max()), 1e-30) for s in asked], 0).ravel()
