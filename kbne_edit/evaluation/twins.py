"""Scores of twins: the margins of two probes in which the same groups exchange roles, so that word frequency cancels.

m = log-probability per token of a probe's first sentence minus that of its second. It contains the association and the
frequency of the two groups' words. In a twin the groups change places, so the frequency has opposite signs in m1 and
m2.

Legend: P probes, N twins.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..recipe import Twin


def twin_cluster(twin: Twin) -> str:
    """The name of a twin's cluster, by which its items are resampled, and assigned to the fitted or reported half."""
    return " | ".join(probe.first for probe in twin.probes)


def twin_scores(twins: Sequence[Twin], margins: np.ndarray, aim: str = "balance") -> np.ndarray:
    """Score of every twin, [..., N], from the margins of all their probes in order (`Recipe.probes`), [..., P].

    "balance": s = (m1 + m2) / 2; 0 prefers neither group. "avoid": s = m1 + m2, the margin of a reply where it is
    unwanted minus its margin where it is right; the lower, the better. A probe without a counterpart scores m.
    Raises ValueError if the margins are not those of these twins.
    """
    margins = np.asarray(margins, float)
    sizes = [len(twin.probes) for twin in twins]
    if margins.shape[-1] != sum(sizes):
        raise ValueError(f"{margins.shape[-1]} margins for {sum(sizes)} probes")
    weight = 0.5 if aim == "balance" else 1.0
    scores = np.zeros((*margins.shape[:-1], len(twins)))
    start = 0
    for i, size in enumerate(sizes):
        total = margins[..., start : start + size].sum(-1)
        scores[..., i] = total * weight if size == 2 else total
        start += size
    return scores


def frequency_share(twins: Sequence[Twin], margins: np.ndarray) -> float:
    """Share of the mean square of m that cancels in twins, as word frequency does: mean d^2 / mean m^2, with
    d = (m1 - m2) / 2. NaN without a twin."""
    margins = np.asarray(margins, float)
    sizes = np.array([len(twin.probes) for twin in twins], int)
    starts = np.cumsum([0, *sizes])[:-1][sizes == 2]
    if not len(starts):
        return float("nan")
    first, second = margins[starts], margins[starts + 1]
    return float((((first - second) / 2) ** 2).mean() / ((first**2 + second**2) / 2).mean())
