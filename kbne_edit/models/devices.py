"""Names of devices, refused where the machine has none of them. torch is imported for any but the CPU."""

from __future__ import annotations

from ..errors import InputError, shown


def check_device(name: str) -> None:
    """Raise InputError unless torch can compute on this device here."""
    if name == "cpu":
        return
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {shown(name)} is no device of torch: use cpu, cuda, cuda:N, mps or xpu") from None
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
