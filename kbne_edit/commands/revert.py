from __future__ import annotations

from pathlib import Path

import click

from . import options


@click.command("revert")
@click.argument("edited", type=click.Path(path_type=Path))
@options.out("Directory for the restored base.", "EDITED-reverted")
@options.JSON
@options.OVERWRITE
def command(edited: Path, out: Path | None, as_json: bool, overwrite: bool) -> None:
    """Restore the base, byte for byte, from an edited directory alone."""
    from ..disk.checkpoint import Checkpoint
    from ..folding.undo import revert
    from ..progress import progress

    out = out or options.beside(edited, "-reverted")
    with progress("revert", sum(shard.size for shard in Checkpoint.open(edited).shards), "B") as update:
        result = revert(edited, out, overwrite=overwrite, progress=update)
    lines = [f"restored: {out} ({result.files} files, every SHA-256 as in the manifest)"]
    if result.left_out:
        lines.append(f"not restored, since they were not carried over: {', '.join(result.left_out)}")
    options.show(result.to_dict(), as_json, lines)
