from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import options

if TYPE_CHECKING:
    from ..comparing import Compared, Pair
    from ..results import Collected, Row

_SHOWN = 10  # differing factors of a pair


@click.command("compare")
@click.argument("edits", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--results",
    is_flag=True,
    help="Compare what was measured instead: EDITS are results.json files, or edited directories; also a single one.",
)
@options.JSON
def command(edits: tuple[Path, ...], results: bool, as_json: bool) -> None:
    """Put two or more edits side by side: edit files, checkpoints, adapters or deltas.

    With --results, the figures of several runs, also other people's, stand in one table.
    """
    from ..comparing import compare
    from ..results import collect_results

    if results:
        collected = collect_results(*edits)
        return options.show(collected.to_dict(), as_json, _result_lines(collected))
    if len(edits) < 2:
        raise click.UsageError("compare takes two edits or more")
    comparison = compare(*edits)
    pairs = [line for pair in comparison.pairs for line in _pair_lines(pair)]
    return options.show(comparison.to_dict(), as_json, [*map(_edit_line, comparison.edits), *comparison.notes, *pairs])


def _result_lines(collected: Collected) -> list[str]:
    """Every run, then every figure with a line for each run that has it."""
    lines = []
    for number, (name, run) in enumerate(collected.runs.items(), 1):
        commit = f" at {run.model.commit[:12]}" if run.model and run.model.commit else ""
        model = f"{run.model.id if run.model else 'a model without a name'}{commit}"
        lines.append(f"[{number}] {name}: {model}, {run.edit['neurons']:,} neurons, {run.tool}: {run.verdict.ship}")
    lines += collected.notes
    numbers = {name: number for number, name in enumerate(collected.runs, 1)}
    for (task, figure, unit), rows in collected.figures().items():
        lines.append(f"{task}: {figure}" + (f" ({unit})" if unit else ""))
        lines += [_row_line(numbers[name], row) for name, row in rows.items()]
    return lines


def _row_line(number: int, row: Row) -> str:
    digits = 1 if row.unit == "percent" else 4
    change = "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*row.change, d=digits)
    random = f"; random neurons {row.random.value:+.{digits}f}" if row.random else ""
    text = f": {row.text}" if row.text else ""
    return f"  [{number}] {row.base:.{digits}f} to {row.edit:.{digits}f}, {change}{random} ({row.items} items){text}"


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
