from __future__ import annotations

from pathlib import Path

import click

from . import options
from .edited import BAKED, EDITED, SOURCE, base_of, directory


@click.command("verify")
@EDITED
@SOURCE
@BAKED
@click.option(
    "--edit",
    "edit_path",
    type=click.Path(path_type=Path),
    help="The edit to prove.  [default: that of the manifest, or recovered from the weights]",
)
@options.NO_BEHAVIOUR
@options.MEMORY
@options.JSON
def command(
    edited: Path | None,
    source: str | None,
    baked: Path | None,
    edit_path: Path | None,
    behaviour: bool,
    as_json: bool,
) -> int:
    """Prove that the directory EDITED is its base with an edit folded in, and nothing else.

    The exit status is 1 if it is not.
    """
    from ..edit import Edit
    from ..verifying import verify

    path = directory(edited, baked)
    if path is None:
        raise click.UsageError("Missing argument 'EDITED'.")
    source = base_of(path, source)
    edit = Edit.load(edit_path) if edit_path else None
    proofs = verify(source, path, edit=edit, behaviour=behaviour)
    proven = proofs.edit
    factors = ", ".join(f"{factor:g}" for factor in proven.distinct_factors)
    head = f"edit: {proven.num_neurons} neurons, site {proven.site}, factor {factors}"
    options.show(proofs.to_dict(), as_json, [head, *options.proof_lines(proofs.to_dict())])
    return 0 if proofs.ok else 1
