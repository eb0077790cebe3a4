"""Effect and cost of an edit against figures worked out by hand, plain loops over the model, and known effects."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from kbne_edit import Edit, hooked, load_recipe
from kbne_edit.errors import InputError
from kbne_edit.evaluation.cost import MOST_KL, MOST_RISE, Answered, Balanced, Cost, Interval
from kbne_edit.evaluation.effect import (
    DRAWS,
    FEWEST_DRAWS,
    Effect,
    Flattening,
    different_twins,
    measure_effect,
    random_edit,
)
from kbne_edit.evaluation.impact import measure_impact
from kbne_edit.evaluation.neutral import neutral_text
from kbne_edit.models.loading import load_model, load_tokenizer
from kbne_edit.models.prompts import answer_tokens, encode
from kbne_edit.recipe import Probe, Twin
from kbne_edit.statistics import interval

DEMO = Path(__file__).resolve().parent.parent / "kbne_edit" / "demo"
EDIT = Edit("down", {0: {0: 2.0, 1: 2.0}})
SIZES = [4_000, 40]  # so many that no two draws are the same

SEEDS = {random_edit(EDIT, SIZES, seed).sha256: seed for seed in range(DRAWS)}


def _twins(count):
    return tuple(
        Twin(Probe(f"a{i} x", f"b{i} x", "d"), Probe(f"b{i} y", f"a{i} y", "d"), (f"a{i}", f"b{i}"))
        for i in range(count)
    )


class Margins:
    """Stands in for a model: margins of each twin's two probes under the base, the edit, draws and a flattening."""

    def __init__(self, base, edit, draws, flat=None):
        self.base, self.edit, self.draws, self.flat = base, edit, draws, flat
        self.asked = []

    def __call__(self, probes, edits, temperature):
        self.asked.append((len(probes), len(edits), temperature))
        places = [int(probe.first.split()[0][1:]) for probe in probes[::2]]
        rows = []
        for edit in edits:
            if edit is None:
                scores = self.base if temperature == 1 else self.flat
            elif edit == EDIT:
                scores = self.edit
            else:
                scores = self.draws[SEEDS[edit.sha256]]
            s = np.asarray(scores)[places]
            rows.append(np.stack([s + 1.0, s - 1.0], 1).ravel())  # the frequency, 1, cancels
        return np.array(rows)


def _draws(base, shift, spread=0.002, seed=3, count=DRAWS):
    """Draws that change the size of each score by about `shift`."""
    rng = np.random.default_rng(seed)
    size = np.abs(base)[None] + shift + rng.normal(0, spread, (count, 1)) + rng.normal(0, 0.001, (count, len(base)))
    return np.sign(base) * size


def _base(count=24):
    rng = np.random.default_rng(0)
    return rng.choice([-1, 1], count) * rng.uniform(0.2, 0.5, count)


def test_figures_by_hand():
    base = _base()
    edit, draws = base * 0.9, _draws(base, 0.0)
    flat = base * 0.98
    result = measure_effect(Margins(base, edit, draws, flat), _twins(24), EDIT, SIZES, temperature=1.5)
    assert (result.twins, result.probes, result.random.draws, result.random.twins) == (24, 48, DRAWS, 24)
    assert result.signed == pytest.approx((base.mean(), edit.mean()))
    assert result.absolute == pytest.approx((np.abs(base).mean(), np.abs(edit).mean()))
    assert result.preferred == ((base > 0).mean(), (edit > 0).mean())
    assert result.change_absolute == pytest.approx(interval(np.abs(edit) - np.abs(base)))
    assert result.change_signed == pytest.approx(interval(edit - base))
    assert result.random.absolute.value == pytest.approx((np.abs(draws) - np.abs(base)).mean())
    assert result.random.signed.value == pytest.approx((draws - base).mean())
    assert result.random.versus.value == pytest.approx(np.abs(edit).mean() - np.abs(draws).mean())
    assert (result.random.as_low, result.random.as_high) == (0, DRAWS) and result.random.beyond == -1
    sizes = np.abs(draws).mean(1) - np.abs(base).mean()
    assert (result.random.lowest, result.random.highest) == pytest.approx((sizes.min(), sizes.max()))
    assert result.flattening.versus == pytest.approx(interval(np.abs(edit) - np.abs(flat)))
    assert result.state == "less" and result.change is result.change_absolute


