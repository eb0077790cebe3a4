"""Publishing: a directory appears whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import OutputError
from .names import DELTA, OLD_DELTA, UNDO

_OUTPUTS = ("config.json", "adapter_config.json", DELTA, OLD_DELTA, UNDO)  # one of them is in whatever this tool writes


@contextmanager
def staged(out: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of `out` that takes its name when the block ends well, and vanishes when it does not.

    A sibling left by a killed run is recognised by its name and its free lock, and removed. With `overwrite` there is
    a moment at which the old output has left its name and the new one has not taken it: a run killed there leaves the
    old one whole as `.NAME.kbne-old`, and the next run puts it back. Raises OutputError.
    """
    with _claimed(Path(out), overwrite) as part, write_errors(out):
        yield part
        _sync_tree(part)
        _swap(part, Path(os.path.abspath(out)))
    with suppress(OSError):  # the files are safe; if the name is not, the output is lost as a whole
        sync(part.parent)


def check_out(out: str | Path, overwrite: bool = False) -> None:
    """Raise OutputError unless `staged` could begin now: asked before work that takes long."""
    with _claimed(Path(out), overwrite):
        pass


@contextmanager
def _claimed(given: Path, overwrite: bool) -> Iterator[Path]:
    """The sibling, empty and locked; it is removed at the end unless it has taken the output's name by then."""
    out = Path(os.path.abspath(given))
    part, old, lock = _sibling(out, "partial"), _sibling(out, "old"), None
    try:
        with write_errors(given):
            out.parent.mkdir(parents=True, exist_ok=True)
            lock = _lock(part, given)
            if old.exists() and _is_free(out):
                os.rename(old, out)
            _discard(out)
            for left in part.iterdir():
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            if out.is_symlink() or (out.exists() and not out.is_dir()):
                raise OutputError(f"{given} exists and is no folder: choose another --out")
            if not overwrite and not _is_free(out):
                raise OutputError(f"{given} exists: choose another --out, or pass --overwrite")
            if not _is_free(out) and not any((out / name).is_file() for name in _OUTPUTS):
                raise OutputError(f"{given} holds no checkpoint, and --overwrite replaces nothing else: remove it")
        yield part
    finally:
        if lock is not None:
            if _holds(lock, part):
                shutil.rmtree(part, ignore_errors=True)
            os.close(lock)


def _sibling(out: Path, state: str) -> Path:
    return out.parent / f".{out.name}.kbne-{state}"


def _is_free(out: Path) -> bool:
    return not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir()))


def _lock(part: Path, out: Path) -> int:
    while True:
        part.mkdir(exist_ok=True)
        try:
            handle = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # renamed in this moment by a run that ended well
            continue
        claim(handle, out)
        if _holds(handle, part):
            return handle
        os.close(handle)


def claim(handle: int, out: Path) -> None:
    """Lock an open file or folder until it is closed. Raises OutputError, and closes it, if another run has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise OutputError(f"another run is writing to {out}: wait for it, or choose another --out") from None


def _holds(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _swap(part: Path, out: Path) -> None:
    if _is_free(out):
        os.rename(part, out)
        return
    old = _sibling(out, "old")
    os.rename(out, old)
    try:
        os.rename(part, out)
    except OSError:
        os.rename(old, out)
        raise
    _discard(out)


def _discard(out: Path) -> None:
    """Remove a replaced output. It loses its name first: what is called old is whole, or it could not be put back."""
    gone = _sibling(out, "gone")
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(OSError):
        os.rename(_sibling(out, "old"), gone)
    shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def write_errors(out: str | Path) -> Iterator[None]:
    """Failures of the operating system become an OutputError; inputs name themselves (see files.open_input)."""
    try:
        yield
    except OSError as error:
        cure = {errno.ENOSPC: "free some space or choose another --out", errno.EDQUOT: "your quota is used up"}
        advice = cure.get(error.errno, "check the path and its permissions")
        raise OutputError(f"cannot write {out}: {error.strerror or error} ({advice})") from error


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file or a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(path: Path) -> None:
    for root, _, files in os.walk(path):
        for name in files:
            sync(Path(root) / name)
        sync(Path(root))
