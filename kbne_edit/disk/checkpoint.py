"""Safetensors checkpoints on disk: index, headers, reading in chunks, atomic publishing. No torch, no model class.

A checkpoint is read by offsets, never through a model class: tensors that a class does not know would be lost, tied
ones doubled. Headers are checked in full before a byte is written.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..errors import CheckpointError, OutputError, shown
from ..files import MOST_JSON, open_input, parse_json, read_json

CHUNK = 2 << 20  # bytes read at once: memory is independent of tensors, and the chunk stays in the cache while hashed
WIDTHS = {  # bits of each dtype
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}

MANIFEST, UNDO, DELTA = "kbne_edit.json", "kbne_undo.safetensors", "kbne_delta.safetensors"
_OUTPUTS = ("config.json", "adapter_config.json", DELTA)  # one of them stands in whatever this tool writes
_INDEX = ".safetensors.index.json"
INDEX = f"model{_INDEX}"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a shard. start, end: byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file, its header checked. tensors are in file order; data starts at `data_start`."""

    path: Path
    tensors: tuple[TensorInfo, ...]
    data_start: int
    size: int

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Read and check the header. Raises CheckpointError."""
        with open_input(path) as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
            if head.startswith(b"version "):
                raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`")
            if not 2 <= length <= size - 8:
                raise CheckpointError(f"{path} is not a safetensors file, or is truncated: download it again")
            text = file.read(min(length, MOST_JSON + 1))
        header = parse_json(text, f"the header of {path}", cure="download it again")
        return cls(path, _tensors(path, header, 8 + length, size), 8 + length, size)


def _tensors(path: Path, header: object, data_start: int, size: int) -> tuple[TensorInfo, ...]:
    """Check that the tensors fill the file without hole or overlap, as the format demands."""
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: damaged header (not an object): download it again")
    metadata, found = header.pop("__metadata__", {}), []
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: damaged header (metadata is not text): download it again")
    for name, entry in header.items():
        try:
            dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            whole = all(type(n) is int and n >= 0 for n in (*shape, start, end)) and isinstance(dtype, str)
            whole &= isinstance(entry["shape"], list) and len(entry) == 3
        except (TypeError, KeyError, ValueError):
            whole = False
        if not whole:
            raise CheckpointError(f"{path}: the header's entry for {shown(name)} is malformed: download it again")
        if dtype not in WIDTHS:
            raise CheckpointError(f"{path}: {shown(name)} has the unknown dtype {shown(dtype)}")
        count = 0 if 0 in shape else 1
        for n in shape:
            count = min(count * n, 8 * size + 1)  # more than the file holds is too much: no product of huge numbers
        if end - start != (count * WIDTHS[dtype] + 7) // 8:
            raise CheckpointError(f"{path}: {shown(name)} has not the size that its shape demands: download it again")
        found.append(TensorInfo(name, dtype, shape, data_start + start, data_start + end))
    found.sort(key=lambda t: (t.start, t.end))
    position = data_start
    for tensor in found:
        if tensor.start != position:
            raise CheckpointError(f"{path}: tensors overlap or leave a hole at {shown(tensor.name)}: download it again")
        position = tensor.end
    if position != size:
        state = "truncated" if position > size else "longer than its header says"
        raise CheckpointError(f"{path} is {state} ({size} bytes, {position} expected): download it again")
    return tuple(found)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file whose header `Shard.open` has checked."""
    with open_input(path) as file:
        header = parse_json(file.read(int.from_bytes(file.read(8), "little")), str(path))
    return header.get("__metadata__", {})


