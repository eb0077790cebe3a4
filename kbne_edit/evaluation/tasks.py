"""The tasks of an evaluation: the public benchmarks, the recipe's own tasks, and the measures of the package.

A task becomes a `Benchmark`: token pairs to score, and a function from an item's answers to columns of numbers. Figures
are functions of the columns' means (see `statistics`). Requests are built once, so all models get the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..progress import say
from ..recipe import Recipe
from .benchmark import Benchmark, Figure
from .datafiles import NoDataError, rows
from .figures import AVOIDED, KNOWLEDGE, TWINS
from .measures import MEASURES, measure
from .own import knowledge_benchmark, probes_benchmark
from .public import PUBLIC, public_benchmark

if TYPE_CHECKING:
    from .scoring import Scorer

_OWN = ("probes", "knowledge", "knowledge_controls")
DEFAULT = (*PUBLIC, *_OWN)  # run by default
ENGLISH_MEASURES = ("decisions", "decisions_names", "associations", "questions", "help_parity", "regard_parity")
GROUPS = {"measures": ENGLISH_MEASURES}  # names that stand for several tasks
TASKS = (*DEFAULT, *MEASURES)


@dataclass(frozen=True)
class TaskNote:
    """What `evaluate --explain` prints about a task. clusters: what items that are resampled together share."""

    name: str
    kind: str
    clusters: str
    figures: tuple[Figure, ...]

    def to_dict(self) -> dict:
        return {
            "kind": self.kind,
            "clusters": self.clusters,
            "figures": {
                figure.name: {
                    "unit": figure.unit,
                    "ideal": figure.ideal if figure.ideal is None or abs(figure.ideal) < float("inf") else "lowest",
                    "definition": figure.definition,
                    "source": figure.source,
                }
                for figure in self.figures
            },
        }


def explain(names: Sequence[str] | None = None) -> tuple[TaskNote, ...]:
    """Every figure of the tasks with its definition and source. Raises InputError for an unknown task."""
    check(names, None)
    wanted = expanded(names) or TASKS
    notes = {name: TaskNote(name, task.kind, task.clusters, task.figures) for name, task in PUBLIC.items()}
    notes["probes"] = TaskNote("probes", "bias", "twin", (*TWINS, *AVOIDED))
    for name in ("knowledge", "knowledge_controls"):
        notes[name] = TaskNote(name, "knowledge", "question", KNOWLEDGE)
    for name in set(wanted) & set(MEASURES):
        notes[name] = TaskNote(name, MEASURES[name].kind, MEASURES[name].clusters, MEASURES[name].figures())
    return tuple(notes[name] for name in wanted)


def expanded(names: Sequence[str] | None) -> tuple[str, ...]:
    """Task names, with groups replaced by their members; () for None."""
    return tuple(task for name in names or () for task in GROUPS.get(name, (name,)))


def check(names: Sequence[str] | None, data: Path | None) -> None:
    """Raise InputError for an unknown task or folder and for an invalid row, before a model is loaded."""
    if unknown := sorted(set(expanded(names)) - set(TASKS)):
        known = ", ".join((*TASKS, *GROUPS))
        raise InputError(f"--tasks: there is no task {', '.join(unknown)}; known: {known}")
    if data and not data.is_dir():
        raise InputError(f"--data {data} is not a directory")
    for name in expanded(names) or DEFAULT:
        if data and name in PUBLIC:
            _check_rows(name, data, named=names is not None)


def _check_rows(name: str, data: Path, named: bool) -> None:
    try:
        rows(name, data, PUBLIC[name].patterns)
    except NoDataError:
        if named:
            raise


def benchmarks(
    names: Sequence[str] | None, data: Path | None, limit: int | None, recipe: Recipe, scorer: Scorer, tokenizer: Any
) -> list[Benchmark]:
    """The tasks by name, with at most `limit` items of each, drawn with a fixed seed.

    None: the public tasks with data, and the recipe's; "measures": the package's, in English.

    Raises InputError for a named task whose data are missing.
    """
    result, offline = [], False
    for name in expanded(names) or DEFAULT:
        try:
            if name == "probes":
                result.append(probes_benchmark(recipe, scorer, limit))
            elif name in _OWN:
                result.append(knowledge_benchmark(name, recipe, tokenizer, limit))
            elif name in MEASURES:
                result.append(measure(name, scorer, tokenizer, limit))
            elif offline:  # each further task would try for half a minute
                raise NoDataError(f"{name}: the Hub cannot be reached; give files with --data DIR")
            else:
                result.append(public_benchmark(name, data, limit, scorer))
        except NoDataError as error:
            if names:
                raise
            say(f"left out: {error}")
            offline |= isinstance(error.__cause__, ConnectionError)
    return result
