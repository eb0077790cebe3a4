"""What this machine can do: versions, cores, memory, devices, disk, speed, and the largest model for each mode."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..disk.checkpoint import Checkpoint
from ..families import hidden_size
from . import memory

if TYPE_CHECKING:
    from torch import Tensor

NEEDED = ("torch", "transformers", "safetensors", "huggingface-hub")
OPTIONAL = {"accelerate": "--device auto", "peft": "loading what --as peft writes"}
# A large model's proportions, those of Llama 3.1 70B: parameters outside the layers, and how many layers there are.
_OUTSIDE, _LAYERS = 0.03, 80
_SIZE, SECONDS = 1024, 0.2  # of the matrices, and of one measurement


@dataclass(frozen=True)
class Device:
    """A device of torch. memory: bytes, None where it is the machine's. rates: of matrix products, by kind.

    Rates are operations per second, two for each multiplication with its addition. Attribution computes in float32 even
    where bfloat16 is faster. Rejected: exact products from three bfloat16 parts of each float32 number. torch rounds
    the output of a bfloat16 product on a CPU; through oneDNN's own conversion of float32 inputs it is exact, and took
    1.2 to 2.5 times as long as float32 on a processor with AMX.
    """

    name: str
    memory: int | None
    rates: dict[str, float]


@dataclass(frozen=True)
class Treatment:
    """How `bake` would treat a model. Sizes in bytes.

    memory: what attribution takes "in memory" and "layer by layer", and the "budget". attribution: which of the two, or
    "too large". second_proof: "whole model", "layer by layer" or "site by site". fits_here: whether the free disk holds
    the output.
    """

    architecture: str
    parameters: int
    bytes: int
    memory: dict[str, float]
    attribution: str
    second_proof: str
    fits_here: bool


@dataclass(frozen=True)
class Diagnosis:
    """What this machine can do. Sizes in bytes, models in parameters.

    versions: of libraries, None where one is not installed. disk: free "here" and in the folder for temporary files,
    "temp". largest: parameters of the largest model for attribution "in memory" and "layer by layer", and for "fold".
    model: of the checkpoint that was asked for.
    """

    versions: dict[str, str | None]
    cores: int | None
    memory: float
    disk: dict[str, int]
    devices: dict[str, Device]
    largest: dict[str, float]
    model: Treatment | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(checkpoint: Checkpoint | None = None) -> Diagnosis:
    """Look at this machine; with a checkpoint also at how `bake` would treat it. Raises FamilyError if it could not."""
    free = memory.available()
    folders = {"here": os.getcwd(), "temp": tempfile.gettempdir()}
    disk = {place: shutil.disk_usage(path).free for place, path in folders.items()}
    return Diagnosis(
        {"python": platform.python_version()} | {name: _version(name) for name in (*NEEDED, *OPTIONAL)},  # type: ignore[misc]
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        free,
        disk,
        _devices(),
        largest_models(free, disk["here"]),
        _model(checkpoint, free) if checkpoint else None,
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, Device]:
    import torch

    devices: dict[str, tuple[str, int | None]] = {"cpu": (platform.processor() or platform.machine(), None)}
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = (about.name, about.total_memory)
    if torch.backends.mps.is_available():
        devices["mps"] = ("Apple GPU", None)
    return {device: Device(name, size, _rates(device)) for device, (name, size) in devices.items()}


@cache
def _rates(device: str) -> dict[str, float]:
    """Measured once in a process."""
    import torch

    a = torch.ones(_SIZE, _SIZE, device=device)
    half = a.bfloat16()

    ways = {"float32": lambda: a @ a, "bfloat16": lambda: half @ half}
    return {kind: _rate(way) for kind, way in ways.items()}


def _rate(product: Callable[[], Tensor]) -> float:
    """Operations per second of a product of two matrices, after one to warm up."""
    product().sum().item()  # reading a value waits for the device
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < SECONDS or not count:
        product()[0, 0].item()
        count += 1
    return 2 * _SIZE**3 * count / passed


def largest_models(free: float, disk: float) -> dict[str, float]:
    """Parameters of the largest model for each mode. Folding takes no memory to speak of, but room for the output."""
    usable = max(memory.SHARE * free - memory.OVERHEAD, 0)
    part = _OUTSIDE + (1 - _OUTSIDE) * memory.LAYERS_HELD / _LAYERS
    # Graphs of the layers take what their rows need, up to a limit.
    whole = max(_fitting(usable, 1, _LAYERS * memory.ROWS / 2), (usable - memory.GRAPHS) / 4)
    return {
        "in memory": whole,
        "layer by layer": _fitting(usable, part, memory.ROWS),
        "fold": disk / 2,
    }


def _fitting(usable: float, part: float, rows: float) -> float:
    """Parameters N of which a part, and the activations of these rows, fill the room: a quadratic in sqrt(N)."""
    per_root = memory.activations(rows, (12 * _LAYERS) ** -0.5)  # a layer has some 12 D^2 parameters
    return ((math.sqrt(per_root**2 + 16 * part * usable) - per_root) / (8 * part)) ** 2


def _model(checkpoint: Checkpoint, free: float) -> Treatment:
    """What `bake` would do with a checkpoint, and what that takes."""
    outside, layer = memory.parts(checkpoint)
    whole = memory.needed(checkpoint)
    streamed = memory.streamed(4 * outside, 4 * layer, memory.ROWS, hidden_size(checkpoint.config))
    budget = memory.SHARE * free
    mode = "in memory" if whole <= budget else "layer by layer" if streamed <= budget else "too large"
    size, way = sum(shard.size for shard in checkpoint.shards), memory.way(checkpoint, free)
    return Treatment(
        checkpoint.config["model_type"],
        memory.in_memory(checkpoint, 1),
        size,
        {"in memory": whole, "layer by layer": streamed, "budget": budget},
        mode,
        "site by site" if way == "too large" else way,
        size < shutil.disk_usage(Path.cwd()).free,
    )
