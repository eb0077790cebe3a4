"""Units become rows whose kinds mean what they say; the file of gradients is resumed, and refuses strangers."""

import numpy as np
import pytest
import torch

from kbne_edit.errors import OutputError, ScoresError
from kbne_edit.fitting.contrasts import contrast_units
from kbne_edit.fitting.rows import KINDS, unit_rows
from kbne_edit.fitting.store import GradientFile, Sizes, load_gradients
from kbne_edit.fitting.units import load_pairs, load_units


def words(sentence):
    """A tokenizer of the test's own: one token per word, and a prefix token."""
    known = {}
    first = [known.setdefault(word, sum(map(ord, word)) % 90 + 5) for word in sentence.context.split()]
    return [1, *first], [1, *first, *(sum(map(ord, word)) % 90 + 5 for word in sentence.continuation.split())]


@pytest.fixture(scope="module")
def units():
    return load_units(["gender"])


def test_kinds_mean_what_they_say(units):
    """Log-probabilities made of a group, an attribute and their interaction come apart again."""
    for unit in units[:40]:
        rows = unit_rows(unit, False, words)
        tokens = np.mean([sum(s.weights) for s in rows.sentences])
        group, attribute, both, level = 0.7, -0.3, 0.11, -4.0
        square = [  # ax, ay, bx, by
            level + group + attribute + both,
            level + group - attribute - both,
            level - group + attribute - both,
            level - group - attribute + both,
        ]
        found = dict(zip(KINDS, rows.mixture @ np.array(square) * tokens, strict=True))
        assert found["association"] == pytest.approx(2 * both)
        assert found["sentiment"] == pytest.approx(2 * attribute)
        assert found["prior"] == pytest.approx(2 * group)
        assert found["level"] == pytest.approx(level)
        assert np.isnan(found["tone"])


def test_contrasts_set_bad_attributes_against_good_ones():
    files = load_pairs()
    every = contrast_units(files)
    assert len(every) > 500
    tones = {
        (group, attribute): tone
        for pairs in files
        for fact in pairs.facts
        for group, attribute, tone in ((fact.a, fact.x, fact.tone_x), (fact.b, fact.y, fact.tone_y))
    }
    good = {attribute for (_, attribute), tone in tones.items() if tone == "good"}
    for unit in every:
        assert tones[unit.fact.a, unit.fact.x] == "bad" and unit.fact.y in good
        assert unit.square.ax.context == unit.square.ay.context
    rows = unit_rows(every[0], True, words)
    assert [*rows.mixture[KINDS.index("tone")] * np.mean([sum(s.weights) for s in rows.sentences])] == [1, -1]
    assert np.isnan(rows.mixture).sum() == 2 * (len(KINDS) - 1)
    few = contrast_units(files, 10)
    assert max(sum(unit.type == pairs.type for unit in few) for pairs in files) <= 10


def test_what_all_four_share_is_not_scored_and_questions_are_not_either(units):
    for unit in units[:40]:
        rows = unit_rows(unit, False, words)
        square = rows.sentences[:4]
        starts = {next(i for i, w in enumerate(s.weights) if w) for s in square}
        if unit.format == "question":
            context, _ = words(unit.square.ax)
            assert square[0].weights.index(1.0) == len(context) - 1
        else:
            start = starts.pop()
            assert not starts
            assert len({s.ids[: start + 1] for s in square}) == 1
            assert len({s.ids[: start + 2] for s in square}) > 1
        assert all(s.weights[-1] == 1 for s in square)


SIZES, SETTINGS = Sizes(units=3, kinds=2, texts=2, samples=1, factors=5), {"base": "abc", "seed": 0}


def fill(file, entries):
    for entry in entries:
        if entry < 3:
            file.write_unit(entry, torch.full((2, 5), entry + 0.5), np.array([entry, np.nan]))
        elif entry == 5:
            file.write_likelihood(torch.full((5,), 0.25))
        else:
            file.write_fisher(entry - 3, torch.full((1, 5), -1.0 - entry))


def test_a_file_is_resumed_to_the_same_bytes(tmp_path):
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    for path, steps in ((whole, [range(6)]), (parts, [(1,), (4, 0), (2, 5, 3)])):
        for step in steps:
            file = GradientFile(path, SIZES, SETTINGS)
            assert file.done.sum() == (0 if path == whole or step == (1,) else 1 if step == (4, 0) else 3)
            fill(file, step)
            file.close()
    assert whole.read_bytes() == parts.read_bytes()
    found = load_gradients(whole)
    assert found.rows.shape == (3, 2, 5) and found.rows[2].unique().tolist() == [2.5]
    assert found.fisher[1].unique().tolist() == [-5.0] and found.values[1, 0] == 1 and np.isnan(found.values[1, 1])
    assert found.settings == SETTINGS and found.likelihood.unique().tolist() == [0.25]


def test_what_is_no_finished_file_of_these_settings_is_refused(tmp_path):
    path = tmp_path / "gradients.safetensors"
    file = GradientFile(path, SIZES, SETTINGS)
    fill(file, [0])
    with pytest.raises(OutputError):
        GradientFile(path, SIZES, SETTINGS)  # locked
    with pytest.raises(ScoresError, match="not numbers"):
        file.write_fisher(0, torch.full((1, 5), torch.nan))
    file.close()
    with pytest.raises(ScoresError, match="1 of 6"):
        load_gradients(path)
    with pytest.raises(ScoresError, match="begun with another"):
        GradientFile(path, SIZES, SETTINGS | {"seed": 1})
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ScoresError):
        load_gradients(path)
