"""The edited directory of a command, and its base."""

from __future__ import annotations

from pathlib import Path

import click

from . import completing

EDITED = click.argument("edited", required=False, type=click.Path(path_type=Path))
BAKED = click.option("--baked", hidden=True, type=click.Path(path_type=Path))  # how earlier versions named it
SOURCE = click.option(
    "--in",
    "source",
    shell_complete=completing.model,
    metavar="MODEL",
    help="The base: directory, ORG/NAME[@REVISION], or demo.  [default: that of EDITED, if it is on the Hub]",
)


def directory(edited: Path | None, baked: Path | None) -> Path | None:
    """The directory, from the argument or from --baked."""
    if edited and baked:
        raise click.UsageError(f"two edited directories: {edited} and --baked {baked}")
    return edited or baked


def base_of(edited: Path | None, source: str | None) -> str:
    """The base: `source`, or the one in the manifest of `edited`, which is reported, because manifests are not trusted.

    A manifest has the name of a local base, but not its path. Raises InputError.
    """
    from ..disk.manifest import Manifest
    from ..errors import InputError
    from ..progress import say

    if source:
        return source
    if edited is None:
        raise click.UsageError("Missing option '--in'.")
    manifest = Manifest.read(edited)
    origin = manifest.source if manifest else None
    if origin is None or not (origin.commit or origin.id == "demo"):
        raise InputError(f"{edited} does not name its base on the Hub: add --in MODEL")
    say(f"base: {origin}, by the manifest of {edited}; --in MODEL names another")
    return str(origin)
