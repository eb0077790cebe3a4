"""The objective: a figure of bias nearer to its ideal, without a loss of capability."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from ..errors import InputError
from ..evaluation.effect import FEWEST_DRAWS
from ..evaluation.result import ABILITIES, ALPHA, TaskResult, loss_of
from ..statistics import Clusters, Interval, Part, pooled

if TYPE_CHECKING:
    from ..evaluation.benchmark import Figure
    from ..evaluation.result import Loss
    from .halves import Half
    from .settings import Criteria

FIGURES = ("absolute margin", "unwanted margin")  # default figures, in order of preference


class Looks(NamedTuple):
    """How many chances a random edit had to be confirmed.

    uses: how often this data confirmed an edit, this one included; candidates: edits that the choice was among.
    """

    uses: int = 1
    candidates: int = 1

    @property
    def draws(self) -> int:
        """The number of draws of random neurons to exceed, so that at most 5 of 100 random choices are confirmed.

        The best of k random edits is below all of n draws in about k / (k + n) cases. New items do not change that:
        neurons that are lucky on one half are lucky on the other.
        """
        return (FEWEST_DRAWS + 1) * self.uses * self.candidates - 1


class Run(NamedTuple):
    """Measurements of a model on a half. tasks: {task: columns [n, k]}; neutral: columns of the texts, or None."""

    tasks: dict[str, np.ndarray]
    neutral: np.ndarray | None


@dataclass(frozen=True)
class Objective:
    """steering: {task: the figure of bias}. Bounds: of each of the abilities less than `margin` points are lost, and
    the KL from the base on neutral text is below `max_kl`, if that is given. clusters: of the dev half's items, by
    task; chance: accuracy of a guess in the abilities, in percent."""

    steering: dict[str, Figure]
    abilities: list[str]
    margin: float
    max_kl: float | None = None
    clusters: dict[str, Clusters] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)

    @property
    def figure(self) -> Figure:
        """The steering figure, which is the same in every task."""
        return next(iter(self.steering.values()))

    def moved(self, run: Run, others: Sequence[Run]) -> Interval:
        """The figure's distance from its ideal minus that of the others, mean over the tasks."""
        parts = []
        for name, figure in self.steering.items():
            columns = [run.tasks[name], *(other.tasks[name] for other in others)]
            difference = _difference(figure, columns[0].shape[1], len(others))
            parts.append(Part(np.concatenate(columns, 1), difference, self.clusters.get(name)))
        return pooled(parts)

    def distance(self, tasks: Mapping[str, np.ndarray]) -> float:
        """The figure's distance from its ideal, mean over the tasks: {task: columns [n, k]}."""
        return float(np.mean([f.distance(tasks[name].mean(0)) for name, f in self.steering.items()]))

    def lowest(self, base: Run, run: Run) -> dict[str, float]:
        """Lower end of the change of each ability, in points above chance."""
        return {name: self._loss(name, base, run) for name in self.abilities}

    def _loss(self, name: str, base: Run, run: Run) -> float:
        before, after, chance = base.tasks[name], run.tasks[name], self.chance.get(name, 0.0)
        return loss_of(before, after, self.margin, chance, self.clusters.get(name)).lowest

    def breach(self, lowest: dict[str, float], kl: float) -> float:
        """How far the bounds are exceeded, below 0 if they hold. lowest: as of `lowest`."""
        loss = -self.margin - min(lowest.values())
        return loss if self.max_kl is None else max(loss, kl - self.max_kl)

    def confirmed(self, tasks: dict[str, TaskResult], kl: float, looks: Looks = Looks()) -> Confirmation:  # noqa: B008
        """The confirmation from results on the test half, where only the steering figure is tested.

        Every steering task must have less bias, with p below .05 / uses, beyond as many random draws as the looks
        require; and the bounds must hold. kl: of the edit.
        """
        good, bounds, reasons = [], [], []
        for name in self.steering:
            result = tasks[name].figures[self.figure.name]
            better = result.state == "better" and "random neurons" not in result.same_as
            p = min(1.0, cast("float", result.p_holm) * looks.uses)
            good.append(better and result.draws >= looks.draws and p < ALPHA)
            reasons.append(f"{name}: {result.described}")
            if better and result.draws < looks.draws:
                reasons.append(
                    f"the best of {looks.candidates} edits must exceed {looks.draws} draws, not {result.draws}"
                )
        if looks.uses > 1:
            reasons.append(f"this data has confirmed {looks.uses} edits, so p is multiplied by {looks.uses}")
        for name in self.abilities:
            excluded = cast("Loss", tasks[name].loss).excluded
            bounds.append(excluded)
            reasons.append(f"{name}: a loss of {self.margin:g} points is {'' if excluded else 'not '}excluded")
        if self.max_kl is not None:
            bounds.append(kl < self.max_kl)
            reasons.append(f"KL {kl:.2g} is {'' if bounds[-1] else 'not '}below {self.max_kl:g}")
        return Confirmation(all(good) and all(bounds), "; ".join(reasons), all(bounds), looks.uses, looks.candidates)


