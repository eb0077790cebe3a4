"""GGUF files: the header, and where a file stores its feed-forward neurons.

The reader of the `gguf` package needs seconds for a vocabulary of 150,000 tokens (it makes a numpy object of each).
This reader skips the vocabulary, and checks every count against the file's size before it uses it.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import CheckpointError, FamilyError, shown
from ...files import open_input
from .ggml import TYPES, BlockType

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_LONGEST = 1 << 24  # bytes of one string: a chat template has thousands

# {architecture in GGUF: model_type in transformers}, of those whose blocks have a gate.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "cohere": "cohere",
    "command-r": "cohere",
}


@dataclass(frozen=True)
class Entry:
    """One tensor. shape: outermost axis first, in weights; start: byte offset of its data in the file."""

    name: str
    kind: BlockType
    shape: tuple[int, ...]
    start: int

    @property
    def row(self) -> int:
        """Bytes of a row."""
        return self.shape[-1] // self.kind.weights * self.kind.size

    @property
    def size(self) -> int:
        return prod(self.shape[:-1]) * self.row


@dataclass(frozen=True)
class Header:
    """A file's header. metadata: numbers, booleans and strings; of an array only its length.

    spans: (begin, end) of each key with its value in the file; arrays: keys whose values are arrays; described: (begin,
    end) of the tensors' descriptions.
    """

    metadata: dict[str, object]
    entries: tuple[Entry, ...]
    data_start: int
    size: int
    spans: dict[str, tuple[int, int]]
    arrays: frozenset[str]
    described: tuple[int, int]
    alignment: int


class _Reader:
    def __init__(self, file: BinaryIO, path: Path):
        self._file, self.path, self.size = file, path, os.fstat(file.fileno()).st_size

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is not a readable GGUF file ({what}): download it again")

    def bytes(self, count: int) -> bytes:
        data = self._file.read(count) if count <= self.size else b""
        if len(data) != count:
            raise self.damaged("truncated")
        return data

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.bytes(struct.calcsize(form)))[0]

    def text(self) -> str:
        length = self.number("<Q")
        if length > _LONGEST:
            raise self.damaged("a text is too long")
        return self.bytes(length).decode("utf-8", "replace")

    def value(self, kind: int) -> object:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._skip_array()
        raise self.damaged(f"unknown type of value {kind}")

    def _skip_array(self) -> int:
        kind, count = self.number("<I"), self.number("<Q")
        if count > self.size or kind not in (*_SCALARS, _STRING):
            raise self.damaged("an array is too long, or of arrays")
        if kind in _SCALARS:
            self.bytes(count * struct.calcsize(_SCALARS[kind]))
            return count
        for _ in range(count):
            length = int.from_bytes(self.bytes(8), "little")
            self.bytes(length)
        return count

    def position(self) -> int:
        return self._file.tell()


def read_header(path: Path) -> Header:
    """The header of a GGUF file of version 2 or 3, little-endian. Raises CheckpointError."""
    with open_input(path) as file:
        reader = _Reader(file, path)
        if reader.bytes(4) != b"GGUF":
            raise reader.damaged("it does not begin with GGUF")
        version, tensors, values = reader.number("<I"), reader.number("<Q"), reader.number("<Q")
        if version not in (2, 3) or max(tensors, values) > reader.size:
            raise reader.damaged(f"version {version}" if version not in (2, 3) else "truncated")
        metadata: dict[str, object] = {}
        spans: dict[str, tuple[int, int]] = {}
        arrays = set()
        for _ in range(values):
            begin, key = reader.position(), reader.text()
            if key in metadata:
                raise reader.damaged(f"{shown(key)} appears twice")
            kind = reader.number("<I")
            metadata[key] = reader.value(kind)
            if kind == _ARRAY:
                arrays.add(key)
            spans[key] = (begin, reader.position())
        begin = reader.position()
        described = [_described(reader) for _ in range(tensors)]
        ranges = (begin, reader.position())
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise reader.damaged("its alignment is not a power of two")
        data_start = -(-reader.position() // alignment) * alignment
        entries = tuple(Entry(name, kind, shape, data_start + offset) for name, kind, shape, offset in described)
        _check(reader, entries, alignment)
        return Header(metadata, entries, data_start, reader.size, spans, frozenset(arrays), ranges, alignment)


def without_vocabulary(header: Header, file: Path, out: Path, weights: bool = True) -> None:
    """Copy the file without the tokenizer's arrays, which take the gguf package most of a minute to read.

    weights: False leaves a hole in their place.
    """
    kept = [span for key, span in header.spans.items() if key not in header.arrays or not key.startswith("tokenizer.")]
    with open_input(file) as source, open(out, "wb") as target:
        target.write(source.read(16) + struct.pack("<Q", len(kept)))
        for begin, end in (*kept, header.described):
            source.seek(begin)
            target.write(source.read(end - begin))
        target.write(b"\0" * (-target.tell() % header.alignment))
        size = source.seek(0, 2) - header.data_start
        if not weights:
            target.truncate(target.tell() + size)
            return
        source.seek(header.data_start)
        shutil.copyfileobj(source, target, 4 << 20)


def _described(reader: _Reader) -> tuple[str, BlockType, tuple[int, ...], int]:
    name, dimensions = reader.text(), reader.number("<I")
    if not 1 <= dimensions <= 4:
        raise reader.damaged(f"{shown(name)} has {dimensions} dimensions")
    shape = tuple(reader.number("<Q") for _ in range(dimensions))[::-1]
    kind, offset = reader.number("<I"), reader.number("<Q")
    if kind not in TYPES:
        raise CheckpointError(f"{reader.path}: {shown(name)} is of ggml type {kind}, which is not known")
    if not all(0 < n <= 8 * reader.size for n in shape) or shape[-1] % TYPES[kind].weights:
        raise reader.damaged(f"{shown(name)} has rows that are not whole blocks")
    return name, TYPES[kind], shape, offset


def _check(reader: _Reader, entries: tuple[Entry, ...], alignment: int) -> None:
    if len({entry.name for entry in entries}) != len(entries):
        raise reader.damaged("a tensor appears twice")
    position = 0
    for entry in sorted(entries, key=lambda entry: entry.start):
        if entry.start % alignment or entry.start < position:
            raise reader.damaged(f"tensors overlap at {shown(entry.name)}")
        position = entry.start + entry.size
        if position > reader.size:
            raise reader.damaged("truncated")


def config_of(header: Header, path: Path) -> dict[str, Any]:
    """model_type and sizes, under config.json's keys. Raises FamilyError, CheckpointError."""
    metadata = header.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise FamilyError(
            f"{path} has the architecture {shown(architecture)}; known in GGUF: {', '.join(sorted(ARCHITECTURES))}"
        )
    if metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(f"{path} is one of several files: join them first (llama-gguf-split --merge)")
    named = {"num_hidden_layers": "block_count", "hidden_size": "embedding_length"}
    config = {key: metadata.get(f"{architecture}.{name}") for key, name in named.items()}
    for key, value in config.items():
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{path} names no {key.replace('_', ' ')} ({architecture}.{named[key]})")
    words = metadata.get("tokenizer.ggml.tokens")
    return {"model_type": ARCHITECTURES[architecture], **config} | ({"vocab_size": words} if words else {})


