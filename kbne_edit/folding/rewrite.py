"""Rewrites one file of weights in chunks of whole rows: memory does not grow with the model."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..disk.hashing import CHUNK, TwoDigests
from ..disk.sharding import NewShard
from ..disk.tensors import Shard, TensorInfo
from ..errors import CheckpointError
from ..files import open_input
from .plan import Plan
from .target import Target

Kept = dict[str, list[np.ndarray]]  # {edited tensor: what the undo file keeps of it, by chunk}
Progress = Callable[[int], None]  # called with the number of bytes done since the last call


def chunks(
    path: Path, tensors: tuple[TensorInfo, ...], edited: dict[str, Target]
) -> Iterator[tuple[TensorInfo | None, int, int]]:
    """(tensor or None, start, end) in file order; chunks of an edited tensor hold whole rows."""
    position, size = 0, os.path.getsize(path)
    for tensor in (t for t in tensors if t.name in edited):
        yield from ((None, a, min(a + CHUNK, tensor.start)) for a in range(position, tensor.start, CHUNK))
        yield from ((tensor, a, b) for a, b in pieces(tensor, edited[tensor.name]))
        position = tensor.end
    yield from ((None, a, min(a + CHUNK, size)) for a in range(position, size, CHUNK))


def pieces(tensor: TensorInfo, target: Target | None) -> Iterator[tuple[int, int]]:
    """(start, end) of a tensor's chunks in its file; chunks of an edited tensor hold whole rows."""
    row = max((tensor.end - tensor.start) // max(target.slot.shape(tensor)[0], 1), 1) if target else 1
    step = max(CHUNK // row, 1) * row
    return ((a, min(a + step, tensor.end)) for a in range(tensor.start, tensor.end, step))


def rewrite(
    shard: Shard,
    targets: dict[str, Target],
    out: BinaryIO,
    undo: Kept,
    pool: ThreadPoolExecutor,
    progress: Progress | None,
) -> tuple[str, str]:
    """Copy one file with its targets scaled. Returns the SHA-256 of the old file and of the new one.

    Where the file system supports it, the new file begins as a clone of the old one, and only changed chunks are
    written. Rejected for other file systems: copy_file_range first, since writing while hashing is faster than copying
    before it.
    """
    digests = TwoDigests(pool)
    with open_input(shard.path) as file:
        cloned = _clone(file, out)
        for tensor, start, end in chunks(shard.path, shard.tensors, targets):
            old = file.read(end - start)
            if len(old) != end - start:
                raise CheckpointError(f"{shard.path} became shorter while it was read: start again")
            new = old if tensor is None else scaled(old, tensor, start, targets[tensor.name], undo)
            digests.update(old, new)
            if not cloned:
                out.write(new)
            elif new is not old:
                out.seek(start)
                out.write(new)
            if progress:
                progress(len(new))
    return digests.hexdigests()


_FICLONE = 0x40049409  # ioctl of Linux: share all blocks of another file, copy on write


def _clone(file: BinaryIO, out: BinaryIO) -> bool:
    """Make the empty file `out` a clone of `file`. False if the file system cannot, or `out` is not a regular file."""
    try:
        fcntl.ioctl(out.fileno(), _FICLONE, file.fileno())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        return False
    return True


def assemble(
    new: NewShard,
    plan: Plan,
    out: BinaryIO,
    undo: Kept,
    pool: ThreadPoolExecutor,
    progress: Progress | None,
) -> str:
    """Write one file of a new sharding: its header, then its tensors, with the targets scaled. Returns its SHA-256."""
    digests = TwoDigests(pool)
    digests.update(new.head, new.head)
    out.write(new.head)
    for name in new.tensors:
        shard, tensor = plan.checkpoint.tensors[name]
        with open_input(shard.path) as file:
            file.seek(tensor.start)
            for start, end in pieces(tensor, plan.targets.get(name)):
                data = file.read(end - start)
                if len(data) != end - start:
                    raise CheckpointError(f"{shard.path} became shorter while it was read: start again")
                if name in plan.targets:
                    data = scaled(data, tensor, start, plan.targets[name], undo)
                digests.update(data, data)
                out.write(data)
                if progress:
                    progress(len(data))
    return digests.hexdigests()[1]


def _place(
    raw: bytes, tensor: TensorInfo, start: int, target: Target
) -> tuple[np.ndarray, tuple[Any, ...], slice | np.ndarray]:
    """(rows, where, kept) of a chunk of whole rows that begins at byte `start` of the file.

    rows: a copy that can be written; where: the target's neurons in it; kept: which rows of the undo tensor those are.
    """
    kind, shape = target.slot.numbers(tensor).storage, target.slot.shape(tensor)
    rows = np.frombuffer(raw, kind).reshape(-1, *shape[1:]).copy()
    first = (start - tensor.start) // (kind.itemsize * max(int(np.prod(shape[1:])), 1))
    index = target.index
    if target.by_column:
        return rows, (slice(None), index), slice(first, first + len(rows))
    row = index if target.expert is None else target.expert
    inside = (row >= first) & (row < first + len(rows))
    if target.expert is None:
        return rows, (row[inside] - first,), inside
    between = (slice(None),) * (target.slot.axis - 1)
    return rows, (row[inside] - first, *between, index[inside]), inside


def scaled(raw: bytes, tensor: TensorInfo, start: int, target: Target, undo: Kept) -> bytes:
    """Scale the target's neurons in a chunk of whole rows, and keep what was there in `undo`."""
    rows, where, kept = _place(raw, tensor, start, target)
    old = rows[where]
    undo.setdefault(tensor.name, []).append(old)
    rows[where] = target.product(old, kept, tensor) if target.values is None else target.values[kept]
    return rows.tobytes()
