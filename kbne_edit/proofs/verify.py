"""Runs both proofs on a directory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..disk.checkpoint import Checkpoint
from ..disk.manifest import Manifest
from ..disk.names import MANIFEST
from ..edit import Edit
from ..folding.plan import Plan
from ..folding.rewrite import Progress
from .behaviour import behaviour_proof
from .files import file_proof
from .outcome import EditFrom, Proofs
from .recovery import recover


def verify(
    base: Checkpoint,
    baked_dir: str | Path,
    *,
    edit: Edit | None = None,
    behaviour: bool = True,
    progress: Progress | None = None,
    also: Callable[[Plan, Manifest], Sequence[str]] | None = None,
) -> Proofs:
    """Both proofs that `baked_dir` is `base` with an edit folded in; also for a directory made elsewhere.

    The edit is `edit`, or the manifest's, or else recovered from the weights. behaviour: False skips the second proof.
    also: further checks of an output with a manifest, run if the first proof holds; they return faults. Raises
    CheckpointError if a directory cannot be read; a failed proof does not raise, it is in the result.
    """
    baked = Checkpoint.open(baked_dir)
    manifest = Manifest.read(baked_dir)
    plan = Plan.of(base, edit or (manifest.edit if manifest else recover(base, baked)))
    edit_from: EditFrom = "given" if edit else "manifest" if manifest else "recovered from the weights"
    files = file_proof(plan, baked, manifest, edit_from, progress)
    if manifest and not manifest.sealed:
        files = files.with_fault(f"{MANIFEST} was changed after baking (its own SHA-256 differs)")
    if manifest and also and files.holds:
        for fault in also(plan, manifest):
            files = files.with_fault(fault)
    if not (behaviour and files.holds):
        return Proofs(files)
    return Proofs(files, behaviour_proof(plan, baked))
