"""Publishing: an output directory appears whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import KbneError, OutputError, of_the_machine, shown
from ..files import read_json
from .names import DELTA, MANIFEST, OLD_DELTA, UNDO, is_hidden, is_part_of_checkpoint

_OUTPUTS = ("config.json", "adapter_config.json", DELTA, OLD_DELTA, UNDO)  # every output has one of them


@contextmanager
def staged(out: str | Path, overwrite: bool = False, like: Path | None = None) -> Iterator[Path]:
    """A temporary folder that becomes `out` if the block succeeds, and is removed if it fails.

    It is a sibling of `out`, renamed at the end. Where `out` cannot be renamed (a mount point, the working directory),
    it is a subfolder, and its files are moved at the end, config.json and the manifest last.
    The sibling of a killed run is recognised by its name and its free lock, and removed. `overwrite` renames the old
    output away before it renames the new one. A run killed between the two leaves the old one whole as
    `.NAME.kbne-old`, and the next run restores it.
    like: the folder whose content is copied: the output is readable by nobody who could not read it. An output that
    exists keeps its mode and its owner. Raises OutputError.
    """
    with _claimed(Path(out), overwrite) as part, write_errors(out):
        yield part
        target = Path(os.path.abspath(out))
        _give_rights(part, target, like)
        _sync_tree(part)
        if is_fixed(target):
            _move_in(part, target)
        else:
            _swap(part, target)
    with suppress(OSError):  # the files are on disk; without the folder's own sync at worst the whole output is lost
        sync(part.parent)


def check_out(out: str | Path, overwrite: bool = False) -> None:
    """Raise OutputError unless `staged` could begin now. Called before long work."""
    with _claimed(Path(out), overwrite):
        pass


def create(path: Path, like: Path | None = None) -> BinaryIO:
    """Open a new file for writing; never an existing one, and never what a link points to. Raises OSError.

    like: a file; the new one is readable by nobody who could not read it.
    """
    mode = 0o666 if like is None else 0o666 & (os.stat(like).st_mode | 0o600)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode), "wb")


@contextmanager
def _claimed(given: Path, overwrite: bool) -> Iterator[Path]:
    """The temporary folder, empty and locked; removed at the end unless it has become the output."""
    out = Path(os.path.abspath(given))
    part, lock = _part(out), None
    try:
        with write_errors(given):
            out.parent.mkdir(parents=True, exist_ok=True)
            lock = _lock(part, given)
            if not is_fixed(out):
                _put_back(out)
            for left in part.iterdir():
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            if out.is_symlink() or (out.exists() and not out.is_dir()):
                raise OutputError(f"{given} exists and is not a folder: choose another --out")
            if not _is_free(out):
                if not overwrite:
                    raise OutputError(f"{given} exists: choose another --out, or pass --overwrite")
                _check_replaceable(given, out)
        yield part
    finally:
        if lock is not None:
            if _holds(lock, part):
                shutil.rmtree(part, ignore_errors=True)
            os.close(lock)


def _part(out: Path) -> Path:
    return out / ".kbne-partial" if is_fixed(out) else _sibling(out, "partial")


def _sibling(out: Path, state: str) -> Path:
    return out.parent / f".{out.name}.kbne-{state}"


def is_fixed(out: Path) -> bool:
    """True for a folder that cannot be renamed: a mount point, or the working directory or a parent of it."""
    try:
        here = Path.cwd()
    except OSError:  # it was removed
        here = Path(out.anchor)
    return out.is_dir() and (os.path.ismount(out) or here.is_relative_to(out.resolve()))


_OF_THE_SYSTEM = ("lost+found", ".kbne-partial")  # entries of an empty volume, or of a folder that is being filled


def _is_free(out: Path) -> bool:
    if not os.path.lexists(out):
        return True
    return out.is_dir() and not out.is_symlink() and not set(os.listdir(out)) - set(_OF_THE_SYSTEM)


def _check_replaceable(given: Path, out: Path) -> None:
    """Raise OutputError unless all files of a folder come from kbne-edit or from other writers of checkpoints."""
    if not any((out / name).is_file() for name in _OUTPUTS):
        raise OutputError(f"{given} is not a checkpoint, and --overwrite replaces nothing else: remove it")
    known = _listed(out)
    for root, folders, names in os.walk(out):
        inside = Path(root).relative_to(out)
        folders[:] = [f for f in folders if not is_hidden((inside / f).as_posix()) and f not in _OF_THE_SYSTEM]
        for name in names:
            relative = (inside / name).as_posix()
            if relative not in known and not is_part_of_checkpoint(relative):
                raise OutputError(
                    f"{given} holds {shown(relative)}, which is not part of a checkpoint, and --overwrite would delete "
                    "it: move it away, or choose another --out"
                )


def _listed(out: Path) -> set[str]:
    """Files that the manifest of an earlier output lists."""
    with suppress(KbneError, AttributeError, TypeError):
        return set(read_json(out / MANIFEST)["files"])
    return set()


def _lock(part: Path, out: Path) -> int:
    """Make the temporary folder, or reuse that of a killed run of this user, and lock it."""
    while True:
        with suppress(FileExistsError):
            part.mkdir(mode=0o700)
        try:
            handle = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # another run has just renamed it to its output
            continue
        try:
            if os.fstat(handle).st_uid != os.geteuid():  # possible in a folder that others can write to
                raise OutputError(f"{part} belongs to another user: remove it, or choose another --out")
            os.fchmod(handle, 0o700)
        except BaseException:
            os.close(handle)
            raise
        claim(handle, out)
        if _holds(handle, part):
            return handle
        os.close(handle)


# Errors of a file system without locks: there nothing keeps two runs apart.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def claim(handle: int, out: Path) -> None:
    """Lock an open file or folder until it is closed. If another run holds the lock, close it and raise OutputError."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return
        os.close(handle)
        raise OutputError(f"another run is writing to {out}: wait for it, or choose another --out") from None


