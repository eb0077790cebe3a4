"""The sweep against brute force, the choice against its rule, and that nothing of the test half is seen before it."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from command import run_command
from printed import parsed

import bench_data
from bench_data import avoiding
from kbne_edit import (
    Checks,
    Criteria,
    Edit,
    Measurement,
    Search,
    bake,
    hooked,
    load_recipe,
    load_scores,
    locate,
    select,
)
from kbne_edit import tune as public_tune
from kbne_edit.attribution.scores import Scores
from kbne_edit.commands import cli
from kbne_edit.commands.options import taken
from kbne_edit.errors import EditError, InputError, OutputError
from kbne_edit.evaluation import neutral
from kbne_edit.evaluation.benchmark import Benchmark
from kbne_edit.evaluation.effect import DRAWS
from kbne_edit.evaluation.figures import ACCURACY, AVOIDED, PREFERENCE
from kbne_edit.evaluation.result import results_of
from kbne_edit.evaluation.runs import Bench, Runs
from kbne_edit.evaluation.runs import Run as EvaluationRun
from kbne_edit.evaluation.scoring import Scorer
from kbne_edit.evaluation.tasks import benchmarks
from kbne_edit.locating import Settings
from kbne_edit.models.loading import load_model, load_tokenizer
from kbne_edit.recipe import Question
from kbne_edit.reporting.contents import report as report_of
from kbne_edit.rule import Rule
from kbne_edit.selection.select import by_dimension, selection
from kbne_edit.statistics import Crossed
from kbne_edit.tuning.choose import Chooser
from kbne_edit.tuning.halves import Half, halves, whole_data
from kbne_edit.tuning.journal import Journal
from kbne_edit.tuning.objective import Looks, Objective, Run, objective_of
from kbne_edit.tuning.result import load_tuning
from kbne_edit.tuning.search import Space, front, in_words, sweep
from kbne_edit.tuning.tune import USED
from kbne_edit.used import count_use, record_of

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "kbne_edit" / "demo"
SMALL = Space(factors=(0.25, 2.0), taus=(0.1, 0.2), rules=("contrastive",))
ASKED = dict(tasks=["probes", "knowledge_controls"], margin=9.0, space=SMALL)
PER_TOKEN = 1e-5  # see test_evaluation.py


def tune(*args, **values):
    """As JSON has it. values: of the settings, by name."""
    measurement, search = taken(Measurement, values), taken(Search, values)
    return public_tune(*args, search=search, measurement=measurement, criteria=Criteria(**values)).to_dict()


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    path = tmp_path_factory.mktemp("scores") / "scores.safetensors"
    locate("demo", path, Settings(questions=9))
    return path


@pytest.fixture(scope="module")
def scorer():
    return Scorer(load_model(DEMO, torch.float32), load_tokenizer(DEMO))


@pytest.fixture(scope="module")
def split(scorer):
    """(dev, test) of the runs in this file, made again."""
    marks = benchmarks(ASKED["tasks"], None, None, load_recipe("demo"), scorer, scorer.tokenizer)
    text = neutral.neutral_text(scorer.tokenizer, load_recipe("demo"))
    stories, texts = text.texts, text.rows
    return halves(marks, stories, texts, 0)


@pytest.fixture(scope="module")
def tuned(scores, tmp_path_factory):
    """A finished run: (folder, result). Not to be changed."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    return out, tune("demo", scores, out, **ASKED)


def contents(folder):
    """Of the files that the function and the command both write; `run.yaml` is the command's."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.yaml"}


# ---------------------------------------------------------------------------------------------------------- the split


def _mark(name, stories, groups):
    count = len(stories)
    return Benchmark(name, "bias", [([1], [2])] * count, [1] * count, groups, lambda i, _: [i], PREFERENCE, stories)


def _sides(marks, stories=("s", "t"), seed=0):
    """The stories of each half: [{task: stories}, …]."""
    texts = [[1, i] for i in range(len(stories))]
    return [
        {mark.name: list(mark.clusters) for mark in half.benchmarks} for half in halves(marks, stories, texts, seed)
    ]


def test_halves_share_out_every_group_and_keep_stories_together():
    rng = np.random.default_rng(0)
    for _ in range(30):
        stories = [f"story {i}" for i in rng.integers(0, 60, 90)]
        kind = {story: str(rng.integers(0, 3)) for story in stories}
        dev, test = _sides([_mark("a", stories, [kind[s] for s in stories])])
        assert not set(dev["a"]) & set(test["a"]) and sorted(dev["a"] + test["a"]) == sorted(stories)
        largest = max(Counter(stories).values())
        for group in set(kind.values()):
            counts = [sum(kind[s] == group for s in half["a"]) for half in (dev, test)]
            assert abs(counts[0] - counts[1]) <= largest


def test_a_text_is_in_one_half_whatever_task_it_stands_in():
    stories = [f"story {i}" for i in range(20)]
    marks = [_mark("a", stories, [""] * 20), _mark("b", stories[::-2], ["x", "y"] * 5)]
    dev, test = _sides(marks, stories[5:15])
    assert set(dev["b"]) <= set(dev["a"]) and set(test["b"]) <= set(test["a"])
    texts = [[1, i] for i in range(10)]
    for half, of_a in zip(halves(marks, stories[5:15], texts, 0), (dev, test), strict=True):
        assert {stories[5 + i] for _, i in half.texts} <= set(of_a["a"])


def test_the_split_is_that_of_its_seed_and_not_of_the_order():
    stories = [f"story {i}" for i in range(40)]
    first, again, other = (
        _sides([_mark("a", s, [""] * 40)], seed=n) for s, n in ((stories, 3), (stories[::-1], 3), (stories, 4))
    )
    assert set(first[0]["a"]) == set(again[0]["a"]) != set(other[0]["a"])


def test_stories_known_from_another_task_are_counted():
    """A task whose shared stories all lie in one half gets its own ones in the other."""
    first = [f"story {i}" for i in range(12)]
    dev, _ = _sides([_mark("a", first, [""] * 12)])
    second = dev["a"] + [f"other {i}" for i in range(len(dev["a"]))]
    again, rest = _sides([_mark("a", first, [""] * 12), _mark("b", second, [""] * len(second))])
    assert again["a"] == dev["a"] and sorted(again["b"]) == sorted(dev["a"])
    assert len(rest["b"]) == len(again["b"]) == 6


def test_what_cannot_be_halved_is_refused():
    with pytest.raises(InputError, match="a: its 3 items cannot be halved"):
        _sides([_mark("a", ["same"] * 3, [""] * 3)])


def test_bbq_is_split_by_its_questions(scorer, tmp_path):
    """Ambiguous and disambiguated, negative and not: the variants of a question stay together."""
    rows = [row | {"question_index": str(i // 4)} for i, row in enumerate(bench_data.bbq())]
    (tmp_path / "bbq_Own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (mark,) = benchmarks(["bbq"], tmp_path, None, load_recipe("demo"), scorer, scorer.tokenizer)
    dev, test = _sides([mark])
    assert dev["bbq"] and test["bbq"] and not set(dev["bbq"]) & set(test["bbq"])
    assert Counter(mark.clusters) == Counter(f"bbq {row['category']} {row['question_index']}" for row in rows)


def test_items_taken_are_those_of_the_task(scorer, tmp_path):
    """Each task's columns of some items are the same rows as those of all."""
    names = ["stereoset_intrasentence", "bbq", "arc_easy", "probes", "knowledge"]
    data = bench_data.write(tmp_path / "data")
    for mark in benchmarks(names, data, None, load_recipe("demo"), scorer, scorer.tokenizer):
        items = [4, 1, 2]
        part = mark.take(items)
        every = mark.columns(scorer.score(mark.pairs))
        np.testing.assert_allclose(part.columns(scorer.score(part.pairs)), every[items], atol=PER_TOKEN)
        assert part.groups == [mark.groups[i] for i in items] and part.clusters == [mark.clusters[i] for i in items]


