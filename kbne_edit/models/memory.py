"""How much memory there is, and how much a model takes. Sizes in bytes."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Literal, NamedTuple

from ..disk.checkpoint import Checkpoint
from ..disk.dtypes import DTYPES
from ..errors import InputError
from ..families import family_of, hidden_size, num_layers, owners
from ..files import parse_size

OVERHEAD = 0.7e9  # the interpreter, torch, activations, and what the allocator holds
SHARE = 0.7  # of the free memory that a model may take: activations, the allocator and others need some, too

ROWS = 512  # that go through a layer side by side: enough for nearly the full rate of matrix products
GRAPHS = 1e9  # what the graphs of a model's layers may take; those beyond are computed again
LAYERS_HELD = 2.5  # layer by layer: the one that computes, the next one, and what is read of it


_limit: ContextVar[float | None] = ContextVar("limit", default=None)


@contextmanager
def limited(size: str | float | None) -> Iterator[None]:
    """Within the context, models take at most `size` bytes, e.g. 8e9 or "8GB", all of the process included.

    None: no limit besides the one that holds. Raises InputError for a text that is no size.
    """
    if size is None:
        yield
        return
    token = _limit.set(parse_size(size, "--memory") if isinstance(size, str) else size)
    try:
        yield
    finally:
        _limit.reset(token)


def room() -> float:
    """Bytes that a model may take here: what `limited` leaves of it, else a share of the free memory."""
    limit = _limit.get()
    return SHARE * available() if limit is None else limit - OVERHEAD


def require_room(checkpoint: Checkpoint, itemsize: int) -> None:
    """Raise InputError if attribution or a fit, with the whole model in memory, takes more than `limited` allows."""
    need = needed(checkpoint, itemsize) - OVERHEAD
    if _limit.get() is not None and need > room():
        raise InputError(
            f"{checkpoint.path} takes {(need + OVERHEAD) / 1e9:.1f} GB, and --memory allows "
            f"{(room() + OVERHEAD) / 1e9:.1f} GB: pass a larger --memory"
        )


def available() -> float:
    """Free memory: the machine's, or what a control group or the process's own limit leaves of it."""
    return min(of_machine(), of_group(), of_process())


def of_machine() -> float:
    free = kilobytes("/proc/meminfo", "MemAvailable")
    return free if free < math.inf else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # macOS


def of_group() -> float:
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{what}").read_text().strip() for what in ("max", "current"))
        return math.inf if limit == "max" else int(limit) - int(used)
    except (OSError, ValueError):
        return math.inf


def of_process() -> float:
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    used = kilobytes("/proc/self/status", "VmData")
    return math.inf if limit == resource.RLIM_INFINITY or used == math.inf else limit - used


def kilobytes(path: str, key: str) -> float:
    """A size that the kernel states in kB, in bytes; inf where it states none."""
    try:
        return 1024 * next(int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(key))
    except (OSError, StopIteration):
        return math.inf


def in_memory(checkpoint: Checkpoint, itemsize: int = 4) -> int:
    """What the checkpoint's tensors take at `itemsize` bytes per value."""
    return itemsize * sum(math.prod(shape) for shape in checkpoint.plain_shapes.values())


def narrow(checkpoint: Checkpoint) -> str | None:
    """The one dtype of 16 bits in which all weights are stored, as torch calls it; None if there is none such."""
    if checkpoint.quantised:
        return None
    names = {tensor.dtype for _, tensor in checkpoint.tensors.values() if DTYPES[tensor.dtype].editable}
    return {"BF16": "bfloat16", "F16": "float16"}.get(names.pop()) if len(names) == 1 else None


def forward(checkpoint: Checkpoint) -> float:
    """What forward passes in float32 take: weights of 16 bits stay so, and one layer is widened (see `widening`)."""
    if narrow(checkpoint) is None or family_of(checkpoint.config).recurrent:
        return in_memory(checkpoint)
    return in_memory(checkpoint, 2) + 2 * in_memory(checkpoint, 2) / max(num_layers(checkpoint.config), 1)


class Parts(NamedTuple):
    """Parameters of a model. outside: in no layer; layer: of the largest one."""

    outside: int
    layer: int


def parts(checkpoint: Checkpoint) -> Parts:
    prefix = "blk" if checkpoint.gguf else family_of(checkpoint.config).layers.rsplit(".", 1)[-1]
    sizes = []
    for layer, (slot, *_) in checkpoint.slots("down").items():
        begin = slot.tensor.partition(f"{prefix}.{layer}.")[0] + f"{prefix}.{layer}."
        sizes.append(sum(math.prod(shape) for name, shape in checkpoint.plain_shapes.items() if name.startswith(begin)))
    return Parts(in_memory(checkpoint, 1) - sum(sizes), max(sizes))


def can_stream(checkpoint: Checkpoint) -> bool:
    """True if the layers can be read one by one: not where they share a block, nor of a GGUF mixture of experts."""
    if owners(checkpoint.config):
        return False
    return checkpoint.gguf is None or family_of(checkpoint.config).experts is None


def forward_by_layer(checkpoint: Checkpoint) -> float:
    """What forward passes in float32 take where the layers are read one by one."""
    outside, layer = parts(checkpoint)
    return 4 * (outside + LAYERS_HELD * layer)


Way = Literal["whole model", "layer by layer", "too large"]


def way(checkpoint: Checkpoint, free: float | None = None) -> Way:
    """How forward passes run in so many free bytes; None: in the `room` of this machine."""
    most = room() if free is None else SHARE * free
    if forward(checkpoint) <= most:
        return "whole model"
    return "layer by layer" if can_stream(checkpoint) and forward_by_layer(checkpoint) <= most else "too large"


def activations(rows: float, size: float, itemsize: int = 4) -> float:
    """What rows leave behind in one layer for the backward pass: some 48 vectors of the hidden size."""
    return rows * 48 * size * itemsize


def needed(checkpoint: Checkpoint, itemsize: int = 4) -> float:
    """What attribution takes with the whole model in memory; the rows grow with depth, so half of them on average."""
    graph = num_layers(checkpoint.config) * activations(ROWS / 2, hidden_size(checkpoint.config), itemsize)
    return in_memory(checkpoint, itemsize) + min(graph, GRAPHS) + OVERHEAD


def streamed(outside: float, layer: float, rows: float, size: float) -> float:
    """What attribution takes layer by layer, besides what it keeps of each question.

    outside: bytes of what is in no layer; layer: of the largest one; rows: that go through it; size: hidden size.
    """
    return OVERHEAD + outside + LAYERS_HELD * layer + activations(max(rows, ROWS), size)
