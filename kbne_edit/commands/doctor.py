from __future__ import annotations

from contextlib import ExitStack

import click

from . import options


@click.command("doctor")
@click.option("--in", "source", metavar="MODEL", help="Also how bake would treat this model (downloaded if need be).")
@options.JSON
def command(source, as_json) -> None:
    """Show what this machine can do: versions, memory, devices, disk, speed, the largest model for each mode."""
    from ..disk.checkpoint import Checkpoint
    from ..hub.source import resolved
    from ..models.doctor import examine
    from ..progress import say

    with ExitStack() as stack:
        checkpoint = Checkpoint.open(stack.enter_context(resolved(source, say)).path) if source else None
        found = examine(checkpoint)
    options.show(found, as_json, _lines(found))


def _lines(found: dict) -> list[str]:
    from ..models.doctor import OPTIONAL

    lines = []
    for name, version in found["versions"].items():
        use = f" (for {OPTIONAL[name]})" if name in OPTIONAL else ""
        lines.append(f"{name} {version or 'is not installed'}{use}")
    lines.append(f"cores: {found['cores']}; free memory: {_gb(found['memory'])}")
    disk = found["disk"]
    lines.append(f"free disk: {_gb(disk['here'])} here, {_gb(disk['temp'])} in the folder for temporary files")
    for device, about in found["devices"].items():
        size = f", {_gb(about['memory'])}" if about["memory"] else ""
        rates = ", ".join(f"{kind} {rate / 1e9:,.0f} GFLOP/s" for kind, rate in about["rates"].items())
        lines.append(f"{device}: {about['name']}{size}; matrix products: {rates}")
    largest = found["largest"]
    lines += [
        "largest model (parameters):",
        f"  attribution in memory, float32: {largest['in memory'] / 1e9:.1f} billion",
        f"  attribution layer by layer: {largest['layer by layer'] / 1e9:.1f} billion (of 80 layers; slower)",
        f"  fold and first proof: {largest['fold'] / 1e9:.1f} billion (of two bytes each, by the free disk here)",
    ]
    return lines + (_model_lines(found["model"]) if "model" in found else [])


def _model_lines(model: dict) -> list[str]:
    takes = model["memory"]
    lines = [
        f"this model: {model['architecture']}, {model['parameters'] / 1e9:.2f} billion parameters, "
        f"{_gb(model['bytes'])} on disk",
        f"  attribution: {model['attribution']} (in memory it takes {_gb(takes['in memory'])}, layer by layer "
        f"{_gb(takes['layer by layer'])} and some for each question; {_gb(takes['budget'])} may be used)",
        f"  second proof: {model['second_proof']}",
    ]
    return lines if model["fits_here"] else [*lines, "  the free disk here does not hold the output"]


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