def test_draws_of_both_signs_are_averaged_in_size():
    """Draws that turn every score round: their mean score is near 0, their mean size is not."""
    base = _base()
    draws = np.resize(np.stack([base, -base]), (DRAWS, len(base))) * 1.1
    result = measure_effect(Margins(base, base * 0.9, draws), _twins(24), EDIT, SIZES)
    assert result.random.absolute.value == pytest.approx(0.1 * np.abs(base).mean())
    odd = 1.1 * base.mean() / DRAWS if DRAWS % 2 else 0.0  # of an odd number of draws one has no opposite
    assert result.random.signed.value == pytest.approx(odd - base.mean(), abs=1e-9)


def test_the_interval_of_the_draws_holds_their_spread():
    """All twins alike within a draw, so that resampling twins alone would give an interval without width."""
    base = np.full(24, 0.4)
    shift = np.linspace(-0.02, 0.02, DRAWS)
    draws = base[None] + shift[:, None]
    result = measure_effect(Margins(base, base - 0.05, draws), _twins(24), EDIT, SIZES).random
    half = 1.96 * shift.std() / DRAWS**0.5
    assert (result.absolute.low, result.absolute.high) == pytest.approx((-half, half), rel=0.2)
    assert result.versus.high - result.versus.low == pytest.approx(2 * half, rel=0.2)


@pytest.mark.parametrize(
    "edit, draws, flat, state",
    [
        (0.9, 0.0, 0.98, "less"),
        (0.9, -0.08, 0.98, "none"),  # random neurons do as much
        (0.9, 0.0, 0.85, "none"),  # so does a flattening
        (1.1, 0.0, 0.98, "more"),
        (1.1, 0.1, 0.98, "none"),
        (1.0, 0.05, 1.0, "none"),  # below every draw, but as the base
    ],
)
def test_states(edit, draws, flat, state):
    base = _base()
    noise = np.random.default_rng(5).normal(0, 1e-3, 24)
    stub = Margins(base, base * edit + noise, _draws(base, draws), base * flat)
    result = measure_effect(stub, _twins(24), EDIT, SIZES, temperature=1.5)
    assert result.state == state
    assert replace(result, flattening=None).state in (state, "less" if edit == 0.9 and draws == 0 else state)


def test_what_is_to_be_avoided_goes_by_the_sign():
    """Scores of both signs, all lower by .05: sizes grow where the score is below 0."""
    base = _base()
    stub = Margins(base / 2, base / 2 - 0.05, _draws(base / 2, 0.0), base / 2)
    result = measure_effect(stub, _twins(24), EDIT, SIZES, aim="avoid", temperature=2.0)
    assert result.avoids and result.change is result.change_signed and result.change.value == pytest.approx(-0.1)
    assert result.score.before == pytest.approx(base.mean()) and result.state == "less"
    assert result.random.versus.value == pytest.approx(-0.1 + base.mean() - 2 * stub.draws.mean())


def test_draws_end_where_no_more_can_change_what_is_said():
    base = _base()
    stub = Margins(base, base * 0.99, _draws(base, 0.0, spread=0.05))
    result = measure_effect(stub, _twins(24), EDIT, SIZES)
    assert result.random.draws < 12 and 0 < result.random.as_low < result.random.draws and result.state == "none"
    still = base * np.resize([0.99, 1.01], len(base))
    result = measure_effect(Margins(base, still, _draws(base, 0.05)), _twins(24), EDIT, SIZES)
    assert result.random.draws == 4 and result.random.as_low == 0  # below all draws
    assert result.change.side == 0 and result.state == "none"
    whole = Margins(base, base * 0.5, _draws(base, 0.0, spread=0.05))
    assert measure_effect(whole, _twins(24), EDIT, SIZES).random.draws == DRAWS >= FEWEST_DRAWS
    more = measure_effect(Margins(base, base * 1.5, _draws(base, 0.0, spread=0.05)), _twins(24), EDIT, SIZES)
    assert more.random.draws == DRAWS and more.state == "more"