# ---------------------------------------------------------------------------------------------------------- the sweep


def _beaten(a, b):
    return b[0] <= a[0] and b[1] <= a[1] and a != b


def test_front_against_every_pair():
    rng = np.random.default_rng(0)
    for size in (0, 1, 2, 5, 30):
        for _ in range(50):
            pairs = [tuple(pair) for pair in rng.integers(0, 8, (size, 2)).tolist()]
            expected = {i for i, a in enumerate(pairs) if not any(_beaten(a, b) for b in pairs)}
            result = front(pairs)
            assert set(result) == expected and len(result) == len(expected)
            assert [pairs[i][0] for i in result] == sorted(pairs[i][0] for i in result)


def _measure(edit):
    """A stand-in for the model: more neurons cost more, factors above 1 lower the bias."""
    return -sum(f - 1 for ns in edit.factors.values() for f in ns.values()), float(edit.num_neurons), -1.0


def test_a_grid_holds_every_edit_once(scores):
    loaded, calls = load_scores(scores), Counter()

    def measure(edit):
        calls[edit.sha256] += 1
        return _measure(edit)

    space = Space(factors=(0.5, 2.0), taus=(0.1, 0.2, 1.0), betas=(0.1, 0.4), rules=("paper", "contrastive"))
    result = sweep(space, {"down": loaded}, 24, 0, measure)
    expected, empty = {}, 0
    for rule, tau, beta, factor in product(("paper", "contrastive"), (0.1, 0.2, 1.0), (0.1, 0.4), (0.5, 2.0)):
        try:
            edit = select(loaded, Rule(rule, tau, beta), factor=factor)
        except EditError:
            empty += 1
            continue
        expected.setdefault(edit.sha256, (edit.factors, []))[1].append((rule, tau, beta, factor))
    got = {
        key: (c.edit.factors, [(s["rule"], s["tau"], s["beta"], s["factor"]) for s in c.settings])
        for key, c in result.candidates.items()
    }
    assert got == expected and (result.how, result.size, result.empty) == ("grid", 24, empty) and empty >= 4
    assert set(calls) == set(expected)
    assert all(c.edit.found["select"]["tau"] == c.settings[0]["tau"] for c in result.candidates.values())


def _with_controls():
    """Noise in 400 neurons of twelve questions and as many controls; five neurons know the questions from the rest."""
    rng = np.random.default_rng(0)
    values = rng.standard_exponential((24, 2, 200)).astype(np.float32) * 0.02
    values[:, 0, 0] += 1.0
    values[:12, 1, 10:15] += np.linspace(0.2, 0.6, 5, dtype=np.float32)
    questions = tuple(Question(f"q{i}", "no", "a", "", i >= 12) for i in range(24))
    ones = np.ones(24, np.float32)
    return Scores(values, ones, 0 * ones, ones, ones, questions, {}, "down", "base")


def test_tops_stand_beside_taus_and_are_not_multiplied_with_them():
    """A setting has a tau or a top, never both; each selects what `select` does, under the specific rule too."""
    loaded, limits = _with_controls(), (("tau", 0.1), ("tau", 0.5), ("top", 0.0025), ("top", 0.01))
    space = Space(factors=(0.5, 2.0), taus=(0.1, 0.5), tops=(0.0025, 0.01), rules=("paper", "specific"))
    result = sweep(space, {"down": loaded}, 16, 0, _measure)
    expected = {}
    for rule, limit, factor in product(("paper", "specific"), limits, (0.5, 2.0)):
        edit = select(loaded, Rule(rule, **dict([limit])), factor=factor)
        expected.setdefault(edit.sha256, []).append({"rule": rule, "factor": factor, **dict([limit])})
    common = {"site": "down", "combine": "union", "beta": 0.1}
    got = {key: candidate.settings for key, candidate in result.candidates.items()}
    assert got == {key: [common | setting for setting in settings] for key, settings in expected.items()}
    assert (result.how, result.size, result.empty) == ("grid", 16, 0) and len(
        got
    ) == 12  # of specific, tau says nothing
    words = {in_words([setting]) for settings in got.values() for setting in settings}
    assert {
        "site down, paper, top 0.0025, beta 0.1, union, factor 2",
        "site down, specific, top 0.01, union, factor 0.5",
    } <= words
    alone = sweep(Space((2.0,), tops=(0.01,), rules=("paper",)), {"down": loaded}, 1, 0, _measure)
    (candidate,) = alone.candidates.values()
    assert candidate.settings == [common | {"rule": "paper", "top": 0.01, "factor": 2.0}] and alone.size == 1


def test_optuna_asks_for_taus_and_tops(scores):
    pytest.importorskip("optuna")
    space = Space((0.5, 2.0, 3.0), (0.1, 0.2), rules=("paper",), tops=(0.002, 0.005, 0.01), per_dimension=True)
    result = sweep(space, {"down": load_scores(scores)}, 40, 0, _measure)
    settings = [setting for candidate in result.candidates.values() for setting in candidate.settings]
    assert result.size == 4**3 * 5 and all(("tau" in setting) != ("top" in setting) for setting in settings)
    tried = {(name, setting[name]) for setting in settings for name in ("tau", "top") if name in setting}
    assert tried == {("tau", 0.1), ("tau", 0.2), ("top", 0.002), ("top", 0.005), ("top", 0.01)}


def _of_two_dimensions():
    """Neuron 0 is kept by both, more by b; 1 by a alone; 2 by b alone; 3 by a alone, though b has the larger mean."""
    rows = [
        ("a", [0.5, 1.0, 0.0, 0.2]),
        ("a", [0.5, 1.0, 0.0, 0.0]),
        ("b", [0.9, 0.0, 1.0, 0.12]),
        ("b", [0.9, 0.0, 1.0, 0.12]),
    ]
    values = np.array([[[*row]] for _, row in rows], np.float32) * np.array([1, 3, 2, 1], np.float32)[:, None, None]
    questions = tuple(Question(f"q{i}", "no", name, "", False) for i, (name, _) in enumerate(rows))
    ones = np.ones(4, np.float32)
    return Scores(values, ones, 0 * ones, ones, ones, questions, {}, "down", "base")


def test_factors_by_dimension_by_hand():
    scores = _of_two_dimensions()
    chosen = selection(scores, Rule(tau=0.15, beta=0.5))
    assert chosen.edit.factors == {0: {0: 2.0, 1: 2.0, 2: 2.0, 3: 2.0}}
    assert by_dimension(chosen, {"a": 3.0, "b": 5.0}).factors == {0: {0: 5.0, 1: 3.0, 2: 5.0, 3: 3.0}}
    assert by_dimension(chosen, {"a": 3.0, "b": 1.0}).factors == {0: {1: 3.0, 3: 3.0}}
    assert by_dimension(chosen, {"a": 2.0, "b": 2.0}).sha256 == chosen.edit.sha256
    assert by_dimension(chosen, {"a": 1.0, "b": 1.0}).factors == {}


def test_per_dimension_tries_every_combination():
    space = Space(factors=(2.0, 4.0), taus=(0.15,), betas=(0.5,), rules=("paper",), per_dimension=True)
    result = sweep(space, {"down": _of_two_dimensions()}, 9, 0, _measure)
    tried = {tuple(s["factor"].values()) for c in result.candidates.values() for s in c.settings}
    assert tried == set(product((1.0, 2.0, 4.0), repeat=2)) - {(1.0, 1.0)} and result.empty == 1
    words = {in_words(c.settings) for c in result.candidates.values()}
    assert "site down, paper, tau 0.15, beta 0.5, union, factor a 2, b 4" in words


