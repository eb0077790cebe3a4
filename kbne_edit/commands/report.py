from __future__ import annotations

from pathlib import Path

import click

from . import options


@click.command("report")
@click.argument("edited", type=click.Path(path_type=Path))
@options.out("Page to write.", "EDITED.html")
@click.option(
    "--scores",
    type=click.Path(path_type=Path),
    help="Scores file of the run that made EDITED.  [default: EDITED.work/scores.safetensors, if it matches]",
)
@click.option(
    "--tuning",
    type=click.Path(path_type=Path),
    help="The tune.json that chose the edit.  [default: EDITED.work/tune.json, if it matches]",
)
@click.option("--no-hash", is_flag=True, help="Do not compare the files with their hashes. The page says so.")
@options.OVERWRITE
@options.JSON
def command(
    edited: Path, out: Path | None, scores: Path | None, tuning: Path | None, overwrite: bool, **given: bool
) -> None:
    """Write one page about an edited checkpoint, adapter or delta, for reviewers and auditors. No model is loaded."""
    from ..files import forbid_overlap, write_text
    from ..progress import say
    from ..reporting.contents import report
    from ..reporting.wording import STATES

    out = out or options.beside(edited, ".html")
    forbid_overlap(out, edited, *(path for path in (scores, tuning) if path))
    options.check_free(out, overwrite)
    result = report(edited, scores, tuning, hashes=not given["no_hash"], say=say)
    write_text(out, result.html())
    lines = [f"{line.about}: {STATES[line.state]}. {line.text}" for line in result.verdicts]
    options.show(result.to_dict(), given["as_json"], [f"verdict: {result.verdict.ship}", *lines, f"written: {out}"])