def test_draws_that_were_measured_together_count_as_if_block_by_block():
    """All of them in one call, where reading the weights costs more: the same figures."""
    base, found = _base(), []
    for ahead in (4, DRAWS):
        stub = Margins(base, base * 0.99, _draws(base, 0.0, spread=0.05))
        stub.ahead = ahead
        found.append(measure_effect(stub, _twins(24), EDIT, SIZES))
        assert stub.asked[-1][1] == ahead
    assert found[0] == found[1] and found[0].random.draws < 12


def test_draws_are_measured_on_some_of_many_twins_and_compared_on_these():
    base = _base(60)
    stub = Margins(base, base * 0.9, _draws(base, 0.0))
    result = measure_effect(stub, _twins(60), EDIT, SIZES)
    assert result.twins == 60 and result.random.twins == 24
    assert stub.asked[0] == (120, 2, 1.0) and {requests[0] for requests in stub.asked[1:]} == {48}


def test_a_draw_that_does_just_as_well_counts():
    base = _base()
    draws = _draws(base, 0.0)
    draws[30] = base * 0.9
    result = measure_effect(Margins(base, base * 0.9, draws), _twins(24), EDIT, SIZES)
    assert (result.random.as_low, result.random.draws, result.state) == (1, 32, "none")


def test_a_model_flattened_for_good_prefers_nothing():
    base = _base()
    stub = Margins(base, base * 0.5, _draws(base, 0.0))
    result = measure_effect(stub, _twins(24), EDIT, SIZES, temperature=float("inf")).flattening
    assert result.temperature is None and result.versus.value == pytest.approx(np.abs(base).mean() / 2)


def test_too_few_draws_are_no_evidence():
    base = _base()
    result = measure_effect(Margins(base, base * 0.9, _draws(base, 0.0)), _twins(24), EDIT, SIZES)
    few = replace(result, random=replace(result.random, draws=FEWEST_DRAWS - 1))
    assert (result.state, few.state) == ("less", "none")
    older = replace(result, random=replace(result.random, draws=5, as_low=None, as_high=None))
    assert older.state == "none"


@pytest.mark.parametrize("flattened", [False, True])
def test_a_record_is_read_back(flattened):
    base = _base()
    result = measure_effect(Margins(base, base * 0.9, _draws(base, 0.0)), _twins(24), EDIT, SIZES)
    if flattened:
        result = replace(result, flattening=Flattening(1.25, Interval(-0.1, -0.2, -0.05)))
    record = json.loads(json.dumps(result.to_dict()))
    assert Effect.from_dict(record) == result
    for key in ("twins", "random_twins", "random_as_low", "random_as_high", "state"):
        record.pop(key)  # of an earlier version
    assert Effect.from_dict(record).state == "none" and Effect.from_dict(record).twins == 48


def test_the_same_probe_again_says_nothing_new():
    twins = _twins(8)
    assert different_twins(twins * 50) == twins and len(different_twins([twins[0]] * 6)) == 1
    base = _base()
    stub = Margins(base, base * 0.9, _draws(base, 0.0))
    once = measure_effect(stub, twins, EDIT, SIZES)
    assert measure_effect(stub, twins * 4, EDIT, SIZES) == once
    with pytest.raises(InputError, match="1 different twins"):
        measure_effect(stub, [twins[0]] * 6, EDIT, SIZES)
    with pytest.raises(InputError, match="the same sentence twice"):
        different_twins([Twin(Probe("a", "a", "d"), None)])
    with pytest.raises(InputError, match="empty sentence"):
        different_twins([Twin(Probe("a", " ", "d"), None)])


def test_no_numbers_are_refused():
    base = _base()
    with pytest.raises(InputError, match="no numbers"):
        measure_effect(Margins(base, base * np.nan, _draws(base, 0.0)), _twins(24), EDIT, SIZES)