RULES = ("paper", "contrastive")
LARGE = Space((0.5, 2.0, 3.0), (0.05, 0.1, 0.2, 1.0), (0.1, 0.3), RULES, per_dimension=True)


def test_optuna_is_reproducible_with_its_seed(scores):
    pytest.importorskip("optuna")
    loaded = {"down": load_scores(scores)}
    runs = [sweep(LARGE, loaded, 14, seed, _measure) for seed in (0, 0, 1)]
    points = [{key: c.settings for key, c in run.candidates.items()} for run in runs]
    assert list(points[0]) == list(points[1]) and points[0] == points[1] and points[0] != points[2]
    assert len(points[0]) == 14 and runs[0].size == 4**3 * 4 * 2 * 2 and "TPE" in runs[0].how


def test_optuna_learns_what_is_asked_for(scores):
    """It finds edits with much of what is wanted more often than chance does."""
    pytest.importorskip("optuna")
    loaded = {"down": load_scores(scores)}
    everything = [_measure(c.edit)[0] for c in sweep(LARGE, loaded, 4**3 * 16, 0, _measure).candidates.values()]
    requests = [_measure(c.edit)[0] for c in sweep(LARGE, loaded, 60, 0, _measure).candidates.values()]
    assert np.mean(requests[30:]) < np.mean(everything) and min(requests) <= np.quantile(everything, 0.02)


def test_without_optuna_the_error_says_what_to_install(scores, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"1024 points.*kbne-edit\[tune\].*--trials 1024"):
        sweep(LARGE, {"down": load_scores(scores)}, 14, 0, _measure)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(factors=(1.0,)), "1.0 is no value for factors"),
        (dict(factors=(float("nan"),)), "nan is no value for factors"),
        (dict(factors=(-2.0,)), "-2.0 is no value for factors"),
        (dict(factors=()), "needs values"),
        (dict(factors=(2.0, 2.0)), "each once"),
        (dict(taus=(1.5,)), "1.5 is no value for taus"),
        (dict(taus=()), "needs values"),
        (dict(taus=(), tops=(0.0,)), "0.0 is no value for tops"),
        (dict(tops=(0.01, 0.01)), "each once"),
        (dict(rules=("best",)), "'best' is no value for rules"),
        (dict(combines=("any",)), "'any' is no value for combines"),
    ],
)
def test_wrong_spaces(values, message):
    with pytest.raises(InputError, match=message):
        Space(**values)


def test_a_space_without_any_edit_is_an_error(scores):
    with pytest.raises(InputError, match="no setting of the space selects a neuron"):
        sweep(Space(taus=(1.0,)), {"down": load_scores(scores)}, 60, 0, _measure)


# -------------------------------------------------------------------------------------------------------- the journal


def test_a_line_cut_short_is_measured_again(tmp_path):
    path = tmp_path / "j" / "journal.jsonl"
    journal = Journal(path, {"seed": 1})
    journal.put("a", {"x": [0.1, 1e-300]})
    journal.put("b", {"x": []})
    journal.close()
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        journal = Journal(path, {"seed": 1})
        assert len(journal) == max(whole[:size].count(b"\n") - 1, 0)
        for key, record in (("a", {"x": [0.1, 1e-300]}), ("b", {"x": []})):
            if journal.get(key) is None:
                journal.put(key, record)
            assert journal.get(key) == record
        journal.close()
        assert path.read_bytes() == whole


def test_a_journal_of_others_is_refused(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, {"seed": 1, "dtype": "float32"})
    with pytest.raises(OutputError, match="another run is writing"):
        Journal(path, {"seed": 1, "dtype": "float32"})
    journal.close()
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"other settings \(dtype, seed\)"):
        Journal(path, {"seed": 2, "dtype": "float16"})
    for damage in (b"[]\n", b"{}\n{}\n", b"\x00\n", before + b'{"key": 1}\n'):
        path.write_bytes(damage)
        with pytest.raises(InputError, match="journal"):
            Journal(path, {"seed": 1, "dtype": "float32"})
        assert path.read_bytes() == damage


# --------------------------------------------------------------------------------------------------------- the figures


def _margins(mark):
    """Each sentence of a task of twins by itself: the means [twins] of two margins per token, by plain loops."""

    def per_token(model, pair):
        context, continuation = pair
        ids = torch.tensor([[*context, *continuation]])
        with torch.no_grad():
            logp = model(ids).logits[0, len(context) - 1 : -1].double().log_softmax(-1)
        return float(logp.gather(1, ids[0, len(context) :, None]).mean())

    def of(model):
        result = [per_token(model, pair) for pair in mark.pairs]
        margins = np.array([a - b for a, b in zip(result[::2], result[1::2], strict=True)])
        return (margins[::2] + margins[1::2]) / 2

    return of


def _edits(result, scores):
    """{SHA-256: edit} of every point, selected again by its settings."""
    loaded = load_scores(scores)
    settings = [p["settings"][0] for p in result["points"]]
    actual = [select(loaded, Rule.from_dict(of), factor=of["factor"]) for of in settings]
    assert [edit.sha256 for edit in actual] == [p["edit"] for p in result["points"]]
    return {edit.sha256: edit for edit in actual}


def test_points_are_measured_on_dev(tuned, split, scores, scorer):
    result, margins = tuned[1], _margins(split[0].benchmarks[0])
    base = np.abs(margins(scorer.model))
    assert result["base_bias"]["probes"] == pytest.approx(base.mean(), abs=PER_TOKEN) and len(result["points"]) == 4
    for point in result["points"]:
        with hooked(scorer.model, _edits(result, scores)[point["edit"]]):
            change = np.abs(margins(scorer.model)).mean() - base.mean()
            logits = neutral.logits(scorer, split[0].texts)
        assert point["bias"][0] == pytest.approx(change, abs=2 * PER_TOKEN)
        assert point["bias"][1] <= point["bias"][0] <= point["bias"][2]
        columns = neutral.columns(split[0].texts, logits, neutral.logits(scorer, split[0].texts))
        assert point["kl"] == pytest.approx(columns[:, 1].sum() / columns[:, 2].sum(), rel=1e-3)
        assert point["lowest"] == {"knowledge_controls": pytest.approx(-196 / 25)}  # 23 items, none lost


def test_the_test_figures_are_of_the_test_half(tuned, split, scores, scorer):
    result, margins = tuned[1], _margins(split[1].benchmarks[0])
    entry = result["test"]["tasks"]["probes"]["figures"]["absolute margin"]
    assert entry["base"] == pytest.approx(np.abs(margins(scorer.model)).mean(), abs=PER_TOKEN)
    with hooked(scorer.model, _edits(result, scores)[result["chosen"]]):
        assert entry["edit"] == pytest.approx(np.abs(margins(scorer.model)).mean(), abs=PER_TOKEN)
    assert {"random neurons", "control questions", "inverse factor", "flattened"} == set(entry["controls"])
    tested = [f for task in result["test"]["tasks"].values() for f in task["figures"].values() if "p" in f]
    assert tested == [entry] and result["test"]["comparisons"] == 1 and entry["p_holm"] == entry["p"]


