"""Units become rows whose kinds mean what they say; the file of gradients is resumed, and refuses strangers."""

import json

import numpy as np
import pytest
import torch

from kbne_edit.errors import InputError, OutputError, ScoresError
from kbne_edit.fitting.contrasts import contrast_units
from kbne_edit.fitting.public import public_pairs
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
        rows = unit_rows(unit, "", words)
        tokens = np.mean([sum(s.weights) for s in rows.sentences[:4]])
        group, attribute, both, level = 0.7, -0.3, 0.11, -4.0
        square = [  # ax, ay, bx, by
            level + group + attribute + both,
            level + group - attribute - both,
            level - group + attribute - both,
            level - group - attribute + both,
        ]
        square += [level + 0.4] * len(unit.unknown)  # that it cannot be told is likelier, per token
        per_sentence = np.array(square) * tokens
        by_length = np.array(square) * [sum(s.weights) for s in rows.sentences]
        result = dict(zip(KINDS, rows.mixture @ per_sentence, strict=True))
        if unit.format == "question":
            guess = rows.mixture[KINDS.index("guess")] @ by_length
            assert guess == pytest.approx(_answers(unit, square) - level - 0.4)
        else:
            assert np.isnan(result["guess"])
        assert result["association"] == pytest.approx(2 * both)
        assert result["sentiment"] == pytest.approx(2 * attribute)
        assert result["prior"] == pytest.approx(2 * group)
        assert result["level"] == pytest.approx(level)
        assert np.isnan(result["tone"])


def _answers(unit, values):
    """The mean of the answers in the contexts of the two unknown answers."""
    square = (unit.square.ax, unit.square.ay, unit.square.bx, unit.square.by)
    means = []
    for answer in unit.unknown:
        own = [value for sentence, value in zip(square, values, strict=False) if sentence.context == answer.context]
        assert len(own) == 2
        means.append(np.mean(own))
    return np.mean(means)


def test_public_pairs_are_the_stereotyped_sentence_against_the_other(tmp_path):
    rows = [
        {"id": "1", "split": "dev", "context": "A BLANK b.", "stereotype": "A c b.", "anti_stereotype": "A d b."},
        {"id": "2", "split": "test", "context": "E BLANK b.", "stereotype": "E c b.", "anti_stereotype": "E d b."},
    ]
    rest = {"bias_type": "race", "target": "t", "unrelated": "A e b."}
    (tmp_path / "stereoset_intrasentence.jsonl").write_text("\n".join(json.dumps(row | rest) for row in rows) + "\n")
    more, less = ("The old {} was late.", "The young {} was late.")
    table = [f"{i},{more.format(word)},{less.format(word)},stereo,age" for i, word in enumerate(("man", "one", "cat"))]
    table += [f"{9},{'He ran off.'},{'She ran off.'},stereo,gender"]
    head = ",sent_more,sent_less,stereo_antistereo,bias_type"
    (tmp_path / "crows_pairs_anonymized.csv").write_text("\n".join([head, *table]) + "\n")
    (unit,) = public_pairs(["stereoset"], tmp_path)
    assert (unit.square.ax.text, unit.square.ay.text, unit.type) == ("A c b.", "A d b.", "stereoset race")
    result = unit_rows(unit, "pair", words)
    assert [*result.mixture[KINDS.index("pair")] * sum(result.sentences[0].weights)] == [1, -1]
    assert np.isnan(result.mixture).sum() == 2 * (len(KINDS) - 1)
    crows = [unit.square.ax.text for unit in public_pairs(["crows_pairs"], tmp_path)]
    assert sum("was late" in text for text in crows) in (0, 3)  # a story is read as a whole or not at all
    (tmp_path / "stereoset_intrasentence.jsonl").write_text(json.dumps(rows[1] | rest))
    for folder, message in ((tmp_path, "test split"), (None, "--data")):
        with pytest.raises(InputError, match=message):
            public_pairs(["stereoset"], folder)


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
    rows = unit_rows(every[0], "tone", words)
    assert [*rows.mixture[KINDS.index("tone")] * np.mean([sum(s.weights) for s in rows.sentences])] == [1, -1]
    assert np.isnan(rows.mixture).sum() == 2 * (len(KINDS) - 1)
    few = contrast_units(files, 10)
    assert max(sum(unit.type == pairs.type for unit in few) for pairs in files) <= 10


def test_what_all_four_share_is_not_scored_and_questions_are_not_either(units):
    for unit in units[:40]:
        rows = unit_rows(unit, "", words)
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


SIZES = Sizes(units=3, kinds=2, rows=5, texts=2, samples=1, held=2, factors=5)
PLACE, SETTINGS = np.array([[0, -1], [1, 2], [3, 4]]), {"base": "abc", "seed": 0}


def fill(file, entries):
    for entry in entries:
        if entry < 3:
            count = 1 if entry == 0 else 2
            rows = torch.arange(count)[:, None].expand(count, 5) + 10.0 * entry
            file.write_unit(entry, rows, np.array([entry, 7.0 if entry else np.nan]))
        elif entry >= 5:
            file.write_likelihood(entry - 5, torch.full((5,), float(entry)))
        else:
            file.write_fisher(entry - 3, torch.full((1, 5), -1.0 - entry))


def test_a_file_is_resumed_to_the_same_bytes(tmp_path):
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    for path, steps in ((whole, [range(7)]), (parts, [(1,), (4, 0), (2, 5, 3, 6)])):
        for step in steps:
            file = GradientFile(path, SIZES, PLACE, SETTINGS)
            assert file.done.sum() == (0 if path == whole or step == (1,) else 1 if step == (4, 0) else 3)
            fill(file, step)
            file.close()
    assert whole.read_bytes() == parts.read_bytes()
    result = load_gradients(whole)
    assert result.rows[:, 0].tolist() == [0, 10, 11, 20, 21] and result.rows.shape == (5, 5)
    assert result.fisher[1].unique().tolist() == [-5.0] and result.values[1, 0] == 1 and np.isnan(result.values[0, 1])
    assert result.settings == SETTINGS and result.likelihood[:, 4].tolist() == [5.0, 6.0]
    assert np.array_equal(result.place, PLACE)


def test_what_is_no_finished_file_of_these_settings_is_refused(tmp_path):
    path = tmp_path / "gradients.safetensors"
    file = GradientFile(path, SIZES, PLACE, SETTINGS)
    fill(file, [0])
    with pytest.raises(OutputError):
        GradientFile(path, SIZES, PLACE, SETTINGS)  # locked
    with pytest.raises(ScoresError, match="not finite"):
        file.write_fisher(0, torch.full((1, 5), torch.nan))
    file.close()
    with pytest.raises(ScoresError, match="1 of 7"):
        load_gradients(path)
    with pytest.raises(ScoresError, match="begun with another"):
        GradientFile(path, SIZES, PLACE, SETTINGS | {"seed": 1})
    with pytest.raises(ScoresError, match="begun with another"):
        GradientFile(path, SIZES, PLACE[::-1], SETTINGS)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ScoresError):
        load_gradients(path)
