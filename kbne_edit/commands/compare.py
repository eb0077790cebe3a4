from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import options

if TYPE_CHECKING:
    from ..comparing import Compared, Pair

_SHOWN = 10  # differing factors of a pair


@click.command("compare")
@click.argument("edits", nargs=-1, required=True, type=click.Path(path_type=Path))
@options.JSON
def command(edits: tuple[Path, ...], as_json: bool) -> None:
    """Put two or more edits side by side: edit files, checkpoints, adapters or deltas."""
    from ..comparing import compare

    if len(edits) < 2:
        raise click.UsageError("compare takes two edits or more")
    found = compare(*edits)
    pairs = [line for pair in found.pairs for line in _pair_lines(pair)]
    options.show(found.to_dict(), as_json, [*map(_edit_line, found.edits), *found.notes, *pairs])


def _edit_line(edit: Compared) -> str:
    layers = ", ".join(f"{layer}: {n}" for layer, n in edit.layers.items())
    factors = ", ".join(f"{factor:g}" for factor in edit.factors[:_SHOWN])
    more = f" and {len(edit.factors) - _SHOWN} more" if len(edit.factors) > _SHOWN else ""
    return f"{edit.name}: {edit.neurons} neurons, site {edit.site}, factor {factors}{more}; by layer {layers}"


def _pair_lines(pair: Pair) -> list[str]:
    lines = [
        f"{pair.a} and {pair.b}: {pair.shared} shared (Jaccard {pair.jaccard:.3f}), {pair.only_a} only in the first, "
        f"{pair.only_b} only in the second, {len(pair.differing)} with differing factors"
    ]
    lines += [f"  layer {d.layer}, neuron {d.neuron}: {d.a:g} and {d.b:g}" for d in pair.differing[:_SHOWN]]
    if len(pair.differing) > _SHOWN:
        lines.append(f"  and {len(pair.differing) - _SHOWN} more (--json lists them)")
    return lines
