"""Fold: an edit into a copy of a checkpoint, without proofs and without a model."""

from __future__ import annotations

from pathlib import Path

from .disk.checkpoint import Checkpoint
from .disk.manifest import Manifest
from .disk.publishing import staged
from .edit import Edit
from .files import forbid_overlap
from .folding.fold import fold_into
from .folding.plan import Plan
from .folding.rewrite import Progress
from .hub.source import resolved
from .progress import say


def fold(
    source: str | Path,
    edit: Edit,
    out: str | Path,
    *,
    shard_size: int | str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write a model with `edit` folded in to the directory `out`; returns the manifest (also in kbne_edit.json).

    It streams: memory does not grow with the model. The output appears whole or not at all. source: a directory,
    ORG/NAME[@REVISION], or "demo". shard_size: largest number of bytes per file, or "5GB" (default: the files of the
    source). progress: called with the number of bytes written since the last call. Raises CheckpointError, FamilyError,
    EditError, InputError, OutputError.
    """
    with resolved(str(source), say) as base:
        checkpoint = Checkpoint.open(base.path)
        forbid_overlap(out, base.origin)
        plan = Plan.of(checkpoint, edit, shard_size)
        with staged(out, overwrite, base.origin) as part:
            manifest = fold_into(plan, part, progress)
            manifest.write(part)
    return manifest
