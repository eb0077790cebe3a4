"""What is wanted of an edit: a figure of bias nearer to its ideal, and no loss of capability."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import InputError
from ..evaluation.evaluate import ABILITIES, ALPHA, least
from ..statistics import pooled

if TYPE_CHECKING:
    from ..evaluation.benchmark import Figure
    from .halves import Half

FIGURES = ("absolute margin", "unwanted margin")  # what steers unless told otherwise


class Run(NamedTuple):
    """What a model did on a half. tasks: {task: columns [n, k]}; neutral: columns of the texts."""

    tasks: dict[str, np.ndarray]
    neutral: np.ndarray


@dataclass(frozen=True)
class Goal:
    """steering: {task: the figure of bias}. Bounds: of each of the abilities less than `margin` points are lost, and
    the KL from the base on neutral text is below `max_kl`, if that is given."""

    steering: dict[str, Figure]
    abilities: list[str]
    margin: float
    max_kl: float | None = None

    @property
    def figure(self) -> Figure:
        """The steering one, which is the same in every task."""
        return next(iter(self.steering.values()))

    def moved(self, run: Run, others: Sequence[Run]) -> list[float]:
        """[d, low, high]: the figure's distance from its ideal, less that of the others; mean over the tasks."""
        parts = []
        for name, figure in self.steering.items():
            columns = [run.tasks[name], *(other.tasks[name] for other in others)]
            parts.append((np.concatenate(columns, 1), _difference(figure, columns[0].shape[1], len(others))))
        return pooled(parts)

    def lowest(self, base: Run, run: Run) -> dict[str, float]:
        """Lower end, in points, of the change of each ability."""
        return {name: least(base.tasks[name], run.tasks[name]) for name in self.abilities}

    def breach(self, lowest: dict[str, float], kl: float) -> float:
        """By how much the bounds are broken, below 0 if they are not. lowest: as of `lowest`."""
        loss = -self.margin - min(lowest.values())
        return loss if self.max_kl is None else max(loss, kl - self.max_kl)

    def verdict(self, report: dict) -> dict:
        """Of a report of `evaluate` whose one tested figure is the steering one.

        confirmed: in every steering task there is less bias, beyond random neurons, and the bounds hold.
        """
        good, said = [], []
        for name, figure in self.steering.items():
            entry = report["tasks"][name]["figures"][figure.name]
            nearer = figure.away(entry["edit"]) < figure.away(entry["base"])
            good.append(entry["p_holm"] < ALPHA and nearer and entry["beyond"]["random neurons"][2] < 0)
            said.append(f"{name}: {entry['verdict']}")
        for name in self.abilities:
            loss = report["tasks"][name]["figures"]["accuracy"]["non_inferior"]
            good.append(loss["shown"])
            said.append(f"{name}: a loss of {self.margin:g} points is {'' if loss['shown'] else 'not '}excluded")
        if self.max_kl is not None:
            kl = report["neutral"]["KL from the base"]["edit"][0]
            good.append(kl < self.max_kl)
            said.append(f"KL {kl:.2g} is {'' if good[-1] else 'not '}below {self.max_kl:g}")
        return {"confirmed": all(good), "text": "; ".join(said)}


def _difference(figure: Figure, k: int, others: int) -> Callable[[np.ndarray], np.ndarray]:
    """The first k columns' distance from the ideal, less the mean distance of the others' k columns each."""

    def difference(means: np.ndarray) -> np.ndarray:
        first, *rest = (figure.distance(means[..., i * k : (i + 1) * k]) for i in range(others + 1))
        return first - sum(rest) / others

    return difference


def goal_of(halves: Sequence[Half], figure: str | None, margin: float, max_kl: float | None) -> Goal:
    """The goal for the tasks that there are: bias tasks with this figure (None: the first of FIGURES that one has)
    steer; capability tasks (where there are none, the recipe's questions) bound the loss.

    Raises InputError if nothing steers or bounds, or if a half is so small that no loss could ever be excluded.
    """
    of_bias = [mark for mark in halves[0].marks if mark.kind == "bias"]
    known = {f.name for mark in of_bias for f in mark.figures if f.ideal is not None}
    figure = figure or next(filter(known.__contains__, FIGURES), FIGURES[0])
    steering = {m.name: f for m in of_bias for f in m.figures if f.name == figure and figure in known}
    if not steering:
        cure = f"--figure is one of {', '.join(sorted(known))}" if known else "there is no bias task with data at all"
        raise InputError(f"no bias task has the figure {figure!r}: {cure}")
    by_kind = ([mark.name for mark in halves[0].marks if mark.kind == kind] for kind in ABILITIES)
    abilities = next(filter(None, by_kind), None)
    if not abilities:
        raise InputError(
            "no task bounds the loss of capability: add arc_easy, arc_challenge, openbookqa, copa or knowledge_controls"
        )
    for mark in (mark for half in halves for mark in half.marks if mark.name in abilities):
        unharmed = np.ones((len(mark.sizes), 1))
        if (best := least(unharmed, unharmed)) <= -margin:
            raise InputError(
                f"{mark.name} has {len(unharmed)} items in a half, too few to exclude a loss of {margin:g} points even "
                f"where none is lost (lower end {best:.1f}): take more, or --margin {math.floor(-best) + 1}"
            )
    return Goal(steering, abilities, margin, max_kl)
