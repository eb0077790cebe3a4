from __future__ import annotations

from pathlib import Path

import click

from . import options


@click.command("report")
@click.argument("baked", type=click.Path(path_type=Path))
@options.out("Page to write, e.g. report.html.")
@click.option(
    "--scores",
    type=click.Path(path_type=Path),
    help="Scores of its run.  [default: BAKED.work/scores.safetensors, if it fits]",
)
@click.option(
    "--tuning",
    type=click.Path(path_type=Path),
    help="The tune.json that chose its edit.  [default: BAKED.work/tune.json, if it did]",
)
@options.JSON
def command(baked, out, scores, tuning, as_json) -> None:
    """Write one page on a baked directory for those who must judge it: no model is loaded, no network used."""
    from ..files import forbid_overlap, write_text
    from ..progress import say
    from ..reporting.contents import build
    from ..reporting.page import render
    from ..reporting.wording import STATES

    forbid_overlap(out, baked, *filter(None, [scores, tuning]))
    found = build(baked, scores, say, tuning)
    write_text(out, render(found))
    lines = [f"{v['about']}: {STATES[v['state']]}. {v['text']}" for v in found["verdicts"]]
    options.show(found, as_json, [*lines, f"written: {out}"])
