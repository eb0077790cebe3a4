"""What is evaluated: the public benchmarks, the recipe's own tasks, and the measures that come with the package.

A task becomes a `Benchmark`: token pairs to score, and how an item's answers turn into columns of numbers, whose means
the figures are made of (see `statistics`). The requests are built once, so every model is asked the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..progress import say
from ..recipe import Recipe
from .benchmark import Benchmark, Figure
from .datafiles import NoDataError
from .figures import AVOIDED, KNOWLEDGE, TWINS
from .own import knowledge_benchmark, probes_benchmark
from .public import PUBLIC, public_benchmark

_OWN = ("probes", "knowledge", "knowledge_controls")
TASKS = (*PUBLIC, *_OWN)


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
    notes = {name: TaskNote(name, task.kind, task.clusters, task.figures) for name, task in PUBLIC.items()}
    notes["probes"] = TaskNote("probes", "bias", "twin", (*TWINS, *AVOIDED))
    for name in ("knowledge", "knowledge_controls"):
        notes[name] = TaskNote(name, "knowledge", "question", KNOWLEDGE)
    return tuple(notes[name] for name in names or TASKS)


def check(names: Sequence[str] | None, data: Path | None) -> None:
    """Raise InputError for an unknown task or folder: before a model is loaded."""
    if unknown := sorted(set(names or ()) - set(TASKS)):
        raise InputError(f"--tasks: there is no task {', '.join(unknown)}; known: {', '.join(TASKS)}")
    if data and not data.is_dir():
        raise InputError(f"--data {data} is not a directory")


def benchmarks(
    names: Sequence[str] | None, data: Path | None, limit: int | None, recipe: Recipe, scorer, tokenizer
) -> list[Benchmark]:
    """The tasks by name (None: all that there are data for), `limit` items of each at most, drawn with a fixed seed.

    Raises InputError for a task asked for by name whose data are missing.
    """
    result, offline = [], False
    for name in names or TASKS:
        try:
            if name == "probes":
                result.append(probes_benchmark(recipe, scorer, limit))
            elif name in _OWN:
                result.append(knowledge_benchmark(name, recipe, tokenizer, limit))
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
