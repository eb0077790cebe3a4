"""How far a selection depends on what was asked: resampled questions, and other ways of asking.

The literature leaves both open (generalisation and stability). Everything here is computed from kept scores; no model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import EditError, InputError
from .selection import ballot, combined, needed, selection

if TYPE_CHECKING:
    from .scores import Scores

_TOP = 1000  # neurons of either side whose ranks are compared


def stability(
    scores: Scores, *, draws: int = 200, seed: int = 0, rule="paper", tau=0.1, beta=0.1, combine="union", only=None
) -> dict:
    """A bootstrap over the questions of each dimension; controls are not resampled.

    Returns {"neurons": {layer: {neuron: share of draws that select it}} of the selection from all questions, "jaccard":
    [mean, low, high] (95 % of the draws) between a draw's selection and that one, "size": the same of the number of
    neurons, "draws": draws}. Settings and errors as of `select`.
    """
    votes = ballot(scores, None, None, None, None, rule, tau, beta, combine, "down", None, only)
    rng = np.random.default_rng(seed)
    masks = {name: np.stack([votes.counts(q) for q in asked]) for name, asked in votes.dimensions.items()}
    shape = next(iter(masks.values())).shape[1:]
    candidates = np.flatnonzero(sum(mask.any(0) for mask in masks.values()))
    flat = {name: mask.reshape(len(mask), -1)[:, candidates].astype(np.int32) for name, mask in masks.items()}

    def chosen(weights: dict[str, np.ndarray]) -> np.ndarray:
        return combined([w @ flat[name] >= needed(beta, len(flat[name])) for name, w in weights.items()], combine)

    whole = chosen({name: np.ones(len(v), int) for name, v in flat.items()})
    if not whole.any():
        raise EditError(f"no neuron counts (rule {rule}, tau {tau:g}, beta {beta:g}): lower --tau or --beta")
    found = np.stack([
        chosen({name: np.bincount(rng.integers(0, len(v), len(v)), minlength=len(v)) for name, v in flat.items()})
        for _ in range(draws)
    ])  # fmt: skip
    shares: dict[int, dict[int, float]] = {}
    for place, share in zip(candidates[whole], found[:, whole].mean(0), strict=True):
        layer, neuron = divmod(int(place), shape[1])
        shares.setdefault(layer, {})[neuron] = float(share)
    jaccard = (found & whole).sum(1) / (found | whole).sum(1)
    return {"neurons": shares, "jaccard": _spread(jaccard), "size": _spread(found.sum(1)), "draws": draws}


def _spread(values: np.ndarray) -> list[float]:
    return [float(values.mean()), *(float(q) for q in np.quantile(values, [0.025, 0.975]))]


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
