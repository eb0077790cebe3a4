"""Statistics against scipy, and against definitions written out."""

import itertools

import numpy as np
import pytest
from scipy import stats

from kbne_edit.statistics import (
    Crossed,
    Interval,
    change,
    holm,
    interval,
    least_change,
    mcnemar,
    permutation,
    pooled,
    skewed,
    wilson,
)


def _pairs(seed, n=60):
    rng = np.random.default_rng(seed)
    before = rng.normal(size=(n, 1))
    return before, before + rng.normal(0.2, 0.5, size=(n, 1))


@pytest.mark.parametrize("up, down", [(0, 0), (1, 0), (3, 9), (10, 10), (40, 18), (300, 250)])
def test_mcnemar_is_the_exact_binomial_test(up, down):
    before = np.array([0.0] * up + [1.0] * down + [1.0, 0.0] * 5)
    after = np.array([1.0] * up + [0.0] * down + [1.0, 0.0] * 5)
    expected = stats.binomtest(up, up + down).pvalue if up + down else 1.0
    assert mcnemar(before, after) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("k, n", [(0, 7), (1, 7), (7, 7), (31, 90), (500, 1000)])
def test_interval_of_a_share_is_wilsons(k, n):
    expected = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert wilson(k, n) == pytest.approx(expected, abs=1e-5)  # 1.96 for 1.959964


def test_interval_agrees_with_scipy():
    """Two seeded bootstraps of 2000: their limits differ by some 3 % of the interval's width (quantile noise)."""
    values = _pairs(1)[1][:, 0]
    ours = interval(values)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=1).confidence_interval
    assert ours[0] == pytest.approx(values.mean(), abs=1e-12)
    width = theirs.high - theirs.low
    assert abs(ours[1] - theirs.low) < 0.1 * width and abs(ours[2] - theirs.high) < 0.1 * width


def test_interval_of_a_ratio_agrees_with_scipy():
    rng = np.random.default_rng(2)
    columns = np.stack([rng.random(80) < 0.4, np.ones(80)], 1).astype(float)
    columns[:, 1] = np.maximum(columns[:, 0], rng.random(80) < 0.7)
    ours = interval(columns, lambda m: m[..., 0] / m[..., 1])
    theirs = stats.bootstrap(
        (columns[:, 0], columns[:, 1]),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=20000,
        method="percentile",
        rng=1,
    ).confidence_interval
    width = theirs.high - theirs.low
    assert abs(ours[1] - theirs.low) < 0.1 * width and abs(ours[2] - theirs.high) < 0.1 * width


def test_change_is_the_interval_of_the_paired_difference():
    before, after = _pairs(3)
    assert change([before], [after]) == pytest.approx(interval(after - before), abs=1e-12)
    other = before + 1
    assert change([before, other], [after])[0] == pytest.approx(float((after - before).mean() - 0.5), abs=1e-12)


@pytest.mark.parametrize("seed", [4, 5, 6])
def test_permutation_agrees_with_the_exact_test(seed):
    """All 2^10 exchanges against 9999 drawn ones: 4 standard errors of a share, at most 4 sqrt(.25 / 9999) = 0.02."""
    before, after = _pairs(seed, 10)
    exact = stats.permutation_test(
        (before[:, 0], after[:, 0]),
        lambda a, b: np.mean(b) - np.mean(a),
        permutation_type="samples",
        n_resamples=np.inf,
        vectorized=False,
    ).pvalue
    hall = _hall(before, after, lambda m: m[..., 0], range(10))
    assert abs(permutation(before, after) - max(exact, hall)) < 0.02


def test_permutation_of_a_figure_that_is_no_mean():
    """Every exchange written out, for a ratio of two columns."""
    rng = np.random.default_rng(7)
    before, after = rng.random((8, 2)), rng.random((8, 2)) + [0.3, 0.0]

    def ratio(means):
        return means[..., 0] / means[..., 1]

    def shift(swap):
        swap = np.array(swap)[:, None]
        return abs(ratio(np.where(swap, before, after).mean(0)) - ratio(np.where(swap, after, before).mean(0)))

    every = [shift(swap) for swap in itertools.product([False, True], repeat=8)]
    exact = np.mean([value >= every[0] - 1e-12 for value in every])
    assert abs(permutation(before, after, ratio) - max(exact, _hall(before, after, ratio, range(8)))) < 0.02


