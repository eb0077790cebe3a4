"""Stability against probabilities worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
from printed import parsed

from kbne_edit import select
from kbne_edit.attribution.scores import Row, Scores, ScoresWriter
from kbne_edit.commands.stability import command as stability_command
from kbne_edit.errors import EditError, InputError
from kbne_edit.recipe import Question
from kbne_edit.rule import COMBINE, Rule
from kbne_edit.selection.select import selection
from kbne_edit.selection.stability import agreements, resample, stability
from kbne_edit.statistics import wilson


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
    result = stability(_scores(_ten()), draws=4000)
    assert result.neurons[0] == {0: 1.0}
    drawn = 1 - 0.9**10  # at least once in ten draws, which is enough at beta 0.1
    assert result.neurons[1][2] == pytest.approx(drawn, abs=4 * (drawn * (1 - drawn) / 4000) ** 0.5)
    assert result.jaccard[0] == pytest.approx((1 + drawn) / 2, abs=0.02)
    assert result == stability(_scores(_ten()), draws=4000)  # seeded


def test_only_stable_neurons_are_kept():
    scores = _scores(_ten())
    chosen = selection(scores).stable(stability(scores), 0.8)
    assert chosen.edit.factors == {0: {0: 2.0}} and select(scores).factors == {0: {0: 2.0}, 1: {2: 2.0}}
    assert chosen.edit.found["select"]["min_stability"] == 0.8
    with pytest.raises(EditError, match="resamples"):
        selection(scores).stable(replace(stability(scores), neurons={0: {0: 0.5}, 1: {2: 0.5}}), 0.8)


def test_the_specific_rule_is_resampled_too():
    values = np.random.default_rng(0).standard_normal((20, 1, 40)) * 0.01
    values[:, 0, 0] = 1.0
    values[:10, 0, 5] += 0.5  # of every question, and of no control
    result = stability(_scores(values, controls=10), draws=20, rule="specific")
    assert result.neurons == {0: {5: 1.0}} and result.jaccard[0] > 0.5


def _agreement(a, b):
    (result,) = agreements({"a": a, "b": b})
    return result


def test_agreement():
    a = resample(_scores(_ten()))
    same = _agreement(a, a)
    assert same.neurons == (2, 2, 2) and same.jaccard == (1, 1, 1) and same.rank == pytest.approx([1, 1, 1])
    other = _ten()
    other[3, 1, 2], other[5, 1, 1] = 0, 0.5
    result = _agreement(a, resample(_scores(other)))
    assert result.neurons == (2, 2, 1) and result.jaccard[0] == pytest.approx(1 / 3) and result.rank[0] < 1
    with pytest.raises(InputError, match="different models"):
        _agreement(a, resample(replace(_scores(_ten()), base="another")))


def test_the_intervals_of_an_agreement():
    """The selections of two files from the same draws, by hand: each has neuron 0, and one that needs its question."""
    other = _ten()
    other[3, 1, 2], other[5, 1, 1] = 0, 0.5
    a, b = resample(_scores(_ten()), draws=500), resample(_scores(other), draws=500)
    values = []
    for (first, x), (second, y) in zip(a.drawn, b.drawn, strict=True):
        assert (first == second).all()  # paired
        expected = {0} | ({5} if 3 in first else set()), {0} | ({4} if 5 in first else set())
        assert (set(x.tolist()), set(y.tolist())) == expected
        values.append(len(expected[0] & expected[1]) / len(expected[0] | expected[1]))
    assert _agreement(a, b).jaccard[1:] == pytest.approx(np.quantile(values, [0.025, 0.975]).tolist())
    assert set(values) == {1, 1 / 2, 1 / 3}


def test_the_rank_correlation_is_spearmans():
    """With ties: many neurons of a mixture of experts score 0 in all questions."""
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    values = [rng.random((8, 2, 30)) ** 3 * (rng.random((1, 2, 30)) < 0.6) for _ in range(2)]
    a, b = (resample(_scores(v, controls=2), rule=Rule(tau=0.9)) for v in values)

    def want(*requests):
        return spearmanr(
            *(
                np.mean([own.questions.scores[q] / own.questions.scores[q].max() for q in which], 0).ravel()
                for own, which in zip((a, b), requests, strict=True)
            )
        ).statistic

    result = _agreement(a, b).rank
    assert result[0] == pytest.approx(want(range(6), range(6)), abs=1e-6)
    drawn = [want(x, y) for (x, _), (y, _) in zip(a.drawn, b.drawn, strict=True)]
    assert result[1:] == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist(), abs=1e-6)


def test_intersection_is_compared_as_intersection():
    values = np.zeros((4, 1, 4))
    values[:, 0, 0] = 1.0
    values[:2, 0, 1] = 0.5  # of the first dimension alone
    scores = _scores(values)
    kinds = tuple(replace(q, dimension="ab"[i // 2]) for i, q in enumerate(scores.questions))
    result = {how: resample(replace(scores, questions=kinds), rule=Rule(combine=how)).whole.tolist() for how in COMBINE}
    assert result == {"union": [0, 1], "intersection": [0]}


def test_several_files_on_the_command_line(tmp_path, capsys):
    """One neuron that all files select, one that two of three do; a file that selects nothing is a finding."""
    paths = []
    for number in range(3):
        values = np.zeros((4, 2, 3), np.float32)
        values[:, 0, 0] = 1.0
        values[:, 1, 1] = 0.5 * (number < 2)
        paths.append(tmp_path / f"{number}.safetensors")
        _write(paths[-1], values)
    stability_command.main([*map(str, paths), "--json"], standalone_mode=False)
    result = parsed("stability", capsys.readouterr().out)
    assert result["in_files"] == {
        "0": {"0": [1.0, *wilson(3, 3)]},
        "1": {"1": [2 / 3, *wilson(2, 3)]},
    }
    assert [pair["jaccard"][0] for pair in result["pairs"]] == [1.0, 0.5, 0.5] and result["nothing"] == []
    stability_command.main([*map(str, paths), "--tau", "1"], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [f"{path}: nothing is selected" for path in paths]
    assert "of 0 neurons that any of the 3 files selects" in lines[-2]
    with pytest.raises(EditError, match="no neuron counts"):
        stability_command.main([str(paths[0]), "--tau", "1"], standalone_mode=False)


def _write(path, values):
    questions = _scores(values).questions
    about = {"model": "m", "recipe": "social-bias", "base": "base", "site": "down"}
    writer = ScoresWriter(path, questions, *values.shape[1:], about)
    for q, row in enumerate(values):
        writer.write(q, Row(row, p=1, p_best_wrong=0, p_answers=1, p_zero=0, residual=0, nodes=4))
    writer.close()


def test_another_seed_draws_other_questions():
    first, second = (resample(_scores(_ten()), draws=20, seed=seed) for seed in (0, 1))
    assert any((a.questions != b.questions).any() for a, b in zip(first.drawn, second.drawn, strict=True))
    again = resample(_scores(_ten()), draws=20, seed=1)
    assert all((a.questions == b.questions).all() for a, b in zip(again.drawn, second.drawn, strict=True))
