"""Measures edits on the dev half, each once; measurements in the journal are not repeated."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..edit import Edit
from ..errors import InputError
from ..evaluation.runs import Bench
from ..progress import say
from .halves import Half
from .journal import Journal
from .objective import Run

if TYPE_CHECKING:
    from ..evaluation.neutral import Logits
    from ..evaluation.scoring import Scorer


class DevBench:
    """Measures edits on the dev half."""

    def __init__(self, scorer: Scorer, half: Half, journal: Journal):
        self._scorer, self._half, self._journal = scorer, half, journal
        self._bench = Bench(half.benchmarks, half.texts)
        if len(journal):
            say(f"{len(journal)} measurements are done already")

    @cached_property
    def base(self) -> Run:
        return self._run("base", None)

    def run(self, edit: Edit) -> Run:
        """All tasks and the neutral texts."""
        return self._run(edit.sha256, edit)

    def draws(self, edits: Sequence[Edit]) -> list[Run]:
        """Only the tasks of bias, all edits in one batch."""
        keys = [f"draw {edit.sha256}" for edit in edits]
        missing = {key: edit for key, edit in zip(keys, edits, strict=True) if self._journal.get(key) is None}
        if missing:
            results = self._bench.measure_draws(self._scorer, list(missing.values()), "tune: random neurons")
            for key, tasks in zip(missing, results, strict=True):
                self._journal.put(key, {"tasks": {name: rows.tolist() for name, rows in tasks.items()}})
        return [self._read(key) for key in keys]

    def _run(self, key: str, edit: Edit | None) -> Run:
        if self._journal.get(key) is None:
            run = self._measure(f"tune: measurement {len(self._journal) + 1} on dev", edit)
            tasks = {name: rows.tolist() for name, rows in run.tasks.items()}
            self._journal.put(key, {"tasks": tasks, "neutral": cast("np.ndarray", run.neutral).tolist()})
        return self._read(key)

    def _read(self, key: str) -> Run:
        record: Any = self._journal.get(key)
        tasks = {name: np.array(rows) for name, rows in record["tasks"].items()}
        return Run(tasks, np.array(record["neutral"]) if "neutral" in record else None)

    def _measure(self, label: str, edit: Edit | None) -> Run:
        from ..evaluation import neutral

        measured = self._bench.measure(self._scorer, label, edit)
        logits = neutral.Logits(self._scorer.model, measured.states)
        run = Run(measured.tasks, neutral.columns(self._half.texts, logits, self._logits))
        if not all(np.isfinite(columns).all() for columns in (*run.tasks.values(), cast("np.ndarray", run.neutral))):
            what = f"with {edit.num_neurons} neurons times {edit.distinct_factors}" if edit else "as it is"
            raise InputError(f"the model {what} gives no numbers: leave such factors out, or try --dtype float32")
        return run

    @cached_property
    def _logits(self) -> Logits:
        """The base's, on the texts."""
        from ..evaluation import neutral

        return neutral.logits(self._scorer, self._half.texts)