def test_the_choice_follows_its_rule(tuned):
    out, result = tuned
    points = result["points"]
    pairs = {p["edit"]: (p["bias"][0], p["kl"]) for p in points if p["within"]} | {"base": (0.0, 0.0)}
    best = {key for key, a in pairs.items() if not any(_beaten(a, b) for b in pairs.values())} - {"base"}
    assert {p["edit"] for p in points if p["front"]} == best and best
    in_turn = sorted((p for p in points if p["front"]), key=lambda p: p["bias"][0])
    held = [p["beyond_random"] and p["beyond_random"][2] < 0 and p["as_good"] == 0 for p in in_turn]
    assert all(p["draws"] == DRAWS for p, good in zip(in_turn, held, strict=True) if good)
    first = held.index(True)
    assert in_turn[first]["edit"] == result["chosen"]
    assert all(p["beyond_random"] is None for p in in_turn[first + 1 :])  # none was tried after it
    edit = Edit.load(out / "edit.json")
    assert edit.sha256 == result["chosen"] and edit.found["tune"]["confirmed"] == result["confirmation"]["confirmed"]
    assert edit.found["select"]["tau"] == in_turn[first]["settings"][0]["tau"]


def test_a_loss_that_is_not_excluded_keeps_an_edit_out(scores, tmp_path):
    """Neurons times 4096 break the model: it is on no front, though KL and bias may be what they like."""
    space = Space(factors=(2.0, 4096.0), taus=(0.1,), rules=("paper",))
    result = tune("demo", scores, tmp_path / "out", **ASKED | dict(space=space, dev_only=True))
    (whole,) = [p for p in result["points"] if p["within"]]
    (broken,) = [p for p in result["points"] if not p["within"]]
    assert whole["settings"][0]["factor"] == 2.0 and broken["lowest"]["knowledge_controls"] < -9
    assert not broken["front"] and result["chosen"] != broken["edit"]


def test_both_sites_are_tried(scores, tmp_path):
    locate("demo", tmp_path / "gate.safetensors", Settings(questions=9, site="gate"))
    space = Space(factors=(2.0,), taus=(0.1,), rules=("paper",))
    files = [scores, tmp_path / "gate.safetensors"]
    result = tune("demo", files, tmp_path / "out", **ASKED | dict(space=space, dev_only=True))
    assert [p["settings"][0]["site"] for p in result["points"]] == ["down", "gate"] == list(result["scores"])
    assert [p["edit"] for p in result["points"]] == [select(load_scores(path)).sha256 for path in files]


def test_benchmarks_from_files_steer_together(scores, scorer, tmp_path):
    """The mean of three tasks' changes, and the accuracy of arc_easy as the bound."""
    names, data = ["stereoset_intrasentence", "crows_pairs", "probes", "arc_easy"], bench_data.write(tmp_path / "data")
    space = Space(factors=(4.0,), taus=(0.1,), rules=("paper",))
    result = tune("demo", scores, tmp_path / "out", space=space, tasks=names, data=data, margin=45, dev_only=True)
    assert result["steered_by"] == names[:3] and result["bounded_by"] == ["arc_easy"]
    (point,) = result["points"]
    marks = benchmarks(names, data, None, load_recipe("demo"), scorer, scorer.tokenizer)
    (dev, _), changes = halves(marks, ["a", "b"], [[1], [2]], 0), []
    for mark in dev.benchmarks[:3]:
        before = mark.columns(scorer.score(mark.pairs))[:, 2].mean()
        with hooked(scorer.model, _edits(result, scores)[point["edit"]]):
            changes.append(mark.columns(scorer.score(mark.pairs))[:, 2].mean() - before)
        assert result["base_bias"][mark.name] == pytest.approx(before, abs=PER_TOKEN)
    assert point["bias"][0] == pytest.approx(np.mean(changes), abs=2 * PER_TOKEN) and np.ptp(changes) > 0.01


def test_a_bound_on_the_cost_keeps_edits_out(tuned, scores, tmp_path):
    costs = sorted(p["kl"] for p in tuned[1]["points"])
    bound = (costs[1] + costs[2]) / 2
    (tmp_path / "out").mkdir()
    shutil.copyfile(tuned[0] / "journal.jsonl", tmp_path / "out" / "journal.jsonl")  # what is measured is not bound
    result = tune("demo", scores, tmp_path / "out", **ASKED, max_kl=bound)
    assert [p["within"] for p in result["points"]] == [p["kl"] < bound for p in result["points"]]
    assert all(p["kl"] < bound for p in result["points"] if p["front"])
    assert result["verdict"] is None or f"below {bound:g}" in result["confirmation"]["text"]


def _run(margins, right=None):
    """A model with these margins, and these answers to one ability."""
    m = np.asarray(margins, float)
    columns = np.stack([m > 0, m, np.abs(m), m > 0], 1).astype(float)
    return Run({"a": columns, "ability": np.array(right if right is not None else [1.0])[:, None]}, np.zeros((1, 3)))


def test_moved_is_the_change_less_that_of_the_controls():
    rng = np.random.default_rng(0)
    base, edit, one, two = (rng.normal(0, s, 200) for s in (1.0, 0.5, 0.9, 1.1))
    objective = Objective({"a": PREFERENCE[2]}, ["ability"], 5.0)
    assert objective.moved(_run(edit), [_run(base)])[0] == pytest.approx(np.abs(edit).mean() - np.abs(base).mean())
    d = np.abs(edit) - (np.abs(one) + np.abs(two)) / 2
    mean, low, high = objective.moved(_run(edit), [_run(one), _run(two)])
    half = 1.96 * d.std() / len(d) ** 0.5  # the bootstrap of a mean is near the normal interval
    assert (mean, low, high) == pytest.approx((d.mean(), d.mean() - half, d.mean() + half), abs=0.2 * half)


def test_what_is_crossed_is_drawn_crossed():
    """Items that share a name as well as a scenario."""
    scenarios, names = [f"s{i // 6}" for i in range(36)], [f"n{i % 6}" for i in range(36)]
    task = replace(_mark("a", scenarios, ["g"] * 36), crossed=names)
    ability = replace(_mark("ability", [f"t{i}" for i in range(400)], ["g"] * 400), kind="capability")
    half = Half([task, ability], [])
    by_name = np.tile(np.random.default_rng(0).normal(size=6), 6)
    runs = _run(0.5 * by_name), [_run(by_name)]
    result = objective_of([half, half], Criteria(margin=5.0)).moved(*runs)
    figure = {"a": PREFERENCE[2]}
    assert result == Objective(figure, [], 5.0, clusters={"a": Crossed(scenarios, names)}).moved(*runs)
    alone = Objective(figure, [], 5.0, clusters={"a": scenarios}).moved(*runs)
    assert result.high - result.low > 2 * (alone.high - alone.low)  # every scenario has the same names


def test_several_tasks_are_averaged_each_with_its_own_items():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 1, 150), rng.normal(0, 3, 60)
    objective = Objective({"a": PREFERENCE[2], "b": PREFERENCE[2]}, [], 5.0)
    edit, base = ({"a": _run(x).tasks["a"], "b": _run(y).tasks["a"]} for x, y in ((0.5 * a, 0.9 * b), (a, b)))
    parts = np.abs(a) * -0.5, np.abs(b) * -0.1
    error = sum(part.var() / len(part) for part in parts) ** 0.5 / 2
    mean, low, high = objective.moved(Run(edit, np.zeros((1, 3))), [Run(base, np.zeros((1, 3)))])
    assert mean == pytest.approx(np.mean([part.mean() for part in parts]))
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.2 * error)


