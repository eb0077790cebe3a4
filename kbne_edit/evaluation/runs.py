"""Measures models on the same requests and texts: base, edit, and controls.

Random draws are measured only on tasks of bias, all of them in one batch, because only changes of bias are compared
with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import numpy as np

from ..edit import Edit
from ..progress import progress
from .controls import Control, Kind

if TYPE_CHECKING:
    import torch

    from .benchmark import Benchmark
    from .scoring import Scorer

Columns = dict[str, np.ndarray]  # {task: [n, k]}


class Measured(NamedTuple):
    """Measurements of a model. tasks: columns of each task; states: the last layer's output on the neutral texts, [N,
    D].

    States, not logits: a baked directory has the base's head, so only the base has to stay in memory.
    """

    tasks: Columns
    states: torch.Tensor


@dataclass(frozen=True)
class Run:
    """One model's columns. kind: "base", "edit", or that of a control; neutral: columns of the texts, None if they were
    not measured."""

    kind: Literal["base", "edit"] | Kind
    name: str
    tasks: Columns
    neutral: np.ndarray | None = None


@dataclass(frozen=True)
class Runs:
    """Runs on the same items, the base first. temperature: of the flattened base, None if none has the edit's KL."""

    runs: tuple[Run, ...]
    temperature: float | None = None
    _by_name: dict[str, Run] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._by_name.update({run.name: run for run in self.runs})

    def __iter__(self) -> Iterator[Run]:
        return iter(self.runs)

    @property
    def base(self) -> Run:
        return self._by_name["base"]

    @property
    def edit(self) -> Run | None:
        """None if only the base was measured."""
        return self._by_name.get("edit")

    def of(self, task: str) -> dict[str, np.ndarray]:
        """{run: columns} of one task, of the runs that measured it."""
        return {run.name: run.tasks[task] for run in self.runs if task in run.tasks}

    def controls(self, task: str) -> dict[Kind, list[np.ndarray]]:
        """{kind of control: columns of each of its runs} of one task."""
        result: dict = {}
        for run in self.runs:
            if run.kind not in ("base", "edit") and task in run.tasks:
                result.setdefault(run.kind, []).append(run.tasks[task])
        return result


@dataclass(frozen=True)
class Bench:
    """The tasks and the token ids of the neutral texts."""

    tasks: Sequence[Benchmark]
    texts: Sequence[Sequence[int]]

    def measure(self, scorer: Scorer, label: str, edit: Edit | None = None) -> Measured:
        """Measure one model, task by task: no figure depends on the other tasks."""
        from . import neutral

        with scorer.edited(edit):
            with progress(label, sum(len(task.pairs) for task in self.tasks), "request") as update:
                columns = {task.name: task.measure(scorer, update) for task in self.tasks}
            return Measured(columns, neutral.states(scorer.model, self.texts))

    def measure_draws(self, scorer: Scorer, edits: Sequence[Edit], label: str = "random neurons") -> list[Columns]:
        """Measure the tasks of bias under each of these edits, in one batch."""
        from .batched import score_edits, shortened

        tasks = [task for task in self.tasks if task.kind == "bias"]
        result: list[Columns] = [{} for _ in edits]
        with progress(f"{label} ({len(edits)})", sum(len(task.pairs) for task in tasks) * len(edits), "request") as up:
            for task in tasks if edits else ():
                scored = score_edits(scorer.model, shortened(task.pairs, scorer.max_length), edits, update=up)
                for columns, logp, greedy in zip(result, scored.logprobs, scored.greedy, strict=True):
                    columns[task.name] = task.columns(list(zip(logp.tolist(), greedy.tolist(), strict=True)))
        return result

    def complete(self, scorer: Scorer, edited: Measured | None, controls: Sequence[Control]) -> Runs:
        """The base, the edit as measured, the controls, and the flattened base. scorer: of the base."""
        from . import neutral

        base = self.measure(scorer, "evaluate: base")
        base_logits = neutral.Logits(scorer.model, base.states)

        def run(kind: Literal["base", "edit"] | Kind, name: str, measured: Measured) -> Run:
            logits = neutral.Logits(scorer.model, measured.states, scorer.temperature)
            return Run(kind, name, measured.tasks, neutral.columns(self.texts, logits, base_logits))

        runs = [run("base", "base", base)]
        if edited is None:
            return Runs(tuple(runs))
        runs.append(run("edit", "edit", edited))
        draws = [control for control in controls if control.kind == "random neurons"]
        columns = self.measure_draws(scorer, [control.edit for control in draws], "evaluate: random neurons")
        runs += [Run(c.kind, c.name, tasks) for c, tasks in zip(draws, columns, strict=True)]
        for control in controls:
            if control.kind != "random neurons":
                measured = self.measure(scorer, f"evaluate: {control.name}", control.edit)
                runs.append(run(control.kind, control.name, measured))
        kl = float(neutral.KL.of(cast("np.ndarray", runs[1].neutral).mean(0)))
        temperature = neutral.temperature(base_logits, kl)
        if temperature:
            scorer.temperature = temperature
            runs.append(run("flattened", "flattened", self.measure(scorer, "evaluate: flattened")))
            scorer.temperature = 1.0
        return Runs(tuple(runs), temperature)
