"""How often is a positive verdict given to random edits, and how often to edits that do reduce bias?

Random edits hold any neurons of the demo model, at factors 0, 0.25, 2 and 3.5, in layouts of several sizes; 36 or 12 of
the recipe's twins are asked. They are no better than random neurons by construction, so "less bias" is wrong each time
it is said, and should be said in 5 of 100 cases at most. Each edit is held against random neurons of its own, drawn as
the commands draw them, so edits are independent of each other. A real effect is a model whose scores are shrunk by 5,
10 or 20 % towards 0, with the side effects of a random edit on top: power and rate are of the same procedure.

bake      `measure_effect` on the recipe's probes, as every bake and apply run it (flattening left out: it can only take
          verdicts away, and a shrunk score has no temperature)
evaluate  "less bias, beyond every control", in any figure of the probes
tune      chosen among 4 edits on one half of the twins, where it must do better than each draw, and confirmed on the
          other half, where it must do better than 79. An edit is a candidate in 4 tunings: these are not independent

    python benchmarks/verdicts.py --edits 300 --json
    python benchmarks/verdicts.py --edits 300 --json --factor 2     (one factor, about 3 minutes)
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from kbne_edit import Edit, load_recipe
from kbne_edit.disk.checkpoint import Checkpoint
from kbne_edit.evaluation.batched import margins_of_edits
from kbne_edit.evaluation.benchmark import Benchmark
from kbne_edit.evaluation.effect import DRAWS, measure_effect, random_edit
from kbne_edit.evaluation.figures import TWINS, twin_columns
from kbne_edit.evaluation.result import TaskResult, results_of
from kbne_edit.evaluation.runs import Run, Runs
from kbne_edit.evaluation.twins import twin_scores
from kbne_edit.hub.source import resolved
from kbne_edit.models.loading import load_model, load_tokenizer
from kbne_edit.recipe import Twin
from kbne_edit.statistics import wilson
from kbne_edit.tuning.objective import Looks, Objective
from kbne_edit.tuning.objective import Run as HalfRun

FACTORS = (0.0, 0.25, 2.0, 3.5)
LAYOUTS = ({0: 13, 3: 4}, {0: 10, 1: 10, 2: 10, 3: 10}, {2: 3})  # neurons by layer: as the demo's edit, wide, small
TWIN_COUNTS = (36, 12)  # how many of the recipe's twins are asked
SHRUNK = (0.05, 0.10, 0.20)
POWER_FACTOR = 2.0  # of the random edit under a real effect
CANDIDATES = 4  # edits that a tuning chooses among
COMMANDS = ("bake", "evaluate", "tune")


class Cell(NamedTuple):
    factor: float
    layout: dict[int, int]
    twins: int

    def edits(self, sizes: Sequence[int], count: int) -> list[Edit]:
        """Random edits. sizes: neurons of each layer."""
        result = []
        for seed in range(count):
            rng = np.random.default_rng([int(100 * self.factor), sum(self.layout.values()), self.twins, seed])
            chosen = {la: rng.choice(sizes[la], n, False).tolist() for la, n in self.layout.items()}
            result.append(Edit("down", {la: dict.fromkeys(neurons, self.factor) for la, neurons in chosen.items()}))
        return result


@dataclass(frozen=True)
class Model:
    """The model that is edited. sizes: neurons of each layer."""

    model: nn.Module
    tokenizer: Any
    sizes: list[int]

    def margins(self, twins: Sequence[Twin], edits: Sequence[Edit | None]) -> np.ndarray:
        """[edits, probes]"""
        return margins_of_edits(self.model, self.tokenizer, [p for twin in twins for p in twin.probes], edits)


@dataclass(frozen=True)
class Trial:
    """An edit and its draws of random neurons, measured. Margins of the probes: after [P], draws {SHA-256: [P]}."""

    edit: Edit
    after: np.ndarray
    draws: dict[str, np.ndarray]

    @classmethod
    def measured(cls, model: Model, twins: Sequence[Twin], edit: Edit) -> Trial:
        drawn = [random_edit(edit, model.sizes, seed) for seed in range(DRAWS)]
        after, *draws = model.margins(twins, [edit, *drawn])
        return cls(edit, after, {e.sha256: row for e, row in zip(drawn, draws, strict=True)})

    def with_draws(self, model: Model, twins: Sequence[Twin], count: int) -> Trial:
        """The same with more draws, `count` in all."""
        drawn = [random_edit(self.edit, model.sizes, seed) for seed in range(len(self.draws), count)]
        more = {e.sha256: row for e, row in zip(drawn, model.margins(twins, drawn), strict=True)}
        return replace(self, draws=self.draws | more)

    def shrunk(self, base: np.ndarray, share: float) -> Trial:
        """The same edit of a model that has less association, and the same word frequency. base: margins, [P]."""
        association = base.reshape(-1, 2).mean(1, keepdims=True)
        return Trial(self.edit, (self.after.reshape(-1, 2) - share * association).ravel(), self.draws)


class Judge:
    """The three procedures on measured margins. base: of the model itself, [P]."""

    def __init__(self, model: Model, twins: Sequence[Twin], base: np.ndarray):
        self._model, self._twins, self._base = model, twins, base
        order = np.random.default_rng(0).permutation(len(twins))
        self._dev, self._test = order[::2], order[1::2]

    def bake(self, trial: Trial) -> bool:
        """Is there less bias?"""
        places = {probe: i for i, probe in enumerate(probe for twin in self._twins for probe in twin.probes)}

        def margins(probes, edits, _):
            chosen = [places[probe] for probe in probes]
            return np.array([self._margins(trial, edit)[chosen] for edit in edits])

        return measure_effect(margins, self._twins, trial.edit, self._model.sizes).state == "less"

    def _margins(self, trial: Trial, edit: Edit | None) -> np.ndarray:
        if edit is None:
            return self._base
        return trial.after if edit == trial.edit else trial.draws[edit.sha256]

    def evaluate(self, trial: Trial) -> bool:
        """Is any figure better, beyond every control?"""
        result = self._results(trial, range(len(self._twins)), None)
        return any(figure.beyond_every_control("better") for figure in result["probes"].figures.values())

    def tune(self, candidates: Sequence[Trial]) -> bool:
        """Chosen among candidates on one half, is one confirmed on the other?"""
        objective = Objective({"probes": next(f for f in TWINS if f.name == "absolute margin")}, [], 5.0)

        def half(margins: np.ndarray) -> HalfRun:
            return HalfRun({"probes": self._columns(margins, self._dev)}, None)

        base = half(self._base)
        for trial in sorted(candidates, key=lambda trial: objective.distance(half(trial.after))):
            run, draws = half(trial.after), [half(margins) for margins in trial.draws.values()]
            if objective.distance(run) >= objective.distance(base):
                return False
            outdone = all(objective.distance(run) < objective.distance(draw) for draw in draws)
            if outdone and objective.moved(run, draws).high < 0:
                return self._confirmed(objective, trial, Looks(candidates=len(candidates)))
        return False

    def _confirmed(self, objective: Objective, trial: Trial, looks: Looks) -> bool:
        sizes = [np.abs(twin_scores(self._twins, margins)[self._test]).mean() for margins in trial.draws.values()]
        if min(sizes) > np.abs(twin_scores(self._twins, trial.after)[self._test]).mean():
            trial = trial.with_draws(self._model, self._twins, looks.draws)
        return objective.confirmed(self._results(trial, self._test, "absolute margin"), 0.0, looks).confirmed

    def _results(self, trial: Trial, which: Sequence[int], only: str | None) -> dict[str, TaskResult]:
        """Every figure of these twins, tested."""
        runs = [
            Run(kind, kind, {"probes": self._columns(margins, which)})
            for kind, margins in (("base", self._base), ("edit", trial.after))
        ]
        for i, margins in enumerate(trial.draws.values()):
            runs.append(Run("random neurons", f"random {i + 1}", {"probes": self._columns(margins, which)}))
        count = len(which)
        task = Benchmark("probes", "bias", [], [4] * count, [""] * count, None, TWINS, [f"t{i}" for i in range(count)])
        return results_of([task], Runs(tuple(runs)), 5.0, only)

    def _columns(self, margins: np.ndarray, which: Sequence[int]) -> np.ndarray:
        scores = twin_scores(self._twins, margins)
        return np.array([twin_columns(float(scores[i])) for i in which])


Verdicts = dict[str, list[bool]]


def verdicts(model: Model, twins: Sequence[Twin], cell: Cell, count: int, shares: Sequence[float]) -> list[Verdicts]:
    """What each command says of `count` random edits, whose scores are shrunk by each of these shares."""
    place = np.unique(np.linspace(0, len(twins) - 1, cell.twins).round().astype(int))
    twins = [twins[i] for i in place]
    base = model.margins(twins, [None])[0]
    judge = Judge(model, twins, base)
    measured = [Trial.measured(model, twins, edit) for edit in cell.edits(model.sizes, count)]
    reply: list[Verdicts] = []
    for share in shares:
        trials = [trial.shrunk(base, share) for trial in measured]
        rounds = [[trials[(i + j) % count] for j in range(CANDIDATES)] for i in range(count)]
        reply.append(
            {
                "bake": [judge.bake(trial) for trial in trials],
                "evaluate": [judge.evaluate(trial) for trial in trials],
                "tune": [judge.tune(candidates) for candidates in rounds],
            }
        )
    return reply


def loaded() -> tuple[Model, tuple[Twin, ...]]:
    with resolved("demo") as result:
        sizes = Checkpoint.open(result.path).layer_sizes("down")
        return Model(load_model(result.path, torch.float32), load_tokenizer(result.path), sizes), load_recipe(
            "demo"
        ).twins


def measure(factors: Sequence[float], edits: int, power: int) -> dict:
    """All rates. edits: of each factor; power: of each real effect."""
    model, twins = loaded()
    layouts = [(layout, count) for layout in LAYOUTS for count in TWIN_COUNTS]
    each = -(-edits // len(layouts))
    result: dict = {name: {} for name in COMMANDS} | {"interval": {name: {} for name in COMMANDS}, "cells": []}
    for factor in factors:
        reply: Verdicts = {name: [] for name in COMMANDS}
        for layout, count in layouts:
            (actual,) = verdicts(model, twins, Cell(factor, layout, count), each, [0.0])
            shares = {name: float(np.mean(actual[name])) for name in COMMANDS}
            result["cells"].append({"factor": factor, "layout": layout, "twins": count, "edits": each, **shares})
            print(f"factor {factor:g}, {layout}, {count} twins: {shares}", file=sys.stderr, flush=True)
            for name in COMMANDS:
                reply[name] += actual[name]
        for name in COMMANDS:
            result[name][f"{factor:g}"] = float(np.mean(reply[name]))
            result["interval"][name][f"{factor:g}"] = wilson(sum(reply[name]), len(reply[name]))
    found_all = verdicts(model, twins, Cell(POWER_FACTOR, LAYOUTS[0], max(TWIN_COUNTS)), power, SHRUNK) if power else []
    result["power"] = {
        f"{share:g}": {name: float(np.mean(actual[name])) for name in COMMANDS}
        for share, actual in zip(SHRUNK, found_all, strict=False)
    }
    return result | {"edits": each * len(layouts), "power_edits": power, "draws": DRAWS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--edits", type=int, default=300, help="random edits of each factor, over all layouts and sizes"
    )
    parser.add_argument("--power", type=int, default=50, help="edits of each real effect")
    parser.add_argument("--factor", type=float, action="append", help=f"repeatable; default {FACTORS}")
    parser.add_argument("--json", action="store_true", dest="as_json")
    arguments = parser.parse_args()
    start = time.perf_counter()
    result = measure(arguments.factor or FACTORS, arguments.edits, arguments.power)
    result["seconds"] = round(time.perf_counter() - start, 1)
    if arguments.as_json:
        print(json.dumps(result))
        return
    for name in COMMANDS:
        shares = ", ".join(f"factor {factor} {share:.1%}" for factor, share in result[name].items())
        power = ", ".join(f"{float(share):.0%}: {of[name]:.0%}" for share, of in result["power"].items())
        print(f"{name}: {shares}; power for scores shrunk by {power or 'nothing'}")
    print(f"{result['edits']} edits a factor, {DRAWS} draws, {result['seconds']} s")


if __name__ == "__main__":
    main()
