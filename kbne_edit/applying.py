"""Apply: a delta and its base to the checkpoint that `bake` would have written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .disk.checkpoint import DELTA, Checkpoint, staged
from .disk.manifest import write_manifest
from .disk.sharding import cut
from .edit import Edit
from .errors import EditError, ProofError
from .files import forbid_overlap
from .folding.delta import fold_hashes, origin_of, read_about
from .folding.fold import Progress, fold_into, plan, stored_columns
from .proofs.verification import Report, behaviour_proof, file_proof
from .reporting.card import add_card


def apply(
    delta: str | Path,
    base_dir: str | Path,
    out_dir: str | Path,
    *,
    source: dict | None = None,
    shard_size: int | str | None = None,
    behaviour: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write `base_dir` with a delta's columns put in to `out_dir`, weights byte for byte as `bake` would have.

    source: {"id", "commit"} of the base, as manifest and card name it (default: the name of `base_dir`, and none).
    shard_size: as in `fold`; then it is the tensors that are those of `bake`, in other files.
    behaviour: False leaves the second proof out. Both hold before the output appears; it can be verified, reverted and
    pushed as one of `bake`. What the delta says that its own run measured is not repeated: this run did not see it.
    Raises CheckpointError for a damaged delta, EditError for another base, ProofError, OutputError.
    """
    path = Path(delta) / DELTA if Path(delta).is_dir() else Path(delta)
    forbid_overlap(out_dir, base_dir, delta)
    checkpoint, about = Checkpoint.open(base_dir), read_about(path)
    edit = Edit.from_dict(about["edit"], str(path))
    targets = plan(checkpoint, edit)
    columns = stored_columns(path, targets, checkpoint)
    targets = {name: replace(target, values=columns[name]) for name, target in targets.items()}
    cuts = cut(checkpoint, shard_size)
    with staged(out_dir, overwrite) as part:
        manifest = fold_into(checkpoint, edit, targets, part, progress, cuts)
        # Cut anew, no file is one that the delta knows: what it promises is then computed, and written nowhere.
        hashes = fold_hashes(checkpoint, targets, progress)[0] if cuts else manifest["files"]
        for name in (shard.path.name for shard in checkpoint.shards):
            if hashes[name]["in"] != about["files"].get(name, {}).get("in"):
                raise EditError(
                    f"{path} was made from another {name} (SHA-256 differs): apply it to "
                    f"{origin_of(about)} as published"
                )
        report = file_proof(checkpoint, Checkpoint.open(part), manifest, None, progress, rehash=False)
        report.faults += [
            f"{shard.path.name} is not what the delta promises (SHA-256 differs)"
            for shard in checkpoint.shards
            if hashes[shard.path.name]["out"] != about["files"][shard.path.name]["out"]
        ]
        if behaviour and not report.faults:
            report.behaviour = behaviour_proof(checkpoint, Checkpoint.open(part), edit)
        if not report.ok:
            which, why = ("first", report.faults[0]) if report.faults else ("second", "behaviour differs")
            raise ProofError(f"the {which} proof failed, {out_dir} was not written: {why}", report)
        manifest |= {"source": source or {"id": checkpoint.path.resolve().name, "commit": None}}
        manifest |= {"proofs": report.to_dict(), "summary": {}}
        add_card(part, manifest)
        write_manifest(part, manifest)
    return report
