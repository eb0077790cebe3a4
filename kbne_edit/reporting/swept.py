"""The sweep that chose an edit, from its tune.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..disk.hashing import file_hash
from ..edit import Edit
from ..errors import InputError
from ..tuning.result import Tuning, load_tuning
from ..tuning.search import in_words
from .types import SplitRow, Sweep, SweepPoint, TaskTest


def sweep_of(file: Path, given: bool, edit: Edit, say: Callable[[str], None]) -> Sweep | None:
    """What a sweep found, if it chose this edit. Another one is an error if it was asked for, and left out if not."""
    if not given and not file.exists():
        return None
    try:
        found = load_tuning(file)
        if (found.base, found.chosen) != (edit.base, edit.sha256):
            raise InputError(f"{file} did not choose this edit: pass the --tuning of its run")
        return _sweep(found, file_hash(file))
    except InputError as error:
        if given:
            raise
        say(f"tune.json left out: {error}")
        return None


def _sweep(found: Tuning, sha256: str) -> Sweep:
    said = found.confirmation
    return Sweep(
        figure=found.figure,
        margin=found.margin,
        max_kl=found.max_kl,
        chosen_by=found.chosen_by,
        steered_by=found.steered_by,
        bounded_by=found.bounded_by,
        split=tuple(_split(name, halves) for name, halves in found.split.items()),
        points=tuple(
            SweepPoint(
                settings=in_words(point.settings),
                neurons=point.neurons,
                bias=point.bias,
                kl=point.kl,
                lowest=min(point.lowest.values()),
                within=point.within,
                front=point.front,
                chosen=point.edit == found.chosen,
            )
            for point in found.points
        ),
        test=tuple(TaskTest(row.task, row.change, row.p, row.text, row.beyond) for row in found.tested) or None,
        confirmed=said and said.confirmed,
        verdict=said and said.text,
        uses=said and said.uses,
        sha256=sha256,
    )


def _split(task: str, halves: dict) -> SplitRow:
    dev, test = halves["dev"], halves["test"]
    return SplitRow(task, dev["items"], dev["sha256"], test["items"], test["sha256"])
