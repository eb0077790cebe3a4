"""SHA-256 of files and of streams, in the background of other work."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import open_input

CHUNK = 2 << 20  # bytes read at once: small enough to stay in the processor's cache while it is hashed


def file_hash(path: Path) -> str:
    """SHA-256 of a file. Raises CheckpointError if it cannot be read."""
    digest = hashlib.sha256()
    with open_input(path) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def at_once() -> int:
    """How many files are read and hashed at a time: each keeps two cores busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // 2, 1)


class TwoDigests:
    """SHA-256 of a stream and of its edited copy, in the background; computed once while they are equal."""

    def __init__(self, pool: ThreadPoolExecutor):
        self._pool = pool
        self._before = hashlib.sha256()
        self._after: Any = None
        self._jobs: list[Future[Any]] = []

    def update(self, before: bytes, after: bytes) -> None:
        """Add the next chunk of both; pass the same object twice where they are equal."""
        self._wait()
        if after is not before and self._after is None:
            self._after = self._before.copy()
        self._jobs = [self._pool.submit(self._before.update, before)]
        if self._after:
            self._jobs.append(self._pool.submit(self._after.update, after))

    def _wait(self) -> None:
        for job in self._jobs:
            job.result()

    def hexdigests(self) -> tuple[str, str]:
        """SHA-256 of the stream and of its edited copy."""
        self._wait()
        return self._before.hexdigest(), (self._after or self._before).hexdigest()


@contextmanager
def in_background() -> Iterator[Callable[..., Future[Any]]]:
    """Yields `submit(work, path)`, which runs in a thread; leaving the context waits and raises its errors."""
    pool = ThreadPoolExecutor(1)
    jobs: list[Future[Any]] = []

    def submit(work: Callable[[Path], Any], path: Path) -> Future[Any]:
        jobs.append(pool.submit(work, path))
        return jobs[-1]

    try:
        yield submit
        for job in jobs:
            job.result()
    finally:
        pool.shutdown(cancel_futures=True)