def header_bytes(tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: dict[str, str] | None) -> bytes:
    """All of a safetensors file before the data. tensors: (name, dtype, shape, bytes) in the order of the data."""
    header, position = {"__metadata__": metadata} if metadata else {}, 0
    for name, dtype, shape, size in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class Checkpoint:
    """A local checkpoint directory: config.json and its safetensors shards (or one file)."""

    path: Path
    config: dict
    shards: tuple[Shard, ...]

    @classmethod
    def open(cls, directory: str | Path) -> Checkpoint:
        """Read config, index and every header. Raises CheckpointError that says what to do."""
        path = Path(directory)
        config = read_config(path)
        single, indexes = path / "model.safetensors", sorted(path.glob(f"*{_INDEX}"))
        if single.is_file():
            return cls(path, config, (Shard.open(single),))
        index = path / INDEX
        if index not in indexes:
            raise CheckpointError(_no_weights(path))
        return cls(path, config, _sharded(path, index))

    @cached_property
    def tensors(self) -> dict[str, tuple[Shard, TensorInfo]]:
        return {tensor.name: (shard, tensor) for shard in self.shards for tensor in shard.tensors}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, (_, tensor) in self.tensors.items()}

    def fingerprint(self) -> str:
        """SHA-256 that identifies the weights, whatever their sharding; read from disk once per opened checkpoint."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        """SHA-256 over each tensor's name, dtype, shape and sample.

        The sample is 4 KiB from the tensor's middle: enough to tell a fine-tuned model from its base in a few
        milliseconds. It says "made for this model", not "undamaged": the manifest's full hashes say that.
        """
        digest = hashlib.sha256()
        files = {shard.path: open_input(shard.path) for shard in self.shards}
        try:
            for name, (shard, tensor) in sorted(self.tensors.items()):
                middle = (tensor.start + tensor.end) // 2
                files[shard.path].seek(max(tensor.start, middle - 2048))
                digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
                digest.update(files[shard.path].read(min(4096, tensor.end - tensor.start)))
        finally:
            for file in files.values():
                file.close()
        return digest.hexdigest()

    def other_files(self) -> tuple[list[str], list[str]]:
        """`other_files` of the directory, besides the shards."""
        return other_files(self.path, {shard.path.name for shard in self.shards})


def other_files(path: Path, shards: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """(files to carry over, weight files to leave out), as sorted paths relative to the directory.

    Left out: the same weights in other formats. A loader could prefer them, and they are not edited. Links to files
    are followed (see `files.forbid_links_out`). Raises CheckpointError for what cannot be carried over: links to
    folders, pipes, devices.
    """
    carry, leave = [], []
    for root, folders, names in os.walk(path, onerror=_cannot_list):
        folders[:] = sorted(f for f in folders if f not in (".git", ".cache", "__pycache__"))
        for name in sorted(names + [f for f in folders if os.path.islink(os.path.join(root, f))]):
            relative = (Path(root) / name).relative_to(path).as_posix()
            if relative in shards or relative in (MANIFEST, UNDO):
                continue
            if not os.path.isfile(os.path.join(root, name)):
                raise CheckpointError(
                    f"{path} holds {shown(relative)}, which is no file (a pipe, a device, a link to a folder or to "
                    "nothing): remove it, or put a copy of what is meant in its place"
                )
            (leave if is_weights(relative) else carry).append(relative)
    return carry, leave


def _cannot_list(error: OSError) -> None:
    raise CheckpointError(f"cannot read {error.filename}: {error.strerror}")


def is_weights(name: str) -> bool:
    suffixes = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot")
    return name.endswith(suffixes) or name.endswith((".bin.index.json", "consolidated" + _INDEX))


def read_config(path: Path) -> dict:
    """config.json of a checkpoint that can be edited. Raises CheckpointError for everything else, with the way out."""
    try:
        if not os.listdir(path):
            raise CheckpointError(f"{path} is empty: a checkpoint directory holds config.json and the weights")
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except NotADirectoryError:
        raise CheckpointError(f"{path} is a file: give the directory that holds config.json and the weights") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise CheckpointError(f"{path} holds an adapter: merge it into its base model first (PEFT: merge_and_unload)")
    if not (path / "config.json").is_file():
        if list(path.glob("*.gguf")):
            raise CheckpointError(f"{path} holds GGUF weights: use the unquantised transformers checkpoint instead")
        if list(path.glob("*.pth")):
            raise CheckpointError(
                f"{path} holds Meta's own .pth files: convert them with transformers' convert_llama_weights_to_hf.py, "
                "or take the '-hf' sibling from the Hub, e.g. --in meta-llama/Llama-2-7b-hf"
            )
        raise CheckpointError(f"{path} has no config.json: it does not hold a transformers checkpoint")
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path / 'config.json'} is not a JSON object")
    if quantised := config.get("quantization_config"):
        method = shown(quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown")
        raise CheckpointError(
            f"{path / 'config.json'} has quantization_config ({method}): kbne-edit needs full-precision weights. "
            "Edit the unquantised model and quantise the result"
        )
    return config


def _no_weights(path: Path) -> str:
    if any(path.glob("pytorch_model*.bin*")):
        return f"{path} holds .bin weights only: they are converted on the way (resolve the source first)"
    if any(path.glob("*.gguf")):
        return f"{path} holds GGUF weights: use the unquantised transformers checkpoint instead"
    if any(path.glob("*.pth")):
        return (
            f"{path} holds Meta's own .pth files and no transformers weights: convert them with transformers' "
            "convert_llama_weights_to_hf.py, or take the '-hf' sibling from the Hub"
        )
    return f"{path} has no weights: neither model.safetensors nor {INDEX} is there"


def _sharded(path: Path, index: Path) -> tuple[Shard, ...]:
    try:
        weight_map = read_json(index)["weight_map"]
        names = list(dict.fromkeys(weight_map.values()))
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} has no weight_map {{tensor: file}}: download it again") from None
    present = set(os.listdir(path))
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {shown(name)}, which is not a safetensors file beside it")
        if name not in present:
            raise CheckpointError(f"{index} names {shown(name)}, which is missing: download it again")
    shards = tuple(Shard.open(path / name) for name in sorted(names))
    held = {tensor.name: shard.path.name for shard in shards for tensor in shard.tensors}
    total = sum(len(shard.tensors) for shard in shards)
    if len(held) != total:
        raise CheckpointError(f"{path}: a tensor stands in two shards: download it again")
    if held != weight_map:
        wrong = sorted(set(held.items()) ^ set(weight_map.items()))[0][0]
        raise CheckpointError(f"{index} and the shards disagree about {shown(wrong)}: download them again")
    return shards


# -------------------------------------------------------------------------------------------------------- arithmetic

_NUMPY = {"F32": np.float32, "F16": np.float16, "F64": np.float64}


def to_float(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Stored values as float32 (F64: float64). raw: for BF16 an array of uint16, else of the dtype itself."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw if dtype == "F64" else raw.astype(np.float32)


def from_float(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round once, half to even, to the stored dtype. NaN stays NaN."""
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return values.astype(_NUMPY[dtype])
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), (bits >> 16).astype(np.uint16) | 0x40, rounded)


