"""Progress on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .distributed import RANK

_EVERY = 5.0  # seconds between plain lines


def say(line: str) -> None:
    """One line for the user, beside the results on stdout; from the first of several processes only."""
    if RANK == 0:
        print(line, file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, total: int, unit: str = "", done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yields a function that is called with the amount done since the last call. unit "B" counts bytes."""
    if sys.stderr.isatty() and RANK == 0:
        from tqdm import tqdm

        with tqdm(desc=label, total=total, initial=done, unit=unit, unit_scale=unit == "B", leave=False) as bar:
            yield bar.update
        return
    start = last = time.monotonic()

    def update(amount: int) -> None:
        nonlocal done, last
        finished = done >= total
        done += amount
        now = time.monotonic()
        if now - last >= _EVERY or (done >= total and not finished and now - start >= 1):
            last = now
            say(f"{label}: {100 * done // max(total, 1)} % ({_amount(done, unit)} of {_amount(total, unit)})")

    yield update


def _amount(n: int, unit: str) -> str:
    return f"{n / 1e6:.0f} MB" if unit == "B" else str(n)
