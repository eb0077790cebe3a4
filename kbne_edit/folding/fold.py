"""Fold an edit into a checkpoint, shard by shard, and take it out again (method, section 5).

W_down (factor_i h_i) = (W_down with column i scaled by factor_i) h. Each stored weight becomes the float32 product,
rounded once to its own dtype. Files stream through in chunks of whole rows, so memory does not grow with the model.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .. import __version__
from ..disk.checkpoint import (
    CHUNK,
    INDEX,
    MANIFEST,
    UNDO,
    Checkpoint,
    Shard,
    TensorInfo,
    from_float,
    header_bytes,
    read_array,
    read_raw,
    staged,
    storage,
    sync,
    to_float,
)
from ..disk.manifest import base_names, is_sealed, read_manifest, write_manifest
from ..disk.sharding import Cut, as_it_was, cut, heads, index_text
from ..edit import Edit
from ..errors import CheckpointError, EditError, shown
from ..families import Slot, end, layer_sizes, slots
from ..files import forbid_links_out, forbid_overlap, open_input

Progress = Callable[[int], None]  # called with the number of bytes done since the last call


@dataclass(frozen=True)
class Target:
    """What happens to one tensor. index: neurons along the slot's axis, [k]; factors: float32 [k].

    expert: which expert each belongs to, [k], where the tensor stacks all experts. values: what is put in place of the
    products, in the layout of the undo file (a delta brings its own).
    """

    slot: Slot
    index: np.ndarray
    factors: np.ndarray
    expert: np.ndarray | None = None
    values: np.ndarray | None = None

    @property
    def neurons(self) -> np.ndarray:
        """Which of the slot's neurons change, [k]."""
        return self.index if self.expert is None else self.expert * self.slot.neurons + self.index

    def product(self, old: np.ndarray, kept: slice | np.ndarray, tensor: TensorInfo) -> np.ndarray:
        """The float32 product of stored values with their factors, rounded once. Raises EditError where it overflows.

        old: a part of what the undo file keeps, [D, k] or [k, …]; kept: which of its rows those are.
        """
        if self.expert is None and self.slot.axis == 1:
            factors = self.factors[None, :]
        else:
            factors = self.factors[kept].reshape(-1, *[1] * (old.ndim - 1))
        wide = to_float(old, tensor.dtype)
        with np.errstate(over="ignore"):
            new = from_float(wide * factors.astype(wide.dtype), tensor.dtype)
        if not np.isfinite(to_float(new, tensor.dtype)[np.isfinite(wide)]).all():
            raise EditError(f"a factor makes weights of {tensor.name} overflow {tensor.dtype}: pass a smaller --factor")
        return new


def plan(checkpoint: Checkpoint, edit: Edit) -> dict[str, Target]:
    """Which tensors change, and how: {tensor name: Target}. Raises EditError if the edit does not fit."""
    found = slots(checkpoint.shapes, checkpoint.config, edit.site)
    edit.check(layer_sizes(found), checkpoint.fingerprint())
    targets = {}
    for layer, factors in edit.factors.items():
        neurons, values = np.fromiter(factors, np.int64), np.fromiter(factors.values(), np.float32)
        for slot in found[layer]:
            inside = (neurons >= slot.offset) & (neurons < end([slot]))
            if inside.any():
                storage(checkpoint.tensors[slot.tensor][1].dtype, slot.tensor)
                expert, index = np.divmod(neurons[inside] - slot.offset, slot.neurons)
                targets[slot.tensor] = Target(slot, index, values[inside], expert if slot.experts else None)
    return targets


