"""Several processes, started by `torchrun` or `accelerate launch`, that share the questions.

Objects are exchanged with gloo on every device, because they are scores, not gradients. Only rank 0 writes files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

RANK, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
LOCAL_RANK, LOCAL_SIZE = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Processes:
    """The processes of a run. rank: of this process; size: their number."""

    rank: int
    size: int

    def broadcast(self, value: object) -> object:
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
def process_group() -> Iterator[Processes]:
    """The processes that were started together; a single one if there was no launcher."""
    if SIZE == 1:
        yield Processes(0, 1)
        return
    import torch.distributed as dist

    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo")
    try:
        yield Processes(RANK, SIZE)
    finally:
        if started:
            dist.destroy_process_group()