def _tested(base, edit, draws, lost=0):
    """Results on a test half: sizes of 200 margins relative to the base's, and an ability of which some is lost."""
    margin = np.random.default_rng(0).normal(0, 1, 200)
    noise = np.random.default_rng(1).normal(0, 1e-3, (len(draws), 200))
    right = np.ones((200, 1))
    after = right.copy()
    after[:lost] = 0

    def run(kind, name, m, right=right):
        columns = np.stack([m > 0, m, np.abs(m), m > 0], 1).astype(float)
        return EvaluationRun(kind, name, {"a": columns, "ability": right})

    runs = [run("base", "base", base * margin), run("edit", "edit", edit * margin, after)]
    runs += [
        run("random neurons", f"random {i}", f * margin + n) for i, (f, n) in enumerate(zip(draws, noise, strict=True))
    ]
    marks = [
        Benchmark("a", "bias", [], [1] * 200, [""] * 200, None, PREFERENCE),
        Benchmark("ability", "capability", [], [1] * 200, [""] * 200, None, ACCURACY, chance=0.0),
    ]
    return results_of(marks, Runs(tuple(runs)), 5.0, "absolute margin")


@pytest.mark.parametrize(
    "given, looks, confirmed, text",
    [
        (
            (1.0, 0.8, [1.0] * 19),
            (1, 1),
            True,
            "a: less bias, beyond every control; ability: a loss of 5 points is excluded",
        ),
        ((1.0, 0.8, [1.0] * 19, 20), (1, 1), False, "ability: a loss of 5 points is not excluded"),
        ((1.0, 1.0, [1.1] * 19), (1, 1), False, "a: no effect found"),
        ((1.0, 1.2, [1.0] * 19), (1, 1), False, "a: more bias, beyond every control"),
        ((1.0, 0.8, [1.0] * 18 + [0.79]), (1, 1), False, "but not beyond random neurons"),
        ((1.0, 0.8, [1.0] * 18), (1, 1), False, "but not beyond random neurons (18 draws cannot tell)"),
        ((1.0, 0.8, [1.0] * 39), (2, 1), True, "this data has confirmed 2 edits, so p is multiplied by 2"),
        ((1.0, 0.8, [1.0] * 59), (1, 3), True, "a: less bias, beyond every control; ability"),
        ((1.0, 0.8, [1.0] * 58), (1, 3), False, "the best of 3 edits must exceed 59 draws, not 58"),
        ((1.0, 0.8, [1.0] * 39), (2, 2), False, "the best of 2 edits must exceed 79 draws, not 39"),
    ],
)
def test_confirmed_needs_all_of_it(given, looks, confirmed, text):
    results, objective, looks = _tested(*given), Objective({"a": PREFERENCE[2]}, ["ability"], 5.0), Looks(*looks)
    result = objective.confirmed(results, 0.02, looks)
    assert result.confirmed == confirmed and text in result.text
    assert (result.uses, result.candidates) == looks
    for bound, holds in ((0.019, False), (0.021, True)):
        bounded = replace(objective, max_kl=bound).confirmed(results, 0.02, looks)
        assert bounded.confirmed == (confirmed and holds) and bounded.bounded == (result.bounded and holds)
        assert bounded.text.endswith(f"; KL 0.02 is {'' if holds else 'not '}below {bound:g}")


def test_every_further_use_multiplies_p():
    objective, results = Objective({"a": PREFERENCE[2]}, [], 5.0), _tested(1.0, 0.8, [1.0] * 39)
    figures = results["a"].figures
    for p, uses, confirmed in ((0.024, 2, True), (0.026, 2, False), (0.026, 1, True)):
        figures["absolute margin"] = replace(figures["absolute margin"], p_holm=p)
        assert objective.confirmed(results, 0.0, Looks(uses)).confirmed == confirmed


@pytest.mark.parametrize("uses, candidates", [(1, 1), (1, 5), (3, 4)])
def test_the_best_of_random_edits_is_rarely_below_all_draws(uses, candidates):
    """Numbers from one distribution: the least of k is below n others in 5 of 100 cases at most, for each use."""
    draws, rng = Looks(uses, candidates).draws, np.random.default_rng(0)
    values = rng.normal(size=(4000, uses * candidates + draws))
    below = values[:, : uses * candidates].min(1) < values[:, uses * candidates :].min(1)
    assert 0.03 < below.mean() < 0.06


def test_draws_end_with_the_first_that_does_as_well(tuned):
    result = tuned[1]
    figure = result["test"]["tasks"]["probes"]["figures"]["absolute margin"]
    as_good = [i for i in range(figure["draws"]) if figure[f"random {i + 1}"] <= figure["edit"]]
    assert result["confirmation"]["candidates"] == len(result["points"]) == 4
    assert figure["draws"] == (79 if not as_good or as_good[0] >= DRAWS else DRAWS)
    assert result["confirmation"]["confirmed"] == (not as_good and figure["verdict"].endswith("beyond every control"))


def test_draws_go_on_as_long_as_the_choice_outdoes_them(scores, tmp_path, monkeypatch):
    measured, drawn, inner, distance = [], [], Bench.measure_draws, Objective.distance

    def noting(bench, scorer, edits, *args):
        measured.append([edit.sha256 for edit in edits])
        drawn.extend(inner(bench, scorer, edits, *args))
        return drawn[-len(edits) :]

    def far(objective, columns):
        return distance(objective, columns) + 1e3 * any(columns is other for other in drawn)

    monkeypatch.setattr(Bench, "measure_draws", noting)
    monkeypatch.setattr(Objective, "distance", far)  # of runs on the test half alone
    result = tune("demo", scores, tmp_path / "out", **ASKED)
    on_test = measured[list(map(len, measured)).index(DRAWS) :]
    assert list(map(len, on_test)) == [DRAWS, 79 - DRAWS]
    assert len({sha for block in on_test for sha in block}) == 79  # never the same neurons again
    assert result["test"]["tasks"]["probes"]["figures"]["absolute margin"]["draws"] == 79


@pytest.mark.parametrize("least, chosen", [(0.75, True), (0.5, False)])
def test_one_draw_that_does_as_well_is_enough(scores, least, chosen):
    """The edit halves every margin; of 39 draws, 38 change nothing and one leaves this share of it."""
    margin = np.random.default_rng(0).normal(0, 1, 200)
    neutral_columns, right = np.ones((4, 3)), np.ones((200, 1))

    def run(factor):
        columns = np.stack([margin > 0, factor * margin, np.abs(factor * margin), margin > 0], 1).astype(float)
        return Run({"a": columns, "ability": right}, neutral_columns)

    seen = []

    def draws(edits):
        seen.extend(edits)
        return [run(least if len(seen) - len(edits) + i == 20 else 1.0) for i in range(len(edits))]

    bench = SimpleNamespace(base=run(1.0), run=lambda edit: run(0.5), draws=draws)
    sizes = SimpleNamespace(layer_sizes=lambda site: [192] * 4)
    objective = Objective({"a": PREFERENCE[2]}, ["ability"], 9.0, chance={"ability": 50.0})
    search = Search(space=Space(factors=(2.0,), taus=(0.1,), rules=("paper",)), trials=5)
    result = Chooser(sizes, bench, objective, DRAWS).choose(search, {"down": load_scores(scores)})
    assert (result.edit is not None) == chosen and len(seen) == (DRAWS if chosen else 24)
    assert result.points[0].as_good == (0 if chosen else 1) and result.points[0].beyond_random.high < 0
    bounded = Chooser(sizes, bench, replace(objective, max_kl=0.5), DRAWS)  # the texts' KL is 1
    assert bounded.choose(search, {"down": load_scores(scores)}).edit is None


