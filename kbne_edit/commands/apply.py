from __future__ import annotations

from pathlib import Path

import click

from . import options


@click.command("apply")
@click.argument("delta", type=click.Path(path_type=Path))
@options.SOURCE
@options.out("Directory of the new checkpoint.")
@options.SHARD_SIZE
@options.NO_BEHAVIOUR
@options.JSON
@options.OVERWRITE
def command(delta, source, out, shard_size, no_behaviour, as_json, overwrite) -> None:
    """Put the edited columns of DELTA (from `bake --as delta`) into a copy of its base, and prove the result."""
    from ..applying import apply
    from ..disk.checkpoint import Checkpoint
    from ..disk.manifest import Origin
    from ..files import forbid_overlap
    from ..hub.source import resolved
    from ..progress import progress, say

    with resolved(source, say) as found:
        forbid_overlap(out, found.origin)
        total = 3 * sum(shard.size for shard in Checkpoint.open(found.path).shards)
        with progress("apply", total, "B") as update:
            result = apply(
                delta,
                found.path,
                out,
                source=Origin(found.label, found.commit),
                shard_size=shard_size,
                behaviour=not no_behaviour,
                overwrite=overwrite,
                progress=update,
            )
    data = result.to_dict()
    lines = [*options.proof_lines(data), "the weights are those that the delta was made from, by their SHA-256"]
    options.show(data, as_json, [*lines, f"written: {out}"])
