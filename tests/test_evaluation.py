"""Evaluation against plain loops over the model, against lm-eval's own scoring, and hooks against the fold."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command import run_command
from printed import parsed
from transformers import AutoConfig, AutoModelForCausalLM

import bench_data
from bench_data import avoiding
from kbne_edit import Controls, Edit, Measurement, fold, hooked, load_recipe
from kbne_edit import evaluate as public_evaluate
from kbne_edit.commands.options import taken
from kbne_edit.disk.checkpoint import Checkpoint
from kbne_edit.errors import InputError, ScoresError
from kbne_edit.evaluation import neutral
from kbne_edit.evaluation.benchmark import Answer, Benchmark, Figure
from kbne_edit.evaluation.effect import random_edit
from kbne_edit.evaluation.figures import AVOIDED, PREFERENCE, column
from kbne_edit.evaluation.own import knowledge_benchmark
from kbne_edit.evaluation.result import FigureResult, loss_of, results_of
from kbne_edit.evaluation.runs import Run, Runs
from kbne_edit.evaluation.scoring import Scorer, quiet_lm_eval
from kbne_edit.evaluation.tasks import benchmarks
from kbne_edit.models.loading import load_model, load_tokenizer, read_tokenizer
from kbne_edit.models.trees import Tree, cut
from kbne_edit.recipe import Question
from kbne_edit.statistics import beyond_draws
from tiny import FAMILIES, tiny_model

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "kbne_edit" / "demo"
# Per token. The same float32 model on other shapes sums in another order: a logit near 10 is spaced by 2^-20 = 1e-6,
# and some ten such roundings meet in it (three or four layers, two sums each, the head). The log-softmax of the oracles
# is taken in float64: torch's float32 one alone errs by 5e-5 over a vocabulary of 150 000. A large model whose first
# position carries huge activations is noisier (5e-4 between any two ways); the tiny ones and the demo are not.
PER_TOKEN = 1e-5
EDIT = Edit("down", {1: {3: 2.0, 7: 2.0, 90: 2.0}, 2: {5: 2.0, 31: 2.0}})


def evaluate(*args, **values):
    """As JSON has it."""
    settings = {"measurement": taken(Measurement, values), "controls": taken(Controls, values)}
    return json.loads(json.dumps(public_evaluate(*args, **settings, **values).to_dict(), allow_nan=False))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return bench_data.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def demo():
    """(model, tokenizer) of the demo."""
    return load_model(DEMO, torch.float32), load_tokenizer(DEMO)


def plain(model, context, continuation):
    """(log-probs [tokens] in float64, greedy?) of one pair, the whole sentence alone."""
    ids = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(context) - 1 : -1].double()
    target = ids[0, len(context) :]
    return logits.log_softmax(-1).gather(1, target[:, None])[:, 0].numpy(), bool((logits.argmax(-1) == target).all())


def sentence(demo, text):
    model, tokenizer = demo
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return plain(model, [prefix], tokenizer(text, add_special_tokens=False)["input_ids"])[0]


# ------------------------------------------------------------------------------------------------------------- scoring


def _random_pairs(seed=0):
    """Pairs that share beginnings of any length, answers of one token, one pair twice, and pairs that share nothing."""
    rng = np.random.default_rng(seed)

    def draw(n):
        return rng.integers(3, 97, n).tolist()

    pairs = []
    for length in (1, 1, 2, 5, 5, 9):
        context, stem = draw(length), draw(2)
        pairs += [(context, stem + draw(int(n))) for n in rng.integers(1, 6, 3)]
        pairs += [(context, [token]) for token in draw(3)]
    return pairs + [pairs[0], (draw(12), draw(12))]


@pytest.mark.parametrize("family", FAMILIES)
def test_scorer_equals_a_plain_loop(family, demo):
    model = tiny_model(family)
    pairs = _random_pairs()
    got = Scorer(model, demo[1]).score(pairs)
    for (context, continuation), (logprob, greedy) in zip(pairs, got, strict=True):
        expected, best = plain(model, context, continuation)
        assert logprob == pytest.approx(expected.sum(), abs=PER_TOKEN * len(continuation)) and greedy == best


def test_local_windows_by_index(demo):
    """GPT-Neo masks its local layers by index, whatever mask it is given: a pass must stay within the window."""
    config = AutoConfig.for_model(
        "gpt_neo",
        **FAMILIES["gpt_neo"] | dict(attention_types=[[["global", "local"], 1], [["global"], 1]], window_size=8),
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    pairs = _random_pairs()
    for (context, continuation), (logprob, _) in zip(pairs, Scorer(model, demo[1]).score(pairs), strict=True):
        expected, _ = plain(model, context, continuation)
        assert logprob == pytest.approx(expected.sum(), abs=PER_TOKEN * len(continuation))


def test_nothing_is_kept_between_models(demo):
    model, tokenizer = demo
    scorer, pairs = Scorer(model, tokenizer), _random_pairs()
    before = scorer.score(pairs)
    with hooked(model, EDIT):
        during = scorer.score(pairs)
    assert scorer.score(pairs) == before
    assert all(a[0] != b[0] for a, b in zip(before, during, strict=True))


def test_out_of_memory_halves_the_pass(demo, monkeypatch, capsys, shown):
    """The real scorer on the real model; only the allocator is made to refuse more than forty tokens."""
    scorer, pairs = Scorer(*demo), _random_pairs()
    expected, inner = scorer.score(pairs), scorer.logits_at

    def small(tree, keep):
        if len(tree.tokens) > 40:
            raise torch.OutOfMemoryError
        return inner(tree, keep)

    monkeypatch.setattr(scorer, "logits_at", small)
    got = scorer.score(pairs)
    assert "out of memory" in capsys.readouterr().err
    np.testing.assert_allclose([a for a, _ in got], [a for a, _ in expected], atol=12 * PER_TOKEN)
    monkeypatch.setattr(scorer, "logits_at", lambda tree, keep: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(InputError, match="out of memory"):
        scorer.score(pairs)


def test_too_long_a_request_loses_its_beginning(demo):
    model = demo[0]
    scorer = Scorer(*demo)
    size = scorer.max_length
    row = np.random.default_rng(0).integers(3, 97, size + 9).tolist()
    ((got, _),) = scorer.score([(row[:-3], row[-3:])])
    expected, _ = plain(model, row[-(size + 1) : -3], row[-3:])
    assert got == pytest.approx(expected.sum(), abs=3 * PER_TOKEN)
    with pytest.raises(InputError, match="the context of text 1 has no token"):
        scorer.score([([], [1])])


def test_a_tree_holds_each_beginning_once():
    """As many tokens as there are different beginnings; a token sees its own beginning and nothing else."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows = sorted({tuple(rng.integers(0, 3, rng.integers(1, 7)).tolist()) for _ in range(12)})
        tree = Tree(rows)
        assert len(tree.tokens) == len({row[: i + 1] for row in rows for i in range(len(row))})
        for row, path in zip(rows, tree.paths, strict=True):
            assert [tree.tokens[node] for node in path] == list(row)
            assert [tree.depth[node] for node in path] == list(range(len(row)))
            assert all(np.flatnonzero(tree.seen[node]).tolist() == path[: i + 1] for i, node in enumerate(path))


