"""Files: only regular ones are opened; JSON is parsed strictly; writing is atomic and never overwrites an input."""

from __future__ import annotations

import io
import json
import os
import re
import stat
from codecs import BOM_UTF8
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from .errors import CheckpointError, InputError, OutputError, of_the_machine, short, shown

MOST_JSON = 24 << 20  # bytes: parsed objects can take thirty times as much memory, which must stay below 1 GB
_CONTAINERS = 1 << 20  # lists and objects: enough for 300,000 tensors, and parsed in two seconds
_COMMAS = 4 << 20
_DEEPEST = 50
LFS_POINTER = b"version https://git-lfs"


class InputFile(io.FileIO):
    """A file whose read errors name it, so that they are not mistaken for errors of the output."""

    def __init__(self, path: Path, kind: type[InputError]):
        self._path, self._kind = path, kind
        try:
            # O_NONBLOCK: opening a pipe without a writer would block; regular files are not affected.
            super().__init__(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
        except OSError as error:
            raise self._error(error.strerror) from None
        if not stat.S_ISREG(os.fstat(self.fileno()).st_mode):
            self.close()
            raise self._error("it is not a regular file")

    def _error(self, reason: str | None) -> InputError:
        return self._kind(f"cannot read {self._path}: {reason}")

    def readinto(self, buffer: Any) -> int | None:
        try:
            return super().readinto(buffer)
        except OSError as error:
            raise self._error(error.strerror) from None

    def readall(self) -> bytes:
        try:
            return super().readall()
        except OSError as error:
            raise self._error(error.strerror) from None


def open_input(path: str | Path, kind: type[InputError] = CheckpointError) -> BinaryIO:
    """Open a regular file for reading. Raises `kind`, now and for later read errors."""
    return io.BufferedReader(InputFile(Path(path), kind))


def read_json(path: str | Path, kind: type[InputError] = CheckpointError, cure: str = "download it again") -> Any:
    """The JSON document in a file. Raises `kind`."""
    with open_input(path, kind) as file:
        return parse_json(file.read(MOST_JSON + 1), str(path), kind, cure)


def parse_json(raw: bytes, where: str, kind: type[InputError] = CheckpointError, cure: str = "") -> Any:
    """Parse JSON: UTF-8, limited in size and depth, without duplicate keys. Raises `kind` that names `where`."""
    if raw.startswith(BOM_UTF8):  # transformers does not read such a file either
        raise kind(f"{where} begins with a byte order mark: save it as UTF-8 without one")
    try:
        if raw.startswith(LFS_POINTER):
            raise ValueError("a Git LFS pointer, not the file itself: run `git lfs pull`")
        if len(raw) > MOST_JSON:
            raise ValueError(f"more than {MOST_JSON >> 20} MB")
        if raw.count(b"[") + raw.count(b"{") > _CONTAINERS:  # small containers are slow to parse, and take much memory
            raise ValueError(f"more than {_CONTAINERS:,} lists and objects")
        if raw.count(b",") > _COMMAS:
            raise ValueError(f"more than {_COMMAS:,} values")
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
        if _depth(data) > _DEEPEST:
            raise ValueError(f"nested deeper than {_DEEPEST} levels")
    except _Twice as error:
        raise kind(f"{where}: a key appears twice, {shown(error.args[0])}: remove one of them") from None
    except (ValueError, RecursionError) as error:
        raise kind(f"{where} is not JSON that can be read ({short(error)}): {cure}") from None
    return data


class _Twice(ValueError):
    """A duplicate key: parsers differ in which one counts."""


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _Twice(next(key for key in keys if keys.count(key) > 1))
    return result


def _depth(data: object) -> int:
    depth, level = 0, [data]
    while level := [v for v in level if isinstance(v, (dict, list))]:
        depth += 1
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
    return depth


def real(path: str | Path) -> Path:
    """The path without links. Path.resolve raises a RuntimeError where links lead in a circle; this leaves them."""
    return Path(os.path.realpath(path))


def forbid_overlap(out: str | Path, *inputs: str | Path, option: str = "--out") -> None:
    """Raise OutputError if writing to `out`, a file or a directory, could change one of the `inputs`."""
    target = real(out)
    for given in map(Path, inputs):
        source = real(given)
        if target == source or source in target.parents or target in source.parents:
            how = "is" if target == source else "is inside" if source in target.parents else "holds"
            raise OutputError(f"{option} {out} {how} {given}, which is read and never changed: choose another {option}")


def forbid_links_out(directory: str | Path, names: Iterable[str]) -> None:
    """Raise CheckpointError if one of the files to copy is a link out of its directory.

    A directory from elsewhere (a clone, an archive) could link to a private file, whose copy would then be published.
    .git counts as outside, because a clone keeps addresses with tokens there. The blobs of the Hub's cache, to which
    its snapshots link, count as inside.
    """
    root = real(directory)
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    for name in names:
        target = real(root / name)
        inside = target.is_relative_to(root) and ".git" not in target.relative_to(root).parts
        if not inside and target.parent != blobs:
            raise CheckpointError(
                f"{directory} holds {shown(name)}, a link to {target}, which is outside, and the output would hold "
                "a copy of that file: remove the link, or replace it by a copy if you want that"
            )


def json_text(data: object) -> str:
    """JSON as kbne-edit writes it: the same data gives the same bytes, in ASCII."""
    return json.dumps(data, indent=1) + "\n"


def write_json(path: str | Path, data: object) -> None:
    """Write a JSON file atomically. Raises OutputError."""
    write_text(path, json_text(data))


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically. Raises OutputError."""
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{target.name}.kbne-partial")
    try:
        if target.exists() and not target.is_file():  # /dev/stdout cannot be replaced
            target.write_text(text, encoding="utf-8")
            return
        with _own(part) as file:
            if target.exists():
                os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.rename(part, target)
    except OSError as error:
        with suppress(OSError):
            if os.lstat(part).st_uid == os.geteuid():
                part.unlink()
        failure = OutputError(f"cannot write {path}: {error.strerror or error}")
        raise of_the_machine(failure, error.errno) from None


def _own(path: Path) -> TextIO:
    """A new file for writing. Replaces one that a killed run of this user left; follows no link."""
    with suppress(FileNotFoundError):
        if os.lstat(path).st_uid == os.geteuid():
            path.unlink()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    return os.fdopen(handle, "w", encoding="utf-8")


def parse_size(text: str, what: str = "memory") -> float:
    """ "8GB", "500 MB", "12.5G" or "4GiB" in bytes. what: the quantity, for the message. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B?\s*", text, re.IGNORECASE)
    if not match:
        raise InputError(f"{what} {text!r} is not a size: give a number with a unit, e.g. 8GB")
    return float(match[1]) * (1024 if match[3] else 1000) ** ("KMGT".index(match[2].upper()) + 1)


def work_folder(out: Path) -> Path:
    """The default folder in which `bake` keeps the scores and the edit of an output."""
    path = Path(os.path.abspath(out))
    return path.parent / f"{path.name}.work"
