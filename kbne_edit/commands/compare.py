from __future__ import annotations

from pathlib import Path

import click

from . import options


@click.command("compare")
@click.argument("edits", nargs=-1, required=True, type=click.Path(path_type=Path))
@options.JSON
def command(edits, as_json) -> None:
    """Put two or more edits side by side: edit files, or baked directories."""
    from ..edit import compare

    if len(edits) < 2:
        raise click.UsageError("compare takes two edits or more")
    found = compare([(str(path), _load(path)) for path in edits])
    options.show(found, as_json, [*map(_edit_line, found["edits"]), *found["notes"], *_pair_lines(found["pairs"])])


def _load(path: Path):
    from ..disk.manifest import Manifest
    from ..edit import Edit
    from ..errors import EditError

    if not path.is_dir():
        return Edit.load(path)
    manifest = Manifest.read(path)
    if manifest is None:
        raise EditError(f"{path} has no manifest: give an edit file, or a directory that kbne-edit baked")
    return manifest.edit


def _edit_line(edit: dict) -> str:
    layers = ", ".join(f"{layer}: {n}" for layer, n in edit["layers"].items())
    factors = ", ".join(f"{factor:g}" for factor in edit["factors"])
    return f"{edit['name']}: {edit['neurons']} neurons, site {edit['site']}, factor {factors}; by layer {layers}"


def _pair_lines(pairs: list[dict]) -> list[str]:
    lines = []
    for pair in pairs:
        lines.append(
            f"{pair['a']} and {pair['b']}: {pair['shared']} shared (Jaccard {pair['jaccard']:.3f}), {pair['only_a']} "
            f"only in the first, {pair['only_b']} only in the second, {len(pair['differing'])} with differing factors"
        )
        shown = pair["differing"][:10]
        lines += [f"  layer {d['layer']}, neuron {d['neuron']}: {d['a']:g} and {d['b']:g}" for d in shown]
        if len(pair["differing"]) > 10:
            lines.append(f"  and {len(pair['differing']) - 10} more (--json lists them)")
    return lines
