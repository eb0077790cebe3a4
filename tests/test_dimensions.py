"""Effect by dimension, against plain loops."""

import json

import numpy as np
import pytest

from kbne_edit import Edit, load_recipe
from kbne_edit.evaluation.effect import Effect, different_twins, measure_effect
from kbne_edit.evaluation.twins import twin_scores

EDIT = Edit("down", {0: {1: 2.0}})


def margins(probes, edits, temperature):
    """Made up: they depend on the sentences, and on whether there is an edit."""
    base = np.array([(len(probe.first) * 7 % 11 - 5) / 10 for probe in probes])
    return np.array([base * (1 if edit is None else 0.5 + 0.1 * (edit == EDIT)) for edit in edits]) / temperature


@pytest.fixture(scope="module", params=["balance", "avoid"])
def found(request):
    recipe = load_recipe("demo")
    return measure_effect(margins, recipe.twins, EDIT, [8], aim=request.param), different_twins(recipe.twins)


def test_each_dimension_equals_a_plain_loop(found):
    effect, twins = found
    probes = [probe for twin in twins for probe in twin.probes]
    before, after = (twin_scores(twins, m, effect.aim) for m in margins(probes, [None, EDIT], 1.0))
    assert len(effect.dimensions) == len({twin.dimension for twin in twins}) > 1
    for part in effect.dimensions:
        rows = [i for i, twin in enumerate(twins) if twin.dimension == part.dimension]
        size = abs if effect.aim == "balance" else float
        assert part.twins == len(rows)
        assert part.score.after == pytest.approx(sum(size(after[i]) for i in rows) / len(rows))
        assert part.preferred.before == pytest.approx(sum(before[i] > 0 for i in rows) / len(rows))
        assert part.change.value == pytest.approx(part.score.after - part.score.before)
        most = max(rows, key=lambda i: abs(after[i] - before[i]))
        assert part.example == (twins[most].first.first, twins[most].first.second)
        assert part.example_score == pytest.approx((before[most], after[most]))
    whole = sum(part.score.after * part.twins for part in effect.dimensions) / effect.twins
    assert whole == pytest.approx(effect.score.after)  # nothing is left out, nothing counted twice


def test_round_trip_and_records_without_them(found):
    effect, _ = found
    record = json.loads(json.dumps(effect.to_dict()))
    assert Effect.from_dict(record) == effect
    del record["dimensions"]
    assert Effect.from_dict(record).dimensions == ()