def _holds(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def _put_back(out: Path) -> None:
    """Undo the half of a swap that a killed run of this user left."""
    old = _sibling(out, "old")
    if os.path.lexists(old) and (old.is_symlink() or os.lstat(old).st_uid != os.geteuid()):
        raise OutputError(f"{old} belongs to another user, or is a link: remove it, or choose another --out")
    if old.exists() and _is_free(out):
        os.rename(old, out)
    _discard(out)


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


def _move_in(part: Path, out: Path) -> None:
    """Fill a folder that cannot be renamed. A run killed here leaves no config.json, so nothing can load it."""
    for entry in sorted(out.iterdir(), key=lambda entry: entry.name not in _LAST):
        if entry.name not in _OF_THE_SYSTEM and not is_hidden(entry.name):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    for entry in sorted(part.iterdir(), key=lambda entry: (entry.name in _LAST, entry.name)):
        os.rename(entry, out / entry.name)
    part.rmdir()
    sync(out)


_LAST = ("config.json", "adapter_config.json", MANIFEST, DELTA)


def _discard(out: Path) -> None:
    """Remove a replaced output. Rename it first: a folder called old must be whole, because it may be restored."""
    gone = _sibling(out, "gone")
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(OSError):
        os.rename(_sibling(out, "old"), gone)
    shutil.rmtree(gone, ignore_errors=True)


def _give_rights(part: Path, out: Path, like: Path | None) -> None:
    """Give `part` the mode and owner of the output it replaces; else those of a new folder, no wider than `like`'s."""
    if out.is_dir() and not out.is_symlink():
        wanted = os.stat(out)
        for root, folders, names in os.walk(part):
            for name in (*folders, *names):
                _give_owner(Path(root) / name, wanted)
        _give_owner(part, wanted)
        if not is_fixed(out):
            os.chmod(part, stat.S_IMODE(wanted.st_mode))
        return
    mask = os.umask(0o077)
    os.umask(mask)
    limit = os.stat(like).st_mode if like is not None and like.is_dir() else 0o777
    mode = 0o777 & ~mask & (limit | 0o700)
    inherited = os.stat(part).st_mode & stat.S_ISGID  # set by a parent folder whose group is inherited
    os.chmod(part, mode | inherited)


def _give_owner(path: Path, wanted: os.stat_result) -> None:
    current = os.lstat(path)
    if (current.st_uid, current.st_gid) != (wanted.st_uid, wanted.st_gid):
        with suppress(OSError):  # only root may change the owner; a member may change the group
            os.chown(path, wanted.st_uid, wanted.st_gid, follow_symlinks=False)
        with suppress(OSError):
            os.chown(path, -1, wanted.st_gid, follow_symlinks=False)


@contextmanager
def write_errors(out: str | Path) -> Iterator[None]:
    """Turn errors of the operating system into OutputError. Errors of inputs name the input (see files.open_input)."""
    try:
        yield
    except OSError as error:
        cure = {errno.ENOSPC: "free some space or choose another --out", errno.EDQUOT: "your quota is used up"}
        advice = cure.get(error.errno or 0, "check the path and its permissions")
        failure = OutputError(f"cannot write {out}: {error.strerror or error} ({advice})")
        raise of_the_machine(failure, error.errno) from error


def sync(path: Path) -> None:
    """Flush a file or a directory to disk."""
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