def fold(
    source_dir: str | Path,
    edit: Edit,
    out_dir: str | Path,
    *,
    shard_size: int | str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict:
    """Write `source_dir` with `edit` folded in to `out_dir`, and return the manifest (also in kbne_edit.json).

    Streaming: no model class, memory independent of the model's size. The output appears whole or not at all.
    shard_size: cut the weights into files of at most so many bytes, or "5GB" (default: the files of `source_dir`).
    Raises CheckpointError, FamilyError, EditError, InputError, OutputError.
    """
    checkpoint = Checkpoint.open(source_dir)
    forbid_overlap(out_dir, checkpoint.path)
    targets, cuts = plan(checkpoint, edit), cut(checkpoint, shard_size)
    with staged(out_dir, overwrite) as part:
        manifest = fold_into(checkpoint, edit, targets, part, progress, cuts)
        write_manifest(part, manifest)
    return manifest


def fold_into(
    checkpoint: Checkpoint,
    edit: Edit,
    targets: dict[str, Target],
    part: Path,
    progress: Progress | None = None,
    cuts: Sequence[Cut] = (),
) -> dict:
    """`fold` into an existing directory, without the manifest file. cuts: files to make in place of the base's."""
    carry, leave = checkpoint.other_files()
    forbid_links_out(checkpoint.path, carry)
    old = heads(checkpoint) if cuts else {}
    files, undo, resharded = {}, {}, {}
    with ThreadPoolExecutor(2) as pool, _behind() as syncing:
        if cuts:
            files, resharded = _recut(checkpoint, cuts, targets, part, undo, pool, progress)
        for shard in () if cuts else checkpoint.shards:
            with open(part / shard.path.name, "wb") as out:
                before, after = rewrite(shard, targets, out, undo, pool, progress)
            files[shard.path.name] = {"in": before, "out": after}
            syncing(sync, part / shard.path.name)
        for name in (name for name in carry if name not in old):
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            with open(part / name, "wb") as out:
                digest, _ = rewrite(Shard(checkpoint.path / name, (), 0, 0), {}, out, undo, pool, progress)
            files[name] = {"in": digest, "out": digest}
    # The edited columns (or rows) as they were: {tensor name: [D, k], [k, D] or [k]}; and how the files were cut.
    kept = {name: (checkpoint.tensors[name][1].dtype, np.concatenate(parts)) for name, parts in undo.items()}
    write_tensors(part / UNDO, kept | {name: ("U8", np.frombuffer(head, np.uint8)) for name, head in old.items()})
    manifest = {
        "kbne_manifest": 1,
        "tool": f"kbne-edit {__version__}",
        "edit": {**edit.to_dict(), "base": checkpoint.fingerprint()},
        "tensors": sorted(targets),
        "files": dict(sorted(files.items())),
        "undo": file_hash(part / UNDO),
        "left_out": leave,
    }
    return manifest | ({"resharded": resharded} if cuts else {})


def _recut(
    checkpoint: Checkpoint,
    cuts: Sequence[Cut],
    targets: dict[str, Target],
    part: Path,
    undo: dict,
    pool: ThreadPoolExecutor,
    progress: Progress | None,
) -> tuple[dict, dict]:
    """The weights in other files than the base's, and their index. Returns the manifest's "files" and "resharded".

    resharded: {file of the base: {"in": its SHA-256, "into": the files that hold its tensors}}.
    """
    places = {name: new.name for new in cuts for name in new.tensors}
    with _behind() as syncing, _behind() as hashing:
        old = {shard.path.name: hashing(file_hash, shard.path) for shard in checkpoint.shards}
        if (index := checkpoint.path / INDEX).is_file():
            old[INDEX] = hashing(file_hash, index)
        files = {}
        for new in cuts:
            with open(part / new.name, "wb") as out:
                files[new.name] = {"in": None, "out": assemble(new, checkpoint, targets, out, undo, pool, progress)}
            syncing(sync, part / new.name)
    into = {shard.path.name: sorted({places[t.name] for t in shard.tensors}) for shard in checkpoint.shards}
    if len(cuts) > 1:
        (part / INDEX).write_text(index_text(checkpoint, cuts), encoding="utf-8")
        files[INDEX], into[INDEX] = {"in": None, "out": file_hash(part / INDEX)}, [INDEX]
    return files, {name: {"in": digest.result(), "into": into.get(name, [])} for name, digest in sorted(old.items())}


@contextmanager
def _behind() -> Iterator[Callable[..., Future]]:
    """A thread for work that nobody waits for before the end, where its errors are raised."""
    pool, jobs = ThreadPoolExecutor(1), []

    def submit(work: Callable, path: Path) -> Future:
        jobs.append(pool.submit(work, path))
        return jobs[-1]

    try:
        yield submit
        for job in jobs:
            job.result()
    finally:
        pool.shutdown(cancel_futures=True)


def chunks(path: Path, tensors: tuple[TensorInfo, ...], edited: dict) -> Iterator[tuple[TensorInfo | None, int, int]]:
    """(tensor or None, start, end) in file order; chunks of an edited tensor hold whole rows."""
    position, size = 0, os.path.getsize(path)
    for tensor in (t for t in tensors if t.name in edited):
        yield from ((None, a, min(a + CHUNK, tensor.start)) for a in range(position, tensor.start, CHUNK))
        yield from ((tensor, a, b) for a, b in pieces(tensor, True))
        position = tensor.end
    yield from ((None, a, min(a + CHUNK, size)) for a in range(position, size, CHUNK))


def pieces(tensor: TensorInfo, edited: bool) -> Iterator[tuple[int, int]]:
    """(start, end) of a tensor's chunks in its file, in turn; those of an edited one hold whole rows."""
    row = max((tensor.end - tensor.start) // max(tensor.shape[0], 1), 1) if edited else 1
    step = max(CHUNK // row, 1) * row
    return ((a, min(a + step, tensor.end)) for a in range(tensor.start, tensor.end, step))


class TwoDigests:
    """SHA-256 of a stream and of its edited twin, beside the caller's work; one computation until they part."""

    def __init__(self, pool: ThreadPoolExecutor):
        self._pool, self._before, self._after, self._jobs = pool, hashlib.sha256(), None, []

    def update(self, before: bytes, after: bytes) -> None:
        """Take the next piece of both; pass the same object twice where they are equal."""
        self._wait()
        if after is not before and self._after is None:
            self._after = self._before.copy()
        self._jobs = [self._pool.submit(self._before.update, before)]
        if self._after:
            self._jobs.append(self._pool.submit(self._after.update, after))

    def _wait(self) -> None:
        for job in self._jobs:
            job.result()

    def hexdigests(self) -> tuple[str, str]:
        self._wait()
        return self._before.hexdigest(), (self._after or self._before).hexdigest()


def rewrite(
    shard: Shard,
    targets: dict[str, Target],
    out: BinaryIO,
    undo: dict,
    pool: ThreadPoolExecutor,
    progress: Progress | None,
) -> tuple[str, str]:
    """Copy one file with its targets scaled. Returns SHA-256 of what was read and of what was written."""
    digests = TwoDigests(pool)
    with open_input(shard.path) as file:
        for tensor, start, end in chunks(shard.path, shard.tensors, targets):
            old = file.read(end - start)
            if len(old) != end - start:
                raise CheckpointError(f"{shard.path} became shorter while it was read: start again")
            new = old if tensor is None else scaled(old, tensor, start, targets[tensor.name], undo)
            digests.update(old, new)
            out.write(new)
            if progress:
                progress(len(new))
    return digests.hexdigests()


def assemble(
    new: Cut,
    checkpoint: Checkpoint,
    targets: dict[str, Target],
    out: BinaryIO,
    undo: dict,
    pool: ThreadPoolExecutor,
    progress: Progress | None,
) -> str:
    """Write one file of another layout: its head, then each tensor from where it stands, the targets scaled.

    Returns its SHA-256.
    """
    digests = TwoDigests(pool)
    digests.update(new.head, new.head)
    out.write(new.head)
    for name in new.tensors:
        shard, tensor = checkpoint.tensors[name]
        with open_input(shard.path) as file:
            file.seek(tensor.start)
            for start, end in pieces(tensor, name in targets):
                data = file.read(end - start)
                if len(data) != end - start:
                    raise CheckpointError(f"{shard.path} became shorter while it was read: start again")
                if name in targets:
                    data = scaled(data, tensor, start, targets[name], undo)
                digests.update(data, data)
                out.write(data)
                if progress:
                    progress(len(data))
    return digests.hexdigests()[1]


def _place(raw: bytes, tensor: TensorInfo, start: int, target: Target) -> tuple[np.ndarray, tuple, slice | np.ndarray]:
    """(rows, where, kept) of a chunk of whole rows that begins at byte `start` of the file.

    rows: a copy that can be written; where: the target's neurons in it; kept: which rows of the undo tensor those are.
    """
    kind = storage(tensor.dtype, tensor.name)
    rows = np.frombuffer(raw, kind).reshape(-1, *tensor.shape[1:]).copy()
    first = (start - tensor.start) // (kind.itemsize * max(int(np.prod(tensor.shape[1:])), 1))
    index = target.index
    if target.expert is None and target.slot.axis == 1:
        return rows, (slice(None), index), slice(first, first + len(rows))
    row = index if target.expert is None else target.expert
    inside = (row >= first) & (row < first + len(rows))
    if target.expert is None:
        return rows, (row[inside] - first,), inside
    between = (slice(None),) * (target.slot.axis - 1)
    return rows, (row[inside] - first, *between, index[inside]), inside


def scaled(raw: bytes, tensor: TensorInfo, start: int, target: Target, undo: dict) -> bytes:
    """Scale the target's neurons in a chunk of whole rows, and keep what was there in `undo`."""
    rows, where, kept = _place(raw, tensor, start, target)
    old = rows[where]
    undo.setdefault(tensor.name, []).append(old)
    rows[where] = target.product(old, kept, tensor) if target.values is None else target.values[kept]
    return rows.tobytes()


def write_tensors(path: Path, tensors: dict[str, tuple[str, np.ndarray]], metadata: dict | None = None) -> None:
    """A safetensors file of {name: (dtype, values as stored)}. metadata: {text: text}."""
    ordered = sorted(tensors.items(), key=lambda item: (item[1][0] == "U8", item[0]))  # bytes last: they align nothing
    head = header_bytes(((name, dtype, array.shape, array.nbytes) for name, (dtype, array) in ordered), metadata)
    path.write_bytes(head + b"".join(array.tobytes() for _, (_, array) in ordered))


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open_input(path) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------ revert


def revert(
    baked_dir: str | Path, out_dir: str | Path, *, overwrite: bool = False, progress: Progress | None = None
) -> dict:
    """Write the base of a baked directory to `out_dir`, byte for byte, from that directory alone.

    Every file's hash is compared with the manifest's hash of the base. Returns {"files": n, "left_out": [...]}.
    Raises CheckpointError if the directory was changed since it was baked, OutputError.
    """
    checkpoint = Checkpoint.open(baked_dir)
    manifest = read_manifest(baked_dir)
    if manifest is None:
        raise CheckpointError(f"{baked_dir} has no {MANIFEST}: only a directory that kbne-edit baked can be reverted")
    if not is_sealed(baked_dir, manifest):
        raise CheckpointError(f"{Path(baked_dir) / MANIFEST} was changed after baking: the base is not certain")
    forbid_overlap(out_dir, checkpoint.path)
    undo_path = checkpoint.path / UNDO
    if not undo_path.is_file() or file_hash(undo_path) != manifest["undo"]:
        raise CheckpointError(f"{undo_path} is missing or was changed: the base cannot be restored from it")
    targets = plan(checkpoint, Edit.from_dict({**manifest["edit"], "base": None}))
    kept = stored_columns(undo_path, targets, checkpoint)
    targets = {name: replace(target, values=kept[name]) for name, target in targets.items()}
    old, resharded = _stored_heads(undo_path), manifest.get("resharded", {})
    if old.keys() != resharded.keys():
        raise CheckpointError(f"{undo_path} does not hold how the files of the base were cut: it is damaged")
    shards = {shard.path.name: shard for shard in checkpoint.shards}
    names = base_names(manifest, [*shards, *checkpoint.other_files()[0]])
    if wrong := sorted(set(names) ^ set(manifest["files"])):
        where = "its manifest does not know" if wrong[0] in names else "are missing in it"
        raise CheckpointError(f"{baked_dir} was changed after baking: files that {where}, {shown(wrong[0])}")
    restored = {name: origin for name, origin in names.items() if origin is not None}
    with staged(out_dir, overwrite) as part, ThreadPoolExecutor(2) as pool:
        for name, origin in restored.items():
            shard = shards.get(name, Shard(checkpoint.path / name, (), 0, 0))
            (part / origin).parent.mkdir(parents=True, exist_ok=True)
            with open(part / origin, "wb") as out:
                _, digest = rewrite(shard, targets, out, {}, pool, progress)
            if digest != manifest["files"][name]["in"]:
                raise CheckpointError(f"{baked_dir}/{name} was changed after baking: it does not give the base back")
        for name, head in old.items():
            new = Cut(INDEX, head, ()) if name == INDEX else as_it_was(name, head, checkpoint.tensors)
            with open(part / name, "wb") as out:
                digest = assemble(new, checkpoint, targets, out, {}, pool, progress)
            if digest != resharded[name]["in"]:
                raise CheckpointError(f"{baked_dir} was changed after baking: it does not give {name} of the base back")
    return {"files": len(restored) + len(old), "left_out": manifest["left_out"]}


def _stored_heads(path: Path) -> dict[str, bytes]:
    """The heads of the base's files, if an undo file holds them."""
    undo = Shard.open(path)
    return {tensor.name: read_raw(undo, tensor) for tensor in undo.tensors if tensor.dtype == "U8"}


def stored_columns(path: Path, targets: dict[str, Target], checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """What an undo file or a delta holds for each target: [D, k], [k, D] or [k]. Raises CheckpointError if not."""
    saved, expected = Shard.open(path), {}
    columns = [tensor for tensor in saved.tensors if tensor.dtype != "U8"]  # those are heads, see `fold_into`
    for name, target in targets.items():
        shape = list(checkpoint.shapes[name])
        shape[target.slot.axis] = len(target.index)
        if target.expert is not None:
            shape = [len(target.index), *(size for axis, size in enumerate(shape) if axis not in (0, target.slot.axis))]
        expected[name] = (checkpoint.tensors[name][1].dtype, tuple(shape))
    if {tensor.name: (tensor.dtype, tensor.shape) for tensor in columns} != expected:
        raise CheckpointError(f"{path} does not hold what its edit changes in this checkpoint: it is damaged")
    return {tensor.name: read_array(saved, tensor) for tensor in columns}
