from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options

if TYPE_CHECKING:
    from ..pushing import PushJSON


# Hashes show damage, not forgery: without the base nothing can.
UNPROVEN = "which whoever wrote the directory could have made up (--in MODEL proves them here)"


@click.command("push")
@click.argument("edited", type=click.Path(path_type=Path))
@click.argument("name", metavar="ORG/NAME")
@click.option("--in", "source", metavar="MODEL", help="The base: prove EDITED against it again before sending.")
@click.option("--private", is_flag=True, help="Create the repository as private.")
@click.option("--create-pr", is_flag=True, help="Open a pull request in an existing repository.")
@click.option("--dry-run", is_flag=True, help="Check and list the files; send nothing.")
@options.JSON
def command(edited: Path, name: str, as_json: bool, **values: Any) -> None:
    """Publish on the Hub what `bake` or `apply` wrote. Files and proofs are checked first."""
    from ..pushing import push

    if values["private"] and values["create_pr"]:
        raise click.UsageError(
            "--create-pr needs an existing repository, and --private creates one: leave one of them out"
        )
    pushed = push(edited, name, **values)
    result = pushed.to_dict()
    lines = [f"  {file}: {size:,} bytes" for file, size in result["files"].items()]
    lines.append(f"{len(result['files'])} files, {result['bytes']:,} bytes, all as the manifest says; {_sound(result)}")
    if pushed.dry_run:
        lines += [f"note: {notice}" for notice in result["notices"]]
        lines.append(f"dry run: nothing was sent to {name}")
    else:
        done = "proposed" if pushed.create_pr else "pushed"
        lines.append(f"{done}: {result['url']} (commit {result['commit']}; the Hub holds every file as it was sent)")
    options.show(result, as_json, lines)


def _sound(result: PushJSON) -> str:
    """Whether the output was proven in this run, or its record says so."""
    if result["proofs"] == "computed":
        return "proven again against its base"
    if result["form"] == "checkpoint":
        return f"both proofs are on record, {UNPROVEN}"
    return f"on record: read back when it was written, {UNPROVEN}"