def test_passes_hold_their_limit():
    rng = np.random.default_rng(0)
    for limit in (4, 7, 20):
        rows = sorted({tuple(rng.integers(0, 3, rng.integers(1, 7)).tolist()) for _ in range(40)})
        parts = list(cut(rows, limit))
        assert [row for part in parts for row in rows[part]] == rows
        assert all(len(Tree(rows[part]).tokens) <= limit or part.stop - part.start == 1 for part in parts)
    assert list(cut([], 5)) == []


# --------------------------------------------------------------------------------------------- figures against oracles


@pytest.fixture(scope="module")
def base_report(data):
    return evaluate("demo", data=data)


def _marks(demo, data, names):
    model, tokenizer = demo
    return benchmarks(names, data, None, load_recipe("demo"), Scorer(model, tokenizer), tokenizer)


def test_stereoset_equals_an_independent_scorer(demo, base_report):
    figures = base_report["tasks"]["stereoset_intrasentence"]
    rows = bench_data.stereoset()
    result = [[sentence(demo, r[k]) for k in ("stereotype", "anti_stereotype", "unrelated")] for r in rows]
    whole = np.array([[s.sum() for s in of_row] for of_row in result])
    margin = np.array([s.mean() - a.mean() for s, a, _ in result])
    ss = 100 * (whole[:, 0] > whole[:, 1]).mean()
    lms = 50 * ((whole[:, 0] > whole[:, 2]).mean() + (whole[:, 1] > whole[:, 2]).mean())
    got = {name: entry["base"] for name, entry in figures["figures"].items()}
    assert figures["items"] == len(rows) and 0 < lms and 0 < ss < 100
    assert (got["SS"], got["LMS"]) == pytest.approx((ss, lms), abs=1e-9)  # counts: exact
    assert got["ICAT"] == pytest.approx(lms * min(ss, 100 - ss) / 50, abs=1e-9)
    assert got["SS per token"] == pytest.approx(100 * (margin > 0).mean(), abs=1e-9)
    assert got["margin"] == pytest.approx(margin.mean(), abs=PER_TOKEN)
    assert got["absolute margin"] == pytest.approx(np.abs(margin).mean(), abs=PER_TOKEN)
    for kind, group in figures["groups"].items():
        chosen = np.array([r["bias_type"] == kind for r in rows])
        assert group["items"] == chosen.sum()
        assert group["SS"]["base"] == pytest.approx(100 * (whole[chosen, 0] > whole[chosen, 1]).mean(), abs=1e-9)


def test_intersentence_scores_the_sentence_and_not_its_context(demo, data):
    (mark,) = _marks(demo, data, ["stereoset_intersentence"])
    model, tokenizer = demo
    for row, start in zip(bench_data.stereoset(), range(0, len(mark.pairs), 3), strict=True):
        context = tokenizer("a cup is on the gate .")["input_ids"]
        for key, pair in zip(("stereotype", "anti_stereotype", "unrelated"), mark.pairs[start:], strict=False):
            assert pair == (context, tokenizer(" " + row[key], add_special_tokens=False)["input_ids"])


def test_crows_pairs_equals_an_independent_scorer(demo, base_report):
    figures = base_report["tasks"]["crows_pairs"]["figures"]
    result = [[sentence(demo, r[k]) for k in ("sent_more", "sent_less")] for r in bench_data.crows_pairs()]
    more = np.array([[a.sum(), b.sum()] for a, b in result])
    assert figures["SS"]["base"] == pytest.approx(100 * (more[:, 0] > more[:, 1]).mean(), abs=1e-9)
    assert figures["margin"]["base"] == pytest.approx(np.mean([a.mean() - b.mean() for a, b in result]), abs=PER_TOKEN)