def test_random_neurons_are_any_of_the_layer():
    """Each neuron as often as any other, the edit's own too: a random edit is then one more draw among its draws."""
    edit = Edit("down", {0: {i: float(i + 2) for i in range(15)}, 1: {3: 0.5}})
    drawn = [random_edit(edit, [30, 8], seed) for seed in range(400)]
    for other in drawn:
        assert sorted(other.factors[0].values()) == sorted(edit.factors[0].values())
        assert list(other.factors[1].values()) == [0.5] and other.base is None
    assert len({other.sha256 for other in drawn}) > 300
    for layer, (size, share) in enumerate(((30, 0.5), (8, 1 / 8))):
        times = np.bincount([n for other in drawn for n in other.factors[layer]], minlength=size)
        # Five standard deviations of a share of 400 draws.
        assert np.abs(times / 400 - share).max() < 5 * (share * (1 - share) / 400) ** 0.5
    factors = [other.factors[0].get(3) for other in drawn]
    assert len({f for f in factors if f is not None}) == 15  # and any factor


# ------------------------------------------------------------------------------------------------------ on a real model


@pytest.fixture(scope="module")
def demo():
    return load_model(DEMO, torch.float32), load_tokenizer(DEMO)


@pytest.fixture(scope="module")
def measured(demo):
    edit = Edit("down", {1: {i: -3.0 for i in range(0, 180, 2)}, 2: {5: 3.0}})
    return edit, measure_impact(*demo, load_recipe("demo"), edit, [192] * 4)


def _sentence(model, tokenizer, text, temperature=1.0):
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        logp = (model(ids).logits[0, :-1].double() / temperature).log_softmax(-1)
    return float(logp.gather(1, ids[0, 1:, None]).mean())


def test_effect_equals_a_plain_loop(demo, measured):
    """Every sentence by itself, without hooks and with them, and flattened."""
    (model, tokenizer), (edit, result) = demo, measured
    recipe, effect = load_recipe("demo"), result.effect

    def scores(temperature=1.0):
        margin = [
            [_sentence(model, tokenizer, t, temperature) for t in (p.first, p.second)]
            for twin in recipe.twins
            for p in twin.probes
        ]
        return np.subtract(*np.array(margin).T).reshape(-1, 2).mean(1)

    before, flat = scores(), scores(effect.flattening.temperature)
    with hooked(model, edit):
        after = scores()
    assert effect.absolute == pytest.approx((np.abs(before).mean(), np.abs(after).mean()), abs=1e-5)
    assert effect.signed == pytest.approx((before.mean(), after.mean()), abs=1e-5)
    assert effect.change.value == pytest.approx((np.abs(after) - np.abs(before)).mean(), abs=2e-5)
    assert effect.flattening.versus.value == pytest.approx((np.abs(after) - np.abs(flat)).mean(), abs=2e-5)
    place = np.unique(np.linspace(0, len(before) - 1, 24).round().astype(int))
    sizes = []
    for seed in range(effect.random.draws):
        with hooked(model, random_edit(edit, [192] * 4, seed)):
            sizes.append(np.abs(scores()[place]).mean())
    assert effect.random.lowest == pytest.approx(min(sizes) - np.abs(before[place]).mean(), abs=2e-5)
    assert effect.random.as_low == sum(size <= np.abs(after[place]).mean() for size in sizes)