def test_data_is_new_once(tmp_path):
    """Whatever folder and split: the same data is counted for every further edit, and the same edit only once."""
    scores = tmp_path / "s.safetensors"
    assert [count_use([scores], "data", edit) for edit in "abacb"] == [1, 2, 1, 3, 2]
    assert count_use([scores], "other", "z") == 1
    assert count_use([scores, tmp_path / "t.safetensors"], "data", "d") == 4
    assert len(record_of(scores).read_text().splitlines()) == 5
    record_of(scores).write_text("[]\n{broken")
    assert count_use([scores], "data", "e") == 1  # said, and not a reason to stop
    marks = [_mark("a", [f"s{i}" for i in range(9)], [""] * 9), _mark("b", ["x", "y"], ["", ""])]
    marks = [replace(mark, pairs=[([1], [i]) for i in range(len(mark.sizes))]) for mark in marks]
    turned = [mark.take(list(range(len(mark.sizes)))[::-1]) for mark in marks]
    assert whole_data(marks, ["a"]) == whole_data(turned, ["a"]) != whole_data(marks, ["b"])
    assert whole_data([marks[0].take(range(8))], ["a"]) != whole_data(marks, ["a"])


def test_bounds():
    objective = Objective({}, ["x", "y"], 5.0, 0.1)
    assert objective.breach({"x": -1.0, "y": -4.0}, 0.05) < 0
    assert objective.breach({"x": -1.0, "y": -5.0}, 0.05) >= 0 and objective.breach({"x": -7.0, "y": -1.0}, 0.05) == 2
    assert objective.breach({"x": -1.0, "y": -4.0}, 0.3) == pytest.approx(0.2)
    assert Objective({}, ["x"], 5.0).breach({"x": -1.0}, 99.0) == -4


# -------------------------------------------------------------------------------------------- the test half is not seen


class Spy:
    """Notes every row of tokens that a model reads, and whether the mark of the test half was on the disk then."""

    def __init__(self, monkeypatch, out):
        self.seen, used = [], out / USED
        score, states = Scorer.score, neutral.states

        def noting_score(scorer, pairs, *args):
            self.seen += [((*context, *continuation), used.exists()) for context, continuation in pairs]
            return score(scorer, pairs, *args)

        def noting_states(model, texts):
            self.seen += [(tuple(text[:-1]), used.exists()) for text in texts]
            return states(model, texts)

        monkeypatch.setattr(Scorer, "score", noting_score)
        monkeypatch.setattr(neutral, "states", noting_states)


def _rows(half):
    return {(*c, *a) for mark in half.benchmarks for c, a in mark.pairs} | {tuple(text[:-1]) for text in half.texts}


def test_the_test_half_is_scored_after_the_choice_and_once(scores, split, tmp_path, monkeypatch):
    spy, (dev, test) = Spy(monkeypatch, tmp_path / "out"), map(_rows, split)
    assert not dev & test
    result = tune("demo", scores, tmp_path / "out", **ASKED)
    before = {row for row, used in spy.seen if not used}
    after = {row for row, used in spy.seen if used}
    assert before == dev and after == test and result["test"]
    spy.seen.clear()
    assert tune("demo", scores, tmp_path / "out", **ASKED) == result
    assert tune("demo", scores, tmp_path / "out", **ASKED, dev_only=True) == result and not spy.seen
    for change in (dict(space=Space(factors=(2.0,))), dict(margin=9.5), dict(draws=4), dict(trials=5)):
        with pytest.raises(InputError, match="cannot confirm another choice"):
            tune("demo", scores, tmp_path / "out", **ASKED | change)
    assert not spy.seen


def test_dev_only_leaves_the_test_half_and_the_space_may_grow(scores, split, tmp_path, monkeypatch):
    spy, out = Spy(monkeypatch, tmp_path / "out"), tmp_path / "out"
    few = Space(factors=(0.25,), taus=(0.2,), rules=("contrastive",))
    result = tune("demo", scores, out, **ASKED | dict(space=few, dev_only=True))
    assert result["chosen"] and result["test"] is None and {row for row, _ in spy.seen} == _rows(split[0])
    assert sorted(path.name for path in out.iterdir()) == ["journal.jsonl", "pareto.svg", "tune.json"]
    lines = (out / "journal.jsonl").read_bytes()
    wider = tune("demo", scores, out, **ASKED | dict(dev_only=True))
    assert (out / "journal.jsonl").read_bytes().startswith(lines) and len(wider["points"]) == 4
    assert result["points"][0]["bias"] in [p["bias"] for p in wider["points"]]


def test_nothing_to_choose_ends_before_the_test_half(scores, split, tmp_path, monkeypatch):
    """Turned up by 2^-20, neurons move nothing beyond random ones."""
    spy = Spy(monkeypatch, tmp_path / "out")
    space = Space(factors=(1 + 2**-20, 1 - 2**-20), taus=(0.1,), rules=("paper",))
    result = tune("demo", scores, tmp_path / "out", **ASKED | dict(space=space))
    assert result["chosen"] is None and result["test"] is None and result["confirmation"] is None
    assert result["verdict"]["effect"] == "NOT MEASURED"
    assert {row for row, _ in spy.seen} == _rows(split[0])
    assert not (tmp_path / "out" / USED).exists() and not (tmp_path / "out" / "edit.json").exists()


# ------------------------------------------------------------------------------------------------------- to be resumed


@pytest.mark.parametrize("left", [0, 1, 2, 3, 5])
def test_a_killed_run_ends_with_the_same_bytes(tuned, scores, tmp_path, left, monkeypatch):
    """As killed in the midst of writing line `left` of the journal."""
    done, _ = tuned
    lines = (done / "journal.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) > 6
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "journal.jsonl").write_bytes(b"".join(lines[:left]) + lines[left][: len(lines[left]) // 2])
    spy = Spy(monkeypatch, tmp_path / "out")
    tune("demo", scores, tmp_path / "out", **ASKED)
    assert contents(tmp_path / "out") == contents(done)
    sentences = Counter(row for row, used in spy.seen if not used and len(row) > 4)
    assert max(sentences.values()) <= len(lines) - left + 2  # what was done is not scored again


def test_killed_while_the_test_half_is_scored(tuned, scores, tmp_path, monkeypatch):
    """The same choice may be scored again; another may not."""
    out, inner = tmp_path / "out", Scorer.score

    def killed(scorer, pairs, *args):
        if (out / USED).exists():
            raise KeyboardInterrupt
        return inner(scorer, pairs, *args)

    monkeypatch.setattr(Scorer, "score", killed)
    with pytest.raises(KeyboardInterrupt):
        tune("demo", scores, out, **ASKED)
    monkeypatch.setattr(Scorer, "score", inner)
    assert sorted(path.name for path in out.iterdir()) == ["journal.jsonl", USED]
    with pytest.raises(InputError, match="another margin chose"):
        tune("demo", scores, out, **ASKED | dict(margin=10.0))
    tune("demo", scores, out, **ASKED)
    assert contents(out) == contents(tuned[0])


def run(*args, cwd, wait=True):
    if wait:
        return run_command(*args, cwd=cwd)
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, args)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


SMALL_OPTIONS = [
    "--tasks",
    "probes,knowledge_controls",
    "--margin",
    9,
    "--factors",
    "0.25,2",
    "--taus",
    "0.1,0.2",
    "--rules",
    "contrastive",
]


@pytest.mark.slow
def test_a_killed_process_is_continued(tuned, scores, tmp_path):
    arguments = ["tune", "--in", "demo", scores, "--out", "out", *SMALL_OPTIONS]
    journal, kills = tmp_path / "out" / "journal.jsonl", 0
    while kills < 2:
        process = run(*arguments, cwd=tmp_path, wait=False)
        size = journal.stat().st_size if journal.exists() else 0
        while process.poll() is None and (not journal.exists() or journal.stat().st_size == size):
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "out") == contents(tuned[0])