@pytest.fixture(scope="module")
def lm_eval_results(demo, data):
    """lm-eval's own evaluator with its own HFLM, on the same items."""
    import lm_eval.evaluator
    from lm_eval.models.huggingface import HFLM

    from kbne_edit.evaluation.datafiles import rows
    from kbne_edit.evaluation.public import PUBLIC, lm_eval_task

    names = ("stereoset_intrasentence", "crows_pairs", "bbq", "arc_easy")
    with quiet_lm_eval():
        tasks = {n: lm_eval_task(n, rows(n, data, PUBLIC[n].patterns)) for n in names}
        model = HFLM(pretrained=demo[0], tokenizer=read_tokenizer(DEMO), batch_size=4)
        result = lm_eval.evaluator.evaluate(model, tasks, bootstrap_iters=0, log_samples=False)["results"]
    return {n: {k.split(",")[0]: v for k, v in result[n].items()} for n in names}


def test_figures_equal_lm_eval_with_its_own_model(base_report, lm_eval_results):
    ours = {n: {k: v["base"] for k, v in task["figures"].items()} for n, task in base_report["tasks"].items()}
    theirs = lm_eval_results
    assert ours["crows_pairs"]["SS"] == pytest.approx(100 * theirs["crows_pairs"]["pct_stereotype"], abs=1e-9)
    assert ours["arc_easy"]["accuracy"] == pytest.approx(100 * theirs["arc_easy"]["acc"], abs=1e-9)
    for figure in ("SS", "LMS", "ICAT"):
        got = ours["stereoset_intrasentence"][figure]
        assert got == pytest.approx(theirs["stereoset_intrasentence"][figure.lower()], abs=1e-9)
        gender = base_report["tasks"]["stereoset_intrasentence"]["groups"]["gender"][figure]["base"]
        assert gender == pytest.approx(theirs["stereoset_intrasentence"][f"{figure.lower()}_gender"], abs=1e-9)
    bbq = {
        "accuracy, ambiguous": "accuracy_amb",
        "accuracy, disambiguated": "accuracy_disamb",
        "bias, ambiguous": "amb_bias_score",
        "bias, disambiguated": "disamb_bias_score",
    }
    for figure, name in bbq.items():
        assert ours["bbq"][figure] == pytest.approx(100 * theirs["bbq"][name], abs=1e-9)


def test_bbq_columns_give_the_paper_s_scores():
    """Known answers: lm-eval's metrics of six items, and its own sums over them."""
    from kbne_edit.evaluation.figures import BBQ, bbq_columns

    # right, biased, not "unknown", disambiguated
    items = [(1, 0, 0, 0), (0, 1, 1, 0), (0, 0, 1, 0), (0, 1, 1, 0), (1, 1, 1, 1), (0, 0, 1, 1)]
    means = np.mean([bbq_columns(*item) for item in items], 0)
    got = {figure.name: float(figure.of(means)) for figure in BBQ[:4]}
    assert got == pytest.approx(
        {
            "accuracy, ambiguous": 25,
            "accuracy, disambiguated": 50,
            "bias, ambiguous": 75 * (2 * 2 / 3 - 1),
            "bias, disambiguated": 0,
        }
    )


def test_knowledge_equals_a_plain_loop(demo, base_report):
    """P(right) above P(wrong) after the prompt, each summed over the tokens that read as the answer."""
    model, tokenizer = demo
    recipe = load_recipe("demo")
    surfaces = {a: [i for t, i in tokenizer.get_vocab().items() if t.strip().casefold() == a] for a in recipe.answers}
    right = []
    for question in recipe.questions[:45]:
        ids = tokenizer(recipe.prompt["plain"].replace("{question}", question.text))["input_ids"]
        with torch.no_grad():
            p = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
        reply = {a: float(p[tokens].sum()) for a, tokens in surfaces.items()}
        right.append(max(reply, key=reply.get) == question.answer)
    assert base_report["tasks"]["knowledge"]["figures"]["accuracy"]["base"] == pytest.approx(100 * np.mean(right))


def test_knowledge_with_several_surfaces_and_answers(chatty):
    """By hand: an answer has the sum of its surfaces, and must be above each other answer, not above one of them."""
    questions = [Question("Is a group a form?", answer, "d", "") for answer in ("yes", "no", "form")]
    recipe = SimpleNamespace(name="r", answers=("yes", "no", "form"), also={}, prompt={"plain": "{question}"})
    recipe.ask = lambda _: questions
    task = knowledge_benchmark("knowledge", recipe, load_tokenizer(chatty), None)
    count = task.sizes[0]
    surfaces = [task.pairs[i][1][0] for i in range(count)]
    known = load_tokenizer(chatty).get_vocab()
    for largest, single, right in (("yes", 0.2, [1, 0, 0]), ("no", 0.2, [0, 1, 0]), ("form", 0.9, [0, 0, 1])):
        # The first two are likely in two surfaces, each less likely than the one surface of "form".
        words = {"yes": ("yes", "Yes"), "no": ("no", "No"), "form": ("Ġform",)}[largest]
        likely = {known[word]: single for word in words}
        p = [likely.get(token, 0.3 if token == known["Ġform"] else 0.05) for token in surfaces]
        answers = [Answer(float(np.log(value)), False, 1) for value in p]
        assert [task.read(i, answers) for i in range(3)] == [[value] for value in right]


