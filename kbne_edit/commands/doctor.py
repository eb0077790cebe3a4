from __future__ import annotations

from typing import TYPE_CHECKING

import click

from . import options

if TYPE_CHECKING:
    from ..models.doctor import Diagnosis, Treatment


@click.command("doctor")
@click.option(
    "--in", "source", metavar="MODEL", help="Also show how bake would treat this model. It is downloaded if necessary."
)
@options.JSON
def command(source: str | None, as_json: bool) -> None:
    """Show what this machine can do: versions, memory, devices, disk, speed, the largest model for each mode."""
    from ..diagnosing import doctor

    diagnosis = doctor(source)
    options.show(diagnosis.to_dict(), as_json, _lines(diagnosis))


def _lines(diagnosis: Diagnosis) -> list[str]:
    from ..models.doctor import OPTIONAL

    lines = []
    for name, version in diagnosis.versions.items():
        use = f" (for {OPTIONAL[name]})" if name in OPTIONAL else ""
        lines.append(f"{name} {version or 'is not installed'}{use}")
    lines.append(f"cores: {diagnosis.cores}; free memory: {_gb(diagnosis.memory)}")
    disk, largest = diagnosis.disk, diagnosis.largest
    lines.append(f"free disk: {_gb(disk['here'])} here, {_gb(disk['temp'])} in the folder for temporary files")
    for name, device in diagnosis.devices.items():
        size = f", {_gb(device.memory)}" if device.memory else ""
        rates = ", ".join(f"{kind} {rate / 1e9:,.0f} GFLOP/s" for kind, rate in device.rates.items())
        lines.append(f"{name}: {device.name}{size}; matrix products: {rates}")
    lines += [
        "largest model (parameters):",
        f"  attribution in memory, float32: {largest['in memory'] / 1e9:.1f} billion",
        f"  attribution layer by layer: {largest['layer by layer'] / 1e9:.1f} billion (of 80 layers; slower)",
        f"  fold and first proof: {largest['fold'] / 1e9:.1f} billion (of two bytes each, by the free disk here)",
    ]
    return lines + (_model_lines(diagnosis.model) if diagnosis.model else [])


def _model_lines(model: Treatment) -> list[str]:
    lines = [
        f"this model: {model.architecture}, {model.parameters / 1e9:.2f} billion parameters, "
        f"{_gb(model.bytes)} on disk",
        f"  attribution: {model.attribution} (in memory it takes {_gb(model.memory['in memory'])}, layer by layer "
        f"{_gb(model.memory['layer by layer'])} and some for each question; {_gb(model.memory['budget'])} may be used)",
        f"  second proof: {model.second_proof}",
    ]
    return lines if model.fits_here else [*lines, "  the free disk here does not hold the output"]


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
