"""Selection against rules written out by hand."""

import numpy as np
import pytest

from kbne_edit import select
from kbne_edit.errors import EditError, InputError
from kbne_edit.selection import selection


def _scores():
    scores = np.zeros((5, 2, 4), np.float32)
    scores[:, 1, 3] = 1.0  # says the answer to anything
    scores[0:2, 0, 1] = 0.5  # knows dimension a
    scores[2, 0, 2] = 0.5  # knows dimension b
    scores[0, 0, 0] = 0.1  # exactly at the threshold: does not exceed it
    return scores


ABOUT = dict(dimensions=["a", "a", "b", "c", "c"], answers=["no"] * 5, controls=[False] * 3 + [True] * 2)


def test_paper_rule():
    found = selection(_scores(), **ABOUT)
    assert found.edit.factors == {0: {1: 2.0, 2: 2.0}, 1: {3: 2.0}}
    summary = found.summary()
    assert summary["controls_overlap"] == 1 and summary["overlap"] == {"a & b": 1}
    assert summary["dimensions"]["a"] == {"neurons": 2, "layers": [0, 1], "controls_overlap": 1}


def test_intersection_and_beta():
    assert select(_scores(), **ABOUT, combine="intersection").factors == {1: {3: 2.0}}
    scores = _scores()
    scores[1, 0, 1] = 0  # counts in half of dimension a now
    assert 1 in select(scores, **ABOUT, beta=0.5).factors[0]
    assert 1 not in select(scores, **ABOUT, beta=0.51).factors[0]


def test_contrastive_rule_drops_what_the_controls_share():
    found = selection(_scores(), **ABOUT, rule="contrastive")
    assert found.edit.factors == {0: {1: 2.0, 2: 2.0}}
    assert found.summary()["controls_overlap"] == 0


def test_contrastive_rule_matches_answer_and_form():
    scores = np.concatenate([_scores(), _scores()[3:]])
    about = dict(dimensions=["a", "a", "b"] + ["c"] * 4, controls=[False] * 3 + [True] * 4, rule="contrastive")
    scores[3:5, 0, 1] = 0.45  # two of the controls reach what (0, 1) has for dimension a
    assert select(scores, **about, answers=["no"] * 7).factors == {0: {2: 2.0}}
    other_answer = ["no"] * 3 + ["yes"] * 2 + ["no"] * 2
    assert select(scores, **about, answers=other_answer).factors == {0: {1: 2.0, 2: 2.0}}
    other_form = ["x"] * 3 + ["y"] * 2 + ["x"] * 2
    assert select(scores, **about, answers=["no"] * 7, forms=other_form).factors == {0: {1: 2.0, 2: 2.0}}
    with pytest.raises(InputError, match="too few controls with the answer 'yes'"):
        select(scores, **about, answers=["no"] * 6 + ["yes"])  # no other to hold that control against


def test_contrastive_rule_on_the_controls_uses_the_other_half():
    scores = np.zeros((6, 1, 3), np.float32)
    scores[:, 0, 0] = 1.0
    scores[0, 0, 1] = scores[1, 0, 1] = 0.5  # of the questions, and of one control in four
    scores[2:, 0, 2] = 0.5  # of every control
    about = dict(dimensions=["a"] * 2 + ["c"] * 4, controls=[False] * 2 + [True] * 4, rule="contrastive", beta=0.25)
    found = selection(scores, **about)
    assert found.edit.factors == {0: {1: 2.0}} and not found.controls.any()
    scores[2, 0, 1] = 0.5
    with pytest.raises(EditError, match="above what the controls reach"):
        selection(scores, **about)  # a quarter of the controls reach it


def test_left_out_questions_do_not_count():
    assert select(_scores(), **ABOUT, only=[True, True, False, True, True]).factors[0] == {1: 2.0}


def test_nothing_selected_and_wrong_settings():
    with pytest.raises(EditError, match="no neuron counts"):
        select(np.full((2, 1, 3), -1.0, np.float32))
    with pytest.raises(InputError):
        select(_scores(), tau=2)
    with pytest.raises(InputError, match="control"):
        select(_scores(), rule="contrastive")