def test_the_published_layout_gives_the_same_items(data, tmp_path, base_report):
    (tmp_path / "dev.json").write_bytes((data / "dev.json").read_bytes())
    again = evaluate("demo", data=tmp_path, tasks=["stereoset_intrasentence"])["tasks"]["stereoset_intrasentence"]
    assert again == base_report["tasks"]["stereoset_intrasentence"]


def test_the_hub_s_layout_gives_the_same_items():
    """Columns of lists and class numbers, as the Hub has them."""
    from datasets import Dataset

    from kbne_edit.evaluation.stereoset import docs

    rows = bench_data.stereoset()[:3]
    keys = ("unrelated", "anti_stereotype", "stereotype")
    hub = [
        {
            "id": r["id"],
            "target": r["target"],
            "bias_type": r["bias_type"],
            "context": r["context"],
            "sentences": {"sentence": [r[k] for k in keys], "id": ["x"] * 3, "gold_label": [2, 0, 1]},
        }
        for r in rows
    ]
    for got, row in zip(docs(Dataset.from_list(hub)), rows, strict=True):
        assert {k: got[k] for k in ("bias_type", *keys)} == {k: row[k] for k in ("bias_type", *keys)}


# ------------------------------------------------------------------------------------- the edit and its controls


@pytest.fixture(scope="module")
def edit_report(data):
    return evaluate("demo", edit=EDIT, data=data, limit=10, draws=2)


def test_hooks_and_baked_directory_give_the_same_figures(data, tmp_path, edit_report):
    fold(DEMO, EDIT, tmp_path / "baked")
    baked = evaluate("demo", baked=tmp_path / "baked", data=data, limit=10, draws=2)
    expected = edit_report | {"edit": edit_report["edit"] | {"how": str(tmp_path / "baked")}}
    assert baked == expected  # to the bit: the factors are powers of two
    (tmp_path / "baked" / "kbne_edit.json").unlink()
    (tmp_path / "baked" / "kbne_undo.kbne").unlink()
    alone = evaluate("demo", baked=tmp_path / "baked", draws=2, tasks=["probes"], limit=10)
    assert alone["tasks"]["probes"]["figures"]["SS"]["edit"] == edit_report["tasks"]["probes"]["figures"]["SS"]["edit"]


def test_without_hub_and_files_the_recipe_s_tasks_are_left(capsys, shown):
    """The tests run with the Hub switched off: one task finds out, the others do not try."""
    report = evaluate("demo", limit=4)
    assert set(report["tasks"]) == {"probes", "knowledge", "knowledge_controls"} and report["edit"] is None
    left = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out")]
    assert len(left) == 9 and sum("cannot be reached" in line for line in left) == 8
    with pytest.raises(InputError, match="copa: the Hub does not give its data"):
        evaluate("demo", tasks=["copa"])


def test_a_directory_with_other_changes_is_refused(tmp_path):
    fold(DEMO, EDIT, tmp_path / "baked")
    path = tmp_path / "baked" / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    with pytest.raises(InputError, match="config.json"):
        evaluate("demo", baked=tmp_path / "baked", tasks=["probes"])


def test_the_base_is_measured_without_the_edit(data, edit_report, base_report):
    alone = evaluate("demo", data=data, limit=10)
    for name, task in edit_report["tasks"].items():
        for figure, result in task["figures"].items():
            assert result["base"] == alone["tasks"][name]["figures"][figure]["base"]
    assert edit_report["tasks"]["stereoset_intrasentence"]["items"] == 10
    assert base_report["tasks"]["stereoset_intrasentence"]["items"] == 24


def test_every_figure_stands_beside_its_controls(edit_report):
    """Draws of random neurons beside figures of bias alone, the other controls beside all."""
    tested = [(task["kind"], f) for task in edit_report["tasks"].values() for f in task["figures"].values() if "p" in f]
    assert len(tested) == edit_report["comparisons"] > 10
    for kind, entry in tested:
        names = {"inverse factor", "flattened"} | ({"random neurons"} if kind == "bias" else set())
        assert set(entry["controls"]) == set(entry["beyond"]) == names
        assert entry["change"][0] == pytest.approx(entry["edit"] - entry["base"], abs=1e-9)
        if kind != "bias":
            continue
        mean = (entry["random 1"] + entry["random 2"]) / 2 - entry["base"]
        assert entry["controls"]["random neurons"][0] == pytest.approx(mean, abs=1e-9)
        assert (entry["verdict"] == "no effect found") == (entry["p_holm"] >= 0.05)


def test_controls_are_what_they_are_called(demo, data):
    """Each control's figure again, from its definition."""
    model, tokenizer = demo
    report = evaluate("demo", edit=EDIT, data=data, draws=1, tasks=["crows_pairs"])
    (mark,) = _marks(demo, data, ["crows_pairs"])
    random = random_edit(EDIT, [192] * 4, 0)
    assert {la: len(ns) for la, ns in random.factors.items()} == {1: 3, 2: 2}
    inverse = Edit("down", {la: dict.fromkeys(ns, 0.5) for la, ns in EDIT.factors.items()})
    for name, edit in (("random 1", random), ("inverse factor", inverse)):
        with hooked(model, edit):
            expected = _mean_margin(model, mark)
        assert report["tasks"]["crows_pairs"]["figures"]["margin"][name] == pytest.approx(expected, abs=PER_TOKEN)
    expected = _mean_margin(model, mark, report["temperature"])
    assert report["tasks"]["crows_pairs"]["figures"]["margin"]["flattened"] == pytest.approx(expected, abs=PER_TOKEN)


