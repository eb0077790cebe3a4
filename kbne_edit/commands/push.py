from __future__ import annotations

from pathlib import Path

import click

from . import options


@click.command("push")
@click.argument("baked", type=click.Path(path_type=Path))
@click.argument("name", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make the repository a private one.")
@click.option("--create-pr", is_flag=True, help="Propose the files to a repository that exists.")
@click.option("--dry-run", is_flag=True, help="Check, list files and sizes, and send nothing.")
@options.JSON
def command(baked, name, private, create_pr, dry_run, as_json) -> None:
    """Publish a baked directory as a model on the Hub, once its files and proofs are found in order."""
    from ..checkpoint import Checkpoint
    from ..hub import push
    from ..progress import progress

    if private and create_pr:
        raise click.UsageError("--create-pr proposes to a repository that exists: --private has no place there")
    with progress("checking hashes", sum(shard.size for shard in Checkpoint.open(baked).shards), "B") as update:
        result = push(baked, name, private=private, create_pr=create_pr, dry_run=dry_run, progress=update)
    lines = [f"  {file}: {size:,} bytes" for file, size in result["files"].items()]
    lines.append(f"{len(result['files'])} files, {result['bytes']:,} bytes, all as the manifest says; both proofs held")
    if dry_run:
        lines += [f"note: {notice}" for notice in result["notices"]]
        lines.append(f"dry run: nothing was sent to {name}")
    else:
        done = "proposed" if create_pr else "pushed"
        lines.append(f"{done}: {result['url']} (commit {result['commit']}; the Hub holds every file as it was sent)")
    options.show(result, as_json, lines)
