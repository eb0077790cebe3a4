"""Resharding: which tensor is in which file, now and in the base.

A safetensors file is its header and its tensors. So the headers of the old files are all it takes to restore them,
byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..errors import CheckpointError, InputError
from ..files import json_text, open_input, parse_json, parse_size
from .checkpoint import Checkpoint
from .dtypes import DTYPES
from .names import INDEX, SINGLE
from .tensors import Shard, TensorInfo, header_bytes, read_metadata


@dataclass(frozen=True)
class NewShard:
    """One file of a new sharding. head: all bytes before the data; tensors: their names, in file order."""

    name: str
    head: bytes
    tensors: tuple[str, ...]


def reshard(checkpoint: Checkpoint, size: int | str | None) -> tuple[NewShard, ...]:
    """The checkpoint's tensors in files of at most `size` bytes, header included; () if that changes nothing.

    size: a number of bytes, or text such as "5GB"; None leaves the files as they are. The tensors keep their order; a
    larger one has a file to itself. A single file is called model.safetensors, several model-00001-of-0000N and so on.
    Raises InputError.
    """
    if size is None:
        return ()
    most = int(parse_size(size, "shard size")) if isinstance(size, str) else size
    if checkpoint.gguf is not None:
        raise InputError("a GGUF file cannot be resharded: leave out the shard size")
    if most < 1:
        raise InputError(f"shard size {size!r} holds nothing: give a size such as 5GB")
    metadata = shared_metadata(checkpoint)
    groups = _groups([tensor for shard in checkpoint.shards for tensor in shard.tensors], most, metadata)
    files = []
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors" if len(groups) > 1 else SINGLE
        names = tuple(tensor.name for tensor in group)
        files.append(NewShard(name, new_header(checkpoint, names, metadata), names))
    as_it_is = [(shard.path.name, tuple(tensor.name for tensor in shard.tensors)) for shard in checkpoint.shards]
    return () if [(new.name, new.tensors) for new in files] == as_it_is else tuple(files)


def new_header(checkpoint: Checkpoint, names: Sequence[str], metadata: dict[str, str]) -> bytes:
    """The header of a file with these tensors of the checkpoint. metadata: of `shared_metadata`."""
    tensors = [checkpoint.tensors[name][1] for name in names]
    return header_bytes(((t.name, t.dtype, t.shape, t.end - t.start) for t in tensors), metadata)


def _groups(tensors: Sequence[TensorInfo], most: int, metadata: dict[str, str]) -> list[list[TensorInfo]]:
    """Fill one file after the other, in order."""
    groups: list[list[TensorInfo]] = []
    longest = sum(tensor.end - tensor.start for tensor in tensors)  # the largest offset, so that no entry is longer
    empty = len(header_bytes([], metadata)) + 8  # the header is padded to a multiple of eight
    free = 0
    for tensor in tensors:
        entry = {tensor.name: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [longest, longest]}}
        needed = tensor.end - tensor.start + len(json.dumps(entry, separators=(",", ":")))
        if not groups or needed > free:
            groups.append([])
            free = most - empty
        groups[-1].append(tensor)
        free -= needed
    for group in groups:
        group.sort(key=lambda tensor: -DTYPES[tensor.dtype].bits)  # the widest first, so that each is aligned
    return groups


def shared_metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """The metadata that all files have in common. "format" is always there: loaders need it."""
    first, *others = (read_metadata(shard.path) for shard in checkpoint.shards)
    shared = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    return {"format": "pt"} | shared


def index_text(checkpoint: Checkpoint, files: Sequence[NewShard]) -> str:
    """The index that goes with several files."""
    total = sum(tensor.end - tensor.start for _, tensor in checkpoint.tensors.values())
    places = {name: new.name for new in files for name in new.tensors}
    return json_text({"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def header_of(shard: Shard) -> bytes:
    """All bytes of a file before the data."""
    with open_input(shard.path) as file:
        return file.read(shard.data_start)


def headers(checkpoint: Checkpoint) -> dict[str, bytes]:
    """What restores the present files: their headers, and the index if there is one."""
    result = {shard.path.name: header_of(shard) for shard in checkpoint.shards}
    if checkpoint.index:
        with open_input(checkpoint.index) as file:
            result[INDEX] = file.read()
    return result


def old_shard(name: str, head: bytes, tensors: Collection[str]) -> NewShard:
    """The old file with this header. Raises CheckpointError if the header names a tensor that is not in `tensors`."""
    header = parse_json(head[8:], f"the header of {name}")
    try:
        names = sorted(header.keys() - {"__metadata__"}, key=lambda tensor: tuple(header[tensor]["data_offsets"]))
        if not all(tensor in tensors for tensor in names):
            raise KeyError
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"the old header of {name} is damaged: the base cannot be restored") from None
    return NewShard(name, head, tuple(names))