@dataclass(frozen=True)
class Rows:
    """A tensor with a row (of a bias: a number) for each neuron, from row `start` on."""

    tensor: str
    offset: int
    neurons: int
    start: int = 0
    experts: int | None = None


def neuron_rows(entries: Mapping[str, Entry], layer: int, site: str) -> list[Rows]:
    """Where the rows of a layer's up-projection (site "gate": gate projection) are. Raises FamilyError."""
    prefix, part = f"blk.{layer}.", "gate" if site == "gate" else "up"
    result: list[Rows] = []
    if (stacked := entries.get(f"{prefix}ffn_{part}_exps.weight")) is not None:
        experts, neurons = stacked.shape[:2]
        result.append(Rows(stacked.name, 0, neurons, 0, experts))
        if (shared := entries.get(f"{prefix}ffn_{part}_shexp.weight")) is not None:
            result.append(Rows(shared.name, experts * neurons, shared.shape[0]))
        return result
    down = entries.get(f"{prefix}ffn_down.weight")
    rows = entries.get(f"{prefix}ffn_{part}.weight") or entries.get(f"{prefix}ffn_up.weight")
    if down is None or rows is None:
        raise FamilyError(f"no tensor {prefix}ffn_{part}.weight and {prefix}ffn_down.weight in the file")
    neurons = down.shape[1]
    packed = rows.shape[0] == 2 * neurons and f"{prefix}ffn_gate.weight" not in entries
    if not packed and (rows.shape[0] != neurons or not rows.name.endswith(f"{part}.weight")):
        raise FamilyError(f"{rows.name} has {rows.shape[0]} rows and {down.name} takes {neurons}: not a gated block")
    start = neurons if packed and part == "up" else 0
    result.append(Rows(rows.name, 0, neurons, start))
    if (bias := entries.get(re.sub(r"weight$", "bias", rows.name))) is not None:
        result.append(Rows(bias.name, 0, neurons, start))
    return result
