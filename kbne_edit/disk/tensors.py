"""Safetensors files: their headers, checked in full, and their tensors by offset.

A checkpoint is never read through a model class: it would lose tensors that it does not know, and store tied tensors
twice.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, shown
from ..files import MOST_JSON, open_input, parse_json
from .dtypes import DTYPES, storage


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
    metadata, tensors = header.pop("__metadata__", {}), []
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
        if dtype not in DTYPES:
            raise CheckpointError(f"{path}: {shown(name)} has the unknown dtype {shown(dtype)}")
        count = 0 if 0 in shape else 1
        for n in shape:
            count = min(count * n, 8 * size + 1)  # capped beyond the file's size, so that huge sizes cost nothing
        if end - start != (count * DTYPES[dtype].bits + 7) // 8:
            raise CheckpointError(
                f"{path}: {shown(name)} does not have the size that its shape requires: download it again"
            )
        tensors.append(TensorInfo(name, dtype, shape, data_start + start, data_start + end))
    tensors.sort(key=lambda t: (t.start, t.end))
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            raise CheckpointError(f"{path}: tensors overlap or leave a hole at {shown(tensor.name)}: download it again")
        position = tensor.end
    if position != size:
        state = "truncated" if position > size else "longer than its header says"
        raise CheckpointError(f"{path} is {state} ({size} bytes, {position} expected): download it again")
    return tuple(tensors)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file whose header `Shard.open` has checked."""
    with open_input(path) as file:
        header = parse_json(file.read(int.from_bytes(file.read(8), "little")), str(path))
    return header.get("__metadata__", {})


def header_bytes(tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: dict[str, str] | None) -> bytes:
    """All bytes of a safetensors file before the data. tensors: (name, dtype, shape, bytes) in file order."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, dtype, shape, size in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_array(shard: Shard, tensor: TensorInfo) -> np.ndarray:
    """A whole tensor in its storage dtype (BF16 as uint16)."""
    return np.frombuffer(read_raw(shard, tensor), storage(tensor.dtype, tensor.name)).reshape(tensor.shape)


def read_raw(shard: Shard, tensor: TensorInfo) -> bytes:
    """A whole tensor as it is stored."""
    with open_input(shard.path) as file:
        file.seek(tensor.start)
        return file.read(tensor.end - tensor.start)


def write_tensors(
    path: Path, tensors: dict[str, tuple[str, np.ndarray]], metadata: dict[str, Any] | None = None
) -> None:
    """A safetensors file of {name: (dtype, values as stored)}. metadata: {text: text}."""
    ordered = sorted(
        tensors.items(), key=lambda item: (item[1][0] == "U8", item[0])
    )  # bytes last: they would misalign what follows
    head = header_bytes(((name, dtype, array.shape, array.nbytes) for name, (dtype, array) in ordered), metadata)
    path.write_bytes(head + b"".join(array.tobytes() for _, (_, array) in ordered))