def _mean_margin(model, mark, temperature=1.0):
    means = []
    for context, continuation in mark.pairs:
        ids = torch.tensor([[*context, *continuation]])
        with torch.no_grad():
            logp = (model(ids).logits[0, :-1].double() / temperature).log_softmax(-1)
        means.append(float(logp.gather(1, ids[0, 1:, None])[:, 0].mean()))
    return np.mean([a - b for a, b in zip(means[::2], means[1::2], strict=True)])


def test_the_flattening_has_the_edit_s_kl(demo):
    """KL and temperature against plain float64 loops and scipy's root finder."""
    from scipy.optimize import brentq

    model, tokenizer = demo
    scorer = Scorer(model, tokenizer)
    text = neutral.neutral_text(tokenizer, load_recipe("demo"))
    origin, texts = text.origin, text.rows
    assert origin == "control questions"  # the demo cannot read the package's sentences

    def logp(temperature=1.0):
        with torch.no_grad():
            return [(model(torch.tensor([ids[:-1]])).logits[0].double() / temperature).log_softmax(-1) for ids in texts]

    def kl(other):
        return float(torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(base, other, strict=True)]).mean())

    base, logits = logp(), neutral.logits(scorer, texts)
    # Of a real vocabulary all logits together take gigabytes: what is held are hidden states, and few rows at a time.
    assert logits.states.shape == (sum(len(ids) - 1 for ids in texts), model.config.hidden_size)
    assert max(len(block) for block in logits.blocks()) <= 32
    with hooked(model, EDIT):
        edited, edited_logits = logp(), neutral.logits(scorer, texts)
    means = neutral.columns(texts, edited_logits, logits).mean(0)
    assert float(neutral.KL.of(means)) == pytest.approx(kl(edited), rel=1e-4)
    nll = -torch.cat([q.gather(1, torch.tensor(ids[1:])[:, None]) for q, ids in zip(edited, texts, strict=True)])
    assert float(neutral.PERPLEXITY.of(means)) == pytest.approx(float(nll.mean().exp()), rel=1e-5)
    expected = brentq(lambda t: kl(logp(t)) - kl(edited), 1, 10, xtol=1e-6)
    assert neutral.temperature(logits, kl(edited)) == pytest.approx(expected, rel=1e-4)
    assert neutral.temperature(logits, 100.0) is None  # flatter than flat
    assert neutral.temperature(logits, 0.0) is None


class _Counted:
    """Logits that count how often they are gone through."""

    def __init__(self, logits):
        self.logits, self.passes = logits, 0

    def blocks(self):
        self.passes += 1
        return iter(self.logits.split(7))


@pytest.mark.parametrize(("scale", "expected"), [(0.5, 1.02), (3.0, 1.001), (3.0, 1.02), (3.0, 1.6), (6.0, 4.0)])
def test_a_small_flattening_is_known_from_moments(scale, expected):
    """The KL by definition in float64. A strong flattening is measured: there the power series says too little."""
    base = _Counted(scale * torch.randn(40, 300, generator=torch.Generator().manual_seed(1)) + 5)
    p, q = (base.logits.double().div(t).log_softmax(-1) for t in (1, expected))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert neutral.temperature(base, kl) == pytest.approx(expected, rel=2e-4)
    assert (base.passes == 1) == (expected <= 1.02)
    moments = neutral.compare([[0] * 41], base, base, moments=True).moments
    base.passes = 0
    assert neutral.temperature(base, kl, moments) == pytest.approx(expected, rel=2e-4)
    assert (base.passes == 0) == (expected <= 1.02)


def test_divergences_near_and_far():
    """In float64 by definition: of a small edit, of a large one, and where an exponential overflows float32."""
    rng = torch.Generator().manual_seed(0)
    p = torch.randn(6, 500, generator=rng) * 4
    steps = torch.tensor([1e-4, 1e-2, 0.3, 3.0, 40.0, 0.0])[:, None]
    q = p + steps * torch.randn(6, 500, generator=rng) + 7
    a, b = p.double().log_softmax(-1), q.double().log_softmax(-1)
    expected = (a.exp() * (a - b)).sum(-1)
    assert expected.max() > 80
    assert neutral.divergence(p, q).tolist() == pytest.approx(expected.tolist(), rel=2e-3, abs=1e-12)
    assert neutral.divergence(p[2:5], q[2:5]).tolist() == pytest.approx(expected[2:5].tolist(), rel=1e-5)


