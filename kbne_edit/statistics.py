"""Paired statistics of items that were measured before and after.

Every figure is a function of column means: a share of items is the mean of a 0/1 column, ICAT and bias scores combine
two or three such means. So resampling is one matrix product, resample counts [R, m] @ sums [m, k], and one function
gives the figure, its interval and its test.

Dependent items (the sentences of a twin, the variants of a question) have the same number in `clusters`, and are drawn
and exchanged together. None: each item is a cluster of its own.

Intervals are percentile intervals of the bootstrap with the tails of Student's t for the number of clusters (Hesterberg
2015, "expanded percentile"): the plain ones are too narrow by a tenth for ten clusters.

Legend: n items (paired: item i is the same before and after), m clusters, k columns, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist
from typing import Annotated, NamedTuple

import numpy as np

Figure = Callable[[np.ndarray], np.ndarray]  # column means [..., k] -> the figure [...]


class Crossed(NamedTuple):
    """Two crossed kinds of clusters, e.g. scenarios and names. first, second: a name for each item, [n] each.

    Both kinds are drawn, and an item counts as often as the product of its two clusters' counts (Owen's pigeonhole
    bootstrap, 2007). Rejected: drawing one kind only, which treats the other as the same in every sample.
    """

    first: Sequence[object] | np.ndarray
    second: Sequence[object] | np.ndarray


Clusters = Sequence[object] | np.ndarray | Crossed | None  # a name or number for each item, [n]

_RESAMPLES = 2000
_PERMUTATIONS = 9999  # with the observed one 10 000: the smallest p is 1e-4
_CELLS = 4_000_000  # of one block [R, m]: bounds memory


class Interval(NamedTuple):
    """A figure and the ends of its 95 % interval. In JSON the list [value, low, high]."""

    value: float
    low: float
    high: float

    @property
    def side(self) -> int:
        """-1 if the whole interval is below 0, 1 if it is above 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)

    @classmethod
    def from_list(cls, values: Sequence[float]) -> Interval:
        """From a list of three numbers, as in JSON. Raises ValueError."""
        value, low, high = map(float, values)
        return cls(value, low, high)


IntervalJSON = Annotated[list[float], Interval]


def mean(columns: np.ndarray) -> np.ndarray:
    """The figure that is the mean of the first column."""
    return columns[..., 0]


def interval(
    columns: np.ndarray, figure: Figure = mean, resamples: int = _RESAMPLES, clusters: Clusters = None
) -> Interval:
    """A figure with its 95 % bootstrap interval over items, seeded. columns: [n] or [n, k]."""
    return pooled([Part(columns[:, None] if columns.ndim == 1 else columns, figure, clusters)], resamples)


def side(*intervals: Sequence[float]) -> int:
    """-1 if every interval is below 0, 1 if every one is above 0, else 0."""
    sides = {Interval(*interval).side for interval in intervals}
    return sides.pop() if len(sides) == 1 else 0


class Part(NamedTuple):
    """One of several figures that are averaged. columns: [n, k]; clusters: [n]."""

    columns: np.ndarray
    figure: Figure = mean
    clusters: Clusters = None


def pooled(parts: Sequence[Part], resamples: int = _RESAMPLES) -> Interval:
    """The mean of several figures, with items drawn separately for each."""
    parts = [Part(*part) for part in parts]
    draws, count = [], 0
    for seed, part in enumerate(parts):
        means = _resampled(part.columns, part.clusters, resamples, seed)
        draws.append(np.concatenate([np.atleast_1d(part.figure(block)) for block in means]))
        drawn = _number(part.clusters, len(part.columns))
        count = min(count, drawn) if count else drawn
    low, high = np.nanquantile(np.mean(draws, 0), _tails(count))
    value = float(np.mean([part.figure(part.columns.mean(0)) for part in parts]))
    return Interval(value, float(low), float(high))


