from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import completing, options
from .edited import SOURCE, base_of
from .findings import impact_lines, measuring, verdict_lines
from .kept import keep_results


@click.command("apply")
@click.argument("delta", type=click.Path(path_type=Path))
@SOURCE
@options.out("Directory of the new checkpoint.", "DELTA-applied")
@options.SHARD_SIZE
@options.NO_BEHAVIOUR
@options.MEMORY
@click.option(
    "--recipe",
    shell_complete=completing.recipe,
    help="Recipe whose probes measure the effect.  [default: that of the delta, or social-bias]",
)
@measuring
@options.JSON
@options.VERBOSE
@options.OVERWRITE
def command(
    delta: Path, source: str | None, out: Path | None, require: tuple[str, ...], as_json: bool, **given: Any
) -> None:
    """Put the edited columns of DELTA, written by `bake --as delta`, into a copy of its base, and prove the result."""
    from ..applying import apply
    from ..evaluation.verdict import next_command
    from ..settings import Checks, Output

    out = out or options.beside(delta, "-applied")
    source = base_of(delta if delta.is_dir() else delta.parent, source)
    output = options.taken(Output, given)
    checks = options.taken(Checks, given)
    result = apply(delta, source, out, recipe=given["recipe"], output=output, checks=checks)
    keep_results(out)
    purpose, following = next_command(result.verdict, source, str(out))
    data = result.to_dict()
    lines = [f"{delta} and {source} -> {out}: the weights that the delta was made from, by their SHA-256"]
    if given["verbose"]:
        lines += options.proof_lines(data)
        lines += impact_lines(result.impact)
    lines += [*verdict_lines(result.verdict), f"written: {out}; -v shows the details"]
    options.show(data, as_json, [*lines, "next:", f"  {following}   # {purpose}"])
    result.verdict.require(require)
