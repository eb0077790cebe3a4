from __future__ import annotations

from pathlib import Path

import click

from . import options


@click.command("revert")
@click.argument("baked", type=click.Path(path_type=Path))
@options.out("Directory for the restored base.")
@options.JSON
@options.OVERWRITE
def command(baked: Path, out: Path, as_json: bool, overwrite: bool) -> None:
    """Restore the base, byte for byte, from a baked directory alone."""
    from ..disk.checkpoint import Checkpoint
    from ..folding.undo import revert
    from ..progress import progress

    with progress("revert", sum(shard.size for shard in Checkpoint.open(baked).shards), "B") as update:
        result = revert(baked, out, overwrite=overwrite, progress=update)
    lines = [f"restored: {out} ({result.files} files, every SHA-256 as in the manifest)"]
    if result.left_out:
        lines.append(f"not restored, since they were not carried over: {', '.join(result.left_out)}")
    options.show(result.to_dict(), as_json, lines)
