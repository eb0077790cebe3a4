"""An edit as a delta: only the edited columns, with the hashes of the weights before and after."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..disk.hashing import TwoDigests, file_hash
from ..disk.manifest import FileRecord, Manifest, Origin
from ..disk.names import DELTA
from ..disk.tensors import Shard, read_metadata
from ..edit import Edit
from ..errors import CheckpointError, EditError, ProofError
from ..files import open_input, parse_json
from .columns import Columns, delta_path, kept_dtype, write_columns
from .plan import Plan
from .rewrite import Kept, Progress, pieces, rewrite, scaled

VERSION = 1


@dataclass(frozen=True)
class DeltaRecord:
    """The metadata of a delta. files: hashes of the weight files before and after; source: its base.

    weights: hashes of all tensors together, however they are sharded (see `weights_hashes`); None in deltas of earlier
    versions.
    """

    edit: Edit
    files: dict[str, FileRecord]
    source: Origin
    weights: FileRecord | None = None

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "kbne_delta": VERSION,
            "edit": self.edit.to_dict(),
            "files": {name: {"in": record.before, "out": record.after} for name, record in self.files.items()},
            "source": self.source.to_dict(),
        }
        return data | ({"weights": self.weights.to_dict()} if self.weights else {})

    @classmethod
    def read(cls, path: Path) -> DeltaRecord:
        """The record in a delta's file. Raises CheckpointError if the file is not a delta."""
        Shard.open(path)
        data = parse_json(read_metadata(path).get("kbne", "null").encode(), str(path), cure="download it again")
        try:
            if data["kbne_delta"] != VERSION or not isinstance(data["edit"]["base"], str):
                raise TypeError
            files = {name: FileRecord.from_dict(entry) for name, entry in data["files"].items()}
            if any(record.before is None for record in files.values()):
                raise TypeError
            weights = FileRecord.from_dict(data["weights"]) if "weights" in data else None
            return cls(Edit.from_dict(data["edit"], str(path)), files, Origin.from_dict(data["source"]), weights)
        except EditError:
            raise
        except (KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{path} is damaged, or kbne-edit did not write it: download it again") from None


def manifest_of(form: str, plan: Plan, part: Path, source: Origin) -> Manifest:
    """The manifest of an adapter or a delta that was written to `part` and read back."""
    return Manifest(
        edit=plan.edit.made_for(plan.checkpoint.fingerprint()),
        files={file.name: FileRecord(None, file_hash(file)) for file in sorted(part.iterdir())},
        form=form,
        source=source,
    )


def write_delta(plan: Plan, part: Path, source: Origin, progress: Progress) -> None:
    """Write the edited columns to a file in the folder `part`: {tensor name: [D, k], [k, D] or [k]}.

    The metadata hold the edit, the base's fingerprint, and the SHA-256 of the weight files before and after. The
    latter is computed twice: from the products, and with the columns of the delta inserted. Raises ProofError if the
    two differ.
    """
    files, kept = fold_hashes(plan, progress)
    columns = {}
    for name, parts in kept.items():
        tensor = plan.checkpoint.tensors[name][1]
        columns[name] = (kept_dtype(tensor), plan.targets[name].product(np.concatenate(parts), slice(None), tensor))
    weights = weights_hashes(plan)
    record = DeltaRecord(plan.edit.made_for(plan.checkpoint.fingerprint()), files, source, weights)
    write_columns(part / DELTA, columns, metadata={"kbne": json.dumps(record.to_dict())})
    with_columns = plan.with_columns(Columns.open(part / DELTA).arrays(plan))
    if fold_hashes(with_columns, progress)[0] != files or weights_hashes(with_columns) != weights:
        raise ProofError("the delta that was written does not give the folded weights: nothing was published")


def delta_fault(directory: Path, plan: Plan) -> str:
    """Why a delta is not the plan's edit; "" if it is. Raises CheckpointError."""
    path = delta_path(directory)
    record = DeltaRecord.read(path)
    files, _ = fold_hashes(plan, None)
    if files != record.files or (record.edit.site, record.edit.factors) != (plan.edit.site, plan.edit.factors):
        return "the hashes that the delta promises are not those of its edit"
    written, _ = fold_hashes(plan.with_columns(Columns.open(path).arrays(plan)), None)
    return "" if written == files else "the columns of the delta are not those of its edit"


def fold_hashes(plan: Plan, progress: Progress | None) -> tuple[dict[str, FileRecord], Kept]:
    """The hashes of a fold in the base's files without writing it, and what its undo file would hold."""
    files: dict[str, FileRecord] = {}
    kept: Kept = {}
    with ThreadPoolExecutor(2) as pool, open(os.devnull, "wb") as nowhere:
        for shard in plan.checkpoint.shards:
            before, after = rewrite(shard, plan.targets, nowhere, kept, pool, progress)
            files[shard.path.name] = FileRecord(before, after)
    return files, kept


def weights_hashes(plan: Plan) -> FileRecord:
    """SHA-256 over all tensors in the order of their names, with dtype and shape, before and after a fold.

    It does not depend on the sharding, so a delta fits its base in any sharding.
    """
    kept: Kept = {}
    with ThreadPoolExecutor(2) as pool:
        digests = TwoDigests(pool)
        for name, (shard, tensor) in sorted(plan.checkpoint.tensors.items()):
            head = json.dumps([name, tensor.dtype, tensor.shape]).encode()
            digests.update(head, head)
            target = plan.targets.get(name)
            with open_input(shard.path) as file:
                file.seek(tensor.start)
                for start, end in pieces(tensor, target):
                    before = file.read(end - start)
                    after = scaled(before, tensor, start, target, kept) if target else before
                    digests.update(before, after)
        return FileRecord(*digests.hexdigests())
