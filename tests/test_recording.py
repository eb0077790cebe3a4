"""What an evaluation found, in the directory that it is about."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

import kbne_edit
from kbne_edit import Checks, Controls, Edit, Measurement, Output, bake, evaluate, verify
from kbne_edit.commands import cli
from kbne_edit.disk.manifest import Manifest
from kbne_edit.errors import InputError
from kbne_edit.evaluation.verdict import PARTS, benchmarked
from kbne_edit.recording import record_evaluation
from kbne_edit.reporting.card import card_fault
from kbne_edit.reporting.contents import report
from kbne_edit.results import load_results
from kbne_edit.statistics import Interval

DEMO = Path(kbne_edit.__file__).parent / "demo"
EDIT = Edit("down", {1: {3: 2.0, 7: 2.0, 90: 2.0}})


@pytest.fixture(scope="module")
def measured(debiased):
    """An evaluation of the baked demo. The probes are among its tasks: effect and cost are measured, too."""
    return evaluate(
        "demo",
        baked=debiased,
        measurement=Measurement(tasks=["probes", "knowledge"], limit=8),
        controls=Controls(draws=1),
    )


@pytest.fixture
def copy(debiased, tmp_path):
    return shutil.copytree(debiased, tmp_path / "copy")


def worse(found, task):
    """The same evaluation, had a task's figures got worse beyond every control."""
    figures = {
        name: replace(
            figure, p=0.0, p_holm=0.0, beyond={"x": Interval(1.0, 0.5, 2.0)}, draws=39, beyond_random=1, values=_worse()
        )
        for name, figure in found.tasks[task].figures.items()
        if figure.tested
    }
    tasks = {task: replace(found.tasks[task], figures=figures)}
    return replace(found, tasks=tasks, verdict=benchmarked(found.verdict, list(tasks.values())))


def _worse():
    """Away from any ideal: 50, 0 or 100."""
    return {"base": 40.0, "edit": -200.0}


def test_manifest_card_report_and_verdict_follow(measured, copy, debiased):
    weights = (copy / "model.safetensors").stat()
    record_evaluation(copy, measured, "demo")
    summary = json.loads((copy / "kbne_edit.json").read_text())["summary"]
    result, before = report(copy), report(debiased)
    assert summary["verdict"] == measured.verdict.to_dict() == result.to_dict()["verdict"]
    assert summary["evaluations"] == [measured.kept().to_dict()] and not before.evaluations
    assert summary["effect"] == measured.impact.effect.to_dict()
    assert summary["selection"] == Manifest.read(debiased).summary["selection"]
    card = (copy / "README.md").read_text()
    assert "probes (8)" in card and "knowledge (8)" in card and "probes (8)" not in (debiased / "README.md").read_text()
    html = result.html()
    assert "<h3>Benchmarks</h3>" in html and "knowledge, accuracy (%)" in html
    for row in measured.tasks["probes"].figures.values():
        assert f"{row.values['edit']:.{row.figure.digits}f}" in html
    # Nothing else changed: the weights are the same file, and all that holds of a baked directory holds still.
    assert (copy / "model.safetensors").stat().st_ino == weights.st_ino
    assert sorted(p.name for p in copy.iterdir()) == sorted(p.name for p in debiased.iterdir())
    assert card_fault(copy, Manifest.read(copy)) == "" and verify("demo", copy, behaviour=False).files.holds
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]


def test_the_same_is_kept_once_and_a_failure_stays(measured, copy):
    record_evaluation(copy, measured, "demo")
    once = (copy / "kbne_edit.json").read_bytes()
    record_evaluation(copy, measured, "demo")
    assert (copy / "kbne_edit.json").read_bytes() == once
    bad = worse(measured, "probes")
    assert bad.verdict.effect.state == "FAIL" and "more bias, beyond every control" in bad.verdict.effect.reason
    record_evaluation(copy, bad, "demo")
    again = evaluate(
        "demo", baked=copy, measurement=Measurement(tasks=["knowledge"], limit=8), controls=Controls(draws=1)
    )
    # What this run did not measure is on record; what an earlier one found stays found.
    assert again.impact.effect is None and again.verdict.cost == measured.verdict.cost
    assert again.verdict.effect == bad.verdict.effect and again.verdict.ship == "do not ship"
    record_evaluation(copy, again, "demo")
    assert len(report(copy).evaluations) == 3 and report(copy).verdict == again.verdict
    lost = worse(measured, "knowledge")
    assert lost.verdict.cost.state == "FAIL" and benchmarked(measured.verdict, lost.kept().tasks) == lost.verdict