def _hall(before, after, figure, clusters):
    """Hall's corrected t, with a loop over the clusters left out."""
    names = sorted(set(clusters))
    value = figure(after.mean(0)) - figure(before.mean(0))
    left = [np.array([c != name for c in clusters]) for name in names]
    without = np.array([figure(after[kept].mean(0)) - figure(before[kept].mean(0)) for kept in left])
    parts = (len(names) - 1) * (without.mean() - without)
    s, g, n = value / parts.std(), stats.skew(parts), len(names)
    t = np.sqrt(n - 1) * (s + g * s**2 / 3 + g**2 * s**3 / 27 + g / (6 * n))
    return 2 * stats.t.sf(abs(t), n - 1)


@pytest.mark.parametrize("count", [6, 12, 40])
@pytest.mark.parametrize("figure", [lambda m: m[..., 0], lambda m: m[..., 0] / m[..., 1]])
def test_a_skewed_change_is_judged_by_hall_s_t(count, figure):
    rng = np.random.default_rng(count)
    clusters = [f"c{i % count}" for i in range(3 * count)]
    before = np.stack([rng.normal(size=3 * count), 2 + rng.random(3 * count)], 1)
    after = before + np.stack([rng.exponential(size=3 * count) - 0.7, rng.random(3 * count)], 1)
    expected = _hall(before, after, figure, clusters)
    assert skewed(before, after, figure, clusters) == pytest.approx(expected, rel=2e-3)
    assert permutation(before, after, figure, clusters) >= skewed(before, after, figure, clusters)


def test_a_long_tail_on_the_other_side_is_no_effect():
    """A sample of exponential changes often has no outlier, and its mean lies below 0: the exchange is fooled."""
    values = stats.expon.ppf((np.arange(30) + 0.5) / 30 * 0.85)[:, None] - 1  # without the largest of the tail
    zero = np.zeros_like(values)
    exchange = stats.ttest_1samp(values[:, 0], 0).pvalue  # what the exchange gives, but for its steps
    assert exchange < 0.01 and permutation(zero, values) > 1.5 * exchange
    assert permutation(zero, -values) == pytest.approx(permutation(zero, values), abs=0.003)  # no side is preferred


def test_no_difference_gives_p_1():
    before, _ = _pairs(8)
    assert permutation(before, before.copy()) == 1.0 and mcnemar(before[:, 0] > 0, before[:, 0] > 0) == 1.0


def test_holm_rejects_what_the_step_down_procedure_rejects():
    rng = np.random.default_rng(9)
    for _ in range(50):
        p = rng.random(7) ** 4
        rejected = set()
        for rank, index in enumerate(np.argsort(p)):
            if p[index] > 0.05 / (len(p) - rank):
                break
            rejected.add(int(index))
        assert {i for i, adjusted in enumerate(holm(p)) if adjusted <= 0.05} == rejected
    assert holm([]) == []


def test_pooled_figures_have_the_interval_of_independent_means():
    """Two parts of one size: were the same items drawn for both, the parts' errors would not add as squares."""
    rng = np.random.default_rng(3)
    a, b = np.sort(rng.normal(1, 1, 300)), np.sort(rng.normal(2, 1, 300))
    mean, low, high = pooled([(a[:, None], lambda m: m[..., 0]), (b[:, None], lambda m: 2 * m[..., 0])])
    error = np.sqrt(a.var() + 4 * b.var()) / 2 / np.sqrt(300)
    assert mean == pytest.approx((a.mean() + 2 * b.mean()) / 2)
    assert (low - mean, high - mean) == pytest.approx((-1.96 * error, 1.96 * error), rel=0.1)
    assert pooled([(a[:, None], lambda m: m[..., 0])]) == interval(a)


