"""`evaluate --explain`: what every figure means, and where its definition comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..evaluation.tasks import TaskNote


def _explain(context: click.Context, _: click.Parameter, value: str | None) -> None:
    if not value or context.resilient_parsing:
        return
    from ..evaluation.tasks import explain
    from . import options

    names = None if value == "all" else [name.strip() for name in value.split(",")]
    notes = explain(names)
    lines = [line for note in notes for line in _lines(note)]
    options.show({note.name: note.to_dict() for note in notes}, False, lines)
    context.exit()


def _lines(note: TaskNote) -> list[str]:
    lines = [f"{note.name} ({note.kind}; resampled by {note.clusters})"]
    for figure in note.figures:
        ideal = "" if figure.ideal is None else "; lower is better" if figure.ideal < 0 else f"; ideal {figure.ideal:g}"
        lines.append(f"  {figure.name} ({figure.unit}{ideal})")
        lines.append(f"    {figure.definition}")
        lines.append(f"    source: {figure.source}")
    return lines


EXPLAIN = click.option(
    "--explain",
    metavar="TASKS",
    is_eager=True,
    expose_value=False,
    callback=_explain,
    help="Print what each figure of these tasks means, and exit. `all` explains every task.",
)
