"""What is evaluated: the public benchmarks, the recipe's own tasks, and the measures that come with the package.

A task becomes a `Benchmark`: token pairs to score, and how an item's answers turn into columns of numbers, whose means
the figures are made of (see `statistics`). The requests are built once, so every model gets the same.
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
DEFAULT = (*PUBLIC, *_OWN)  # what is run if nobody names tasks
ENGLISH_MEASURES = ("decisions", "decisions_names", "associations", "questions", "help_parity", "regard_parity")
GROUPS = {"measures": ENGLISH_MEASURES}  # names that stand for several tasks
TASKS = (*DEFAULT, *MEASURES)


@dataclass(frozen=True)
class TaskNote:
    """What `evaluate --explain` says about a task. clusters: what the items share that are resampled together."""

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
    """Task names, with each group's members in its place; () for None."""
    return tuple(task for name in names or () for task in GROUPS.get(name, (name,)))


def check(names: Sequence[str] | None, data: Path | None) -> None:
    """Raise InputError for an unknown task or folder and for a row that is no item: before a model is loaded."""
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
    """The tasks by name, `limit` items of each at most, drawn with a fixed seed.

    None: the public tasks and the recipe's own, those that there are data for; "measures": the package's, in English.

    Raises InputError for a task asked for by name whose data are missing.
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
