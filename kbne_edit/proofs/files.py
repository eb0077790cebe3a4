"""The first proof: the files hold the edit.

Every edited weight is the rounded product of the original and its factor; everything else is identical to the bit. The
proof streams, without a model in memory. It trusts nothing that the output says: rules determine which files an output
may hold besides its base's, and their content is compared with the base.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..disk.checkpoint import Checkpoint, other_files
from ..disk.hashing import TwoDigests, file_hash
from ..disk.manifest import FileRecord, Manifest
from ..disk.names import CARD, INDEX, MANIFEST, OLD_UNDO, UNDO, base_card, is_private, is_weights
from ..disk.sharding import NewShard, header_of, headers, index_text, new_header, shared_metadata
from ..disk.tensors import Shard, TensorInfo, read_metadata
from ..errors import one_line
from ..files import open_input, read_json
from ..folding.columns import FOLD_KEY, Columns, undo_path
from ..folding.plan import Plan
from ..folding.rewrite import Progress, chunks, pieces, scaled
from ..folding.target import Target
from .outcome import EditFrom, FileProof

# In a directory made elsewhere: the files that transformers reads. Other files cannot change the model.
_READ = (".json", ".model", "vocab.txt", "merges.txt", ".tiktoken", ".spm", ".jinja", ".py")
# Keys of a configuration that depend on the program that wrote it.
_WRITER = ("transformers_version", "_name_or_path", "torch_dtype", "dtype")


@dataclass
class _Run:
    """The state of a comparison. hashes: {weight file: SHA-256 in the base and in the output}, as far as computed."""

    plan: Plan
    baked: Checkpoint
    manifest: Manifest | None
    rehash: bool
    progress: Progress | None
    kept: dict[str, list[np.ndarray]] = field(default_factory=dict)
    hashes: dict[str, FileRecord] = field(default_factory=dict)
    files: int = 0
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def base(self) -> Checkpoint:
        return self.plan.checkpoint

    def fault(self, text: str) -> None:
        if text not in self.faults:
            self.faults.append(text)

    def done(self, size: int) -> None:
        if self.progress:
            self.progress(size)


def file_proof(
    plan: Plan,
    baked: Checkpoint,
    manifest: Manifest | None = None,
    edit_from: EditFrom = "given",
    progress: Progress | None = None,
    *,
    rehash: bool = True,
) -> FileProof:
    """The first proof that `baked` is the plan's checkpoint with its edit, however both are sharded.

    manifest: the output's, which is checked, too; None for a directory made elsewhere. edit_from: where the plan's edit
    comes from, for the result. rehash: False skips the hashes of the shards, for a manifest whose hashes this run has
    computed itself; the bytes are compared in any case.
    """
    run = _Run(plan, baked, manifest, rehash and manifest is not None, progress)
    same_files = _same_files(run)
    if same_files:
        for old, new in zip(run.base.shards, baked.shards, strict=True):
            _compare_shard(run, old, new)
    else:
        _compare_tensors(run)
    if manifest:
        _compare_with_manifest(run, manifest)
    else:
        _compare_others(run, same_files)
    if stray := [name for name in _others(baked)[1] if not is_private(name)]:
        run.fault(f"the directory also holds unedited weights: {', '.join(stray[:3])}")
    return FileProof(
        edit=plan.edit,
        edit_from=edit_from,
        tensors=len(run.base.tensors),
        edited=len(plan.targets),
        files=run.files,
        faults=tuple(run.faults),
        notes=tuple(run.notes),
    )


# ------------------------------------------------------------------------------------------------------------ weights


def _same_files(run: _Run) -> bool:
    """True if weights can be compared file by file. A directory made elsewhere may have other headers."""
    base, baked = run.base, run.baked
    if [shard.path.name for shard in base.shards] != [shard.path.name for shard in baked.shards]:
        return False
    if run.manifest:
        return not run.manifest.resharded
    return all(header_of(old) == header_of(new) for old, new in zip(base.shards, baked.shards, strict=True))


def _compare_shard(run: _Run, old: Shard, new: Shard) -> None:
    """Fold the base again, chunk by chunk, and compare with the output; hash both at the same time."""
    name, targets = new.path.name, run.plan.targets
    with open_input(old.path) as a, open_input(new.path) as b, ThreadPoolExecutor(2) as pool:
        digests = TwoDigests(pool)
        for tensor, start, end in chunks(old.path, old.tensors, targets):
            before, after = a.read(end - start), b.read(end - start)
            if run.rehash:
                digests.update(before, before if before == after else after)
            expected = before if tensor is None else scaled(before, tensor, start, targets[tensor.name], run.kept)
            if expected != after:
                what = tensor.name if tensor else _tensor_at(old, start, before, after)
                run.fault(f"{name}: {one_line(what)} is not what the edit gives")
            run.done(2 * len(before))
        if rest := b.read(1):
            run.fault(f"{name}: longer than the base's file")
            if run.rehash:
                digests.update(b"", rest)  # not the hash of the whole file, but different from the base's
        if run.rehash:
            run.hashes[name] = FileRecord(*digests.hexdigests())
    run.files += 1


def _tensor_at(shard: Shard, start: int, before: bytes, after: bytes) -> str:
    """The tensor with the first difference of two chunks that begin at `start`."""
    position = start + next((i for i, (x, y) in enumerate(zip(before, after, strict=False)) if x != y), len(after))
    return next((t.name for t in shard.tensors if t.start <= position < t.end), "the header")


def _compare_tensors(run: _Run) -> None:
    """Compare tensor by tensor, for directories with another sharding or order."""
    old, new = run.base.tensors, run.baked.tensors
    for name in sorted(set(old) ^ set(new)):
        run.fault(f"tensor {one_line(name)} is {'missing' if name in old else 'new'}")
    for name in sorted(set(old) & set(new), key=lambda name: (old[name][0].path, old[name][1].start)):
        a, b = old[name][1], new[name][1]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            run.fault(f"tensor {one_line(name)} is {b.dtype} {list(b.shape)}; it was {a.dtype} {list(a.shape)}")
        elif not _same_tensor(run, old[name], new[name], run.plan.targets.get(name)):
            run.fault(f"{one_line(name)} is not what the edit gives")
    run.files += len(run.base.shards)


def _same_tensor(
    run: _Run, old: tuple[Shard, TensorInfo], new: tuple[Shard, TensorInfo], target: Target | None
) -> bool:
    (shard, tensor), (other, place) = old, new
    same = True
    with open_input(shard.path) as a, open_input(other.path) as b:
        a.seek(tensor.start)
        b.seek(place.start)
        for start, end in pieces(tensor, target):
            before, after = a.read(end - start), b.read(end - start)
            same &= (scaled(before, tensor, start, target, run.kept) if target else before) == after
            run.done(2 * len(before))
    return same


# -------------------------------------------------------------------------------------- what this tool wrote: by rule


def _compare_with_manifest(run: _Run, manifest: Manifest) -> None:
    """Compare the other files, the undo file, and the fields of the manifest about them."""
    expected = _expected_files(run, manifest)
    present = {*_others(run.baked)[0], *(shard.path.name for shard in run.baked.shards)}
    if ".gitattributes" not in expected:  # the Hub adds it to every repository
        present.discard(".gitattributes")
    for name in sorted(present ^ expected.keys()):
        run.fault(f"file {one_line(name)} is {'missing' if name in expected else 'new'}")
    for name in sorted(present & expected.keys()):
        _compare_file(run, name, expected[name], manifest)
    for name in sorted(manifest.files.keys() - expected.keys() - present):
        run.fault(f"the manifest names a file that is not there: {one_line(name)}")
    if manifest.resharded:
        _compare_resharded(run, manifest)
    _compare_undo(run, manifest)
    if manifest.tensors != tuple(sorted(run.plan.targets)):
        run.fault("the manifest's list of edited tensors is not that of its edit")
    if manifest.edit.base != run.base.fingerprint():
        run.fault("the manifest's edit was made for another base (the fingerprint differs)")
    edit = run.plan.edit
    if (manifest.edit.site, manifest.edit.factors) != (edit.site, edit.factors):
        run.fault("the manifest records another edit")
    if set(manifest.left_out) != set(run.base.other_files()[1]):
        # From the Hub only the needed files are downloaded, so a local base can hold more or fewer formats.
        run.notes.append("the base's directory holds other formats of the weights than the manifest says")


def _others(baked: Checkpoint) -> tuple[list[str], list[str]]:
    """(all files that are not weights, weights that do not belong to the checkpoint)."""
    return other_files(baked.path, {shard.path.name for shard in baked.shards}, baked.indexed, private=True)


def _expected_files(run: _Run, manifest: Manifest) -> dict[str, str | None]:
    """{file of the output: its name in the base, None if the bake makes it}, by rule."""
    carried = run.base.other_files()[0]
    shards = [shard.path.name for shard in (run.baked if manifest.resharded else run.base).shards]
    expected: dict[str, str | None] = {name: None if manifest.resharded else name for name in shards}
    expected |= {name: name for name in carried if not (manifest.resharded and name == INDEX)}
    if manifest.resharded and len(shards) > 1:
        expected[INDEX] = None
    kept = base_card(carried)
    record = manifest.files.get(CARD)
    has_card = (run.baked.path / kept).is_file() or (record is not None and record.before is None)
    if CARD in expected and has_card:
        expected[kept] = expected.pop(CARD)
    if CARD not in expected and (run.baked.path / CARD).is_file():
        expected[CARD] = None
    if undo_path(run.baked.path).name == OLD_UNDO:  # earlier versions carried over every file, even keys
        for name in manifest.files.keys() - expected.keys():
            if not is_weights(name) and (run.base.path / name).is_file() and (run.baked.path / name).is_file():
                expected[name] = name
                run.notes.append(f"an earlier version carried over {one_line(name)}, which is not part of the model")
    return expected


def _compare_file(run: _Run, name: str, origin: str | None, manifest: Manifest) -> None:
    """Compare one file with the base and the manifest. Weights were compared before; here only their hashes are."""
    if name in run.hashes:
        actual = run.hashes[name]
    elif origin is not None and name in {shard.path.name for shard in run.baked.shards}:
        return  # its hash was computed by this run
    else:
        before = file_hash(run.base.path / origin) if origin is not None else None
        actual = FileRecord(before, file_hash(run.baked.path / name))
        run.files += origin is not None
    record = manifest.files.get(name)
    if origin is not None and name not in run.hashes and actual.before != actual.after:
        run.fault(f"file {one_line(name)} differs")
    elif record is None:
        run.fault(f"{one_line(name)} is not in the manifest")
    elif record.before != actual.before:
        run.fault(_other_base(name))
    elif record.after != actual.after:
        run.fault(f"{one_line(name)} was changed after baking (SHA-256 differs from the manifest)")
    elif record.base_name != (origin if origin != name else None):
        run.fault(f"the manifest says that {one_line(name)} had another name in the base than it has")


def _other_base(name: str) -> str:
    return f"{one_line(name)} of the base is not the file that was baked (SHA-256 differs)"


def _compare_resharded(run: _Run, manifest: Manifest) -> None:
    """Compare the record of the resharding, and the new headers and index."""
    base, baked = run.base, run.baked
    places = {t.name: shard.path.name for shard in baked.shards for t in shard.tensors}
    into = {s.path.name: tuple(sorted({places.get(t.name, "") for t in s.tensors})) for s in base.shards}
    if base.index:
        into[INDEX] = (INDEX,) if len(baked.shards) > 1 else ()
    for name in sorted(into.keys() ^ manifest.resharded.keys()):
        run.fault(f"{one_line(name)} is {'not in' if name in into else 'only in'} the manifest")
    for name in sorted(into.keys() & manifest.resharded.keys()):
        old = manifest.resharded[name]
        if run.rehash and file_hash(base.path / name) != old.before:
            run.fault(_other_base(name))
        elif old.into != into[name]:
            run.fault(f"the manifest says that tensors of {one_line(name)} are in other files than they are")
    if any(_other_base(name) in run.faults for name in into):
        return  # the rest would only follow from that fault
    shards = [NewShard(s.path.name, header_of(s), tuple(t.name for t in s.tensors)) for s in baked.shards]
    metadata = shared_metadata(base)
    for shard in shards:
        if all(name in base.tensors for name in shard.tensors) and shard.head != (
            new_header(base, shard.tensors, metadata)
        ):
            run.fault(f"{one_line(shard.name)}: the header is not that of the resharded base")
    if len(shards) > 1 and (baked.path / INDEX).read_bytes() != index_text(base, shards).encode():
        run.fault(f"file {INDEX} is not the index of these files")


def _compare_undo(run: _Run, manifest: Manifest) -> None:
    """The undo file must hold the base's columns, and nothing else."""
    path = undo_path(run.baked.path)
    if not path.is_file() or file_hash(path) != manifest.undo:
        run.fault(f"{path.name} is missing or was changed")
        return
    if path.name == UNDO and (run.baked.path / OLD_UNDO).exists():
        run.fault(f"file {OLD_UNDO} is new")
    if any(_other_base(shard.path.name) in run.faults for shard in run.base.shards):
        return
    undo = Columns.open(path)
    weights = {name: np.concatenate(parts).tobytes() for name, parts in run.kept.items()}
    if path.name == UNDO and read_metadata(path) != {FOLD_KEY: manifest.fold_sha256()}:
        run.fault(f"{MANIFEST} and {UNDO} are of different folds")
    old = headers(run.base) if manifest.resharded else {}
    if undo.weight_bytes() != weights or undo.header_bytes() != old:
        run.fault(f"{path.name} does not hold the weights as they are in the base")