def test_least_change_covers_what_the_bootstrap_cannot():
    """Drawn from a model that loses 1 item in 20, n = 30: the true change is below the stated end in 5 % at most.

    Some 21 % of such draws show no loss at all, where the bootstrap's end is 0.
    """
    rng = np.random.default_rng(0)
    ends, blind = [], 0
    for _ in range(2000):
        after = (rng.random(30) > 0.05).astype(float)
        ends.append(least_change(np.ones(30), after))
        blind += after.all()
    assert np.mean([end > -0.05 for end in ends]) <= 0.05 and 0.15 < blind / 2000 < 0.28
    assert least_change(np.ones(30), np.ones(30)) == pytest.approx(-1.96 / 32)


def test_holm_has_a_running_maximum():
    assert holm([0.03, 0.04]) == pytest.approx([0.06, 0.06])
    assert holm([0.5, 0.01, 0.04]) == pytest.approx([0.5, 0.03, 0.08])


def test_clusters_are_drawn_together():
    """Forty items in ten clusters of equal items have the interval of ten items; mean and value are those of all."""
    rng = np.random.default_rng(0)
    ten = rng.normal(0.5, 1, 10)
    forty, names = np.repeat(ten, 4), [f"c{i // 4}" for i in range(40)]
    assert interval(forty, clusters=names) == pytest.approx(interval(ten))
    assert permutation(0 * forty[:, None], forty[:, None], clusters=names) == permutation(
        0 * ten[:, None], ten[:, None]
    )
    uneven = np.array([1.0, 1, 1, 1, 5])
    assert interval(uneven, clusters=["a", "a", "a", "a", "b"]).value == pytest.approx(1.8)
    ones = np.ones(40)
    assert least_change(ones, ones, names) == pytest.approx(least_change(np.ones(10), np.ones(10)))


def test_clusters_that_cross_are_both_drawn():
    """Its variance of a mean is that of both kinds' means together (two-way random effects), within 15 %."""
    rng = np.random.default_rng(5)
    rows, columns = rng.normal(0, 1, 40), rng.normal(0, 0.8, 30)
    kinds = [(i, j) for i in range(40) for j in range(30)]
    values = np.array([rows[i] + columns[j] for i, j in kinds])
    crossed = Crossed([f"s{i}" for i, _ in kinds], [f"n{j}" for _, j in kinds])
    result = interval(values, clusters=crossed)
    expected = 2 * 1.96 * np.sqrt(rows.var(ddof=1) / 40 + columns.var(ddof=1) / 30)
    assert result.value == pytest.approx(values.mean()) and 0.85 < (result.high - result.low) / expected < 1.2
    alone = [interval(values, clusters=kind) for kind in crossed]
    assert all(result.high - result.low > 1.1 * (one.high - one.low) for one in alone)
    zero = np.zeros((len(values), 1))
    assert permutation(zero, values[:, None], clusters=crossed) == max(
        permutation(zero, values[:, None], clusters=kind) for kind in crossed
    )


def test_the_spread_of_draws_is_part_of_the_interval():
    """Items all alike: what is left is how much draws differ, and the interval of their mean is 1.96 sd / sqrt(n)."""
    draws = [np.full((30, 1), value) for value in np.linspace(-1, 1, 25)]
    result = change([np.zeros((30, 1))], draws)
    half = 1.96 * np.linspace(-1, 1, 25).std() / 5
    # 30 clusters: Student's tails are 6 % wider; quantiles of 2000 resamples are off by some 4 %.
    assert result == pytest.approx((0, -1.06 * half, 1.06 * half), abs=0.12 * half)
    single = change([np.zeros((30, 1))], draws[:1])
    assert single == pytest.approx((-1, -1, -1))


@pytest.mark.parametrize("count", [6, 10, 25])
def test_intervals_of_few_items_are_as_wide_as_student_s(count):
    """Of a normal sample: percentile limits with Student's tails, against t itself; 3 standard errors of a quantile."""
    values = np.random.default_rng(count).normal(size=count)
    low, high = stats.t.interval(0.95, count - 1, values.mean(), values.std(ddof=1) / count**0.5)
    result = interval(values)
    assert result.high - result.low == pytest.approx(high - low, rel=0.2)
    assert Interval(1.0, 0.5, 2.0).side == 1 and Interval(-1.0, -2.0, -0.1).side == -1 and Interval(0, -1, 1).side == 0
