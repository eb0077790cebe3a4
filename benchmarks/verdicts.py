"""How often is a positive verdict given to random edits, and how often to edits that do reduce bias?

Random edits are drawn as the controls are: any neurons of the demo model, at factors 0, 0.25, 2 and 3.5, in layouts of
several sizes. They are no better than random neurons by construction, so "less bias" is wrong each time it is said, and
should be said in 5 of 100 cases at most. A real effect is a model whose scores are shrunk by 5, 10 or 20 % towards 0,
with the side effects of a random edit on top, so that power and rate are of the same procedure.

bake      `measure_effect` on the recipe's probes, as every bake and apply run it (flattening left out: it can only take
          verdicts away, and a shrunk score has no temperature)
evaluate  "less bias, beyond every control", in any figure of the probes
tune      confirmed: chosen on one half of the twins, where it must do better than each draw, and confirmed on the other

    python benchmarks/verdicts.py --edits 300 --json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kbne_edit import Edit, load_recipe
from kbne_edit.disk.checkpoint import Checkpoint
from kbne_edit.evaluation.batched import margins_of_edits
from kbne_edit.evaluation.benchmark import Benchmark
from kbne_edit.evaluation.effect import DRAWS, measure_effect, random_edit
from kbne_edit.evaluation.figures import TWINS, twin_columns
from kbne_edit.evaluation.result import results_of
from kbne_edit.evaluation.runs import Run, Runs
from kbne_edit.evaluation.twins import twin_scores
from kbne_edit.hub.source import resolved
from kbne_edit.models.loading import load_model, load_tokenizer
from kbne_edit.recipe import Twin
from kbne_edit.tuning.objective import Goal
from kbne_edit.tuning.objective import Run as HalfRun

FACTORS = (0.0, 0.25, 2.0, 3.5)
LAYOUTS = ({0: 13, 3: 4}, {0: 10, 1: 10, 2: 10, 3: 10}, {2: 3})  # neurons by layer: as the demo's edit, wide, small
SHRUNK = (0.05, 0.10, 0.20)
TWIN_COUNTS = (36, 12)  # how many of the recipe's twins are asked


@dataclass(frozen=True)
class Pool:
    """Margins of probes under many random edits of one layout and factor. margins: {edit's SHA-256: [probes]}."""

    twins: tuple[Twin, ...]
    base: np.ndarray
    edits: list[Edit]
    margins: dict[str, np.ndarray]
    sizes: list[int]

    def scores(self, margins: np.ndarray) -> np.ndarray:
        return twin_scores(self.twins, margins)


class Judge:
    """The three procedures on measured margins."""

    def __init__(self, pool: Pool, count: int):
        self._pool, place = pool, np.unique(np.linspace(0, len(pool.twins) - 1, count).round().astype(int))
        self._twins = tuple(pool.twins[i] for i in place)
        self._probes = np.concatenate([[2 * i, 2 * i + 1] for i in place])
        self._base = pool.base[self._probes]
        drawn = (random_edit(pool.edits[0], pool.sizes, seed) for seed in range(DRAWS))
        self._seeds = {edit.sha256: seed for seed, edit in enumerate(drawn)}

    def bake(self, after: np.ndarray, draws: Sequence[np.ndarray]) -> bool:
        """Is there less bias? after, draws: margins of all probes."""
        edit, seeds = self._pool.edits[0], self._seeds  # stands for the edit; which neurons it has does not matter here
        places = {probe.first: i for i, probe in enumerate(p for twin in self._twins for p in twin.probes)}

        def margins(probes, edits, _):
            chosen = [places[probe.first] for probe in probes]
            return np.array([self._of(e, edit, after, draws, seeds)[chosen] for e in edits])

        return measure_effect(margins, self._twins, edit, self._pool.sizes).state == "less"

    def _of(self, asked, edit, after, draws, seeds) -> np.ndarray:
        if asked is None:
            return self._base
        return (after if asked == edit else draws[seeds[asked.sha256]])[self._probes]

    def _columns(self, margins: np.ndarray, which: Sequence[int]) -> np.ndarray:
        scores = twin_scores(self._twins, margins[self._probes])
        return np.array([twin_columns(float(scores[i])) for i in which])

    def _runs(self, after, draws, which) -> Runs:
        runs = [Run("base", "base", {"probes": self._columns(self._pool.base, which)})]
        runs.append(Run("edit", "edit", {"probes": self._columns(after, which)}))
        for i, draw in enumerate(draws):
            runs.append(Run("random neurons", f"random {i + 1}", {"probes": self._columns(draw, which)}))
        return Runs(tuple(runs))

    def _task(self, count: int) -> Benchmark:
        return Benchmark("probes", "bias", [], [4] * count, [""] * count, None, TWINS, [f"t{i}" for i in range(count)])

    def evaluate(self, after: np.ndarray, draws: Sequence[np.ndarray]) -> bool:
        """Is any figure better, beyond every control?"""
        which = range(len(self._twins))
        results = results_of([self._task(len(which))], self._runs(after, draws, which), 5.0)
        return any(figure.beyond_every_control("better") for figure in results["probes"].figures.values())

    def tune(self, candidates: Sequence[np.ndarray], draws: Sequence[Sequence[np.ndarray]]) -> bool:
        """Chosen among candidates on one half, is one confirmed on the other? draws: of each candidate."""
        order = np.random.default_rng(0).permutation(len(self._twins))
        dev, test = order[::2], order[1::2]
        figure = next(f for f in TWINS if f.name == "absolute margin")
        goal = Goal({"probes": figure}, [], 5.0)

        def half(margins):
            return HalfRun({"probes": self._columns(margins, dev)}, None)

        base = half(self._pool.base)
        ranked = sorted(range(len(candidates)), key=lambda i: goal.moved(half(candidates[i]), [base]).value)
        for i in ranked:
            run, others = half(candidates[i]), [half(draw) for draw in draws[i]]
            if goal.moved(run, [base]).value >= 0:
                return False
            if goal.moved(run, others).high < 0 and all(goal.distance(run) < goal.distance(o) for o in others):
                results = results_of(
                    [self._task(len(test))], self._runs(candidates[i], draws[i], test), 5.0, "absolute margin"
                )
                found = results["probes"].figures["absolute margin"]
                return found.beyond_every_control("better")
        return False


def pool_of(model, tokenizer, sizes, recipe, layout: dict[int, int], factor: float, count: int) -> Pool:
    """`count` random edits, measured in batches."""
    edits = []
    for seed in range(count):
        rng = np.random.default_rng([int(100 * factor), sum(layout.values()), seed])
        chosen = {la: rng.choice(sizes[la], n, False).tolist() for la, n in layout.items()}
        edits.append(Edit("down", {la: dict.fromkeys(neurons, factor) for la, neurons in chosen.items()}))
    measured = margins_of_edits(model, tokenizer, recipe.probes, [None, *edits])
    margins = {edit.sha256: row for edit, row in zip(edits, measured[1:], strict=True)}
    return Pool(recipe.twins, measured[0], edits, margins, sizes)


def rates(pool: Pool, edits: int, shrink: float, count: int, candidates: int = 4) -> dict[str, list[bool]]:
    """What each procedure says of `edits` edits: random ones, whose scores are shrunk by a share."""
    judge, said = Judge(pool, count), {"bake": [], "evaluate": [], "tune": []}
    rng, every = np.random.default_rng(7), [pool.margins[edit.sha256] for edit in pool.edits]

    def drawn(apart: Sequence[int]) -> list[np.ndarray]:
        rest = np.setdiff1d(np.arange(len(every)), apart)
        return [every[i] for i in rng.choice(rest, DRAWS, False)]

    def shrunk(margins: np.ndarray) -> np.ndarray:
        """Less association, the same word frequency."""
        pairs = margins.reshape(-1, 2)
        association = (pool.base.reshape(-1, 2)).mean(1, keepdims=True)
        return (pairs - shrink * association).ravel()

    for i in range(edits):
        after, draws = shrunk(every[i % len(every)]), drawn([i % len(every)])
        said["bake"].append(judge.bake(after, draws))
        said["evaluate"].append(judge.evaluate(after, draws))
        chosen = rng.choice(len(every), candidates, False)
        said["tune"].append(judge.tune([shrunk(every[c]) for c in chosen], [drawn(chosen) for _ in chosen]))
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--edits", type=int, default=300, help="random edits of each factor, over all layouts and sizes"
    )
    parser.add_argument("--power", type=int, default=100, help="edits of each real effect")
    parser.add_argument("--json", action="store_true", dest="as_json")
    arguments = parser.parse_args()
    start = time.perf_counter()
    recipe = load_recipe("demo")
    with resolved("demo") as found:
        checkpoint = Checkpoint.open(found.path)
        model, tokenizer = load_model(found.path, torch.float32), load_tokenizer(found.path)
    sizes, cells = checkpoint.layer_sizes("down"), [(layout, n) for layout in LAYOUTS for n in TWIN_COUNTS]
    each = -(-arguments.edits // len(cells))
    result: dict = {"bake": {}, "evaluate": {}, "tune": {}, "cells": [], "power": {}}
    pools = {}
    for factor in FACTORS:
        said = {"bake": [], "evaluate": [], "tune": []}
        for layout, count in cells:
            key = (factor, *layout.items())
            if key not in pools:
                pools[key] = pool_of(model, tokenizer, sizes, recipe, layout, factor, max(2 * each, 3 * DRAWS))
            cell = rates(pools[key], each, 0.0, count)
            for name, values in cell.items():
                said[name] += values
            shares = {name: float(np.mean(values)) for name, values in cell.items()}
            result["cells"].append({"factor": factor, "layout": layout, "twins": count, **shares})
            print(f"factor {factor:g}, {layout}, {count} twins: {shares}", file=sys.stderr, flush=True)
        for name, values in said.items():
            result[name][str(factor)] = float(np.mean(values))
    for shrink in SHRUNK:
        cell = rates(pools[(2.0, *LAYOUTS[0].items())], arguments.power, shrink, max(TWIN_COUNTS))
        result["power"][str(shrink)] = {name: float(np.mean(values)) for name, values in cell.items()}
    result |= {"edits": each * len(cells), "draws": DRAWS, "seconds": round(time.perf_counter() - start, 1)}
    if arguments.as_json:
        print(json.dumps(result))
        return
    for name in ("bake", "evaluate", "tune"):
        shares = ", ".join(f"factor {factor} {share:.1%}" for factor, share in result[name].items())
        power = ", ".join(f"{float(s):.0%}: {of[name]:.0%}" for s, of in result["power"].items())
        print(f"{name}: {shares}; power for scores shrunk by {power}")
    print(f"{result['edits']} edits a factor, {DRAWS} draws, {result['seconds']} s")


if __name__ == "__main__":
    main()
