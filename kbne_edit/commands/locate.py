from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options
from .findings import FORCE
from .kept import keep_run

if TYPE_CHECKING:
    from ..settings import Doubtful


@click.command("locate")
@options.SOURCE
@options.out("Scores file to write; an interrupted one is continued.", "scores.safetensors")
@options.locating
@FORCE
@options.JSON
def command(source: str, out: Path, doubtful: Doubtful, as_json: bool, **values: Any) -> None:
    """Attribute a recipe's questions and controls to neurons; `select` turns the scores into an edit."""
    from ..attribution.answers import AttributionSummary
    from ..locating import locate
    from ..settings import Settings

    scores = locate(source, out, Settings(**values), doubtful=doubtful)
    if scores is None:  # one of several processes, and not the first
        return
    keep_run(out.with_suffix(".run.yaml"))
    summary = AttributionSummary.of(scores)
    lines = [
        *options.attribution_lines(summary),
        f"written: {out}",
        "next: " + options.shell("kbne-edit", "select", out, "--out", "edit.json"),
    ]
    options.show(summary.to_dict(), as_json, lines)
