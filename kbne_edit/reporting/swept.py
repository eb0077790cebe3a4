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
    """The sweep, if it chose this edit. Another sweep is an error if it was given, else it is left out."""
    if not given and not file.exists():
        return None
    try:
        tuning = load_tuning(file)
        if (tuning.base, tuning.chosen) != (edit.base, edit.sha256):
            raise InputError(f"{file} did not choose this edit: pass the --tuning of its run")
        return _sweep(tuning, file_hash(file))
    except InputError as error:
        if given:
            raise
        say(f"tune.json left out: {error}")
        return None


def _sweep(tuning: Tuning, sha256: str) -> Sweep:
    confirmation = tuning.confirmation
    return Sweep(
        figure=tuning.figure,
        margin=tuning.margin,
        max_kl=tuning.max_kl,
        chosen_by=tuning.chosen_by,
        steered_by=tuning.steered_by,
        bounded_by=tuning.bounded_by,
        split=tuple(_split(name, halves) for name, halves in tuning.split.items()),
        points=tuple(
            SweepPoint(
                settings=in_words(point.settings),
                neurons=point.neurons,
                bias=point.bias,
                kl=point.kl,
                lowest=min(point.lowest.values()),
                within=point.within,
                front=point.front,
                chosen=point.edit == tuning.chosen,
            )
            for point in tuning.points
        ),
        test=tuple(TaskTest(row.task, row.change, row.p, row.text, row.beyond) for row in tuning.tested) or None,
        confirmed=confirmation and confirmation.confirmed,
        verdict=confirmation and confirmation.text,
        uses=confirmation and confirmation.uses,
        sha256=sha256,
    )


def _split(task: str, halves: dict) -> SplitRow:
    dev, test = halves["dev"], halves["test"]
    return SplitRow(task, dev["items"], dev["sha256"], test["items"], test["sha256"])