def storage(dtype: str, where: str) -> np.dtype:
    """numpy's view of a stored dtype. Raises CheckpointError for dtypes that carry no plain weights."""
    if dtype == "BF16":
        return np.dtype("<u2")
    if dtype not in _NUMPY:
        raise CheckpointError(f"{where} is stored as {dtype}: kbne-edit edits BF16, F16, F32 and F64 weights")
    return np.dtype(_NUMPY[dtype]).newbyteorder("<")


def read_array(shard: Shard, tensor: TensorInfo) -> np.ndarray:
    """A whole tensor in its storage dtype (BF16 as uint16)."""
    return np.frombuffer(read_raw(shard, tensor), storage(tensor.dtype, tensor.name)).reshape(tensor.shape)


def read_raw(shard: Shard, tensor: TensorInfo) -> bytes:
    """A whole tensor as it is stored."""
    with open_input(shard.path) as file:
        file.seek(tensor.start)
        return file.read(tensor.end - tensor.start)


# -------------------------------------------------------------------------------------------------------- publishing


@contextmanager
def staged(out: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of `out` that takes its name when the block ends well, and vanishes when it does not.

    A sibling left by a killed run is recognised by its name and its free lock, and removed. With `overwrite` there is
    a moment at which the old output has left its name and the new one has not taken it: a run killed there leaves the
    old one whole as `.NAME.kbne-old`, and the next run puts it back. Raises OutputError.
    """
    with _claimed(Path(out), overwrite) as part, write_errors(out):
        yield part
        _sync_tree(part)
        _swap(part, Path(os.path.abspath(out)))
    with suppress(OSError):  # the files are safe; if the name is not, the output is lost as a whole
        sync(part.parent)


def check_out(out: str | Path, overwrite: bool = False) -> None:
    """Raise OutputError unless `staged` could begin now: asked before work that takes long."""
    with _claimed(Path(out), overwrite):
        pass


@contextmanager
def _claimed(given: Path, overwrite: bool) -> Iterator[Path]:
    """The sibling, empty and locked; it is removed at the end unless it has taken the output's name by then."""
    out = Path(os.path.abspath(given))
    part, old, lock = _sibling(out, "partial"), _sibling(out, "old"), None
    try:
        with write_errors(given):
            out.parent.mkdir(parents=True, exist_ok=True)
            lock = _lock(part, given)
            if old.exists() and _is_free(out):
                os.rename(old, out)
            _discard(out)
            for left in part.iterdir():
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            if out.is_symlink() or (out.exists() and not out.is_dir()):
                raise OutputError(f"{given} exists and is no folder: choose another --out")
            if not overwrite and not _is_free(out):
                raise OutputError(f"{given} exists: choose another --out, or pass --overwrite")
            if not _is_free(out) and not any((out / name).is_file() for name in _OUTPUTS):
                raise OutputError(f"{given} holds no checkpoint, and --overwrite replaces nothing else: remove it")
        yield part
    finally:
        if lock is not None:
            if _holds(lock, part):
                shutil.rmtree(part, ignore_errors=True)
            os.close(lock)


def _sibling(out: Path, state: str) -> Path:
    return out.parent / f".{out.name}.kbne-{state}"


def _is_free(out: Path) -> bool:
    return not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir()))