def test_cost_equals_a_plain_loop(demo, measured):
    (model, tokenizer), (edit, actual) = demo, measured
    recipe, cost = load_recipe("demo"), actual.cost
    text = neutral_text(tokenizer, recipe)

    def logp():
        with torch.no_grad():
            return [model(torch.tensor([row])).logits[0, :-1].double().log_softmax(-1) for row in text.rows]

    def right():
        tokens = answer_tokens(tokenizer, recipe.answers)
        result = []
        for question in recipe.ask(None):
            with torch.no_grad():
                p = model(torch.tensor([encode(tokenizer, recipe, question)])).logits[0, -1].softmax(-1)
            reply = {answer: float(p[list(ids.values())].sum()) for answer, ids in tokens.items()}
            result.append(max(reply, key=reply.get) == question.answer)
        return np.array(result)

    base, answers = logp(), right()
    with hooked(model, edit):
        edited, changed = logp(), right()
    kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(base, edited, strict=True)]).mean()
    assert cost.kl.value == pytest.approx(float(kl), rel=1e-4)
    for model_logp, perplexity in ((base, cost.before), (edited, cost.after)):
        nll = -torch.cat(
            [q.gather(1, torch.tensor(row[1:])[:, None]) for q, row in zip(model_logp, text.rows, strict=True)]
        )
        assert perplexity.value == pytest.approx(float(nll.mean().exp()), rel=1e-5)
    assert cost.rise.value == pytest.approx(cost.after.value / cost.before.value, rel=1e-6)
    control = np.array([question.control for question in recipe.ask(None)])
    for part, which in ((cost.questions, ~control), (cost.controls, control)):
        assert (part.total, part.before, part.after) == (which.sum(), answers[which].sum(), changed[which].sum())
        gone, won = (answers & ~changed)[which].sum(), (~answers & changed)[which].sum()
        assert part.p == pytest.approx(stats.binomtest(int(gone), int(gone + won)).pvalue if gone + won else 1.0)
    assert changed.sum() < answers.sum()  # the edit is harmful, so that the figures differ
    assert cost.balanced.chance == 0.5 and Cost.from_dict(json.loads(json.dumps(cost.to_dict()))) == cost


def test_continuations_are_greedy(demo, measured):
    """Token by token, each time the whole text anew."""
    (model, tokenizer), (edit, result) = demo, measured
    assert [item.about for item in result.cost.continuations] == ["neutral"] * 3 + ["probe"] * 3

    def said(prompt):
        ids = tokenizer(prompt)["input_ids"]
        start = len(ids)
        for _ in range(16):
            with torch.no_grad():
                ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
            if ids[-1] == tokenizer.eos_token_id:
                break
        return tokenizer.decode(ids[start:], skip_special_tokens=True)

    for item in result.cost.continuations:
        assert item.before == said(item.prompt)
        with hooked(model, edit):
            assert item.after == said(item.prompt)
    assert any(item.before != item.after for item in result.cost.continuations)


def _cost(kl=(0.01, 0.0, 0.02), rise=(1.0, 0.99, 1.01), **parts):
    return Cost("package", 64, Interval(*kl), Interval(9, 8, 10), Interval(9, 8, 10), Interval(*rise), **parts)


@pytest.mark.parametrize(
    "cost, state",
    [
        (_cost(), "low"),
        (_cost(kl=(0.3, MOST_KL + 0.01, 0.4)), "high"),
        (_cost(kl=(0.1, 0.05, MOST_KL + 0.01)), "unclear"),
        (_cost(rise=(1.2, MOST_RISE + 0.01, 1.3)), "high"),
        (_cost(rise=(1.04, 1.0, MOST_RISE + 0.01)), "unclear"),
        (_cost(rise=(0.8, 0.7, 0.9)), "low"),
        (_cost(questions=Answered(48, 40, 20, 0.001)), "high"),
        (_cost(controls=Answered(48, 40, 39, 1.0)), "low"),
        (_cost(controls=Answered(48, 20, 40, 0.001)), "low"),
        (_cost(kl=(float("nan"), 0.0, 0.0)), "high"),
    ],
)
def test_states_of_a_cost(cost, state):
    assert cost.state == state


def test_a_constant_answer_is_no_better_than_chance():
    yes = np.array(["yes"] * 30 + ["no"] * 10)
    assert Balanced.of((yes == "yes").astype(float), yes).constant
    nearly = (yes == "yes") | (np.arange(40) == 35)  # a little better, within chance
    assert Balanced.of(nearly.astype(float), yes).value > 0.5 and Balanced.of(nearly.astype(float), yes).constant
    assert Balanced.of(np.ones(40), yes)[::3] == (1.0, 0.5) and not Balanced.of(np.ones(40), yes).constant


def test_neutral_texts_are_taken_from_all_over_the_list():
    from kbne_edit.evaluation.neutral import NeutralText

    text = NeutralText("package", tuple(map(str, range(40))), [[0] * 11] * 40)
    assert text.targets == 400 and text.within(400) == text.within(9999) == text
    some = text.within(100)
    assert some.targets == 100 and some.texts[0] == "0" and some.texts[-1] == "39" and len(set(some.texts)) == 10
    assert text.within(1).texts == ("0",)
