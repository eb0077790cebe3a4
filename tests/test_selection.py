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
    assert select(_scores(), **ABOUT, rule="contrastive").factors == {0: {0: 2.0, 1: 2.0, 2: 2.0}}


def test_left_out_questions_do_not_count():
    assert select(_scores(), **ABOUT, only=[True, True, False, True, True]).factors[0] == {1: 2.0}


def test_nothing_selected_and_wrong_settings():
    with pytest.raises(EditError, match="no neuron"):
        select(np.full((2, 1, 3), -1.0, np.float32))
    with pytest.raises(InputError):
        select(_scores(), tau=2)
    with pytest.raises(InputError, match="control"):
        select(_scores(), rule="contrastive")
