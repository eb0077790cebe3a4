"""A whole fit on a tiny model: the budget, the edit, what is measured, resuming; against the hooked model."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chat import save_chat
from click.testing import CliRunner
from printed import parsed
from safetensors.torch import load_file

from kbne_edit import Edit, FitSettings, InputError, fit, hooked
from kbne_edit.commands import cli
from kbne_edit.commands.fit import lines
from kbne_edit.errors import EditError
from kbne_edit.evaluation.neutral import packaged
from kbne_edit.fitting.fit import chosen_units
from kbne_edit.fitting.problem import folds, shuffled
from kbne_edit.fitting.record import FitRecord
from kbne_edit.fitting.result import Control, Gain
from kbne_edit.fitting.rows import KINDS, encode_texts, encode_units
from kbne_edit.models.loading import load_model
from kbne_edit.reporting.fitted import fitted as section
from kbne_edit.statistics import Interval

SETTINGS = FitSettings(facts=30, contrasts=36, texts=8, max_kl=0.02, draws=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_chat(tmp_path_factory.mktemp("fit") / "model")


@pytest.fixture(scope="module")
def fitted(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("fitted") / "edit.json"
    return out, fit(str(model), out, SETTINGS)


def log_probabilities(model, ids):
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return logits, logits[range(len(ids) - 1), list(ids[1:])]


def test_the_budget_is_met_by_the_real_kl(model, fitted):
    """KL and perplexity by the model's own passes, one text at a time."""
    out, result = fitted
    lm, edit = load_model(model, torch.float32), Edit.load(out)
    texts = encode_texts(model, packaged("en"))
    base = [log_probabilities(lm, ids) for ids in texts]
    with hooked(lm, edit):
        edited = [log_probabilities(lm, ids) for ids in texts]
    kl = [(p.exp() * (p - q)).sum(-1) for (p, _), (q, _) in zip(base, edited, strict=True)]
    assert result.cost.kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3)
    assert 0.9 * SETTINGS.max_kl < result.cost.kl <= SETTINGS.max_kl
    perplexity = float((-torch.cat([picked for _, picked in edited]).mean()).exp())
    assert result.cost.perplexity == pytest.approx(perplexity, rel=1e-4)


def test_margins_are_those_of_the_hooked_model(model, fitted):
    """Of the units set aside, by their own log-probabilities; and the fitted ones fall."""
    out, actual = fitted
    lm = load_model(model, torch.float32)
    units, contrasts = chosen_units(SETTINGS)
    every, rows = [*units, *contrasts], encode_units(model, units, contrasts)
    aside = folds(every, 10) == 0
    assert actual.set_aside == aside.sum() and actual.fitted + actual.contrasts == (~aside).sum()

    def margins():
        result = []
        for unit in rows:
            values = [float((log_probabilities(lm, s.ids)[1] * torch.tensor(s.weights)).sum()) for s in unit.sentences]
            result.append(unit.mixture @ values)
        return np.array(result)

    before = margins()
    with hooked(lm, Edit.load(out)):
        change = margins() - before
    kind = KINDS.index("association")
    gain = next(g for g in actual.gains if (g.of, g.part) == ("all", "association"))
    own = aside & ~np.isnan(change[:, kind])
    assert gain.units == own.sum()
    assert gain.before == pytest.approx(before[own, kind].mean(), abs=1e-5)
    assert gain.change.value == pytest.approx(change[own, kind].mean(), abs=1e-5)
    fitted_tone = change[~aside, KINDS.index("tone")]
    assert np.nanmean(fitted_tone) < -2 * np.nanstd(fitted_tone) / np.sqrt((~np.isnan(fitted_tone)).sum())


def test_controls_have_the_same_kl(fitted):
    _, result = fitted
    names = [control.name for control in result.controls]
    assert names == ["shuffled labels 1", "matched neurons", "inverse", "flattening"]
    for control in result.controls:
        assert 0.85 * result.cost.kl < control.kl < 1.1 * result.cost.kl


def test_a_file_of_gradients_serves_again_and_the_result_is_the_same(model, fitted, tmp_path):
    """By the command; and what it prints without --json is what was found."""
    out, result = fitted
    gradients = out.with_name("edit.gradients.safetensors")
    stamp = gradients.stat().st_mtime_ns
    options = [
        "--facts",
        "30",
        "--contrasts",
        "36",
        "--texts",
        "8",
        "--max-kl",
        "0.02",
        "--draws",
        "1",
        "--keep-shuffled",
        "--json",
    ]
    command = ["fit", "--in", str(model), "--out", str(tmp_path / "edit.json"), "--gradients", str(gradients)]
    data = parsed("fit", CliRunner().invoke(cli, [*command, *options]).stdout)
    assert gradients.stat().st_mtime_ns == stamp  # nothing was written
    assert data["sha256"] == result.edit.sha256
    assert data == {"version": 1} | json.loads(json.dumps(result.to_dict()))
    shuffled = Edit.load(tmp_path / "edit.shuffled1.json")
    assert shuffled.num_neurons == result.edit.num_neurons and shuffled.sha256 != result.edit.sha256
    text = "\n".join(lines(result))
    assert f"KL {result.cost.kl:.4f}" in text and "control, shuffled labels 1" in text
    assert all(part in text.splitlines()[-1] for part in result.moved)


