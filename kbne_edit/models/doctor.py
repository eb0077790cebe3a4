"""What this machine can do: versions, cores, memory, devices, disk, speed, and the largest model for each mode."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path

from ..disk.checkpoint import Checkpoint
from ..families import family_of, hidden_size
from . import memory

NEEDED = ("torch", "transformers", "safetensors", "huggingface-hub")
OPTIONAL = {"accelerate": "--device auto", "peft": "loading what --as peft writes"}
# A large model's proportions, those of Llama 3.1 70B: parameters outside the layers, and how many layers there are.
_OUTSIDE, _LAYERS = 0.03, 80
_SIZE, _SECONDS = 1024, 0.2  # of the matrices, and of one measurement


def examine(checkpoint: Checkpoint | None = None) -> dict:
    """All of it as plain values. Sizes in bytes, models in parameters, rates in operations per second (two for each
    multiplication with its addition). With a checkpoint also how `bake` would treat it; raises FamilyError if it could
    not.
    """
    free = memory.available()
    folders = {"here": os.getcwd(), "temp": tempfile.gettempdir()}
    result = {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in (*NEEDED, *OPTIONAL)},
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": free,
        "disk": {place: shutil.disk_usage(path).free for place, path in folders.items()},
        "devices": _devices(),
    }
    result["largest"] = _largest(free, result["disk"]["here"])
    if checkpoint:
        result["model"] = _model(checkpoint, free)
    return result


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, dict]:
    """{device of torch: name, memory, rates}; memory is None where it is the machine's."""
    import torch

    found = {"cpu": (platform.processor() or platform.machine(), None)}
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = (about.name, about.total_memory)
    if torch.backends.mps.is_available():
        found["mps"] = ("Apple GPU", None)
    return {
        device: {"name": name, "memory": size, "rates": {kind: _rate(device, kind) for kind in ("float32", "bfloat16")}}
        for device, (name, size) in found.items()
    }


def _rate(device: str, dtype: str) -> float:
    """Operations per second of a matrix product, after one to warm up."""
    import torch

    a, count = torch.ones(_SIZE, _SIZE, dtype=getattr(torch, dtype), device=device), 0
    (a @ a).sum().item()  # reading a value waits for the device
    start = time.perf_counter()
    while (passed := time.perf_counter() - start) < _SECONDS or not count:
        (a @ a)[0, 0].item()
        count += 1
    return 2 * _SIZE**3 * count / passed


def _largest(free: float, disk: float) -> dict[str, float]:
    """Parameters of the largest model for each mode. Folding takes no memory to speak of, but room for the output."""
    room = max(memory.SHARE * free - memory.OVERHEAD, 0)
    part = _OUTSIDE + (1 - _OUTSIDE) * memory.LAYERS_HELD / _LAYERS
    # Graphs of the layers take what their rows need, up to a limit.
    whole = max(_fitting(room, 1, _LAYERS * memory.ROWS / 2), (room - memory.GRAPHS) / 4)
    return {
        "in memory": whole,
        "layer by layer": _fitting(room, part, memory.ROWS),
        "fold": disk / 2,
    }


def _fitting(room: float, part: float, rows: float) -> float:
    """Parameters N of which a part, and the activations of these rows, fill the room: a quadratic in sqrt(N)."""
    per_root = memory.activations(rows, (12 * _LAYERS) ** -0.5)  # a layer has some 12 D^2 parameters
    return ((math.sqrt(per_root**2 + 16 * part * room) - per_root) / (8 * part)) ** 2


def _model(checkpoint: Checkpoint, free: float) -> dict:
    """What `bake` would do with a checkpoint, and what that takes."""
    stem = "blk" if checkpoint.gguf else family_of(checkpoint.config).layers.rsplit(".", 1)[-1]
    sizes = []
    for layer, (slot, *_) in checkpoint.slots("down").items():
        begin = slot.tensor.partition(f"{stem}.{layer}.")[0] + f"{stem}.{layer}."
        sizes.append(sum(math.prod(shape) for name, shape in checkpoint.plain_shapes.items() if name.startswith(begin)))
    outside = memory.in_memory(checkpoint, 1) - sum(sizes)
    whole = memory.needed(checkpoint)
    streamed = memory.streamed(4 * outside, 4 * max(sizes), memory.ROWS, hidden_size(checkpoint.config))
    budget = memory.SHARE * free
    mode = "in memory" if whole <= budget else "layer by layer" if streamed <= budget else "too large"
    return {
        "architecture": checkpoint.config["model_type"],
        "parameters": memory.in_memory(checkpoint, 1),
        "bytes": sum(shard.size for shard in checkpoint.shards),
        "memory": {"in memory": whole, "layer by layer": streamed, "budget": budget},
        "attribution": mode,
        "second_proof": "whole model" if memory.in_memory(checkpoint) <= budget else "site by site",
        "fits_here": sum(shard.size for shard in checkpoint.shards) < shutil.disk_usage(Path.cwd()).free,
    }
