"""The choice on dev: among the edits within bounds and on the Pareto front, the best one beyond random neurons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, cast

from ..disk.checkpoint import Checkpoint
from ..edit import Edit
from ..evaluation.effect import random_edit
from .objective import Objective, Run
from .result import Point
from .search import Sweep, front, sweep
from .settings import Search

if TYPE_CHECKING:
    import numpy as np

    from ..attribution.scores import Scores
    from ..statistics import Interval
    from .bench import DevBench

_BLOCK = 8  # draws at once; once a draw is as good as the edit, no more are needed


class Choice(NamedTuple):
    """points: every edit tried; edit: the chosen one, None if there is none."""

    points: tuple[Point, ...]
    edit: Edit | None
    sweep: Sweep


@dataclass(frozen=True)
class Chooser:
    """Measures the edits of a space on dev, and chooses one. draws: of random neurons, which it must exceed."""

    checkpoint: Checkpoint
    bench: DevBench
    objective: Objective
    draws: int

    def choose(self, search: Search, scores: dict[str, Scores]) -> Choice:
        """scores: by site."""
        measured: dict[str, Point] = {}
        result = sweep(search.space, scores, search.trials, search.seed, self._measure(measured))
        points = {
            key: replace(measured[key], settings=tuple(candidate.settings))
            for key, candidate in result.candidates.items()
        }
        # The base is on every front, with no change and no cost, so it dominates edits that do not lower the bias.
        held = [point for point in points.values() if point.within and point.bias.value < 0]
        best = [held[i] for i in front([(point.bias.value, point.kl) for point in held])]
        for point in best:
            points[point.edit] = replace(point, front=True)
        for point in best:
            edit = result.candidates[point.edit].edit
            points[point.edit] = tried = self._against_random(points[point.edit], edit)
            if tried.as_good == 0 and cast("Interval", tried.beyond_random).high < 0:
                return Choice(tuple(points.values()), edit, result)
        return Choice(tuple(points.values()), None, result)

    def _measure(self, points: dict[str, Point]) -> Callable[[Edit], tuple[float, float, float]]:
        """A function for the sweep: edit -> (bias, KL, by how much the bounds are broken). points: added to."""
        from ..evaluation import neutral

        def measure(edit: Edit) -> tuple[float, float, float]:
            if edit.sha256 not in points:
                base, run = self.bench.base, self.bench.run(edit)
                lowest, kl = (
                    self.objective.lowest(base, run),
                    float(neutral.KL.of(cast("np.ndarray", run.neutral).mean(0))),
                )
                points[edit.sha256] = Point(
                    edit=edit.sha256,
                    neurons=edit.num_neurons,
                    settings=(),
                    bias=self.objective.moved(run, [base]),
                    kl=kl,
                    lowest=lowest,
                    within=self.objective.breach(lowest, kl) < 0,
                )
            point = points[edit.sha256]
            return point.bias.value, point.kl, self.objective.breach(point.lowest, point.kl)

        return measure

    def _against_random(self, point: Point, edit: Edit) -> Point:
        """Compare an edit with random neurons of the same layers: it must be better than each draw."""
        sizes = self.checkpoint.layer_sizes(edit.site)
        run, draws, as_good = self.bench.run(edit), [], 0
        for start in range(0, self.draws, _BLOCK):
            seeds = range(start, min(start + _BLOCK, self.draws))
            draws += self.bench.draws([random_edit(edit, sizes, seed) for seed in seeds])
            as_good = self._as_good(run, draws)
            if as_good:
                break
        beyond = self.objective.moved(run, draws)
        return replace(point, beyond_random=beyond, draws=len(draws), as_good=as_good)

    def _as_good(self, run: Run, draws: Sequence[Run]) -> int:
        return sum(self.objective.distance(draw.tasks) <= self.objective.distance(run.tasks) for draw in draws)
