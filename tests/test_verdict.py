"""The verdict: what each part says of what was measured, and what follows; equal wherever it is shown."""

import json
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from printed import parsed

from kbne_edit import Edit, Output, bake, load_recipe
from kbne_edit.commands import cli, main
from kbne_edit.errors import InputError, RequirementError
from kbne_edit.evaluation.cost import Answered, Balanced, Cost
from kbne_edit.evaluation.effect import Change, Effect, Flattening, RandomDraws
from kbne_edit.evaluation.verdict import (
    PARTS,
    STATES,
    Part,
    Verdict,
    answers_part,
    cost_part,
    effect_part,
    next_command,
    parts_of,
    proofs_part,
    specific_part,
    verdict_of,
)
from kbne_edit.proofs.outcome import BehaviourProof, FileProof, Proofs
from kbne_edit.reporting import contents
from kbne_edit.selection.summary import SelectionSummary, Shared
from kbne_edit.statistics import Interval

LOWER, UNCLEAR, HIGHER = Interval(-0.1, -0.2, -0.01), Interval(-0.1, -0.2, 0.01), Interval(0.1, 0.01, 0.2)
EDIT = Edit("down", {1: {3: 2.0, 7: 2.0}, 2: {5: 2.0}})


def _effect(change=LOWER, as_low=0, as_high=24, draws=24, flat=LOWER):
    random = RandomDraws(draws, UNCLEAR, UNCLEAR, LOWER, 24, as_low, as_high, -0.1, 0.1)
    both = Change(0.2, 0.1)
    return Effect("balance", 48, 24, both, both, both, change, change, random, flat and Flattening(1.2, flat))


def _cost(**parts):
    flat = Interval(0.01, 0.0, 0.02)
    return Cost("package", 64, flat, Interval(9, 8, 10), Interval(9, 8, 10), Interval(1.0, 0.99, 1.01), **parts)


def _selection(shared, total=20, unseen=()):
    return SelectionSummary("paper", total, 0.1, (0,), {}, {}, 5, shared, tuple(Shared(*pair) for pair in unseen))


def _proofs(faults=(), behaviour=True, holds=True, also_rounded=False):
    entries = (BehaviourProof("float32", "whole model", holds, holds, 0.0, 0.0, 9),) if behaviour else None
    if also_rounded:
        entries = (*entries, BehaviourProof("bfloat16", "whole model", True, False, 0.1, 0.1, 9))
    return Proofs(FileProof(EDIT, "given", 3, 1, 2, faults), entries)


@pytest.mark.parametrize(
    "part, state, said",
    [
        (effect_part(None), "NOT MEASURED", "no probes"),
        (effect_part(_effect()), "PASS", "further than all 24 draws of random neurons and more than a flattening"),
        (effect_part(_effect(flat=None)), "PASS", "further than all 24"),
        (effect_part(_effect(UNCLEAR)), "NO EVIDENCE", "the interval holds 0"),
        (effect_part(_effect(as_low=2)), "NO EVIDENCE", "2 of 24 draws of random neurons do as much"),
        (effect_part(_effect(draws=18)), "NO EVIDENCE", "18 draws of random neurons cannot tell, 19 can"),
        (effect_part(_effect(as_low=None, as_high=None, draws=5)), "NO EVIDENCE", "an interval alone"),
        (effect_part(_effect(flat=UNCLEAR)), "NO EVIDENCE", "a mere flattening"),
        (effect_part(_effect(HIGHER, as_low=24, as_high=0)), "FAIL", "more than all 24 draws"),
        (effect_part(_effect(HIGHER, as_low=20, as_high=4)), "NO EVIDENCE", "4 of 24 draws"),
        (cost_part(None), "NOT MEASURED", ""),
        (cost_part(_cost()), "PASS", "KL 0.01"),
        (cost_part(replace(_cost(), kl=Interval(0.3, 0.2, 0.4))), "FAIL", "limits: KL 0.1"),
        (cost_part(replace(_cost(), kl=Interval(0.1, 0.05, 0.2))), "NO EVIDENCE", "beyond the limits"),
        (cost_part(_cost(controls=Answered(48, 40, 20, 0.001))), "FAIL", "40 -> 20 of 48 controls right"),
        (specific_part(None), "NOT MEASURED", ""),
        (specific_part(_selection(12)), "FAIL", "12 of 20 neurons"),
        (specific_part(_selection(10)), "NO EVIDENCE", "10 of 20"),
        (specific_part(_selection(2)), "PASS", "2 of 20"),
        (specific_part(_selection(0, unseen=[(15, 20), (13, 20)])), "FAIL", "70%"),
        (specific_part(replace(_selection(0), controls_overlap=None)), "NOT MEASURED", "no unrelated question"),
        (proofs_part(None), "NOT MEASURED", ""),
        (proofs_part(_proofs()), "PASS", "bit for bit"),
        (proofs_part(_proofs(also_rounded=True)), "PASS", "up to rounding"),
        (proofs_part(_proofs(behaviour=False)), "NOT MEASURED", "the second was left out"),
        (proofs_part(_proofs(faults=("x differs",))), "FAIL", "the first proof fails: x differs"),
        (proofs_part(_proofs(holds=False)), "FAIL", "the second proof fails"),
    ],
)
def test_parts(part, state, said):
    assert part.state == state and said in part.reason


def _answers(constant=None, mass=None):
    return SimpleNamespace(questions=(30, 48), balanced=Interval(0.6, 0.45, 0.7), constant=constant, mass=mass)