def test_a_later_evaluation_gives_no_evidence_that_the_first_one_lacked(measured):
    """Effect and cost left out, as of `bake --no-measure`: the first evaluation decides."""
    bare = replace(measured.verdict, effect=measured.verdict.effect._replace(state="NOT MEASURED", reason="none"))
    figure = measured.tasks["probes"].figures["SS"]
    better = replace(figure, p_holm=0.0, draws=39, beyond_random=-1, beyond={}, values={"base": 90.0, "edit": 60.0})
    good = replace(measured.tasks["probes"], figures={"SS": better})
    first = benchmarked(bare, [measured.tasks["probes"]])
    assert benchmarked(bare, [good]).effect.state == "PASS" and first.effect.state == "NO EVIDENCE"
    assert benchmarked(first, [good]).effect == first.effect


@pytest.mark.parametrize("factor", [2.0, 100.0])
def test_one_verdict_from_every_place(factor, debiased, tmp_path):
    """Of bake, results.json, evaluate, the manifest, the card and the report: of the demo's own edit, and of one that
    breaks the model."""
    out = tmp_path / "out"
    edit = debiased.parent / "debiased.work" / "edit.json"
    given = ["bake", "--in", "demo", "--edit", edit, "--factor", factor, "--out", out, "--json", "--no-behaviour"]
    said = json.loads(_run(*given).stdout)["verdict"]
    places = [report(out).verdict.to_dict(), load_results(out).verdict.to_dict()]
    places.append(json.loads((tmp_path / "out.work" / "results.json").read_text())["verdict"])
    measured = ["evaluate", out, "--in", "demo", "--tasks", "probes", "--limit", 2, "--draws", 1, "--json"]
    places.append(json.loads(_run(*measured).stdout)["verdict"])
    places += [report(out).verdict.to_dict(), Manifest.read(out).summary["verdict"]]
    assert all(place == said for place in places)
    card = (out / "README.md").read_text()
    assert f"**{said['ship']}**" in card and all(f"| {said[part]} | " in card for part in PARTS)
    assert said["cost"] == ("PASS" if factor == 2 else "FAIL") and (factor == 2 or said["ship"] == "do not ship")


@pytest.mark.parametrize("form", ["delta", "peft"])
def test_an_adapter_and_a_delta_take_one(form, tmp_path):
    bake("demo", tmp_path / form, edit=EDIT, output=Output(form=form), checks=Checks(measure=False))
    result = evaluate(
        "demo", baked=tmp_path / form, measurement=Measurement(tasks=["knowledge"], limit=4), controls=Controls(draws=1)
    )
    assert result.how == "hooks" and result.edit.factors == EDIT.factors
    record_evaluation(tmp_path / form, result, "demo")
    manifest = Manifest.read(tmp_path / form)
    assert manifest.summary["verdict"] == result.verdict.to_dict() and manifest.recipe.name == "demo"
    assert card_fault(tmp_path / form, manifest) == "" == card_fault(tmp_path / form, manifest, DEMO)
    assert report(tmp_path / form).evaluations == (result.kept(),)


def _run(*args):
    result = CliRunner().invoke(cli, list(map(str, args)))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_command_records_into_the_directory(copy, tmp_path, monkeypatch):
    common = ["--in", "demo", "--tasks", "knowledge", "--limit", 2, "--draws", 1]
    before = (copy / "kbne_edit.json").read_bytes()
    assert _run("evaluate", copy, *common, "--no-record").exit_code == 0
    assert (copy / "kbne_edit.json").read_bytes() == before
    reply = _run("evaluate", copy, *common, "--json").stdout
    kept = Manifest.read(copy).summary
    assert json.loads(reply)["verdict"] == kept["verdict"] and set(kept["verdict"]) >= set(PARTS)
    edit = tmp_path / "e.json"
    Manifest.read(copy).edit.save(edit)
    assert _run("evaluate", "--edit", edit, "--into", copy, *common, "--limit", 3).exit_code == 0
    assert [one["limit"] for one in Manifest.read(copy).summary["evaluations"]] == [2, 3]
    assert _run("evaluate", "--into", copy, *common).exit_code == 2


def test_what_cannot_take_one_is_refused_at_once(measured, copy, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no kbne_edit.json"):
        record_evaluation(tmp_path / "absent", measured, "demo")
    with pytest.raises(InputError, match="another edit"):
        record_evaluation(copy, replace(measured, edit=EDIT), "demo")
    with pytest.raises(InputError, match="the base alone"):
        record_evaluation(copy, replace(measured, edit=None, verdict=None), "demo")
    (copy / "notes.txt").write_text("mine")
    monkeypatch.setattr("kbne_edit.evaluation.evaluate.evaluate", None)  # it is not called
    with pytest.raises(InputError, match="notes.txt, which is not part of it"):
        _run("evaluate", copy, "--in", "demo")
    (copy / "notes.txt").unlink()
    with monkeypatch.context() as inside, pytest.raises(InputError, match="working directory"):
        inside.chdir(copy)
        record_evaluation(copy, measured, "demo")
    (copy / "README.md").write_text("changed")
    with pytest.raises(InputError, match="README.md was not made from"):
        record_evaluation(copy, measured, "demo")