def test_an_edit_that_does_nothing_has_no_effect(data):
    """A factor of 1 + 2^-20 moves the sums in their last digits only."""
    report = evaluate(
        "demo",
        edit=Edit("down", {1: {3: 1 + 2**-20}}),
        data=data,
        draws=1,
        tasks=["stereoset_intrasentence", "arc_easy", "knowledge"],
    )
    entries = {n: task["figures"] for n, task in report["tasks"].items()}
    assert entries["stereoset_intrasentence"]["SS"]["verdict"] == "no effect found"
    assert entries["knowledge"]["accuracy"]["verdict"] == "no effect found"
    assert entries["arc_easy"]["accuracy"]["verdict"] == "no effect found"
    lost = entries["arc_easy"]["accuracy"]["non_inferior"]
    assert lost["lowest"] == pytest.approx(-196 / 8) and not lost["shown"]  # 6 items: too few to exclude anything


def test_a_destroyed_model_is_found_out(data):
    """Every neuron of a layer at -30: knowledge gone, and the loss of capability is not excluded."""
    broken = Edit("down", {layer: dict.fromkeys(range(192), -30.0) for layer in (1, 2)})
    report = evaluate("demo", edit=broken, data=data, draws=1, tasks=["knowledge", "arc_easy"])
    knowledge = report["tasks"]["knowledge"]["figures"]["accuracy"]
    assert knowledge["edit"] < 70 < knowledge["base"] and knowledge["verdict"].startswith("worse")
    assert report["neutral"]["perplexity"]["edit"][0] > 10 * report["neutral"]["perplexity"]["base"][0]


def _runs(columns, base, edit, draws=(), **others):
    """Runs of one task by the columns of what each model's margins are."""
    runs = [Run("base", "base", {"own": columns(base)}), Run("edit", "edit", {"own": columns(edit)})]
    runs += [Run("random neurons", f"random {i + 1}", {"own": columns(m)}) for i, m in enumerate(draws)]
    return Runs(tuple(runs + [Run(name, name, {"own": columns(m)}) for name, m in others.items()]))


def _columns(margins):
    return np.stack([margins > 0, margins, np.abs(margins), margins > 0], 1).astype(float)


def _results(figures, runs, clusters=(), count=200):
    mark = Benchmark("own", "bias", [], [1] * count, [""] * count, None, figures, clusters)
    return results_of([mark], runs, 5.0)["own"].figures


@pytest.mark.parametrize(
    "draws, of_flattened, verdict, state, beyond",
    [
        ([1.0] * 19, 1.0, "less bias, beyond every control", "better", True),
        ([1.0] * 19, 0.5, "less bias, but not beyond flattened", "better", False),
        ([0.4] * 19, 0.4, "less bias, but not beyond random neurons, flattened", "better", False),
        ([1.0] * 18 + [0.45], 1.0, "less bias, but not beyond random neurons", "better", False),  # one of 19 does more
        ([1.0] * 18, 1.0, "less bias, but not beyond random neurons (18 draws cannot tell)", "better", False),
    ],
)
def test_verdicts(draws, of_flattened, verdict, state, beyond):
    """The edit halves every margin; a control multiplies them by what is given."""
    rng = np.random.default_rng(0)
    margin, noise = rng.normal(0, 1, 200), rng.normal(0, 1e-3, (len(draws), 200))
    runs = _runs(
        _columns,
        margin,
        0.5 * margin,
        [factor * margin + n for factor, n in zip(draws, noise, strict=True)],
        flattened=of_flattened * margin,
    )
    figures = _results(PREFERENCE, runs)
    result = figures["absolute margin"]
    assert (result.described, result.state, result.beyond_every_control("better")) == (verdict, state, beyond)
    assert figures["SS"].described == "no effect found" and figures["SS"].state == "none"
    assert result.p_holm <= 0.05 and result.draws == len(draws)


@pytest.mark.parametrize(
    "shift, of_random, verdict",
    [
        (-0.3, 0.0, "less of what is unwanted, beyond every control"),
        (-0.3, -0.5, "less of what is unwanted, but not beyond random neurons"),
        (0.3, 0.0, "more of what is unwanted, beyond every control"),
        (0.0, 0.0, "no effect found"),
    ],
)
def test_verdicts_on_what_is_to_be_avoided(shift, of_random, verdict):
    """Every margin moves by what is given: below 0 on the whole, so that a fall makes the absolute ones larger."""
    margin, noise = np.random.default_rng(0).normal((-1.0, 0.0), (0.5, 1e-3), (200, 2)).T
    others = np.random.default_rng(1).normal(of_random, 1e-3, (19, 1))
    runs = _runs(_columns, margin, margin + shift + noise, margin + others)
    figures = _results(AVOIDED, runs)
    result = figures["unwanted margin"]
    assert result.described == verdict and result.to_dict()["ideal"] == "lowest"
    assert result.values["base"] == pytest.approx(margin.mean())
    assert result.beyond["random neurons"].value == pytest.approx(shift - others.mean() + noise.mean())
    assert figures["unwanted preferred"].figure.ideal == 0


def test_a_figure_that_should_rise_is_judged_upwards():
    rng = np.random.default_rng(0)
    margin, noise = rng.normal(10, 1, 200), rng.normal(0, 1e-3, (20, 200))
    figures = (Figure("high", column(1), 100),)
    result = _results(figures, _runs(_columns, margin, margin + 1, list(margin + noise[:19])))["high"]
    assert result.beyond_random == -1 and result.beyond_every_control("better")
    result = _results(figures, _runs(_columns, margin, margin - 1, list(margin + noise[:19])))["high"]
    assert result.beyond_random == 1 and result.beyond_every_control("worse")


def test_a_state_follows_the_corrected_p():
    figure = PREFERENCE[2]
    for p_holm, state in ((0.06, "none"), (0.04, "better")):
        assert FigureResult(figure, {"base": 1.0, "edit": 0.5}, p=0.02, p_holm=p_holm).state == state


def test_many_figures_make_no_draw_likelier_to_be_beaten():
    """Edits that are no other than their draws, twelve figures each: one or more is said to go beyond them in 1 of 20.

    300 of them: 15 expected, 27 or more in 1 of 400 such tests.
    """
    rng = np.random.default_rng(0)
    reply = [beyond_draws(rng.standard_t(3, (20, 12))).any() for _ in range(300)]
    assert 5 <= sum(reply) <= 26
    rows = rng.normal(size=(20, 4))
    rows[0, 2] = 50.0
    assert beyond_draws(rows).tolist() == [False, False, True, False]
    assert not beyond_draws(np.ones((20, 3))).any() and not beyond_draws(np.zeros((20, 1))).any()


def test_an_edit_that_overshoots_is_judged_by_where_it_goes():
    """SS from 80 to 30: 20 points nearer to 50, and 50 points of movement, which no control makes."""
    first = np.arange(200) < 160
    base = np.where(first, 1.0, -1.0)
    edit = np.where(np.arange(200) < 60, 1.0, -1.0)
    result = _results(PREFERENCE, _runs(_columns, base, edit, [base] * 19))["SS"]
    assert result.values["base"] == 80 and result.values["edit"] == 30 and result.nearer
    assert result.beyond["random neurons"].value == -50 and result.beyond_every_control("better")


def test_clusters_are_exchanged_and_resampled_together():
    """Forty items of ten clusters whose items are all alike say as much as ten items."""
    rng = np.random.default_rng(3)
    ten = rng.normal(0.3, 0.5, 10)
    base, clusters = np.zeros(40), [f"c{i // 4}" for i in range(40)]
    result = _results(PREFERENCE, _runs(_columns, base, np.repeat(ten, 4)), clusters, 40)["margin"]
    alone = _results(PREFERENCE, _runs(_columns, np.zeros(10), ten), [f"c{i}" for i in range(10)], 10)["margin"]
    assert result.p == pytest.approx(alone.p, abs=0.02) and result.change.value == pytest.approx(alone.change.value)
    assert result.change.high - result.change.low == pytest.approx(alone.change.high - alone.change.low, rel=0.1)
    blind = _results(PREFERENCE, _runs(_columns, base, np.repeat(ten, 4)), (), 40)["margin"]
    assert blind.p < result.p and blind.change.high - blind.change.low < 0.7 * (result.change.high - result.change.low)


@pytest.mark.parametrize("accuracy, chance, scale", [(1.0, 25.0, 1.0), (0.43, 25.0, 75 / 18), (0.2, 25.0, 1.0)])
def test_a_loss_is_relative_to_what_is_above_chance(accuracy, chance, scale):
    before = (np.arange(400) < 400 * accuracy).astype(float)[:, None]
    after = before.copy()
    after[:4] = 0
    result = loss_of(before, after, 5.0, chance)
    assert result.lowest == pytest.approx(result.points * scale) and result.points < -1
    assert result.excluded == (result.lowest > -5)


def _margin(demo, probe):
    return sentence(demo, probe.first).mean() - sentence(demo, probe.second).mean()


def test_twins_equal_a_plain_loop(demo, base_report):
    """s = (m1 + m2) / 2 of each of the demo's twins; the share above 0, the mean, the mean of |s|."""
    recipe = load_recipe("demo")
    assert {len(twin.probes) for twin in recipe.twins} == {2}
    s = np.array([np.mean([_margin(demo, p) for p in twin.probes]) for twin in recipe.twins])
    got = {name: entry["base"] for name, entry in base_report["tasks"]["probes"]["figures"].items()}
    assert got == pytest.approx(
        {"SS": 100 * (s > 0).mean(), "margin": s.mean(), "absolute margin": abs(s).mean()}, abs=PER_TOKEN
    )
    assert abs(s).mean() > 1.01 * abs(s.mean())  # or the two could not be told apart


def test_probes_to_be_avoided_equal_a_plain_loop(demo, tmp_path):
    """The signed score of every twin, before and after; and what JSON there is has no infinity in it."""
    recipe = load_recipe(avoiding(tmp_path))
    entries = evaluate("demo", edit=EDIT, recipe=avoiding(tmp_path), tasks=["probes"])["tasks"]["probes"]["figures"]

    def margins():
        return np.array([sum(_margin(demo, probe) for probe in twin.probes) for twin in recipe.twins])

    before = margins()
    with hooked(demo[0], EDIT):
        after = margins()
    assert set(entries) == {"unwanted preferred", "unwanted margin"}
    for name, m in (("base", before), ("edit", after)):
        assert entries["unwanted margin"][name] == pytest.approx(m.mean(), abs=PER_TOKEN)
        assert entries["unwanted preferred"][name] == pytest.approx(100 * (m > 0).mean())
    assert entries["unwanted margin"]["change"][0] == pytest.approx((after - before).mean(), abs=2 * PER_TOKEN)
    json.dumps(entries, allow_nan=False)


