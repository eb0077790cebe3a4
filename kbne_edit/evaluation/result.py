"""Results of an evaluation: figures of every run, changes with intervals, tests, and conclusions.

An edit is beyond random neurons if a figure moves further than any figure of any draw, in units of the spread between
draws (`statistics.beyond_draws`). It is beyond another control if the interval of the difference excludes 0. Changes
have the sign of the direction towards the ideal. Rejected: changes of the distance from the ideal, in which an edit
that overshoots seems to do nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple, TypedDict, cast

import numpy as np

from ..statistics import (
    Clusters,
    Interval,
    IntervalJSON,
    beyond_draws,
    change,
    holm,
    interval,
    least_change,
    mcnemar,
    permutation,
)
from .effect import FEWEST_DRAWS

if TYPE_CHECKING:
    from .benchmark import Benchmark, Figure
    from .runs import Runs

ABILITIES = ("capability", "knowledge")  # kinds of tasks in which an edit must not make a model worse
ALPHA = 0.05  # of all tested figures together, by Holm
RANDOM: Final = "random neurons"

State = Literal["better", "worse", "none"]


class LossJSON(TypedDict):
    """The possible loss of an ability, in points. shown: a loss of the margin is excluded."""

    margin: float
    points: float
    lowest: float
    chance: float
    shown: bool


class FigureKeys(TypedDict, total=False):
    """One figure of one task. Other keys are the runs, with the figure's value in each.

    change: from base to edit. controls: the changes under each kind of control; beyond: the edit minus the control,
    below 0 where the edit is nearer to the ideal. p_holm: over all tested figures. same_as: controls that the edit does
    not exceed.
    """

    change: IntervalJSON
    ideal: float | Literal["lowest"] | None
    controls: dict[str, IntervalJSON]
    beyond: dict[str, IntervalJSON]
    draws: int
    beyond_random: int
    p: float | None
    p_holm: float | None
    state: State
    same_as: list[str]
    verdict: str
    non_inferior: LossJSON


class GroupKeys(TypedDict):
    """A group of a task's items. Other keys are the figures of base and edit."""

    items: int


FigureJSON = Annotated[dict[str, Any], FigureKeys, float]
GroupJSON = Annotated[dict[str, Any], GroupKeys, FigureJSON]


class TaskJSON(TypedDict):
    """One task. items: how many; figures: by name; groups: by name."""

    kind: str
    items: int
    figures: dict[str, FigureJSON]
    groups: dict[str, GroupJSON]


@dataclass(frozen=True)
class FigureResult:
    """One figure of one task.

    values: of each run, by name. change: from base to edit. controls: the changes under each kind of control. beyond:
    the edit minus the control, signed so that below 0 is nearer to the ideal. draws: of random neurons. beyond_random:
    -1 if the edit goes further towards the ideal than every draw in any figure, 1 if further away from it, else 0.
    p: of the change, by itself; p_holm: Holm's, over all tested figures. None, {} or 0 where there is no edit, or no
    ideal to judge it by.
    """

    figure: Figure
    values: dict[str, float]
    change: Interval | None = None
    controls: dict[str, Interval] | None = None
    beyond: dict[str, Interval] | None = None
    draws: int = 0
    beyond_random: int = 0
    p: float | None = None
    p_holm: float | None = None

    @property
    def tested(self) -> bool:
        return self.p_holm is not None

    @property
    def nearer(self) -> bool:
        """True if the edit brings the figure nearer to its ideal."""
        return bool(self.figure.away(self.values["edit"]) < self.figure.away(self.values["base"]))

    @property
    def state(self) -> State:
        """True if the edit changes it significantly."""
        if self.p_holm is None or self.p_holm >= ALPHA:
            return "none"
        return "better" if self.nearer else "worse"

    @property
    def same_as(self) -> tuple[str, ...]:
        """Kinds of controls that the edit does not exceed, in the direction of its change."""
        side = -1 if self.nearer else 1
        same = [name for name, change in (self.beyond or {}).items() if change.side != side]
        if self.draws and self.beyond_random != side and RANDOM not in same:
            same.insert(0, RANDOM)
        return tuple(same)

    def beyond_every_control(self, state: State) -> bool:
        """True if it is better (or worse), and beyond every control, enough random draws among them."""
        return self.state == state and not self.same_as and self.draws >= FEWEST_DRAWS

    @property
    def described(self) -> str:
        """One line on a tested figure."""
        if self.state == "none":
            return "no effect found"
        words = ("better", "worse") if self.figure.ideal == 100 else (f"less {self.figure.excess}", "")
        text = words[0] if self.nearer else words[1] or f"more {self.figure.excess}"
        if self.same_as:
            few = f" ({self.draws} draws cannot tell)" if 0 < self.draws < FEWEST_DRAWS else ""
            return f"{text}, but not beyond {', '.join(self.same_as)}{few}"
        return f"{text}, beyond every control"

    def to_dict(self) -> FigureJSON:
        record: dict[str, Any] = dict(self.values)
        if self.change:
            record["change"] = list(self.change)
        if self.beyond is None or self.controls is None:
            return record
        record["ideal"] = "lowest" if self.figure.ideal == -math.inf else self.figure.ideal  # JSON has no infinity
        record["controls"] = {name: list(change) for name, change in self.controls.items()}
        record["beyond"] = {name: list(change) for name, change in self.beyond.items()}
        record |= {"draws": self.draws, "beyond_random": self.beyond_random}
        if self.tested:
            record |= {"p": self.p, "p_holm": self.p_holm, "state": self.state}
            record |= {"same_as": list(self.same_as), "verdict": self.described}
        return record


