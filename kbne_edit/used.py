"""How often data has confirmed an edit: a test half is new once per data, not once per folder or per split.

The record lies beside the scores, one line of JSON for each edit that was tested. Each further edit on the same data is
one more look, and the threshold is corrected for it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from .disk.publishing import write_errors
from .errors import InputError, OutputError
from .files import open_input
from .progress import say

SUFFIX = ".tested.jsonl"


def record_of(scores: Path) -> Path:
    """The record of a scores file."""
    return scores.with_name(scores.name + SUFFIX)


def count_use(scores: Sequence[Path], data: str, edit: str) -> int:
    """Record that an edit is tested on this data, and return the number of this look, from 1.

    data, edit: their SHA-256. The same edit again is the same look. If the record cannot be read or written, a line
    is printed, and nothing is counted.
    """
    place = 1
    for path in map(record_of, scores):
        lines = _lines(path)
        known = [line["edit"] for line in lines if line.get("data") == data and isinstance(line.get("edit"), str)]
        order = list(dict.fromkeys(known))
        if edit not in order:
            order.append(edit)
            try:
                with write_errors(path), open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"data": data, "edit": edit}) + "\n")
            except OutputError as error:
                say(f"cannot record how often this data was used: {error}")
        place = max(place, order.index(edit) + 1)
    return place


def _lines(path: Path) -> list[dict]:
    if not path.exists():
        return []
    try:
        with open_input(path, InputError) as file:
            raw = file.read(1 << 20)
        records = [json.loads(line) for line in raw.splitlines() if line.strip()]
    except (InputError, ValueError, RecursionError) as error:
        say(f"{path} cannot be read ({error}): how often this data was used is not known")
        return []
    return [line for line in records if isinstance(line, dict)]
