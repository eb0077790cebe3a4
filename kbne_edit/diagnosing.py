"""`doctor`: what this machine can do, and how it would treat a model."""

from __future__ import annotations

from contextlib import ExitStack

from .disk.checkpoint import Checkpoint
from .hub.source import resolved
from .models.doctor import Diagnosis, examine
from .progress import say


def doctor(source: str | None = None) -> Diagnosis:
    """Versions, memory, devices, disk, speed, the largest model for each mode; how `bake` would treat a source.

    source: a directory, ORG/NAME[@revision] on the Hub (its files are downloaded), or "demo". Raises InputError.
    """
    with ExitStack() as stack:
        checkpoint = Checkpoint.open(stack.enter_context(resolved(source, say)).path) if source else None
        return examine(checkpoint)