def test_answers():
    small = SimpleNamespace(small=True, median=0.02)
    requests = _cost(questions=Answered(48, 30, 30, 1.0), balanced=Balanced(0.6, 0.55, 0.7, 0.5))
    assert answers_part(None).state == answers_part(None, _cost()).state == "NOT MEASURED"
    assert answers_part(_answers()) == Part(
        "PASS", "30 of 48 questions answered rightly, balanced accuracy 60% [45%, 70%]"
    )
    assert (
        answers_part(_answers("yes")).state == "FAIL" and "'yes' to everything" in answers_part(_answers("yes")).reason
    )
    assert answers_part(_answers(mass=small)).state == "FAIL" and "2.0%" in answers_part(_answers(mass=small)).reason
    assert answers_part(None, requests).state == "PASS"
    assert answers_part(None, replace(requests, balanced=Balanced(0.6, 0.45, 0.7, 0.5))).state == "FAIL"
    assert answers_part(_answers("yes"), requests).state == "FAIL"  # the attribution's, where there are both


def test_what_follows_from_every_combination_of_states():
    for states in product(STATES, repeat=len(PARTS)):
        verdict = Verdict(*(Part(state, "why") for state in states))
        known = dict(zip(PARTS, states, strict=True))
        if "FAIL" in states:
            expected = "do not ship"
        elif known["effect"] == known["cost"] == known["proofs"] == "PASS":
            expected = "ship"
        else:
            expected = "try further"
        assert verdict.ship == expected
        record = json.loads(json.dumps(verdict.to_dict()))
        assert list(record) == ["ship", *PARTS, "reasons"] and Verdict.from_dict(record) == verdict
        missing = [name for name in PARTS if known[name] != "PASS"]
        assert list(verdict.open) == missing
        if missing:
            with pytest.raises(RequirementError, match=f"{missing[0]} {known[missing[0]]}, why"):
                verdict.require(missing[:1])
        verdict.require([name for name in PARTS if known[name] == "PASS"])
        why, command = next_command(verdict, "org/my model", "./o")
        assert why and command.startswith("kbne-edit ") and ("'org/my model'" in command or verdict.ship == "ship")


def test_nothing_measured_is_a_state_of_its_own():
    verdict = verdict_of()
    assert {part.state for _, part in verdict} == {"NOT MEASURED"} and verdict.ship == "try further"
    with pytest.raises(ValueError, match="state"):
        Verdict.from_dict(verdict.to_dict() | {"cost": "UNKNOWN"})


def test_required_parts_are_named():
    assert parts_of("effect, cost") == ("effect", "cost")
    with pytest.raises(InputError, match="'speed' is not a part"):
        parts_of("effect,speed")


@pytest.fixture(scope="module")
def baked(tmp_path_factory):
    out = tmp_path_factory.mktemp("baked") / "out"
    return out, bake("demo", out, edit=EDIT)


def test_one_verdict_everywhere(baked):
    """Of the run, of its JSON, of the manifest, of the card and of the report."""
    out, result = baked
    record = result.verdict.to_dict()
    assert record["effect"] == "NO EVIDENCE" and record["proofs"] == record["cost"] == record["answers"] == "PASS"
    assert result.to_dict()["verdict"] == record == contents.report(out).to_dict()["verdict"]
    assert json.loads((out / "kbne_edit.json").read_text())["summary"]["verdict"] == record
    card = (out / "README.md").read_text()
    assert f"**{record['ship']}**" in card and all(f"| {record['reasons'][name]} |" in card for name in PARTS)
    assert "bias-mitigation" not in card and "model-index" not in card  # no effect was shown
    assert result.impact.effect.probes == len(load_recipe("demo").probes)


def test_the_command_says_it_and_a_requirement_has_a_status(baked, tmp_path, monkeypatch, capsys):
    EDIT.save(tmp_path / "e.json")
    monkeypatch.chdir(tmp_path)
    base = ["kbne-edit", "bake", "--in", "demo", "--edit", "e.json", "--no-behaviour", "-v", "--out"]

    def status(*args):
        monkeypatch.setattr("sys.argv", [*base, *args])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code

    assert status("a", "--require", "cost,answers") == 0
    reply = capsys.readouterr().out
    assert "VERDICT: try further (specific, effect, proofs: see above)" in reply and "greedy continuations" in reply
    assert status("b", "--require", "effect") == 4
    captured = capsys.readouterr()
    assert "required, but not passed: effect NO EVIDENCE" in captured.err and (tmp_path / "b").is_dir()
    assert status("c", "--no-measure", "--json", "--require", "cost") == 4
    record = parsed("bake", capsys.readouterr().out)
    assert record["verdict"]["effect"] == record["verdict"]["cost"] == "NOT MEASURED" and "effect" not in record
    assert "No effect" not in (tmp_path / "c" / "README.md").read_text()
    assert status("d", "--require", "speed") == 2 and not (tmp_path / "d").exists()


@pytest.mark.parametrize("form", ["peft", "delta"])
def test_other_forms_and_apply_are_measured_too(form, baked, tmp_path):
    result = bake("demo", tmp_path / form, edit=EDIT, output=Output(form=form))
    assert result.impact == baked[1].impact and result.verdict.proofs.state == "NOT MEASURED"
    assert result.verdict.effect == baked[1].verdict.effect
    if form == "delta":
        args = [str(tmp_path / form), "--in", "demo", "--out", str(tmp_path / "again"), "--recipe", "demo", "--json"]
        ran = CliRunner().invoke(cli, ["apply", *args], catch_exceptions=False)
        record = parsed("apply", ran.stdout)
        assert record["verdict"] == baked[1].verdict.to_dict() and record["effect"] == baked[1].impact.effect.to_dict()
