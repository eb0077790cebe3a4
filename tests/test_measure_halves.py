"""Halves of the measures that may be fitted, and halves that are reported."""

import numpy as np
import pytest
import torch

from kbne_edit import Edit, load_recipe
from kbne_edit.errors import InputError
from kbne_edit.evaluation.effect import margins_in
from kbne_edit.evaluation.measures import measure, measure_quick
from kbne_edit.evaluation.measures.decisions import decisions_benchmark
from kbne_edit.evaluation.measures.halves import (
    fitted_measures,
    reported_half,
    scenario_halves,
    twin_halves,
    unfitted_twins,
)
from kbne_edit.evaluation.scoring import Scorer
from kbne_edit.evaluation.twins import twin_scores
from kbne_edit.fitting.fit import FitSettings, chosen_units
from kbne_edit.fitting.measure_units import forbid_reported, measure_units
from kbne_edit.fitting.rows import KINDS, encode_units
from kbne_edit.fitting.units import Sentence, Square, Unit, load_units
from kbne_edit.models.loading import load_model, load_tokenizer

LANGUAGES = ("en", "de", "fr", "es", "zh")


@pytest.fixture(scope="module")
def scorer(chatty):
    return Scorer(load_model(chatty, torch.float32), load_tokenizer(chatty))


@pytest.mark.parametrize("language", LANGUAGES)
def test_halves_share_nothing_and_are_as_large(language):
    twins, scenarios = twin_halves(language), scenario_halves(language)
    for halves, least in ((twins, 18), (scenarios, 10)):
        assert not set(halves.fitted) & set(halves.reported)
        assert abs(len(halves.fitted) - len(halves.reported)) <= 1 and len(halves.reported) >= least
    assert {t.dimension for t in twins.fitted} == {t.dimension for t in twins.reported}
    names = [[s.name for s in part] for part in (scenarios.fitted, scenarios.reported)]
    english = scenario_halves("en")
    assert names == [[s.name for s in part] for part in (english.fitted, english.reported)]


def test_what_is_reported_leaves_out_what_is_fitted(scorer):
    for name in ("decisions", "decisions_names", "associations"):
        whole = measure(name, scorer, scorer.tokenizer)
        half = reported_half(whole)
        assert len(half.sizes) * 2 == len(whole.sizes) and set(half.clusters) < set(whole.clusters)
        texts = [scorer.tokenizer.decode([*context, *answer]) for context, answer in half.pairs]
        for unit in measure_units("decisions" if "decisions" in name else name):
            facts = unit.square.ax.text.partition("Should")[0].removeprefix("Question: ")
            assert not any(facts in text for text in texts)
    assert reported_half(measure("help_parity", scorer, scorer.tokenizer, 2)).clusters
    few = measure("decisions", scorer, scorer.tokenizer).take([0, 2])
    with pytest.raises(InputError, match="none of its items is in the half that is reported"):
        reported_half(few)
    assert reported_half(few, ["associations"]) is few


def test_an_edit_that_was_fitted_to_a_measure_is_judged_by_the_other_half(scorer):
    """In effect's twins, and in what every bake measures."""
    edit = Edit("down", {1: {3: 4.0}}, found={"measures": ["associations", "decisions"]})
    plain = Edit("down", {1: {3: 4.0}}, found={"measures": "associations"})
    twins = load_recipe("social-bias").twins
    assert (
        fitted_measures(edit) == ("decisions", "associations") and fitted_measures(plain) == fitted_measures(None) == ()
    )
    assert unfitted_twins(twins, edit) == twin_halves("en").reported and unfitted_twins(twins, plain) == twins
    margins = margins_in(scorer.model, scorer.tokenizer)
    quick = measure_quick(scorer.model, scorer.tokenizer, edit, "en", margins, lambda _: None)
    names = {s.name for s in scenario_halves("en").reported}
    decisions = decisions_benchmark("en", scorer.tokenizer, None, quick=True)
    kept = [c for c in decisions.clusters if c.removeprefix("decisions ") in names]
    assert [q.items for q in quick] == [len(kept), 30] and 0 < len(kept) < len(decisions.clusters)
    units, contrasts = chosen_units(FitSettings(pairs=("decisions", "associations")))
    assert len(units) == 470 and not contrasts
    forbid_reported(units)


def test_the_association_of_a_twin_s_unit_is_its_score(scorer, chatty):
    """The rows that a fit reads, against the score that `effect` and `evaluate` print (there per sentence's token)."""
    twins = twin_halves("en").fitted[:4]
    units = measure_units("associations")[:4]
    rows = encode_units(chatty, units, ())
    for twin, unit, row in zip(twins, units, rows, strict=True):
        logp = []
        for sentence in row.sentences:
            with torch.no_grad():
                result = scorer.model(torch.tensor([sentence.ids])).logits[0, :-1].double().log_softmax(-1)
            targets = torch.tensor(sentence.ids[1:])[:, None]
            logp.append(float((result.gather(1, targets)[:, 0] * torch.tensor(sentence.weights)).sum()))
        ax, ay, bx, by = logp
        margins = [ax - bx, by - ay]
        tokens = np.mean([sum(sentence.weights) for sentence in row.sentences])
        expected = twin_scores([twin], np.array(margins), "balance")[0] / tokens
        assert float(row.mixture[KINDS.index("association")] @ logp) == pytest.approx(expected, abs=1e-9)
        assert [s.text for s in unit.sentences[:4]] == [
            twin.first.first,
            twin.second.second,
            twin.first.second,
            twin.second.first,
        ]


def test_a_decision_s_unit_turns_with_the_polarity():
    units = measure_units("decisions")
    english = scenario_halves("en")
    assert len(units) == 10 * 2 * 22
    first, turned = (next(u for u in units if u.fact.b == "woman" and q in u.square.ax.question) for q in _questions())
    assert (first.square.ax.continuation, first.square.ay.continuation) == (" yes", " no")
    assert (turned.square.ax.continuation, turned.square.ay.continuation) == (" no", " yes")
    assert "is a man." in first.square.ax.question and "is a woman." in first.square.bx.question
    assert first.square.ax.context.startswith("Question: ") and english.fitted[0].facts in first.square.ax.context
    assert measure_units("decisions", "zh")[0].square.ax.continuation == "是"


def _questions():
    scenario = scenario_halves("en").fitted[0]
    return scenario.yes, scenario.no


def test_a_reported_sentence_is_never_fitted():
    forbid_reported(measure_units("decisions"))
    forbid_reported(measure_units("associations", "fr"), "fr")
    forbid_reported(load_units(["gender"])[:20])
    twin = twin_halves("en").reported[3]
    unit = measure_units("associations")[0]
    leaked = Sentence("", twin.second.first)
    with pytest.raises(InputError, match="is reported and must not be fitted"):
        forbid_reported([Unit(unit.fact, "sentence", 0, Square(*[unit.square.ax] * 3, leaked), ())])
    facts = Sentence("", " yes", f"{scenario_halves('en').reported[0].facts} Should they?")
    with pytest.raises(InputError, match="must not be fitted"):
        forbid_reported([Unit(unit.fact, "question", 0, Square(*[facts] * 4), ())])
    with pytest.raises(InputError, match="cannot be fitted: use decisions or associations"):
        measure_units("questions")