class Loss(NamedTuple):
    """The possible loss of an ability. points: lower end of the change of accuracy, in points. lowest: rescaled to a
    model with an accuracy of 100 %: points * (100 - chance) / (accuracy - chance). For a model at 43 % of four choices,
    5 points are more than a quarter of what it knows."""

    margin: float
    points: float
    lowest: float
    chance: float

    @property
    def excluded(self) -> bool:
        """True if a loss of the margin is excluded."""
        return self.lowest > -self.margin

    def to_dict(self) -> LossJSON:
        return {
            "margin": self.margin,
            "points": self.points,
            "lowest": self.lowest,
            "chance": self.chance,
            "shown": self.excluded,
        }


@dataclass(frozen=True)
class TaskResult:
    """One task. figures by name; groups: {group: (items, figures)} of base and edit; loss: of an ability, else None."""

    name: str
    kind: str
    items: int
    figures: dict[str, FigureResult]
    groups: dict[str, tuple[int, dict[str, FigureResult]]]
    loss: Loss | None = None

    def to_dict(self) -> TaskJSON:
        figures = {name: result.to_dict() for name, result in self.figures.items()}
        if self.loss:
            figures["accuracy"]["non_inferior"] = self.loss.to_dict()
        groups = {
            name: {"items": items} | {figure: result.to_dict() for figure, result in figures_.items()}
            for name, (items, figures_) in self.groups.items()
        }
        return {"kind": self.kind, "items": self.items, "figures": figures, "groups": groups}


def results_of(tasks: Sequence[Benchmark], runs: Runs, margin: float, only: str | None = None) -> dict[str, TaskResult]:
    """All figures of all runs; for the edit also changes and tests (only of the figure `only`, if given)."""
    result = {task.name: _task(task, runs, margin) for task in tasks}
    places = [
        (task.name, name)
        for task in tasks
        for name, figure in result[task.name].figures.items()
        if figure.p is not None and only in (None, name)
    ]
    p_holm = holm([cast("float", result[task].figures[name].p) for task, name in places])
    further = _further({place: result[place[0]].figures[place[1]] for place in places}, runs)
    for (task, name), p in zip(places, p_holm, strict=True):
        figures = result[task].figures
        figures[name] = replace(figures[name], p_holm=p, beyond_random=further.get((task, name), 0))
    return result


def _further(tested: dict[tuple[str, str], FigureResult], runs: Runs) -> dict[tuple[str, str], int]:
    """Which of the tested figures move further than in every draw: -1 towards the ideal, 1 away from it, else 0.

    All figures are tested together, so that many figures do not make a false finding likelier.
    """
    draws = [run.name for run in runs if run.kind == RANDOM]
    known = {place: result for place, result in tested.items() if draws and draws[0] in result.values}
    if not known or len(draws) < FEWEST_DRAWS:
        return {}
    progress = np.array([[_progress(result, name) for result in known.values()] for name in ("edit", *draws)])
    towards, away = beyond_draws(progress), beyond_draws(-progress)
    return {place: int(away[i]) - int(towards[i]) for i, place in enumerate(known)}


