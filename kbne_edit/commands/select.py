from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import completing, options


@click.command("select")
@click.argument("scores", type=click.Path(path_type=Path))
@options.out("Edit file to write.", "edit.json")
@click.option(
    "--recipe",
    shell_complete=completing.recipe,
    help="Recipe that supplies the default thresholds.  [default: the recipe of the scores]",
)
@options.selecting
@options.OVERWRITE
@options.JSON
def command(scores: Path, out: Path, recipe: str | None, overwrite: bool, as_json: bool, **values: Any) -> None:
    """Choose neurons from a scores file, with other thresholds or another rule. Needs no model."""
    from ..attribution.scores import load_scores
    from ..files import forbid_overlap
    from ..locating import choose
    from ..recipe import load_recipe
    from ..settings import Settings

    forbid_overlap(out, scores)
    options.check_free(out, overwrite)
    loaded = load_scores(scores)
    chosen = choose(loaded, load_recipe(recipe or loaded.settings["recipe"]), Settings(**values))
    chosen.edit.save(out)
    summary = chosen.summary()
    lines = [f"edit: {summary.neurons} neurons ({summary.share:.3%}) in {len(summary.layers)} layers"]
    lines += options.selection_lines(summary)
    model = loaded.settings["model"] + (f"@{commit}" if (commit := loaded.settings.get("commit")) else "")
    bake = options.shell("kbne-edit", "bake", "--in", model, "--edit", out, "--out", "./debiased")
    lines += [f"written: {out}", f"next: {bake}"]
    options.show(summary.to_dict(), as_json, lines)