def test_what_moved_is_said_of_enough_units_and_beyond_every_shuffle(fitted):
    _, result = fitted
    assert result.moved == ()  # a handful of units was set aside
    fall, small, rise = Interval(-0.2, -0.3, -0.1), Interval(-0.1, -0.2, -0.01), Interval(0.1, -0.1, 0.3)

    def told(units, change, shuffles, uses=1):
        gains = tuple(Gain(part, "all", units, 0.1, rise) for part in ("sentiment", "prior"))
        gains = (Gain("association", "all", units, 0.1, change), *gains)
        controls = [Control(f"shuffled labels {i}", 0.01, (c, fall, fall)) for i, c in enumerate(shuffles, 1)]
        return replace(result, gains=gains, controls=tuple(controls), uses=uses).moved

    assert told(20, fall, [small, rise]) == ("association",)
    assert told(19, fall, [small, rise]) == told(20, rise, [rise]) == told(20, small, [rise, fall]) == ()
    assert told(20, fall, []) == ()
    near = Interval(-0.1, -0.19, -0.01)  # below 0 by 2.18 standard errors; 5 % one-sided: 2.13 of 3, 2.39 of 6
    assert told(20, near, [rise]) == ("association",) and told(20, near, [rise], uses=2) == ()


def test_few_neurons_of_one_part(model, fitted, tmp_path):
    out, result = fitted
    settings = FitSettings(**vars(SETTINGS) | {"neurons": 9, "part": "association", "even": 1.0})
    few = fit(str(model), tmp_path / "few.json", settings, out.with_name("edit.gradients.safetensors"))
    assert few.factors.changed == few.edit.num_neurons and 1 <= few.edit.num_neurons <= 9
    assert result.uses == 1 < few.uses  # the same facts have judged another edit
    assert few.cost.kl <= SETTINGS.max_kl and few.parts == ("association",) and few.even == 1.0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"part": "all of it"}, "--part"),
        ({"max_kl": 0.0}, "--max-kl"),
        ({"facts": 0}, "--facts"),
        ({"facts": 3, "contrasts": 2}, "too few"),
    ],
)
def test_settings_that_cannot_be_meant(model, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        fit(str(model), tmp_path / "edit.json", FitSettings(**vars(SETTINGS) | change))
    assert not list(tmp_path.iterdir())


def test_shuffled_labels_are_balanced_within_types_and_folds_keep_facts_together():
    units, contrasts = chosen_units(FitSettings(facts=200, contrasts=100))
    signs, types = shuffled(units, 1), np.array([unit.type for unit in units])
    for name in set(types.tolist()):
        assert abs(signs[types == name].sum()) <= 1
    fold = folds([*units, *contrasts], 5)
    by_fact = {}
    for unit, number in zip(units, fold, strict=False):
        assert by_fact.setdefault((unit.fact.x, unit.fact.y), number) == number
    for unit, number in zip(contrasts, fold[len(units) :], strict=True):
        of_facts = {result for (x, y), result in by_fact.items() if unit.fact.x in (x, y)}
        assert not of_facts or number in of_facts
    assert len(set(fold.tolist())) == 5


def test_bake_folds_what_fit_found(model, fitted, tmp_path, monkeypatch):
    """Every column of the written down-projections is the base's times its factor."""
    out, _ = fitted

    def stand_in(source, path):
        path.parent.mkdir(parents=True)
        path.write_bytes(out.read_bytes())

    monkeypatch.setattr("kbne_edit.fitting.fit.fit", stand_in)
    command = ["bake", "--in", str(model), "--out", str(tmp_path / "out"), "--fit", "--no-measure", "--no-behaviour"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    base, baked = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    for layer, factors in Edit.load(out).factors.items():
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        scale = torch.tensor([factors.get(i, 1.0) for i in range(base[name].shape[1])])
        assert torch.allclose(baked[name], base[name] * scale, rtol=1e-6)
        assert not torch.equal(baked[name], base[name])
    refused = CliRunner().invoke(cli, [*command[:4], str(tmp_path / "other"), "--fit", "--edit", str(out)])
    assert isinstance(refused.exception, InputError) and "not both" in str(refused.exception)


def test_an_edit_keeps_the_record_of_its_fit_and_the_report_shows_it(fitted):
    out, result = fitted
    data = json.loads(out.read_text())["found"]["fit"]
    record = FitRecord.from_dict(data)
    assert record.to_dict() == FitRecord.from_dict(json.loads(json.dumps(record.to_dict()))).to_dict()
    assert (record.kl, record.facts, record.contrasts) == (result.cost.kl, result.fitted, result.contrasts)
    overall = [gain for gain in result.gains if gain.of == "all"]
    assert [row.part for row in record.gains] == [gain.part for gain in overall]

    def shown(data):
        return "".join(section(SimpleNamespace(edit=SimpleNamespace(found={"fit": data}))))

    page = shown(data)
    assert f"{overall[0].change.value:+.4f}" in page and "inverse" in page and "no part moved" in page
    assert "not less stereotyping" in shown(data | {"moved": ["sentiment"]})
    assert "not less stereotyping" not in shown(data | {"moved": ["association"]})
    assert shown({"part": "all"}) == ""  # an edit of before the record
    for change in ({"kl": "<b>"}, {"gains": [{}]}, {"controls": [{"name": "x", "changes": [1.0]}]}, {"more": 1}):
        with pytest.raises(EditError, match="run fit again"):
            FitRecord.from_dict(data | change)
        assert "Not shown" in shown(data | change)