def _progress(result: FigureResult, run: str) -> float:
    """How far a run moves a figure towards its ideal."""
    return _direction(result.figure, result.values["base"]) * (result.values[run] - result.values["base"])


def _direction(figure: Figure, base: float) -> float:
    """1 if the ideal is above the base, -1 if it is below."""
    return -1.0 if figure.ideal == -math.inf or cast("float", figure.ideal) < base else 1.0


def _task(task: Benchmark, runs: Runs, margin: float) -> TaskResult:
    columns, clusters = runs.of(task.name), task.drawn()
    figures = {f.name: _figure(f, task, runs) for f in _defined(task.figures, columns)}
    groups = {}
    for group in sorted({*task.groups} - {""}) if len({*task.groups}) > 1 else []:
        chosen = np.array([g == group for g in task.groups])
        of_group: dict[str, np.ndarray] = {name: columns[name][chosen] for name in ("base", "edit") if name in columns}
        within = task.drawn(np.flatnonzero(chosen))
        groups[group] = (
            int(chosen.sum()),
            {f.name: _values(f, of_group, within) for f in _defined(task.figures, of_group)},
        )
    loss = None
    if task.kind in ABILITIES and "edit" in columns:
        loss = loss_of(columns["base"], columns["edit"], margin, task.chance_level, clusters)
    return TaskResult(task.name, task.kind, len(task.sizes), figures, groups, loss)


def loss_of(before: np.ndarray, after: np.ndarray, margin: float, chance: float, clusters: Clusters = None) -> Loss:
    """The loss of accuracy, column 0 of [n, k]: the lower of the bootstrap and Agresti ends. chance, margin: points."""
    ends = least_change(before[:, 0], after[:, 0], clusters), change([before], [after], clusters=clusters).low
    points, known = 100 * min(ends), 100 * float(before[:, 0].mean()) - chance
    scale = (100 - chance) / known if known > 0 else 1.0  # at chance there is nothing to lose
    return Loss(margin, points, points * scale, chance)


def _defined(figures: Sequence[Figure], columns: dict[str, np.ndarray]) -> list[Figure]:
    """The figures that are defined on these items: a few items of BBQ may include no ambiguous one."""
    return [f for f in figures if all(np.isfinite(f.of(values.mean(0))) for values in columns.values())]


def _values(figure: Figure, columns: dict[str, np.ndarray], clusters: Clusters) -> FigureResult:
    """Value of each run, and the change from base to edit."""
    values = {name: float(figure.of(means.mean(0))) for name, means in columns.items()}
    if "edit" not in columns:
        return FigureResult(figure, values)
    return FigureResult(figure, values, change([columns["base"]], [columns["edit"]], figure.of, clusters))


def _figure(figure: Figure, task: Benchmark, runs: Runs) -> FigureResult:
    """`_values`, the controls, and the p of the edit's change."""
    columns, clusters = runs.of(task.name), task.drawn()
    result = _values(figure, columns, clusters)
    if "edit" not in columns or figure.ideal is None or task.kind == "open":
        return result
    before, after, controls = columns["base"], columns["edit"], runs.controls(task.name)
    direction = _direction(figure, result.values["base"])

    def away(means: np.ndarray) -> np.ndarray:
        return -direction * figure.of(means)

    alone = not task.clusters or len(set(task.clusters)) == len(task.clusters)
    return replace(
        result,
        controls={kind: change([before], values, figure.of, clusters) for kind, values in controls.items()},
        beyond={kind: change(values, [after], away, clusters) for kind, values in controls.items()},
        draws=len(controls.get(RANDOM, ())),
        p=mcnemar(before[:, figure.binary], after[:, figure.binary])
        if figure.binary is not None and alone
        else permutation(before, after, figure.of, clusters),
    )


def neutral_of(runs: Runs) -> dict[str, dict[str, Interval]]:
    """{"perplexity", "KL from the base": {run: value with its interval}} on the neutral texts."""
    from . import neutral

    figures = (neutral.PERPLEXITY, neutral.KL)
    return {f.name: {run.name: interval(run.neutral, f.of) for run in runs if run.neutral is not None} for f in figures}