def _lock(part: Path, out: Path) -> int:
    while True:
        part.mkdir(exist_ok=True)
        try:
            handle = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # renamed in this moment by a run that ended well
            continue
        claim(handle, out)
        if _holds(handle, part):
            return handle
        os.close(handle)


def claim(handle: int, out: Path) -> None:
    """Lock an open file or folder until it is closed. Raises OutputError, and closes it, if another run has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise OutputError(f"another run is writing to {out}: wait for it, or choose another --out") from None


def _holds(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _swap(part: Path, out: Path) -> None:
    if _is_free(out):
        os.rename(part, out)
        return
    old = _sibling(out, "old")
    os.rename(out, old)
    try:
        os.rename(part, out)
    except OSError:
        os.rename(old, out)
        raise
    _discard(out)


def _discard(out: Path) -> None:
    """Remove a replaced output. It loses its name first: what is called old is whole, or it could not be put back."""
    gone = _sibling(out, "gone")
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(OSError):
        os.rename(_sibling(out, "old"), gone)
    shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def write_errors(out: str | Path) -> Iterator[None]:
    """Failures of the operating system become an OutputError; inputs name themselves (see files.open_input)."""
    try:
        yield
    except OSError as error:
        cure = {errno.ENOSPC: "free some space or choose another --out", errno.EDQUOT: "your quota is used up"}
        advice = cure.get(error.errno, "check the path and its permissions")
        raise OutputError(f"cannot write {out}: {error.strerror or error} ({advice})") from error


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file or a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(path: Path) -> None:
    for root, _, files in os.walk(path):
        for name in files:
            sync(Path(root) / name)
        sync(Path(root))
