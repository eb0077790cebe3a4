"""Folds an edit into a checkpoint, file by file, streaming: memory does not grow with the model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..disk.hashing import at_once, file_hash, in_background
from ..disk.manifest import FileRecord, Manifest, OldShard
from ..disk.names import INDEX, UNDO
from ..disk.publishing import create, sync
from ..disk.sharding import headers, index_text
from ..disk.tensors import Shard
from ..files import forbid_links_out
from .columns import FOLD_KEY, kept_dtype, write_columns
from .plan import Plan
from .rewrite import Kept, Progress, assemble, rewrite


def fold_into(plan: Plan, part: Path, progress: Progress | None = None) -> Manifest:
    """Execute a plan in an existing directory. Returns the manifest; the caller writes it."""
    checkpoint = plan.checkpoint
    carry, leave = checkpoint.other_files()
    forbid_links_out(checkpoint.path, carry)
    old = headers(checkpoint) if plan.files else {}
    kept: Kept = {}
    with ThreadPoolExecutor(2 * at_once()) as pool:
        if plan.files:
            files, resharded = _write_new_shards(plan, part, kept, pool, progress)
        else:
            files, resharded = _write_shards(plan, part, kept, pool, progress), {}
        for name in (name for name in carry if name not in old):
            files[name] = _copy(checkpoint.path / name, part / name, pool, progress)
    manifest = Manifest(
        edit=plan.edit.made_for(checkpoint.fingerprint()),
        files=dict(sorted(files.items())),
        tensors=tuple(sorted(plan.targets)),
        left_out=tuple(leave),
        resharded=resharded,
    )
    # The edited columns (or rows) of the base: {tensor name: [D, k], [k, D] or [k]}; and the headers of its files.
    dtypes = {name: kept_dtype(checkpoint.tensors[name][1]) for name in kept}
    columns = {name: (dtypes[name], np.concatenate(parts)) for name, parts in kept.items()}
    write_columns(part / UNDO, columns, old, {FOLD_KEY: manifest.fold_sha256()})
    return replace(manifest, undo=file_hash(part / UNDO))


def _write_shards(
    plan: Plan, part: Path, kept: Kept, pool: ThreadPoolExecutor, progress: Progress | None
) -> dict[str, FileRecord]:
    """Write the weights with the base's sharding."""

    def write(shard: Shard) -> tuple[str, FileRecord]:
        with create(part / shard.path.name, shard.path) as out:
            before, after = rewrite(shard, plan.targets, out, kept, pool, progress)
        submit(sync, part / shard.path.name)
        return shard.path.name, FileRecord(before, after)

    # One shard keeps two cores busy: one reads and scales, two hash.
    with in_background() as submit, ThreadPoolExecutor(at_once()) as writers:
        return dict(writers.map(write, plan.checkpoint.shards))


def _write_new_shards(
    plan: Plan, part: Path, kept: Kept, pool: ThreadPoolExecutor, progress: Progress | None
) -> tuple[dict[str, FileRecord], dict[str, OldShard]]:
    """Write the weights with a new sharding, and its index."""
    checkpoint = plan.checkpoint
    places = {name: file.name for file in plan.files for name in file.tensors}
    files = {}
    with in_background() as submit, in_background() as hashing:
        old = {shard.path.name: hashing(file_hash, shard.path) for shard in checkpoint.shards}
        if checkpoint.index:
            old[INDEX] = hashing(file_hash, checkpoint.index)
        for file in plan.files:
            with create(part / file.name, checkpoint.shards[0].path) as out:
                files[file.name] = FileRecord(None, assemble(file, plan, out, kept, pool, progress))
            submit(sync, part / file.name)
    into = {shard.path.name: sorted({places[t.name] for t in shard.tensors}) for shard in checkpoint.shards}
    if len(plan.files) > 1:
        (part / INDEX).write_text(index_text(checkpoint, plan.files), encoding="utf-8")
        files[INDEX], into[INDEX] = FileRecord(None, file_hash(part / INDEX)), [INDEX]
    resharded = {name: OldShard(old[name].result(), tuple(into.get(name, ()))) for name in sorted(old)}
    return files, resharded


def _copy(source: Path, out: Path, pool: ThreadPoolExecutor, progress: Progress | None) -> FileRecord:
    out.parent.mkdir(parents=True, exist_ok=True)
    with create(out, source) as file:
        digest, _ = rewrite(Shard(source, (), 0, 0), {}, file, {}, pool, progress)
    return FileRecord(digest, digest)
