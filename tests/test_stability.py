"""Stability against probabilities worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest

from kbne_edit import select
from kbne_edit.errors import EditError, InputError
from kbne_edit.recipe import Question
from kbne_edit.scores import Scores
from kbne_edit.selection import selection
from kbne_edit.stability import agreement, stability


def _scores(values, controls=0):
    count = len(values)
    questions = tuple(
        Question(f"q{i}", "no", "c" if i >= count - controls else "a", "form", i >= count - controls)
        for i in range(count)
    )
    ones = np.ones(count, np.float32)
    return Scores(np.asarray(values, np.float32), ones, 0 * ones, ones, ones, questions, {}, "down", "base")


def _ten():
    values = np.zeros((10, 2, 3))
    values[:, 0, 0] = 1.0  # counts for every question
    values[3, 1, 2] = 0.5  # counts for one question in ten
    return values


def test_a_share_is_the_probability_to_be_drawn():
    found = stability(_scores(_ten()), draws=4000)
    assert found["neurons"][0] == {0: 1.0}
    drawn = 1 - 0.9**10  # at least once in ten draws, which is enough at beta 0.1
    assert found["neurons"][1][2] == pytest.approx(drawn, abs=4 * (drawn * (1 - drawn) / 4000) ** 0.5)
    assert found["jaccard"][0] == pytest.approx((1 + drawn) / 2, abs=0.02)
    assert found == stability(_scores(_ten()), draws=4000)  # seeded


def test_only_stable_neurons_are_kept():
    scores = _scores(_ten())
    chosen = selection(scores).stable(stability(scores)["neurons"], 0.8)
    assert chosen.edit.factors == {0: {0: 2.0}} and select(scores).factors == {0: {0: 2.0}, 1: {2: 2.0}}
    assert chosen.edit.found["select"]["min_stability"] == 0.8
    with pytest.raises(EditError, match="resamples"):
        selection(scores).stable({0: {0: 0.5}, 1: {2: 0.5}}, 0.8)


def test_the_specific_rule_is_resampled_too():
    values = np.random.default_rng(0).standard_normal((20, 1, 40)) * 0.01
    values[:, 0, 0] = 1.0
    values[:10, 0, 5] += 0.5  # of every question, and of no control
    found = stability(_scores(values, controls=10), draws=20, rule="specific")
    assert found["neurons"] == {0: {5: 1.0}} and found["jaccard"][0] > 0.5


def test_agreement():
    a = _scores(_ten())
    assert agreement(a, a) == {"neurons": [2, 2, 2], "jaccard": 1.0, "rank": pytest.approx(1.0)}
    other = _ten()
    other[3, 1, 2], other[5, 1, 1] = 0, 0.5
    found = agreement(a, _scores(other))
    assert found["neurons"] == [2, 2, 1] and found["jaccard"] == pytest.approx(1 / 3) and found["rank"] < 1
    with pytest.raises(InputError, match="different models"):
        agreement(a, replace(a, base="another"))
