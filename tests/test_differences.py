"""Differences of columns against SciPy, against loops, and against how often chance may win."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from kbne_edit.selection.differences import CONFIDENCE, contrast, critical, lower_bounds

STRATA = np.array([0, 0, 0, 1, 1, 1, 1] + [0, 0, 0, 0, 1, 1, 1])
FIRST = np.arange(14) < 7


def _groups(first=FIRST):
    return first[None].astype(float), 1.0 - first[None]


def test_one_stratum_is_welchs_test():
    x = np.random.default_rng(0).standard_exponential((14, 6)) * [1, 1, 1, 5, 5, 5]
    difference, error = contrast(x, np.zeros(14, int), *_groups())
    expected = stats.ttest_ind(x[FIRST], x[~FIRST], equal_var=False)
    np.testing.assert_allclose((difference / error)[0], expected.statistic)


def _by_hand(x, strata, first, second):
    """first, second: lists of rows of one column, as often as they stand there."""
    difference = variance = 0.0
    spread = {}
    for name, group in (("first", first), ("second", second)):
        parts = [[x[i] for i in group if strata[i] == s] for s in set(strata)]
        parts = [part for part in parts if part]
        spread[name] = sum(sum((v - np.mean(p)) ** 2 for v in p) for p in parts) / sum(len(p) - 1 for p in parts)
    for s in set(strata):
        a, b = ([x[i] for i in group if strata[i] == s] for group in (first, second))
        if a:
            share = len(a) / len(first)
            difference += share * (np.mean(a) - np.mean(b))
            variance += share**2 * (spread["first"] / len(a) + spread["second"] / len(b))
    return difference, variance**0.5


def test_strata_and_rows_that_stand_more_than_once():
    x = np.random.default_rng(1).standard_normal((14, 5)) + 3 * STRATA[:, None]
    drawn = [0, 0, 2, 4, 5, 5, 5]
    times = np.bincount(drawn, minlength=14)
    weights = np.stack([FIRST, times]).astype(float), np.stack([~FIRST, ~FIRST]).astype(float)
    difference, error = contrast(x, STRATA, *weights)
    for column in range(5):
        for r, group in enumerate((list(range(7)), drawn)):
            expected = _by_hand(x[:, column], STRATA, group, list(range(7, 14)))
            assert (difference[r, column], error[r, column]) == pytest.approx(expected)


def test_a_shift_of_a_stratum_is_no_difference():
    x = np.random.default_rng(2).standard_normal((14, 3))
    plain, shifted = (contrast(values, STRATA, *_groups()) for values in (x, x + 1e3 * STRATA[:, None]))
    np.testing.assert_allclose(shifted, plain, rtol=1e-9)


def test_chance_wins_in_no_more_than_five_of_a_hundred():
    """Skewed columns that hang together, no difference between the groups: how often is any bound above 0?"""
    rng, runs = np.random.default_rng(3), 400
    result = 0
    for seed in range(runs):
        x = rng.standard_exponential((24, 1)) * rng.standard_normal((24, 30)) ** 2
        strata, first = np.arange(24) % 2, np.arange(24) % 4 < 2
        difference, error = contrast(x, strata, *_groups(first))
        result += bool((difference > critical([x[:, :9], x[:, 9:]], strata, first, seed) * error).any())
    rate = 1 - CONFIDENCE
    assert result / runs < rate + 3 * (rate * (1 - rate) / runs) ** 0.5
    assert result > 0  # or the bound would be idle


def test_lower_bounds_of_scores():
    rng = np.random.default_rng(4)
    scores = rng.standard_normal((20, 2, 700)).astype(np.float32)  # more neurons than are looked at in one go
    scores[:, 0, 0] = rng.uniform(50, 60, 20)  # the largest score of every question
    scores[:8, 1, 650] += 8  # planted in the questions
    first, second = np.array([7, 1, 2, 3, 4, 5, 6, 0]), np.arange(9, 20)
    strata = np.array(["a"] * 4 + ["b"] * 4 + ["a"] * 5 + ["b"] * 6)
    result = lower_bounds(scores, first, second, strata)(first)
    assert result.shape == (2, 700) and np.argwhere(result > 0).tolist() == [[1, 650]]
    rows = np.concatenate([first, second])
    x = (scores / scores.max((1, 2), keepdims=True))[rows].reshape(19, -1)
    belongs = np.arange(19) < 8
    level = critical([x], np.unique(strata, return_inverse=True)[1], belongs)
    for place in (0, 650, 700, 1350):
        difference, error = _by_hand(x[:, place], strata.tolist(), range(8), range(8, 19))
        assert result.ravel()[place] == pytest.approx(difference - level * error, rel=1e-3, abs=1e-6)
    drawn = np.array([7, 7, 7, 3, 4, 4, 6, 0])
    resampled = lower_bounds(scores, first, second, strata)(drawn)
    column = x[:, 1350][[*(first.tolist().index(q) for q in drawn), *range(8, 19)]]
    difference, error = _by_hand(column, strata.tolist(), range(8), range(8, 19))
    assert resampled[1, 650] == pytest.approx(difference - level * error, rel=1e-3)


def test_columns_that_never_move_are_never_found():
    scores = np.random.default_rng(6).standard_normal((12, 1, 40)) * 0.01
    scores[:, 0, 0] = 1.0
    scores[:, 0, 1], scores[:6, 0, 2] = 0.0, scores[0, 0, 2] + 1e-10  # rounding, not a difference
    scores[6:, 0, 2] = scores[0, 0, 2] - 1e-10
    bounds = lower_bounds(scores, np.arange(6), np.arange(6, 12), np.array(["a"] * 12))
    assert not (bounds(np.arange(6)) > 0)[0, :3].any()


def test_the_level_is_one_of_the_exact_relabellings():
    """Two strata of four and six rows, 6 * 20 = 120 relabellings within them, all by hand: the maximum over columns."""
    x, strata = np.random.default_rng(7).standard_exponential((10, 5)), np.array([0] * 4 + [1] * 6)
    first = np.array([True, True, False, False] + [True] * 3 + [False] * 3)
    exact = []
    for a in combinations(range(4), 2):
        for b in combinations(range(4, 10), 3):
            group, rest = [*a, *b], [i for i in range(10) if i not in (*a, *b)]
            parts = (_by_hand(x[:, column], strata.tolist(), group, rest) for column in range(5))
            exact.append(max(difference / error for difference, error in parts))
    levels = [critical([x[:, :2], x[:, 2:]], strata, first, seed) for seed in range(20)]
    for level in levels:
        assert np.abs(np.array(exact) - level).min() < 1e-5 * level  # the labels are float32
    # Of 200 draws the share below the level scatters by sqrt(.05 * .95 / 200) = 0.015 about 0.95, and each of the 120
    # weighs 0.008; twenty levels together by a fifth of that.
    below = [np.mean(np.array(exact) <= level * (1 + 1e-5)) for level in levels]
    assert abs(np.mean(below) - CONFIDENCE) < 0.02 and min(below) > 0.88 and len(set(levels)) > 1


def test_the_level_depends_on_its_seed_and_on_no_division_into_blocks():
    x, first = np.random.default_rng(8).standard_normal((14, 9)), FIRST
    whole = critical([x], STRATA, first, 1)
    assert whole == critical([x], STRATA, first, 1)
    assert whole == pytest.approx(critical([x[:, :1], x[:, 1:4], x[:, 4:]], STRATA, first, 1), rel=1e-6)
    assert critical([x[:, :4]], STRATA, first, 1) <= whole * (1 + 1e-6)  # more columns, more that chance may reach
