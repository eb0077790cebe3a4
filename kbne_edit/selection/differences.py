"""Which of many columns differ between two groups of rows, with an error rate over all columns together.

Rows are questions and controls, columns are neurons. Of a hundred thousand neurons some differ by chance, and none is
normally distributed. Means are compared within strata (questions of one form and answer) and averaged with the first
group's weights. Each group has one variance within its strata, as in Welch's test. A column's lower bound is its
difference minus `critical` standard errors, where `critical` is the 95 % quantile, over random relabellings within the
strata, of the largest statistic of all columns (the maximum of Westfall and Young). So if the labels mean nothing, in
95 of 100 data sets no column at all has a bound above 0, whatever the columns' distributions and correlations.

Legend: n rows, M columns, R relabellings or resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np

RELABELLINGS, CONFIDENCE = 200, 0.95
_COLUMNS = 512  # at once, to fit into the processor's cache
_NOISE = 1e-7  # float32's rounding error of a score relative to the question's largest


def contrast(x: np.ndarray, strata: np.ndarray, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Difference of the groups' means and its standard error, [R, M] each.

    x: [n, M]. strata: [n], the stratum of each row. first, second: how often each row is in the group, [R, n].
    """
    size = first.sum(1, keepdims=True)
    x = x.copy()
    difference: Any  # [R, M], once there is a stratum
    difference, means, parts, spare = 0.0, [0.0, 0.0], [0.0, 0.0], [0, 0]
    for stratum in np.unique(strata):
        rows = strata == stratum
        x[rows] -= x[rows].mean(0)  # changes no difference, and avoids cancellation in the squares
        share = first[:, rows].sum(1, keepdims=True) / size  # [R, 1]
        for i, group in enumerate((first[:, rows], second[:, rows])):
            count = group.sum(1, keepdims=True)
            total = group @ x[rows]
            difference = difference + total * ((-1) ** i * share / np.maximum(count, 1))
            means[i] = means[i] + total * total / np.maximum(count, 1)
            parts[i] = parts[i] + share**2 / np.maximum(count, 1)
            spare[i] = spare[i] + np.maximum(count - 1, 0)
    x *= x
    spreads = [group @ x - mean for group, mean in zip((first, second), means, strict=True)]
    variance = sum(s * (p / np.maximum(k, 1)) for s, p, k in zip(spreads, parts, spare, strict=True))
    return difference, np.maximum(np.sqrt(np.maximum(variance, 0)), _NOISE)


def critical(blocks: Iterable[np.ndarray], strata: np.ndarray, first: np.ndarray, seed: int = 0) -> float:
    """The 95 % quantile, over seeded relabellings, of the largest difference of all columns, in standard errors.

    blocks: the columns, [n, some] each. first: [n], True where a row belongs to the first group.
    """
    rng = np.random.default_rng(seed)
    labels = np.tile(first, (RELABELLINGS, 1)).astype(np.float32)
    for stratum in np.unique(strata):
        rows = np.flatnonzero(strata == stratum)
        labels[:, rows] = rng.permuted(labels[:, rows], axis=1)
    largest = np.full(RELABELLINGS, -np.inf)
    for x in blocks:
        difference, error = contrast(x, strata, labels, 1 - labels)
        largest = np.maximum(largest, (difference / error).max(1))
    return float(np.quantile(largest, CONFIDENCE, method="higher"))


def lower_bounds(
    scores: np.ndarray, first: np.ndarray, second: np.ndarray, strata: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """A function: drawn -> lower bounds [L, F] of the mean share in `drawn` minus that in `second`.

    scores: [Q, L, F]; a share is a score relative to its question's largest. first, second: indices of questions;
    drawn: `first`, or a resample of it. strata: of the concatenation of `first` and `second`.
    """
    rows, belongs = np.concatenate([first, second]), np.arange(len(strata)) < len(first)
    largest = np.array([[max(float(scores[q].max()), 1e-30)] for q in rows], scores.dtype)
    layers, neurons = scores.shape[1:]

    def blocks() -> Iterator[np.ndarray]:
        for layer in range(layers):
            for start in range(0, neurons, _COLUMNS):
                yield scores[rows, layer, start : start + _COLUMNS] / largest

    @cache
    def level() -> float:
        return critical(blocks(), strata, belongs)

    def bounds(drawn: np.ndarray) -> np.ndarray:
        times = belongs * (rows[:, None] == drawn).sum(1)
        contrasts = (contrast(x, strata, times[None].astype(float), 1.0 - belongs[None]) for x in blocks())
        return np.concatenate([(d - level() * e)[0] for d, e in contrasts]).reshape(layers, neurons)

    return bounds