class Confirmation(NamedTuple):
    """The result on test. text: figure by figure; bounded: the bounds hold; uses, candidates: as of `Looks`."""

    confirmed: bool
    text: str
    bounded: bool = True
    uses: int = 1
    candidates: int = 1

    def to_dict(self) -> dict[str, Any]:
        return self._asdict()


def _difference(figure: Figure, k: int, others: int) -> Callable[[np.ndarray], np.ndarray]:
    """The first k columns' distance from the ideal minus the mean distance of the others, k columns each."""

    def difference(means: np.ndarray) -> np.ndarray:
        first, *rest = (figure.distance(means[..., i * k : (i + 1) * k]) for i in range(others + 1))
        return first - sum(rest) / others

    return difference


def objective_of(halves: Sequence[Half], criteria: Criteria) -> Objective:
    """The objective for the tasks that there are: bias tasks with this figure (None: the first of FIGURES that one has)
    steer; capability tasks (where there are none, the recipe's questions) bound the loss.

    Raises InputError if nothing steers or bounds, or if a half is so small that no loss could ever be excluded.
    """
    of_bias = [task for task in halves[0].benchmarks if task.kind == "bias"]
    known = {f.name for task in of_bias for f in task.figures if f.ideal is not None}
    margin = criteria.margin
    figure = criteria.figure or next(filter(known.__contains__, FIGURES), FIGURES[0])
    steering = {m.name: f for m in of_bias for f in m.figures if f.name == figure and figure in known}
    if not steering:
        cure = f"--figure is one of {', '.join(sorted(known))}" if known else "there is no bias task with data at all"
        raise InputError(f"no bias task has the figure {figure!r}: {cure}")
    by_kind = ([task.name for task in halves[0].benchmarks if task.kind == kind] for kind in ABILITIES)
    abilities = next(filter(None, by_kind), None)
    if not abilities:
        raise InputError(
            "no task bounds the loss of capability: add arc_easy, arc_challenge, openbookqa, copa or knowledge_controls"
        )
    for task in (task for half in halves for task in half.benchmarks if task.name in abilities):
        unharmed = np.ones((len(task.sizes), 1))
        best = loss_of(unharmed, unharmed, margin, 0.0, task.drawn()).lowest
        if best <= -margin:
            raise InputError(
                f"{task.name} has {len(unharmed)} items in a half, too few to exclude a loss of {margin:g} points "
                f"even where none is lost (lower end {best:.1f}): take more, or --margin {math.floor(-best) + 1}"
            )
    clusters = {task.name: task.drawn() for task in halves[0].benchmarks}
    chance = {task.name: task.chance_level for task in halves[0].benchmarks if task.name in abilities}
    return Objective(steering, abilities, margin, criteria.max_kl, clusters, chance)
