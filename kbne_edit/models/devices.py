"""Names of devices: what "auto" stands for here, and names that are refused. torch is imported where it is needed."""

from __future__ import annotations

import math

from ..distributed import LOCAL_RANK, LOCAL_SIZE
from ..errors import InputError, shown
from ..progress import say

AUTO = "auto"  # the accelerator, where there is one
SPREAD = "spread"  # over several accelerators, by accelerate


def chosen_device(name: str) -> str:
    """What a device is called by torch. "auto": the machine's accelerator (of each local process its own), else the
    CPU; `SPREAD` where one process has several. What is chosen is said.
    """
    import torch

    if name != AUTO:
        return f"cuda:{LOCAL_RANK}" if name == "cuda" and LOCAL_SIZE > 1 else name
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return "cpu"
    count = torch.accelerator.device_count()
    if count > 1 and LOCAL_SIZE == 1:
        say(f"computing on {count} devices of {accelerator.type} (--device cpu for the processor)")
        return SPREAD
    device = f"{accelerator.type}:{LOCAL_RANK % count}" if count > 1 else accelerator.type
    say(f"computing on {device} (--device cpu for the processor)")
    return device


def device_memory(device: str) -> float:
    """Free bytes of a device; infinite where torch does not tell."""
    import torch

    module = getattr(torch, torch.device(device).type, None)
    mem_get_info = getattr(module, "mem_get_info", None)
    return float(mem_get_info(device)[0]) if mem_get_info else math.inf


def check_device(name: str) -> None:
    """Raise InputError unless torch can compute on this device here."""
    if name in ("cpu", AUTO):
        return
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(
            f"--device {shown(name)} is no device of torch: use auto, cpu, cuda, cuda:N, mps or xpu"
        ) from None
    if device.type == "cpu":
        return
    module = getattr(torch, device.type, None)
    if module is None or not module.is_available():
        built = torch.version.cuda or torch.version.hip
        why = " (this torch was built for the CPU alone)" if device.type == "cuda" and not built else ""
        raise InputError(
            f"--device {name}: torch finds no such device here{why}: leave it out, or see kbne-edit doctor"
        )
    count = module.device_count()
    if device.index is not None and device.index >= count:
        raise InputError(f"--device {name}: there are {count} here, numbered from 0")
