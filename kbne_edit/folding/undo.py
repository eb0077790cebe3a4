"""Reverts an edit: restores the base, byte for byte, from the baked directory alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..disk.checkpoint import Checkpoint
from ..disk.hashing import file_hash
from ..disk.manifest import Manifest
from ..disk.names import INDEX, MANIFEST
from ..disk.publishing import create, staged
from ..disk.sharding import NewShard, old_shard
from ..disk.tensors import Shard
from ..errors import CheckpointError, shown
from ..files import forbid_links_out, forbid_overlap
from .columns import Columns, undo_path
from .plan import Plan
from .rewrite import Progress, assemble, rewrite


@dataclass(frozen=True)
class RevertResult:
    """files: number of restored files, each with the base's SHA-256; left_out: files that `bake` had left out."""

    files: int
    left_out: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def revert(
    baked: str | Path, out: str | Path, *, overwrite: bool = False, progress: Progress | None = None
) -> RevertResult:
    """Write the base of a baked directory to the directory `out`, byte for byte, from the baked directory alone.

    Every file is compared with the hash of the base's file in the manifest.
    Raises CheckpointError if the directory was changed since it was baked, OutputError.
    """
    checkpoint = Checkpoint.open(baked)
    manifest = _manifest(checkpoint)
    forbid_overlap(out, checkpoint.path)
    undo = undo_path(checkpoint.path)
    if not undo.is_file() or file_hash(undo) != manifest.undo:
        raise CheckpointError(f"{undo} is missing or was changed: the base cannot be restored from it")
    plan = Plan.of(checkpoint, replace(manifest.edit, base=None), inexact="ignore")
    columns = Columns.open(undo)
    plan = plan.with_columns(columns.arrays(plan))
    old = columns.header_bytes()
    if old.keys() != manifest.resharded.keys():
        raise CheckpointError(f"{undo} does not hold the headers of the base's files: it is damaged")
    restored = _to_restore(checkpoint, manifest)
    shards = {shard.path.name: shard for shard in checkpoint.shards}
    with staged(out, overwrite, checkpoint.path) as part, ThreadPoolExecutor(2) as pool:
        for name, origin in restored.items():
            shard = shards.get(name, Shard(checkpoint.path / name, (), 0, 0))
            (part / origin).parent.mkdir(parents=True, exist_ok=True)
            with create(part / origin, checkpoint.path / name) as file:
                _, digest = rewrite(shard, plan.targets, file, {}, pool, progress)
            if digest != manifest.files[name].before:
                raise CheckpointError(f"{baked}/{name} was changed after baking: it does not give the base's file")
        for name, head in old.items():
            shard_before = NewShard(INDEX, head, ()) if name == INDEX else old_shard(name, head, checkpoint.tensors)
            with create(part / name, checkpoint.shards[0].path) as file:
                digest = assemble(shard_before, plan, file, {}, pool, progress)
            if digest != manifest.resharded[name].before:
                raise CheckpointError(f"{baked} was changed after baking: it does not give {name} of the base")
    return RevertResult(len(restored) + len(old), manifest.left_out)


def _manifest(checkpoint: Checkpoint) -> Manifest:
    path = checkpoint.path
    manifest = Manifest.read(path)
    if manifest is None:
        raise CheckpointError(f"{path} has no {MANIFEST}: only a directory that kbne-edit baked can be reverted")
    if not manifest.sealed:
        raise CheckpointError(f"{path / MANIFEST} was changed after baking: the base cannot be restored with certainty")
    return manifest


def _to_restore(checkpoint: Checkpoint, manifest: Manifest) -> dict[str, str]:
    """{file: its name in the base}. Raises CheckpointError if files are missing, or new."""
    carried = checkpoint.other_files()[0]
    names = manifest.base_names([*(shard.path.name for shard in checkpoint.shards), *carried])
    if wrong := sorted(set(names) ^ set(manifest.files)):
        where = "its manifest does not know" if wrong[0] in names else "are missing in it"
        raise CheckpointError(f"{checkpoint.path} was changed after baking: files that {where}, {shown(wrong[0])}")
    restored = {name: origin for name, origin in names.items() if origin is not None}
    forbid_links_out(checkpoint.path, restored)
    return restored
