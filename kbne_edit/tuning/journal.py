"""The journal of a sweep: one line of JSON for each finished edit, so that a killed run can be resumed.

A line is appended and synced when its edit is finished. An incomplete last line has no line break, and is removed. The
first line records what the measurements depend on; a journal of other settings is refused.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..disk.publishing import claim, write_errors
from ..errors import InputError
from ..files import open_input, parse_json


class Journal:
    """{key: record} on disk, locked until `close`.

    Raises InputError if the file is damaged or of other settings, OutputError if it cannot be written or another run
    is writing it.
    """

    def __init__(self, path: Path, settings: dict):
        self._path = path
        self._records: dict[str, dict] = {}
        with write_errors(path):
            path.absolute().parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o666)
        claim(self._handle, path.parent)
        try:
            with open_input(path, InputError) as file:
                raw = file.read()
            whole = raw[: raw.rfind(b"\n") + 1]
            with write_errors(path):
                os.ftruncate(self._handle, len(whole))
            lines = [parse_json(line, str(path), InputError, _CURE) for line in whole.splitlines()]
            self._take(lines, settings)
        except BaseException:
            self.close()
            raise

    def _take(self, lines: list, settings: dict) -> None:
        if not lines:
            self._append(settings)
            return
        head, *rest = lines
        if not isinstance(head, dict) or not all(isinstance(x, dict) and set(x) == {"key", "record"} for x in rest):
            raise InputError(f"{self._path} is not a journal of kbne-edit: {_CURE}")
        if other := sorted(key for key in {*settings, *head} if settings.get(key) != head.get(key)):
            raise InputError(
                f"{self._path.parent} was begun with other settings ({', '.join(other)}): choose another --out"
            )
        self._records = {line["key"]: line["record"] for line in rest}

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key: str) -> dict | None:
        return self._records.get(key)

    def put(self, key: str, record: dict) -> None:
        """Append a record; it is on the disk when this returns."""
        self._append({"key": key, "record": record})
        self._records[key] = record

    def _append(self, line: dict) -> None:
        data = (json.dumps(line) + "\n").encode()
        with write_errors(self._path):
            while data:
                data = data[os.write(self._handle, data) :]
            os.fsync(self._handle)

    def close(self) -> None:
        os.close(self._handle)


_CURE = "move it away, or choose another --out"