# ---------------------------------------------------------------------------------------------------- the command line


@pytest.mark.slow
def test_command(scores, tmp_path, tuned, monkeypatch):
    result = run("tune", "--in", "demo", scores, "--out", "out", *SMALL_OPTIONS, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "out") == contents(tuned[0])
    actual = load_tuning(tmp_path / "out" / "tune.json").to_dict()
    for text in (
        "18 dev, 18 test",
        "4 of 4 settings tried (grid)",
        "in common: site down, contrastive, beta 0.1, union",
        "4 edits within bounds",
        "Pareto front of",
        "chosen (*)",
        "test, scored once",
        actual["confirmation"]["text"],
        f"VERDICT: {actual['verdict']['ship']}",
    ):
        assert text in result.stdout
    assert result.stdout.splitlines()[-1].endswith("kbne-edit bake --in demo --edit out/edit.json --out ./debiased")
    monkeypatch.chdir(tmp_path)
    again = CliRunner().invoke(
        cli, list(map(str, ["tune", "--in", "demo", scores, "--out", "out", *SMALL_OPTIONS, "--json"]))
    )
    assert parsed("tune", again.stdout) == {"version": 1} | actual and "is not scored again" in again.stderr
    narrow = [*SMALL_OPTIONS[:4], "--factors", "1.0000001", "--taus", "0.1", "--rules", "paper"]
    nothing = CliRunner().invoke(cli, list(map(str, ["tune", "--in", "demo", scores, "--out", "none", *narrow])))
    assert nothing.exit_code == 0 and "nothing to choose: " in nothing.stdout and "next:" not in nothing.stdout


@pytest.mark.slow
def test_command_with_tops(scores, tmp_path):
    """From the sweep to the report: an edit chosen by a top is baked as printed, and selected again from its record."""
    options = [*SMALL_OPTIONS[:4], "--factors", 2, "--tops", "0.01", "--taus", "0.2", "--rules", "paper"]
    result = run("tune", "--in", "demo", scores, "--out", "out", *options, cwd=tmp_path)
    assert result.returncode == 0 and "2 of 2 settings tried (grid)" in result.stdout, result.stdout + result.stderr
    assert "in common: site down, paper, beta 0.1, union" in result.stdout and "top 0.01, factor 2" in result.stdout
    actual = load_tuning(tmp_path / "out" / "tune.json").to_dict()
    assert (actual["space"]["taus"], actual["space"]["tops"]) == ([0.2], [0.01])
    (chosen,) = (point for point in actual["points"] if point["edit"] == actual["chosen"])
    assert chosen["settings"][0]["top"] == 0.01 and "tau" not in chosen["settings"][0]
    assert chosen["neurons"] == select(load_scores(scores), Rule(top=0.01)).num_neurons
    baking = shlex.split(result.stdout.splitlines()[-1].split("kbne-edit ")[-1])
    assert run(*baking, "--no-behaviour", cwd=tmp_path).returncode == 0
    report = report_of(tmp_path / "debiased", scores, tmp_path / "out" / "tune.json").to_dict()
    assert report["selection"]["top"] == 0.01 and report["selection"]["reproduced"] is True
    assert "top 0.01" in next(point["settings"] for point in report["tuning"]["points"] if point["chosen"])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--factors", "2,x"], "'2,x': give numbers separated by commas"),
        (["--factors", "1"], "1.0 is no value for factors"),
        (["--tops", "0"], "0.0 is no value for tops"),
        (["--tasks", "nonsense"], "there is no task nonsense"),
        (["--trials", 0], "--trials"),
    ],
)
def test_wrong_options(scores, tmp_path, options, message):
    result = run("tune", "--in", "demo", scores, "--out", "out", *options, cwd=tmp_path)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(tasks=["probes"]), "no task bounds the loss of capability"),
        (dict(tasks=["knowledge"]), "there is no bias task with data at all"),
        (dict(figure="ICAT"), "--figure is one of SS, absolute margin, margin"),
        (dict(margin=5.0), r"has 23 items in a half, too few .* or --margin 8"),
        (dict(margin=8.0), r"has 22 items in a half, too few .* or --margin 9"),
        (dict(tasks=["probes", "knowledge_controls"], limit=1), "cannot be halved"),
    ],
)
def test_wrong_arguments(scores, tmp_path, values, message):
    with pytest.raises(InputError, match=message):
        tune("demo", scores, tmp_path / "out", **ASKED | values)
    assert not (tmp_path / "out").exists()


