"""Progress of a run: lines and bars on stderr, from the first of several processes.

In Python nothing is shown until `show_progress()` is called, as the command line does; lines always go to the logger
"kbne_edit".
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .distributed import RANK

if TYPE_CHECKING:
    from rich.progress import Progress

log = logging.getLogger("kbne_edit")
log.addHandler(logging.NullHandler())

_EVERY = 5.0  # seconds between plain lines
_shown = False
_stage = ""  # e.g. "[2/5] " in the second of five stages
_bars: list[Progress] = []  # the open display; bars of nested work are added to it


class _Stderr(logging.Handler):
    """Writes to the current sys.stderr, which a test or a notebook may have replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if _bars:
            _bars[0].console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)


def show_progress(shown: bool = True) -> None:
    """Show lines and bars on stderr, or stop showing them."""
    global _shown
    _shown = shown
    for handler in [handler for handler in log.handlers if isinstance(handler, _Stderr)]:
        log.removeHandler(handler)
    if shown:
        log.addHandler(_Stderr())
        log.setLevel(logging.INFO)
        log.propagate = False
    else:
        log.propagate = True


def say(line: str) -> None:
    """Log one line for the user; only in the first of several processes."""
    if RANK == 0:
        log.info("%s", line)


class Stages:
    """Numbers the stages of a run: each is announced, and its bars show the number."""

    def __init__(self, total: int):
        self._total, self._count = total, 0

    def __enter__(self) -> Stages:
        return self

    def next(self, label: str) -> None:
        """Announce the next stage."""
        global _stage
        self._count += 1
        _stage = f"[{self._count}/{self._total}] "
        say(f"{_stage}{label}")

    def __exit__(self, *_: object) -> None:
        global _stage
        _stage = ""


@contextmanager
def progress(label: str, total: int, unit: str = "", done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yields a function that is called with the amount done since the last call. unit "B" counts bytes."""
    if not _shown or RANK != 0:
        yield lambda amount: None
    elif sys.stderr.isatty():
        with _display() as display:
            task = display.add_task(
                _stage + label, total=max(total, 1), completed=done, amount=_amounts(done, total, unit)
            )

            def advance(amount: int) -> None:
                nonlocal done
                done += amount
                display.update(task, completed=done, amount=_amounts(done, total, unit))

            try:
                yield advance
            finally:
                display.refresh()  # so that short work is shown at its end
                display.remove_task(task)
    else:
        yield _Lines(_stage + label, total, unit, done).update


@contextmanager
def paused() -> Iterator[None]:
    """Hide the bars while the user is asked something."""
    displays = list(_bars)
    for display in displays:
        display.stop()
    try:
        yield
    finally:
        for display in displays:
            display.start()


@contextmanager
def _display() -> Iterator[Progress]:
    """The open display of bars, or a new one."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    if _bars:
        yield _bars[0]
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        _bars.append(display)
        try:
            yield display
        finally:
            _bars.clear()


class _Lines:
    """Progress in a log: a line every few seconds, with the estimated time left."""

    def __init__(self, label: str, total: int, unit: str, done: int):
        self._label, self._total, self._unit = label, total, unit
        self._done = self._done_before = done
        self._start = self._last = time.monotonic()

    def update(self, amount: int) -> None:
        finished_before = self._done >= self._total
        self._done += amount
        now = time.monotonic()
        ends = self._done >= self._total and not finished_before and now - self._start >= 1
        if now - self._last >= _EVERY or ends:
            self._last = now
            say(f"{self._label}: {self._share()} ({_amounts(self._done, self._total, self._unit)}), {self._time(now)}")

    def _share(self) -> str:
        return f"{100 * self._done // max(self._total, 1)} %"

    def _time(self, now: float) -> str:
        elapsed = now - self._start
        if self._done >= self._total:
            return f"{clock(elapsed)} in all"
        rate = (self._done - self._done_before) / elapsed if elapsed else 0
        return f"about {clock((self._total - self._done) / rate)} left" if rate else "just begun"


def clock(seconds: float) -> str:
    """A duration in words: "8 s", "2 min 5 s", "1 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _amounts(done: int, total: int, unit: str) -> str:
    if unit == "B":
        return f"{done / 1e6:.0f} of {total / 1e6:.0f} MB"
    return f"{done} of {total}" + (f" {unit}s" if unit else "")
