"""Paired statistics: what can be said about items that were measured before and after.

Every figure here is a function of column means: a share of items is the mean of a 0/1 column, ICAT and bias scores
combine two or three such means. So resampling items is one matrix product, resample counts [R, n] @ columns [n, k],
and one function serves the figure, its interval and its test.

Legend: n items (paired: item i is the same before and after), k columns, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

Figure = Callable[[np.ndarray], np.ndarray]  # column means [..., k] -> the figure [...]

_RESAMPLES = 2000
_PERMUTATIONS = 9999  # with the observed one 10 000: the smallest p is 1e-4
_CELLS = 4_000_000  # of one block [R, n]: bounds memory


def mean(columns: np.ndarray) -> np.ndarray:
    """The figure that is the first column's mean itself."""
    return columns[..., 0]


def interval(columns: np.ndarray, figure: Figure = mean, resamples: int = _RESAMPLES) -> list[float]:
    """[figure, low, high]: 95 % percentile bootstrap over items, seeded. columns: [n] or [n, k]."""
    return pooled([(columns[:, None] if columns.ndim == 1 else columns, figure)], resamples)


def side(*intervals: Sequence[float]) -> int:
    """-1 if each [figure, low, high] lies below 0, 1 if each lies above, else 0."""
    return all(low > 0 for _, low, _ in intervals) - all(high < 0 for _, _, high in intervals)


def pooled(parts: Sequence[tuple[np.ndarray, Figure]], resamples: int = _RESAMPLES) -> list[float]:
    """[mean of several figures, low, high], each figure's items drawn on their own. parts: (columns [n, k], figure)."""
    draws = [
        np.concatenate([np.atleast_1d(figure(means)) for means in _resampled(columns, resamples, seed)])
        for seed, (columns, figure) in enumerate(parts)
    ]
    low, high = np.nanquantile(np.mean(draws, 0), [0.025, 0.975])
    return [float(np.mean([figure(columns.mean(0)) for columns, figure in parts])), float(low), float(high)]


def change(before: Sequence[np.ndarray], after: Sequence[np.ndarray], figure: Figure = mean) -> list[float]:
    """[figure after - figure before, low, high], the same items drawn for all.

    before, after: arrays [n, k] of the same items; the figures of several (draws of a control) are averaged.
    """
    k = before[0].shape[1]

    def average(means: np.ndarray, first: int, count: int) -> np.ndarray:
        return sum(figure(means[..., i * k : (i + 1) * k]) for i in range(first, first + count)) / count

    def difference(means: np.ndarray) -> np.ndarray:
        return average(means, len(before), len(after)) - average(means, 0, len(before))

    return interval(np.concatenate([*before, *after], 1), difference)


def _resampled(columns: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Column means [r, k] of resampled items, block by block."""
    rng, n = np.random.default_rng(seed), len(columns)
    for size in _blocks(resamples, n):
        index = rng.integers(0, n, (size, n))
        counts = np.bincount((index + n * np.arange(size)[:, None]).ravel(), minlength=size * n).reshape(size, n)
        yield counts @ columns / n


def _blocks(total: int, n: int) -> Iterator[int]:
    step = max(_CELLS // max(n, 1), 1)
    for start in range(0, total, step):
        yield min(step, total - start)


def mcnemar(before: np.ndarray, after: np.ndarray) -> float:
    """Exact two-sided McNemar test of two paired 0/1 columns [n]: p of the items that changed, under a fair coin."""
    up, down = int(((before < 0.5) & (after > 0.5)).sum()), int(((before > 0.5) & (after < 0.5)).sum())
    changed = up + down
    tail = sum(math.comb(changed, i) for i in range(min(up, down) + 1))
    return min(1.0, 2 * tail / 2**changed)


def least_change(before: np.ndarray, after: np.ndarray) -> float:
    """Lower end of the 95 % interval of a paired change of shares, of two 0/1 columns [n].

    By Agresti and Min (2005), who add half an item to each of the four cells. It is for where the bootstrap is blind:
    if none of 30 items got worse, no resample has a loss, but the model may well lose one item in 20.
    """
    n = len(before) + 2
    up, down = int(((before < 0.5) & (after > 0.5)).sum()), int(((before > 0.5) & (after < 0.5)).sum())
    return (up - down) / n - 1.96 * math.sqrt(up + down + 1 - (up - down) ** 2 / n) / n


def wilson(k: float, n: float) -> tuple[float, float]:
    """95 % interval of a share, k of n (Wilson's score interval)."""
    z2 = 1.96**2
    middle, half = (k + z2 / 2) / (n + z2), 1.96 * math.sqrt(k * (n - k) / n + z2 / 4) / (n + z2)
    return middle - half, middle + half


def permutation(before: np.ndarray, after: np.ndarray, figure: Figure = mean) -> float:
    """Two-sided p of figure(after) - figure(before), by exchanging before and after item by item, seeded.

    before, after: [n, k]. If the edit did nothing, each item's two rows could as well be the other way round.
    """
    rng, n = np.random.default_rng(0), len(before)
    observed = abs(figure(after.mean(0)) - figure(before.mean(0)))
    difference, at_least = after - before, 1
    for size in _blocks(_PERMUTATIONS, n):
        moved = rng.integers(0, 2, (size, n)).astype(np.float64) @ difference / n
        values = figure(after.mean(0) - moved) - figure(before.mean(0) + moved)
        # Sums in another order differ in the last bits: an arrangement equal to the observed one must count.
        at_least += int((np.abs(values) >= observed - 1e-12 * (1 + observed)).sum())
    return at_least / (_PERMUTATIONS + 1)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the given order: below alpha for all true findings but alpha of all reports."""
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(np.argsort(p, kind="stable").tolist()):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted
