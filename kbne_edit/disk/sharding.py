"""Which tensor stands in which file: a checkpoint cut anew into files of a given size, and how it was cut before.

A header is all of a file that its tensors are not. So whoever keeps the headers can cut the files again as they were,
to the byte.
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
    """One file of a layout. head: all before the data; tensors: their names, in file order."""

    name: str
    head: bytes
    tensors: tuple[str, ...]


def reshard(checkpoint: Checkpoint, size: int | str | None) -> tuple[NewShard, ...]:
    """The checkpoint's tensors in files of at most `size` bytes, header included; () if they are cut so already.

    size: a number of bytes, or text such as "5GB"; None leaves the files as they are. The tensors keep their order; one
    that is larger has a file to itself. A single file is called model.safetensors, several model-00001-of-0000N and so
    on. Raises InputError.
    """
    if size is None:
        return ()
    most = int(parse_size(size, "shard size")) if isinstance(size, str) else size
    if checkpoint.gguf is not None:
        raise InputError("a GGUF file is one file, and is not cut anew: leave out the shard size")
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
    """All before the data of a file that holds these tensors of the checkpoint. metadata: of `shared_metadata`."""
    tensors = [checkpoint.tensors[name][1] for name in names]
    return header_bytes(((t.name, t.dtype, t.shape, t.end - t.start) for t in tensors), metadata)


def _groups(tensors: Sequence[TensorInfo], most: int, metadata: dict[str, str]) -> list[list[TensorInfo]]:
    """The tensors in turn, each where it fits beside those before it, else in the next file."""
    groups: list[list[TensorInfo]] = []
    longest = sum(tensor.end - tensor.start for tensor in tensors)  # no offset has more digits
    empty = len(header_bytes([], metadata)) + 8  # the header is padded to a multiple of eight
    room = 0
    for tensor in tensors:
        entry = {tensor.name: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [longest, longest]}}
        takes = tensor.end - tensor.start + len(json.dumps(entry, separators=(",", ":")))
        if not groups or takes > room:
            groups.append([])
            room = most - empty
        groups[-1].append(tensor)
        room -= takes
    for group in groups:
        group.sort(key=lambda tensor: -DTYPES[tensor.dtype].bits)  # the widest first: each is aligned to its own width
    return groups


def shared_metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """What the headers of all files say alike. format: loaders ask for it."""
    first, *others = (read_metadata(shard.path) for shard in checkpoint.shards)
    shared = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    return {"format": "pt"} | shared


def index_text(checkpoint: Checkpoint, files: Sequence[NewShard]) -> str:
    """The index that goes with several files."""
    total = sum(tensor.end - tensor.start for _, tensor in checkpoint.tensors.values())
    places = {name: new.name for new in files for name in new.tensors}
    return json_text({"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def header_of(shard: Shard) -> bytes:
    with open_input(shard.path) as file:
        return file.read(shard.data_start)


def headers(checkpoint: Checkpoint) -> dict[str, bytes]:
    """What it takes to cut the files again as they are: their heads, and the index if there is one."""
    result = {shard.path.name: header_of(shard) for shard in checkpoint.shards}
    if checkpoint.index:
        with open_input(checkpoint.index) as file:
            result[INDEX] = file.read()
    return result


def old_shard(name: str, head: bytes, tensors: Collection[str]) -> NewShard:
    """The file that had this header. Raises CheckpointError if it held others than the `tensors` that there are."""
    header = parse_json(head[8:], f"the header of {name}")
    try:
        names = sorted(header.keys() - {"__metadata__"}, key=lambda tensor: tuple(header[tensor]["data_offsets"]))
        if not all(tensor in tensors for tensor in names):
            raise KeyError
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"the header of {name} as it was is damaged: the base cannot be restored") from None
    return NewShard(name, head, tuple(names))