# -------------------------------------------------------------------------------------------- what was made elsewhere


def _compare_others(run: _Run, same_files: bool) -> None:
    """Compare the other files of a directory without a manifest: those that transformers reads must be equal."""
    old = set(run.base.other_files()[0])
    new = {name for name in _others(run.baked)[0] if not is_private(name)}
    if not same_files:  # then the indexes differ, too
        old, new = old - {INDEX}, new - {INDEX}
    for name in sorted(old | new):
        if name not in old or name not in new:
            problem = f"file {one_line(name)} is {'missing' if name in old else 'new'}"
        else:
            run.files += 1
            problem = _difference(run.base.path / name, run.baked.path / name, name)
            if not problem and file_hash(run.base.path / name) != file_hash(run.baked.path / name):
                run.notes.append(f"file {one_line(name)} is formatted differently, with the same content")
        if problem and name.endswith(_READ):
            run.fault(problem)
        elif problem:
            run.notes.append(problem)
    if (path := undo_path(run.baked.path)).exists():
        run.fault(f"{path.name} exists without {MANIFEST}: the manifest was removed")


def _difference(old: Path, new: Path, name: str) -> str:
    """How a file differs; "" for equal files, and for a configuration with the same content."""
    if file_hash(old) == file_hash(new):
        return ""
    if name not in ("config.json", "generation_config.json"):
        return f"file {one_line(name)} differs"
    before, after = read_json(old), read_json(new)
    if not isinstance(before, dict) or not isinstance(after, dict):
        return f"file {one_line(name)} differs"
    missing = object()
    keys = [k for k in sorted(before.keys() | after.keys()) if before.get(k, missing) != after.get(k, missing)]
    keys = [key for key in keys if key not in _WRITER]
    return f"file {one_line(name)} differs in {', '.join(map(one_line, keys[:3]))}" if keys else ""