def change(
    before: Sequence[np.ndarray], after: Sequence[np.ndarray], figure: Figure = mean, clusters: Clusters = None
) -> Interval:
    """The figure after minus the figure before, with the same items drawn for both.

    before, after: arrays [n, k] of the same items. If one holds several arrays (random draws of a control), their
    figures are averaged, and the draws are resampled with the items, so that their spread is part of the interval.
    """
    columns = np.concatenate([*before, *after], 1)
    k, rng = before[0].shape[1], np.random.default_rng(1)

    def average(means: np.ndarray, first: int, count: int) -> np.ndarray:
        values = np.stack([figure(means[..., i * k : (i + 1) * k]) for i in range(first, first + count)], -1)
        if count == 1:
            return values[..., 0]
        weights = rng.multinomial(count, np.full(count, 1 / count), len(means)) if means.ndim > 1 else 1.0
        return (values * weights).sum(-1) / count

    def difference(means: np.ndarray) -> np.ndarray:
        return average(means, len(before), len(after)) - average(means, 0, len(before))

    draws = np.concatenate([difference(means) for means in _resampled(columns, clusters, _RESAMPLES, 0)])
    low, high = np.nanquantile(draws, _tails(_number(clusters, len(columns))))
    return Interval(float(difference(columns.mean(0))), float(low), float(high))


def _number(clusters: Clusters, items: int) -> int:
    """The number of clusters; of two crossed kinds, the smaller one."""
    if clusters is None:
        return items
    if isinstance(clusters, Crossed):
        return min(_number(clusters.first, items), _number(clusters.second, items))
    return len(np.unique(np.asarray(clusters)))


