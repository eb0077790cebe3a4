"""What is asked of the factors: aims, and what each part counts by what it carries over."""

from dataclasses import replace

import numpy as np
import pytest

from kbne_edit.fitting.gram import Gram
from kbne_edit.fitting.problem import System, aims, folds, part_changes, validate
from kbne_edit.fitting.rows import KINDS, PARTS
from kbne_edit.fitting.units import load_units

COLUMNS = 400


@pytest.fixture(scope="module")
def units():
    return load_units(["gender", "profession"])[:160]


def system_of(units, rows, rng, margins=None):
    """A system of rows {kind: [U, P]}, 30 Fisher rows and one text whose likelihood is held."""
    index = np.full((len(units), len(KINDS)), -1)
    blocks, start = [], 0
    for kind, block in rows.items():
        index[:, KINDS.index(kind)] = start + np.arange(len(units))
        blocks.append(block)
        start += len(block)
    every = np.concatenate([*blocks, rng.normal(size=(30, COLUMNS)), rng.normal(size=(1, COLUMNS))])
    margins = np.ones((len(units), len(KINDS))) if margins is None else margins
    return System(units, margins, index, Gram(every @ every.T), np.full(30, 0.1), 0.5), every


def test_prior_is_towards_whom_prejudice_is_not_aimed_at(units):
    """By a loop over the units; a fact of professions is aimed at nobody, and exchanged labels turn a unit around."""
    rng = np.random.default_rng(0)
    rows = {kind: rng.normal(size=(len(units), COLUMNS)) for kind in (*PARTS, "level")}
    system, every = system_of(units, rows, rng)
    signs = rng.choice([-1.0, 1.0], len(units))
    expected, count = np.zeros(COLUMNS), 0
    women = {"women", "girls", "mothers", "female bosses", "grandmothers"}
    for unit, sign, row in zip(units, signs, rows["prior"], strict=True):
        if unit.type == "gender":
            expected += sign * row * (1 if unit.fact.a in women else -1)
            count += 1
    assert 0 < count < len(units)
    result = aims(system, ["prior"], np.arange(len(units)), signs)[:, 0] @ every
    assert result == pytest.approx(expected / count)
    nobody = np.flatnonzero([unit.type == "profession" for unit in units])
    assert not aims(system, ["prior"], nobody).any()


def test_a_type_at_balance_or_beyond_does_not_count(units):
    rng = np.random.default_rng(0)
    rows = {kind: rng.normal(size=(len(units), COLUMNS)) for kind in (*PARTS, "level")}
    margins = np.full((len(units), len(KINDS)), 0.2)
    margins[[unit.type == "profession" for unit in units]] = -0.2
    system, _ = system_of(units, rows, rng, margins)
    result = aims(system, ["association"], np.arange(len(units)))[: len(units), 0]
    gender = np.array([unit.type == "gender" for unit in units])
    assert result[gender] == pytest.approx(0.2 / len(units)) and not result[~gender].any()


@pytest.fixture(scope="module")
def shared_and_not(units):
    """Rows of association that have nothing in common; of prior that have a direction in common."""
    rng = np.random.default_rng(1)
    rows = {kind: rng.normal(size=(len(units), COLUMNS)) for kind in (*PARTS, "level")}
    common = rng.normal(size=COLUMNS)
    rows["prior"] += common * np.array([unit.fact.aim for unit in units])[:, None]
    return system_of(units, rows, rng)


def test_a_part_counts_by_what_it_carries_over(units, shared_and_not):
    system, _ = shared_and_not
    every = np.arange(len(units))
    result = validate(system, ("association", "prior"), every, 0.1, 0.01)
    association, prior = result.carried
    assert association < 0.3 < 0.6 < prior <= 1.1
    held = {h.part: h for h in result.held}
    assert held["prior"].change < -3 * held["prior"].error
    assert abs(held["association"].change) < 4 * held["association"].error
    # Each alone is a column of length 1 in the metric of the solution, times what it carries over.
    for part, carried, weight in zip(("association", "prior"), result.carried, result.weights, strict=True):
        falls = []
        for number in range(4):
            train = every[folds(units, 4) != number]
            y = aims(system, [part], train)[:, 0]
            falls.append(-y @ system.gram.changes(system.solve(y, train, 0.1, system.without(number, 4))))
        assert weight == pytest.approx(carried / np.sqrt(np.mean(falls)))


def test_a_part_that_no_unit_tells_of_has_no_weight(units, shared_and_not):
    system, _ = shared_and_not
    silent = replace(system, units=tuple(replace(u, fact=replace(u.fact, aim=0)) for u in units))
    assert validate(silent, ("prior",), np.arange(len(units)), 0.1, 0.01).weights == (0.0,)


def test_solutions_of_several_aims_are_those_of_each(units, shared_and_not):
    system, _ = shared_and_not
    every = np.arange(len(units))
    y = aims(system, PARTS, every)
    together = system.solve(y, every, 1.0)
    for column, alone in zip(y.T, together.T, strict=True):
        assert system.solve(column, every, 1.0) == pytest.approx(alone)


def test_changes_of_the_prior_are_of_the_group_that_prejudice_is_aimed_at(units, shared_and_not):
    system, _ = shared_and_not
    changes = np.arange(len(system.gram.matrix), dtype=float)
    known = [i for i, unit in enumerate(units) if unit.fact.aim]
    expected = [units[i].fact.aim * system.index[i, KINDS.index("prior")] for i in known]
    assert part_changes(system, "prior", np.arange(len(units)), changes).tolist() == expected
    others = system.index[:, KINDS.index("association")].astype(float)
    assert part_changes(system, "association", np.arange(len(units)), changes).tolist() == others.tolist()
