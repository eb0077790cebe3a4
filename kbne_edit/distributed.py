"""Several processes at one job, as `torchrun` or `accelerate launch` start them: each takes its share of the questions.

Objects travel over gloo, whatever the device: they are scores, not gradients, and rank 0 alone writes files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

RANK, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
LOCAL_RANK, LOCAL_SIZE = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Team:
    """rank: this process's number; size: how many there are."""

    rank: int
    size: int

    def share(self, value: object) -> object:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: object) -> list | None:
        """On rank 0 every rank's value, in order of rank; None on the others."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        box = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, box, dst=0)
        return box


@contextmanager
def team() -> Iterator[Team]:
    """The processes that were started together; a team of one where there was no launcher."""
    if SIZE == 1:
        yield Team(0, 1)
        return
    import torch.distributed as dist

    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo")
    try:
        yield Team(RANK, SIZE)
    finally:
        if started:
            dist.destroy_process_group()