def _by_cluster(columns: np.ndarray, clusters: Sequence[object] | np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(sums [m, k] of each cluster's items, their numbers [m])."""
    if clusters is None:
        return columns, np.ones(len(columns))
    _, place = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.zeros((place.max(initial=-1) + 1, columns.shape[1]))
    np.add.at(sums, place, columns)
    return sums, np.bincount(place).astype(float)


def _tails(count: int) -> list[float]:
    """Quantile levels of the two ends: of a normal distribution at the quantiles of Student's t with count - 1."""
    if count < 2:
        return [0.0, 1.0]
    reach = math.sqrt(count / (count - 1)) * _student(count - 1)
    level = NormalDist().cdf(-reach)
    return [level, 1 - level]


def _student(freedom: int) -> float:
    """The quantile at .975 of Student's t (Hill's expansion; below 3 degrees of freedom exact)."""
    if freedom < 3:
        return {1: 12.706, 2: 4.303}[freedom]
    z, v = 1.959964, float(freedom)
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / v**power for power, term in enumerate(terms, 1))


def _resampled(columns: np.ndarray, clusters: Clusters, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Column means [r, k] of resampled clusters, block by block. columns: [n, k]."""
    rng = np.random.default_rng(seed)
    if isinstance(clusters, Crossed):
        places = [np.unique(np.asarray(kind), return_inverse=True)[1] for kind in clusters]
        for size in _blocks(resamples, len(columns)):
            first, second = (_drawn(rng, size, int(place.max()) + 1)[:, place] for place in places)
            weights = (first * second).astype(float)
            total = weights.sum(1, keepdims=True)
            totals = weights @ columns
            yield np.divide(totals, total, out=np.full(totals.shape, np.nan), where=total > 0)
        return
    sums, sizes = _by_cluster(columns, clusters)
    for size in _blocks(resamples, len(sums)):
        counts = _drawn(rng, size, len(sums))
        yield counts @ sums / (counts @ sizes)[:, None]


def _drawn(rng: np.random.Generator, size: int, m: int) -> np.ndarray:
    """How often each of m clusters is drawn in each of `size` resamples, [size, m]."""
    index = rng.integers(0, m, (size, m))
    return np.bincount((index + m * np.arange(size)[:, None]).ravel(), minlength=size * m).reshape(size, m)


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


def least_change(before: np.ndarray, after: np.ndarray, clusters: Clusters = None) -> float:
    """Lower end of the 95 % interval of a paired change of shares, of two 0/1 columns [n].

    By Agresti and Min (2005), who add half an item to each of the four cells. The bootstrap fails here: if none of 30
    items got worse, no resample has a loss, but the model may well lose one item in 20.
    Each cluster counts as one item, because its items may all be the same.
    """
    share = _number(clusters, len(before)) / len(before)
    n = share * len(before) + 2
    up = share * int(((before < 0.5) & (after > 0.5)).sum())
    down = share * int(((before > 0.5) & (after < 0.5)).sum())
    return (up - down) / n - 1.96 * math.sqrt(up + down + 1 - (up - down) ** 2 / n) / n


def wilson(k: float, n: float) -> tuple[float, float]:
    """95 % interval of a share, k of n (Wilson's score interval)."""
    z2 = 1.96**2
    middle, half = (k + z2 / 2) / (n + z2), 1.96 * math.sqrt(k * (n - k) / n + z2 / 4) / (n + z2)
    return middle - half, middle + half


def permutation(before: np.ndarray, after: np.ndarray, figure: Figure = mean, clusters: Clusters = None) -> float:
    """Two-sided p of figure(after) - figure(before), seeded: from exchanges of before and after by cluster, and at
    least that of `skewed`. before, after: [n, k].

    If the edit does nothing, before and after are exchangeable in each cluster, and the test is exact. But a change
    with mean 0 that is skewed is significant in 7 of 100 cases by the exchange alone (30 clusters, skewness 1.4), by
    both tests in 4.5. For crossed clusters, the larger p of the two kinds.
    """
    if isinstance(clusters, Crossed):
        return max(permutation(before, after, figure, kind) for kind in clusters)
    rng, n = np.random.default_rng(0), len(before)
    observed = abs(figure(after.mean(0)) - figure(before.mean(0)))
    difference, at_least = _by_cluster(after - before, clusters)[0], 1
    for size in _blocks(_PERMUTATIONS, len(difference)):
        moved = rng.integers(0, 2, (size, len(difference))).astype(np.float64) @ difference / n
        values = figure(after.mean(0) - moved) - figure(before.mean(0) + moved)
        # Sums in another order differ in the last bits; an arrangement equal to the observed one must count.
        at_least += int((np.abs(values) >= observed - 1e-12 * (1 + observed)).sum())
    return max(at_least / (_PERMUTATIONS + 1), skewed(before, after, figure, clusters))


def skewed(before: np.ndarray, after: np.ndarray, figure: Figure = mean, clusters: Clusters = None) -> float:
    """Two-sided p of the same change by Student's t with Hall's correction for skewness (1992).

    Standard error and skewness are from the jackknife over clusters. 0 if it is not defined: fewer than three clusters,
    no spread, or a figure that needs every cluster.
    """
    if isinstance(clusters, Crossed):
        return max(skewed(before, after, figure, kind) for kind in clusters)
    sums, sizes = _by_cluster(np.concatenate([before, after], 1), clusters)
    m, k = len(sums), before.shape[1]
    if m < 3:
        return 0.0

    def difference(means: np.ndarray) -> np.ndarray:
        return figure(means[..., k:]) - figure(means[..., :k])

    value = float(difference(sums.sum(0) / sizes.sum()))
    without = difference((sums.sum(0) - sums) / (sizes.sum() - sizes)[:, None])
    parts = (m - 1) * (without.mean() - without)  # a cluster's part of the figure, centred
    spread = float(np.sqrt((parts**2).mean()))
    if not spread > 1e-12 * (1 + abs(value)):  # also where it is not a number
        return 0.0
    scaled, skewness = value / spread, float((parts**3).mean()) / spread**3
    corrected = scaled + skewness * scaled**2 / 3 + skewness**2 * scaled**3 / 27 + skewness / (6 * m)
    return 2 * NormalDist().cdf(-_normal(math.sqrt(m - 1) * abs(corrected), m - 1))


def _normal(t: float, freedom: int) -> float:
    """The normal deviate with the same tail probability as Student's t >= 0 (Hill's algorithm 395, 1970)."""
    a = freedom - 0.5
    b, z = 48 * a * a, math.sqrt(a * math.log1p(t * t / freedom))
    terms = 4 * z**7 + 33 * z**5 + 240 * z**3 + 855 * z
    return z + (z**3 + 3 * z) / b - terms / (10 * b * (b + 0.8 * z**4 + 100))


def beyond_draws(progress: np.ndarray) -> np.ndarray:
    """Which figures of an edit exceed every random draw in every figure, [k] of bool.

    progress: [1 + draws, k], how far each figure moved towards its ideal; row 0 is the edit's. Each column is divided
    by its spread over all rows. If the edit is like a draw, each row is equally likely to hold the largest value. So at
    most 1 in 1 + draws cases has any figure beyond the draws, however many figures there are (the maximum of Westfall
    and Young). Rejected: an interval over items only, which ignores the spread between draws and was wrong in 9 to 29 %
    of the cases.
    """
    centred = progress - progress.mean(0)
    spread = centred.std(0)
    scaled = np.where(spread > 1e-12, centred / np.maximum(spread, 1e-12), 0.0)
    return scaled[0] > scaled[1:].max()


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the given order: they bound the family-wise error rate."""
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(np.argsort(p, kind="stable").tolist()):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted
