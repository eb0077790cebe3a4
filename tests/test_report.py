"""What a report says, against the same figures computed by hand; and what it refuses."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command import run_command
from manifests import read_manifest, write_manifest
from printed import parsed
from safetensors.numpy import save_file

from kbne_edit import Checks, Edit, Output, bake, compare, fold, load_scores
from kbne_edit.disk.checkpoint import Checkpoint
from kbne_edit.disk.slots import readout
from kbne_edit.errors import CheckpointError, InputError
from kbne_edit.evaluation.effect import Change as Pair
from kbne_edit.evaluation.verdict import Part
from kbne_edit.models.places import places
from kbne_edit.reporting import contents
from kbne_edit.reporting.lens import columns, vocabulary, written
from tiny import FAMILIES, MIXTURES, tiny_model

ROOT = Path(__file__).resolve().parent.parent


def run(*args, cwd=ROOT):
    return run_command(*args, cwd=cwd)


def valid(report):
    """The report's JSON, which its schema allows."""
    return parsed("report", json.dumps(report if isinstance(report, dict) else report.to_dict()))


@pytest.fixture(scope="module")
def made(debiased):
    return contents.report(debiased)


@pytest.fixture(scope="module")
def report(made):
    return valid(made)


@pytest.fixture
def copy(debiased, tmp_path):
    """A baked directory without its scores, to be changed."""
    shutil.copytree(debiased, tmp_path / "copy")
    return tmp_path / "copy"


def resealed(folder, **changes):
    manifest = {k: v for k, v in read_manifest(folder).items() if k != "sha256"} | changes
    write_manifest(folder, manifest)
    return folder


# ------------------------------------------------------------------------------------------- figures, done by hand


def _by_hand(scores, tau=0.1):
    """{group: indices}, relative scores [Q, L, F], whether they count [Q, L, F]."""
    groups = {}
    for q, question in enumerate(scores.questions):
        groups.setdefault("controls" if question.control else question.dimension, []).append(q)
    relative = np.stack([row / row.max() for row in np.array(scores.values)])
    return groups, relative, relative > tau


def test_attribution_of_each_neuron(report, debiased):
    scores = load_scores(debiased.parent / "debiased.work" / "scores.safetensors")
    groups, relative, counts = _by_hand(scores)
    edit = Edit.load(debiased.parent / "debiased.work" / "edit.json")
    assert [(n["layer"], n["neuron"], n["factor"]) for n in report["neurons"]] == [
        (layer, neuron, factor) for layer, result in edit.factors.items() for neuron, factor in result.items()
    ]
    by_controls = counts[groups["controls"]].sum(0) >= 1  # a tenth of nine
    for n in report["neurons"]:
        at = n["layer"], n["neuron"]
        for name, requests in groups.items():
            result = n["controls"] if name == "controls" else n["dimensions"][name]
            assert result["score"] == pytest.approx(np.mean([relative[q][at] for q in requests]), abs=1e-6)
            assert result["counts"] == pytest.approx(np.mean([counts[q][at] for q in requests]), abs=1e-6)
        assert n["selected_by_controls"] == by_controls[at]
        best = sorted(range(len(relative)), key=lambda q: (-relative[q][at], q))[:3]
        assert [q["text"] for q in n["questions"]] == [scores.questions[q].text for q in best]
    assert report["selection"]["reproduced"] and report["selection"]["on_record"]
    assert report["controls_overlap"] == sum(n["selected_by_controls"] for n in report["neurons"])


def test_map_and_overlap(report, debiased):
    scores = load_scores(debiased.parent / "debiased.work" / "scores.safetensors")
    groups, relative, counts = _by_hand(scores)
    for row in report["map"]["mass"]:
        requests = groups["controls" if row["controls"] else row["dimension"]]
        shares = [np.clip(relative[q], 0, None).sum(1) / np.clip(relative[q], 0, None).sum() for q in requests]
        assert row["layers"] == pytest.approx(np.mean(shares, 0), abs=1e-5)
    best = max(report["map"]["strongest"], key=lambda s: s["score"])
    means = {name: relative[requests].mean(0) for name, requests in groups.items() if name != "controls"}
    assert best["score"] == pytest.approx(max(float(m.max()) for m in means.values()), abs=1e-6)
    sets = report["overlap"]["sets"]
    masks = [counts[groups[s["dimension"] or "controls"]].any(0) for s in sets]  # a tenth of three, and of nine, is one
    members = [set(zip(*np.nonzero(mask), strict=True)) for mask in masks]
    assert [s["neurons"] for s in sets] == [len(m) for m in members]
    for part in report["overlap"]["parts"]:
        inside = set.intersection(*(members[i] for i in part["sets"]))
        outside = set().union(*(m for i, m in enumerate(members) if i not in part["sets"]))
        assert part["neurons"] == len(inside - outside)
    assert sum(p["neurons"] for p in report["overlap"]["parts"]) == len(set().union(*members))


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_against_the_model_itself(name, tmp_path):
    """The model's own final norm and head, on the column that the model's own module gives for one active neuron."""
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "base")
    fold(tmp_path / "base", Edit("down", {1: {5: 2.0, 40: 0.0}}), tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    result = columns(checkpoint, Edit.from_dict(read_manifest(tmp_path / "out")["edit"]))
    tokens = written(checkpoint, result, None, 4)
    ((down, *_),) = places(model, "down")[1]
    one = torch.eye(48)[[5, 40]]
    with torch.no_grad():
        expected = down(one) - down(torch.zeros_like(one))
        modules = getattr(model.base_model, "decoder", model.base_model).named_children()
        (norm,) = (module for name, module in modules if re.fullmatch(r"(final_?)?(layer_?)?norm|ln_f", name))
        head = model.get_output_embeddings()
        logits = head(norm(expected)) - head(norm(torch.zeros_like(expected)))
    z = (logits - logits.mean(1, keepdim=True)) / logits.std(1, correction=0, keepdim=True)
    for row, neuron in enumerate([(1, 5), (1, 40)]):
        torch.testing.assert_close(torch.from_numpy(np.array(result[neuron])), expected[row], atol=1e-6, rtol=1e-5)
        for (ids, values), largest in (
            (zip(*tokens[neuron][0], strict=True), True),
            (zip(*tokens[neuron][1], strict=True), False),
        ):
            order = z[row].argsort(descending=largest)[:4]
            assert values == pytest.approx(z[row][order].tolist(), abs=0.011)  # two decimals, and the norm's epsilon
            assert z[row][list(ids)].tolist() == pytest.approx(list(values), abs=0.011)


def test_tokens_of_a_tied_head_are_read_from_the_embedding():
    """transformers ties, and leaves a head that is stored as well."""
    block = {f"model.layers.0.mlp.{part}_proj.weight": (4, 4) for part in ("gate", "up", "down")}
    shapes = block | {f"{name}.weight": (9, 4) for name in ("lm_head", "model.embed_tokens")}
    config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 4}
    assert readout(shapes, config).unembedding == "lm_head.weight"
    assert readout(shapes, config | {"tie_word_embeddings": True}).unembedding == "model.embed_tokens.weight"


@pytest.mark.parametrize("name", MIXTURES)
def test_columns_of_experts(name, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "base")
    layer = 2
    first = places(model, "down")[layer][0]
    neuron = 2 * first.neurons + 7  # the eighth of the third expert
    fold(tmp_path / "base", Edit("down", {layer: {neuron: 2.0, 3: 2.0}}), tmp_path / "out")
    result = columns(Checkpoint.open(tmp_path / "out"), Edit("down", {layer: {neuron: 2.0, 3: 2.0}}))
    weight = first.module.down_proj.detach()  # [E, D, F], or in two families [E, F, D]
    expected = weight[2][7] if name in ("gpt_oss", "llama4_text") else weight[2][:, 7]
    assert torch.equal(torch.from_numpy(np.array(result[layer, neuron])), expected)


def test_columns_of_an_edit_at_the_gate(tmp_path):
    model = tiny_model("phi3", torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    fold(tmp_path / "base", Edit("gate", {0: {3: 2.0}, 2: {9: 4.0}}), tmp_path / "out")
    result = columns(Checkpoint.open(tmp_path / "out"), Edit("gate", {0: {3: 2.0}, 2: {9: 4.0}}))
    for layer, neuron in ((0, 3), (2, 9)):
        expected = model.model.layers[layer].mlp.down_proj.weight[:, neuron].float()
        assert torch.equal(torch.from_numpy(result[layer, neuron]), expected)


def test_tokens_in_pieces_and_of_a_padded_unembedding(monkeypatch, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    edit = Edit("down", {1: {5: 2.0}, 2: {1: 2.0}})
    fold(tmp_path / "base", edit, tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    result = columns(checkpoint, edit)
    whole, known = written(checkpoint, result, None, 5), set(range(0, 97, 2))
    even = written(checkpoint, result, known, 5)
    assert {index for ends in even.values() for pairs in ends for index, _ in pairs} <= known
    monkeypatch.setattr("kbne_edit.reporting.lens.STEP", 7 * 32 * 4)  # seven rows at once
    assert written(checkpoint, result, None, 5) == whole and written(checkpoint, result, known, 5) == even


def test_token_texts_are_those_of_the_tokenizer(debiased):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(debiased)
    texts = vocabulary(debiased)
    assert len(texts) == len(tokenizer) and all(texts[i].strip() == tokenizer.decode([i]).strip() for i in texts)


# ---------------------------------------------------------------------------------------- what is there, what is not


def test_figures_of_the_run_are_those_of_its_manifest(report, debiased):
    summary = read_manifest(debiased)["summary"]
    for key in ("change_abs", "versus_random", "random_change_abs", "stereotype_share"):
        assert report["effect"][key] == summary["effect"][key]
    assert report["answers"]["balanced"] == summary["attribution"]["balanced"]
    assert [entry["holds"] for entry in report["proofs"]["behaviour"]] == [True, True]


def test_without_scores_what_the_run_wrote_down_is_said(copy, report):
    made = contents.report(copy)
    result = valid(made)
    assert result["map"] is None and result["controls_overlap"] == report["controls_overlap"] > 0
    assert [v for v in result["verdicts"] if v["about"] == "specific to bias"] == [
        v for v in report["verdicts"] if v["about"] == "specific to bias"
    ]
    assert result["further"]["selection"] == read_manifest(copy)["summary"]["selection"]
    assert "&quot;controls_overlap&quot;" in made.html()


def test_without_scores_and_proofs(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    fold(tmp_path / "base", Edit("down", {1: {5: 2.0}}), tmp_path / "out")
    made = contents.report(tmp_path / "out")
    report = valid(made)
    assert [report[key] for key in ("proofs", "effect", "answers", "map", "overlap", "selection")] == [None] * 6
    assert {v["state"] for v in report["verdicts"]} == {"open"}
    assert report["neurons"][0]["tokens"]["raised"][0]["text"] is None  # no tokenizer
    page = made.html()
    assert "was not measured" in page and "holds no proof" in page and "were not at hand" in page


@pytest.mark.parametrize(
    "state, share, shown, said",
    [
        ("PASS", [0.6, 0.5], "holds", "the reason"),
        ("PASS", [0.6, 0.6], "holds", "did not fall"),
        ("NO EVIDENCE", [0.6, 0.5], "warning", "the reason"),
        ("FAIL", [0.6, 0.5], "warning", "the reason"),
    ],
)
def test_the_verdict_on_the_effect(state, share, shown, said, made):
    """The page takes state and reason from the verdict on record, and makes none of its own."""
    verdict = replace(made.verdict, effect=Part(state, "the reason"))
    changed = replace(made, verdict=verdict, effect=replace(made.effect, preferred=Pair(*share)))
    (result,) = (line for line in changed.verdicts if line.about == "effect on bias")
    assert result.state == shown and said in result.text
    page = changed.html()
    assert said in page and f">{state}</b></th><td" in page and "the reason" in page
    assert f"<strong>{verdict.ship.capitalize()}.</strong>" in page


def test_an_effect_that_is_to_be_avoided_is_told_by_its_signed_score(made):
    effect = replace(made.effect, aim="avoid", signed=Pair(0.7531, 0.6420), absolute=Pair(0.9, 0.8))
    changed = replace(made, effect=effect)
    page = changed.html()
    assert "mean score went from 0.7531 to 0.6420" in page and "what is unwanted" in page and "0.9000" not in page
    assert {line.about for line in changed.verdicts} >= {"effect on behaviour"}


def test_behaviour_is_bit_equal_only_if_it_is_in_every_dtype(made):
    """One dtype of two differs by rounding; then one fails."""
    first, second = made.proofs.behaviour
    mixed = replace(made, proofs=replace(made.proofs, behaviour=(first, replace(second, bit_equal=False))))
    (line,) = (line for line in mixed.verdicts if line.about == "the model behaves as the hooks")
    assert line.state == "holds" and "by rounding only" in line.text and "bit for bit" not in line.text
    failed = replace(made, proofs=replace(made.proofs, behaviour=(first, replace(second, holds=False))))
    (line,) = (line for line in failed.verdicts if line.about == "the model behaves as the hooks")
    assert line.state == "failed"


def test_constant_answers_and_failed_proofs_are_said(made):
    answers = replace(made.answers, answers=replace(made.answers.answers, constant="yes"))
    files = replace(made.proofs.files, faults=("config.json differs",))
    changed = replace(made, answers=answers, proofs=replace(made.proofs, files=files))
    states = {line.about: line.state for line in changed.verdicts}
    assert states["the base's answers"] == "warning" and states["the files hold the edit"] == "failed"
    page = changed.html()
    assert "no better than the same answer (yes)" in page and "config.json differs" in page
    assert "to the bit;" not in page


# --------------------------------------------------------------------------------------------------- files and hashes


def _lines(report):
    return {line.about: line for line in report.verdicts}


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "README.md"])
def test_a_changed_byte_gives_no_report(name, copy):
    data = bytearray((copy / name).read_bytes())
    data[-1:] = b"} " if name == "tokenizer.json" else bytes([data[-1] ^ 1])
    (copy / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name} was changed after baking"):
        contents.report(copy)
    left = contents.report(copy, hashes=False)  # nothing was looked at, and the page says so
    assert valid(left)["hashes"] == {"checked": False, "files": 0} and "No file was hashed" in left.html()
    for about in ("the files hold the edit", "the model behaves as the hooks"):
        assert "not checked again for this page" in _lines(left)[about].text


def test_all_files_are_hashed(made, debiased):
    assert made.hashes.files == len(list(debiased.iterdir())) - 1  # the manifest covers itself
    assert "are those that the run wrote" in made.html()
    assert "the files are unchanged since" in _lines(made)["the files hold the edit"].text


def test_an_unknown_file_is_a_fault(copy):
    (copy / "extra.txt").write_text("x")
    with pytest.raises(CheckpointError, match="extra.txt is not in the manifest"):
        contents.report(copy)


@pytest.mark.parametrize("form", ["peft", "delta"])
def test_an_adapter_and_a_delta_have_a_report(form, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    edit = Edit("down", {1: {5: 2.0, 9: 2.0}, 2: {1: 4.0}})
    bake(tmp_path / "base", tmp_path / "out", edit=edit, output=Output(form=form), checks=Checks(measure=False))
    result = contents.report(tmp_path / "out")
    data = valid(result)
    assert (result.form, data["model"]["layers"], data["edit"]["neurons"]) == (form, None, 3)
    assert data["edit"]["layers"] == [{"layer": 1, "neurons": 2}, {"layer": 2, "neurons": 1}]
    assert result.hashes.checked
    assert compare(tmp_path / "out", edit).pairs[0].jaccard == 1
    page = result.html()
    assert "3 feed-forward neurons in 2 layers" in page and "Not measured" in page and "No tokens are shown" in page


def test_an_edit_with_many_factors_is_told_by_their_distribution(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    factors = {layer: {n: 1.5 + n / 100 + layer for n in range(40)} for layer in range(3)}
    fold(tmp_path / "base", Edit("down", factors), tmp_path / "out")
    result = contents.report(tmp_path / "out")
    bars = valid(result)["edit"]["histogram"]
    flat = [f for of in factors.values() for f in of.values()]
    assert bars[0]["low"] == pytest.approx(min(flat)) and bars[-1]["high"] == pytest.approx(max(flat))
    for bar in bars[:-1]:
        assert bar["neurons"] == sum(bar["low"] <= f < bar["high"] for f in flat)
    assert sum(bar["neurons"] for bar in bars) == 120 and "Distribution of the factors" in result.html()


def test_of_very_many_neurons_those_furthest_from_one_have_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "MOST", 2)
    tiny_model("llama").save_pretrained(tmp_path / "base")
    fold(tmp_path / "base", Edit("down", {0: {1: 1.25, 2: 8.0}, 2: {7: -3.0, 8: 1.5}}), tmp_path / "out")
    result = contents.report(tmp_path / "out")
    assert [(row.layer, row.neuron) for row in result.neurons] == [(0, 2), (2, 7)]
    assert result.edit.neurons == 4 and all(row.tokens for row in result.neurons) and "furthest from 1" in result.html()


def test_another_selection_than_the_one_on_record_is_said(copy, debiased):
    edit = json.loads(json.dumps(read_manifest(copy)["edit"]))
    edit["found"]["select"]["tau"] = 0.3
    resealed(copy, edit=edit)
    scores = debiased.parent / "debiased.work" / "scores.safetensors"
    report = valid(contents.report(copy, scores, hashes=False))
    assert not report["selection"]["reproduced"] and report["verdicts"][-1]["state"] == "warning"


def test_wrong_answers_that_were_left_out_are_left_out_again(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = Checkpoint.open(tmp_path / "base").fingerprint()
    made = _scores_file(tmp_path / "scores.safetensors", base, (3, 48), 0, wrong=(1, 6))
    result = {"select": {"rule": "paper", "tau": 0.4, "beta": 0.1, "combine": "union", "questions": 5, "controls": 5}}
    fold(tmp_path / "base", Edit("down", {1: {5: 2.0}}, base, result), tmp_path / "out")
    report = valid(contents.report(tmp_path / "out", tmp_path / "scores.safetensors"))
    assert report["selection"]["wrong_left_out"] and report["selection"]["questions"] == 5
    relative = made / made.max((1, 2), keepdims=True)
    (neuron,) = report["neurons"]
    kept = [q for q in (0, 2, 4) if q != 1]
    assert neuron["dimensions"]["a"]["score"] == pytest.approx(relative[kept, 1, 5].mean(), abs=1e-6)


def _scores_file(path, base, shape, seed, wrong=(), count=12):
    """A scores file by another writer: `count` questions, half of them controls, dimensions in turn. Returns scores."""
    made = np.random.default_rng(seed).standard_normal((count, *shape), np.float32)
    half = count // 2
    questions = [
        {
            "text": f"question {q} ?",
            "answer": "yes" if q % 2 else "no",
            "form": "f",
            "control": q >= half,
            "dimension": "ab"[q % 2] if q < half else "c",
        }
        for q in range(count)
    ]
    right = np.array([q not in wrong for q in range(count)], np.float32)
    rows = np.zeros((count, shape[0]), np.float32)
    tensors = {
        "scores": made,
        "p": right,
        "p_best_wrong": 1 - right,
        "p_zero": rows,
        "residual": rows,
        "nodes": rows.astype(np.int32),
        "done": np.ones(count, np.uint8),
    }
    about = {"site": "down", "base": base, "model": "m", "recipe": "r", "questions": questions}
    save_file(tensors, path, metadata={"kbne": json.dumps(about)})
    return made


# ------------------------------------------------------------------------------------------------- the command line


def test_the_command_writes_the_same_bytes_wherever_it_runs(debiased, tmp_path):
    for place in ("here", "there"):
        shutil.copytree(debiased.parent, tmp_path / place)
        done = run("report", tmp_path / place / "debiased", "--out", f"{place}.html", "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        valid(json.loads(done.stdout))
    page = (tmp_path / "here.html").read_bytes()
    assert page == (tmp_path / "there.html").read_bytes() and str(tmp_path).encode() not in page


def test_no_model_library_is_loaded(debiased, tmp_path):
    code = (
        "import sys; sys.argv[0] = 'kbne-edit'; from kbne_edit.commands import cli; cli(standalone_mode=False); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "report", debiased, "--out", tmp_path / "r.html"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def _other_scores(copy):
    _scores_file(copy.parent / "other.safetensors", "0" * 64, (4, 192), 0)
    return ["--scores", copy.parent / "other.safetensors"]


WRONG = {
    "no manifest": (lambda c: (c / "kbne_edit.json").unlink(), "a directory that kbne-edit wrote"),
    "changed manifest": (
        lambda c: (c / "kbne_edit.json").write_text((c / "kbne_edit.json").read_text().replace(": 2.0", ": 4.0", 1)),
        "was changed after baking",
    ),
    "changed undo": (lambda c: (c / "kbne_undo.kbne").write_bytes(b"x"), "was changed after baking"),
    "figures of another form": (
        lambda c: resealed(c, summary={"effect": {"probes": "many"}}) and None,
        "did not write",
    ),
    "scores of another model": (_other_scores, "another model or site"),
    "no such scores": (lambda c: ["--scores", c.parent / "none.safetensors"], "none.safetensors"),
    "broken tokenizer": (lambda c: (c / "tokenizer.json").write_text("{"), "was changed after baking"),
    "into the directory": (lambda c: ["--out", c / "report.html"], "choose another --out"),
    "not a directory": (lambda c: shutil.rmtree(c), "does not exist"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case, copy, tmp_path):
    spoil, message = WRONG[case]
    more = spoil(copy)
    more = more if isinstance(more, list) else []
    done = run("report", copy, "--out", tmp_path / "report.html", *more)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "report.html").exists() and not (copy / "report.html").exists()


def test_scores_that_do_not_fit_are_left_out_if_not_asked_for(copy):
    (copy.parent / "copy.work").mkdir()
    _scores_file(copy.parent / "copy.work" / "scores.safetensors", "0" * 64, (4, 192), 0)
    done = run("report", copy, "--out", copy.parent / "report.html", "--json")
    assert done.returncode == 0 and "scores left out" in done.stderr
    assert valid(json.loads(done.stdout))["map"] is None


def test_a_7b_sized_edit_is_a_page_below_three_megabytes(tmp_path):
    """Its layers, neurons and questions; narrow, since the hidden size does not show."""
    rng, (layers, neurons, width) = np.random.default_rng(1), (32, 11008, 8)
    config = dict(model_type="llama", num_hidden_layers=layers, hidden_size=width, intermediate_size=neurons)
    weights = {
        f"model.layers.{la}.mlp.down_proj.weight": rng.standard_normal((width, neurons), np.float32)
        for la in range(layers)
    }
    weights |= {"model.norm.weight": np.ones(width, np.float32)}
    weights |= {"lm_head.weight": rng.standard_normal((32000, width), np.float32)}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    base = Checkpoint.open(tmp_path / "base").fingerprint()
    _scores_file(tmp_path / "scores.safetensors", base, (layers, neurons), 0, count=90)
    chosen = rng.choice(layers * neurons, 400, False).tolist()
    factors = {layer: {n % neurons: 2.0 for n in chosen if n // neurons == layer} for layer in range(layers)}
    fold(tmp_path / "base", Edit("down", factors, base), tmp_path / "out")
    result = contents.report(tmp_path / "out", tmp_path / "scores.safetensors")
    valid(result)
    page = result.html()
    assert page.count("question 0 ?") > 0 and page.count("\n<tr>") > 800 and len(page.encode()) < 3_000_000


# ---------------------------------------------------------------------------------------------------------- compare


def test_compare_against_sets(tmp_path, debiased):
    a, b = Edit("down", {0: {1: 2.0, 2: 2.0}, 3: {7: 2.0}}), Edit("down", {0: {2: 3.0, 5: 2.0}, 3: {7: 2.0}})
    (pair,) = compare(a, b).pairs
    assert (pair.shared, pair.only_a, pair.only_b, pair.jaccard) == (2, 1, 1, 0.5)
    assert compare(a, b).to_dict()["pairs"][0]["differing"] == ({"layer": 0, "neuron": 2, "a": 2.0, "b": 3.0},)
    with pytest.raises(InputError, match="two edits or more"):
        compare(a)
    a.save(tmp_path / "a.json")
    Edit("gate", {0: {2: 2.0}}, base="0" * 64).save(tmp_path / "b.json")
    done = run("compare", tmp_path / "a.json", tmp_path / "b.json", debiased, "--json")
    result = parsed("compare", done.stdout)
    assert [e["neurons"] for e in result["edits"]] == [3, 1, read_manifest(debiased)["proofs"]["edit"]["neurons"]]
    assert len(result["pairs"]) == 3 and len(result["notes"]) == 2
    text = run("compare", tmp_path / "a.json", tmp_path / "b.json").stdout
    assert "1 shared (Jaccard 0.333), 2 only in the first, 0 only in the second" in text and "different sites" in text


@pytest.mark.parametrize(
    "args, message",
    [
        (["one.json"], "two edits or more"),
        (["one.json", "none.json"], "none.json"),
        (["one.json", "."], "no manifest"),
    ],
)
def test_compare_wrong_input(args, message, tmp_path):
    Edit("down", {0: {1: 2.0}}).save(tmp_path / "one.json")
    done = run("compare", *args, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