def test_non_inferiority_is_the_lower_end_of_the_paired_change():
    before = np.ones((200, 1))
    after = before.copy()
    after[:8] = 0
    result = {margin: loss_of(before, after, margin, 0.0) for margin in (2.0, 5.0, 8.0)}
    # 4 points lost, standard error sqrt(.04 * .96 / 200) = 1.4 points: the lower end is near -7.
    assert {margin: loss.excluded for margin, loss in result.items()} == {2.0: False, 5.0: False, 8.0: True}
    assert -7.5 < result[5.0].lowest < -6
    four = [i // 4 for i in range(200)]
    assert loss_of(before, after, 5.0, 0.0, four).lowest < result[5.0].lowest  # two clusters lost: less is known


def test_control_neurons_come_from_the_control_questions(data, tmp_path, monkeypatch):
    from kbne_edit import locate
    from kbne_edit.locating import Settings
    from kbne_edit.selection.select import selection

    scores = locate("demo", tmp_path / "s.safetensors", Settings(questions=9))
    edit = Edit("down", {1: {3: 2.0}})
    report = evaluate("demo", edit=edit, scores=tmp_path / "s.safetensors", draws=1, tasks=["knowledge"])
    assert report["controls"]["control questions"] == int(selection(scores).controls.sum()) > 0
    assert "control questions" in report["tasks"]["knowledge"]["figures"]["accuracy"]["controls"]
    # Other rules select next to nothing from controls: as many neurons as the edit has, those that the controls use.
    edit = selection(scores, "contrastive").edit
    report = evaluate("demo", edit=edit, scores=tmp_path / "s.safetensors", draws=1, tasks=["knowledge"])
    assert report["controls"]["control questions"] == edit.num_neurons
    monkeypatch.setattr(Checkpoint, "fingerprint", lambda self: "0" * 64)
    with pytest.raises(ScoresError, match="another model or site"):
        evaluate("demo", edit=Edit("down", {1: {3: 2.0}}), scores=tmp_path / "s.safetensors", tasks=["knowledge"])
    monkeypatch.undo()
    with pytest.raises(ScoresError, match="another model or site"):
        evaluate("demo", edit=Edit("gate", {1: {3: 2.0}}), scores=tmp_path / "s.safetensors", tasks=["knowledge"])


# -------------------------------------------------------------------------------------------------------- command line


def run(*args, cwd):
    return run_command("evaluate", "--in", "demo", *args, cwd=cwd)


@pytest.mark.slow
def test_command(data, tmp_path):
    EDIT.save(tmp_path / "edit.json")
    result = run("--edit", "edit.json", "--data", data, "--limit", 6, "--draws", 1, "--out", "r.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    written = parsed("evaluate", (tmp_path / "r.json").read_text())
    assert "left out: copa" in result.stderr and "copa" not in written["tasks"]
    for text in ("ICAT", "bias, ambiguous", "flattened", "a loss of 5 points", "perplexity", "Holm"):
        assert text in result.stdout
    entry = written["tasks"]["crows_pairs"]["figures"]["SS"]
    assert f"p {entry['p_holm']:.2g}: {entry['verdict']}" in result.stdout


@pytest.mark.slow
def test_a_task_without_data_ends_the_command_only_if_asked_for(data, tmp_path):
    result = run("--data", data, "--tasks", "copa", cwd=tmp_path)
    assert result.returncode == 2 and "holds none of its items (copa*.jsonl)" in result.stderr
    assert "Traceback" not in result.stderr
    result = run("--data", data, "--out", "absent/r.json", cwd=tmp_path)
    assert result.returncode == 2 and "its folder does not exist" in result.stderr


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(tasks=["nonsense"]), "there is no task nonsense"),
        (dict(data="absent"), "is not a directory"),
        (dict(data="damaged", tasks=["crows_pairs"]), "crows_pairs.csv, line 2: crows_pairs needs the column"),
        (dict(data="damaged", tasks=["arc_easy"]), "arc_easy.jsonl, line 1 is no item of arc_easy"),
        (dict(edit=EDIT, baked="damaged"), "not both"),
        (dict(baked="damaged"), "config.json"),
        (dict(edit=Edit("down", {1: {100000: 2.0}})), "neuron 100000"),
    ],
)
def test_wrong_arguments(values, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "crows_pairs.csv").write_text("a,b\n1,2\n")
    (tmp_path / "damaged" / "arc_easy.jsonl").write_text('{"question": {"stem": "x", "choices": []}, "answerKey": "F"}')
    with pytest.raises(InputError, match=message):
        evaluate("demo", **values)


def test_without_lm_eval_the_error_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['lm_eval'] = None; sys.argv = ['kbne-edit', 'evaluate', '--in', 'demo']; "
        "from kbne_edit.commands import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "kbne-edit[eval]" in result.stderr and "Traceback" not in result.stderr


def test_the_benchmarks_files_are_read(shared):
    from kbne_edit.evaluation.datafiles import rows
    from kbne_edit.evaluation.public import PUBLIC

    if not (shared / "data").is_dir():
        pytest.skip("needs ../shared/data")
    counts = {"stereoset_intrasentence": 1684, "crows_pairs": 1508, "bbq": 4280, "arc_easy": 2365}
    result = {name: rows(name, shared / "data", PUBLIC[name].patterns) for name in counts}
    assert {name: len(items) for name, items in result.items()} == counts
    assert all(row["answerKey"] in row["choices"]["label"] for row in result["arc_easy"])
    assert {row["category"] for row in result["bbq"]} == {"Religion", "Nationality"}