def test_wrong_scores_and_folders(scores, tmp_path):
    with pytest.raises(InputError, match="second scores file of the site down"):
        shutil.copyfile(scores, tmp_path / "copy.safetensors")
        tune("demo", [scores, tmp_path / "copy.safetensors"], tmp_path / "out", **ASKED)
    shutil.copytree(DEMO, tmp_path / "other")
    raw = bytearray((tmp_path / "other" / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "other" / "model.safetensors").write_bytes(raw)
    with pytest.raises(InputError, match="made for another model"):
        tune(str(tmp_path / "other"), scores, tmp_path / "out", **ASKED)
    with pytest.raises(OutputError, match="holds a model"):
        tune("demo", scores, tmp_path / "other", **ASKED)


def test_the_figure_that_steers_unless_told_otherwise():
    """The absolute margin where a task has it, and there it steers alone; else the unwanted margin."""
    avoided, crows, ability = (
        Benchmark(name, kind, [], [1] * 99, [""] * 99, None, figures)
        for name, kind, figures in (
            ("probes", "bias", AVOIDED),
            ("crows_pairs", "bias", PREFERENCE),
            ("copa", "capability", ACCURACY),
        )
    )

    def steering(*marks, figure=None):
        return {
            name: f.name for name, f in objective_of([Half(marks, [])] * 2, Criteria(figure=figure)).steering.items()
        }

    assert steering(avoided, ability) == {"probes": "unwanted margin"}
    assert steering(avoided, crows, ability) == {"crows_pairs": "absolute margin"}
    assert steering(avoided, crows, ability, figure="unwanted margin") == {"probes": "unwanted margin"}
    with pytest.raises(InputError, match="--figure is one of unwanted margin, unwanted preferred"):
        steering(avoided, ability, figure="absolute margin")


def test_probes_that_are_to_be_avoided_steer_by_their_signed_margin(scores, scorer, tmp_path):
    """Dev and test figures again by plain loops, and a verdict that asks for a fall."""
    recipe = avoiding(tmp_path, exchanged=False)
    result = tune("demo", scores, tmp_path / "out", **ASKED, recipe=recipe)
    marks = benchmarks(["probes"], None, None, load_recipe(recipe), scorer, scorer.tokenizer)
    text = neutral.neutral_text(scorer.tokenizer, load_recipe(recipe))
    stories, texts = text.texts, text.rows
    (dev,), (test,) = (half.benchmarks for half in halves(marks, stories, texts, 0))
    assert result["figure"] == "unwanted margin" and result["chosen_by"].startswith("the least of what is unwanted")

    def mean(mark, edit=None):
        with hooked(scorer.model, edit) if edit else nullcontext():
            return 2 * _margins(mark)(scorer.model).mean()  # m1 + m2: where it is unwanted less where it is right

    assert result["base_bias"]["probes"] == pytest.approx(mean(dev), abs=PER_TOKEN)
    edits, base = _edits(result, scores), mean(dev)
    for point in result["points"]:
        change = mean(dev, edits[point["edit"]]) - base
        assert point["bias"][0] == pytest.approx(change, abs=2 * PER_TOKEN)
        assert not point["front"] or change < 0
    assert {point["bias"][0] < 0 for point in result["points"]} == {False, True}
    entry = result["test"]["tasks"]["probes"]["figures"]["unwanted margin"]
    assert entry["edit"] == pytest.approx(mean(test, edits[result["chosen"]]), abs=PER_TOKEN)
    actual = result["confirmation"]
    fell = entry["state"] == "better" and "random neurons" not in entry["same_as"]
    assert actual["confirmed"] == fell and entry["verdict"] in actual["text"]


def test_capability_tasks_bound_the_loss_where_there_are_any():
    names = {"knowledge": "knowledge", "copa": "capability", "probes": "bias"}
    marks = [
        Benchmark(name, kind, [], [1] * 99, [""] * 99, None, PREFERENCE if kind == "bias" else ACCURACY)
        for name, kind in names.items()
    ]
    objectives = [objective_of([Half(m, [])] * 2, Criteria(figure="SS")) for m in (marks, [marks[0], marks[2]])]
    assert [objective.abilities for objective in objectives] == [["copa"], ["knowledge"]]


# ---------------------------------------------------------------------------------------------------------- the report


@pytest.fixture(scope="module")
def baked(tuned, scores, tmp_path_factory):
    """The chosen edit, baked; scores and sweep in its work folder."""
    folder = tmp_path_factory.mktemp("baked")
    shutil.copytree(tuned[0], folder / "debiased.work")
    shutil.copyfile(scores, folder / "debiased.work" / "scores.safetensors")
    bake(
        "demo",
        folder / "debiased",
        edit=folder / "debiased.work" / "edit.json",
        checks=Checks(behaviour=False, measure=False),
    )
    return folder / "debiased"


def test_the_report_shows_the_sweep(baked, tuned):
    made, result = report_of(baked), tuned[1]
    report = made.to_dict()
    parsed("report", json.dumps(report))
    actual = report["tuning"]
    assert [(p["kl"], p["bias"], p["front"]) for p in actual["points"]] == [
        (p["kl"], p["bias"], p["front"]) for p in result["points"]
    ]
    assert [p["chosen"] for p in actual["points"]].index(True) == [p["edit"] for p in result["points"]].index(
        result["chosen"]
    )
    entry = result["test"]["tasks"]["probes"]["figures"]["absolute margin"]
    assert actual["test"] == [
        {"task": "probes", "change": entry["change"], "p": entry["p_holm"], "beyond": False, "found": entry["verdict"]}
    ]
    assert actual["uses"] == result["confirmation"]["uses"]
    assert {s["task"]: (s["dev_items"], s["test_items"]) for s in actual["split"]}["probes"] == (18, 18)
    states = {v["about"]: v["state"] for v in report["verdicts"]}
    assert states["chosen on one half, confirmed on the other"] == ("holds" if actual["confirmed"] else "warning")
    assert states["effect on bias"] != "open" and states["the selection can be repeated"] == "holds"
    html = made.html()
    assert "How factor and thresholds were chosen" in html and "Not measured: neither" not in html
    assert html.count('id="pareto-title"') == 1 and entry["verdict"] in html


def test_a_sweep_that_chose_another_edit_is_left_out(baked, tuned, tmp_path):
    lines = []
    other = tmp_path / "tune.json"
    other.write_text(json.dumps(tuned[1] | {"chosen": "0" * 64}))
    with pytest.raises(InputError, match="did not choose this edit"):
        report_of(baked, tuning=other)
    other.write_text(json.dumps(tuned[1] | {"base": "0" * 64}))  # the same edit, of another model
    with pytest.raises(InputError, match="did not choose this edit"):
        report_of(baked, tuning=other)
    other.write_text(json.dumps(tuned[1] | {"points": [{"bias": "much"}]}))
    with pytest.raises(InputError, match="did not write"):
        report_of(baked, tuning=other)
    shutil.copytree(baked, tmp_path / "debiased")
    (tmp_path / "debiased.work").mkdir()
    for text in ("[]", "{", json.dumps(tuned[1] | {"chosen": None})):
        (tmp_path / "debiased.work" / "tune.json").write_text(text)
        report = report_of(tmp_path / "debiased", say=lines.append)
        assert report.tuning is None and "tune.json left out" in lines[-1]
        assert {line.about: line.state for line in report.verdicts}["effect on bias"] == "open"
    assert "pareto" not in report.html()


def test_the_selection_by_dimension_is_repeated_from_the_record(scores, tmp_path):
    loaded = load_scores(scores)
    edit = by_dimension(selection(loaded), {"clan": 2.0, "village": 1.0, "guild": 0.5})
    edit.save(tmp_path / "edit.json")
    assert set(edit.distinct_factors) == {0.5, 2.0} and edit.num_neurons < selection(loaded).edit.num_neurons
    bake("demo", tmp_path / "out", edit=tmp_path / "edit.json", checks=Checks(behaviour=False, measure=False))
    assert report_of(tmp_path / "out", scores).selection.reproduced is True


def test_the_plot_shows_the_points(tuned):
    """Places of the marks, read back from the file."""
    tree = ElementTree.fromstring((tuned[0] / "pareto.svg").read_text())
    tags = {"front": "first", "other": "ring"}
    marks = {
        kind: [(float(e.get("cx")), float(e.get("cy"))) for e in tree.iter() if e.get("class") == name]
        for kind, name in tags.items()
    }
    points = tuned[1]["points"]
    own = [(np.log10(p["kl"]), p["bias"][0]) for p in points if p["front"]]
    rest = [(np.log10(p["kl"]), p["bias"][0]) for p in points if not p["front"]]
    assert [len(marks["front"]), len(marks["other"])] == [len(own), len(rest)]
    lowest = min(bias for _, bias in own)
    places, drawn = np.array(own + rest), np.array(marks["front"] + marks["other"])
    places[:, 1] = np.minimum(places[:, 1], -2 * lowest)  # the upper edge
    for axis, sign in ((0, 1), (1, -1)):
        line = np.polyfit(places[:, axis], drawn[:, axis], 1)
        assert sign * line[0] > 0 and np.polyval(line, places[:, axis]) == pytest.approx(drawn[:, axis], abs=0.05)
    (ring,) = [e for e in tree.iter() if e.get("class") == "around"]
    (chosen,) = [p for p in points if p["edit"] == tuned[1]["chosen"]]
    at = own.index((np.log10(chosen["kl"]), chosen["bias"][0]))
    assert (float(ring.get("cx")), float(ring.get("cy"))) == marks["front"][at]


def test_marks_out_of_bounds_are_squares():
    from kbne_edit.plots import pareto

    drawing = pareto([(1e-3, -0.1, True, True, False), (1e-2, -0.2, False, False, False)], "<margin>")
    assert drawing.count('class="second"') == 1 == drawing.count('class="first"') and "&lt;margin&gt;" in drawing
    ElementTree.fromstring(drawing)


def test_a_model_that_gives_no_numbers_is_refused(scores, tmp_path, monkeypatch):
    """Columns that are not finite, as an edited model of a narrow dtype may give them."""
    monkeypatch.setattr(Benchmark, "measure", lambda self, scorer, update=None: np.full((len(self.sizes), 4), np.nan))
    with pytest.raises(InputError, match="gives no numbers"):
        tune("demo", scores, tmp_path / "out", **ASKED)


def test_clusters_known_from_another_task_count_for_its_halves():
    """Two tasks that share all clusters but four: those four are dealt so that the second is halved, too."""
    stories = [f"s{i}" for i in range(12)]
    dev, test = _sides([_mark("a", stories, [""] * 12), _mark("b", stories[:8] + list("wxyz"), [""] * 12)])
    assert len(dev["a"]) == len(test["a"]) == 6 and abs(len(dev["b"]) - len(test["b"])) <= 1
