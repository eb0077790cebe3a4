"""A checkpoint directory: its configuration, its shards, its neurons' slots, and the other files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, shown
from ..families import Site
from ..files import open_input, read_json
from .dtypes import DTYPES, to_float
from .layouts.base import Part
from .layouts.carriers import carriers, gguf_carriers, stored
from .layouts.gguf import Header, config_of, read_header
from .layouts.layout import Layout, layout_of
from .names import INDEX, INDEX_SUFFIX, MANIFEST, OLD_UNDO, SINGLE, UNDO, is_hidden, is_private, is_weights
from .refusals import gguf_file, no_weights, read_config
from .slots import Slot, layer_sizes, slots
from .tensors import Shard, TensorInfo, read_raw


@dataclass(frozen=True)
class Checkpoint:
    """A local checkpoint directory: config.json and its safetensors shards (or one file); or a GGUF file.

    path: the directory, or the GGUF file if that was given. gguf: the header of a GGUF file.
    """

    path: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    indexed: bool = False  # an index names the shards
    notes: tuple[str, ...] = ()  # what is unusual about the directory; it was read as transformers reads it
    gguf: Header | None = None

    @classmethod
    def open(cls, directory: str | Path) -> Checkpoint:
        """Read config, index and every header. Raises CheckpointError with advice."""
        path = Path(directory)
        if (file := gguf_file(path)) is not None:
            return cls._open_gguf(path, file)
        checkpoint = cls._open(path)
        _ = checkpoint.layout  # raises for a format that is not known
        return checkpoint

    @classmethod
    def _open_gguf(cls, path: Path, file: Path) -> Checkpoint:
        header = read_header(file)
        tensors = tuple(sorted((stored(entry) for entry in header.entries), key=lambda tensor: tensor.start))
        shard = Shard(file, tensors, header.data_start, header.size)
        return cls(path, config_of(header, file), (shard,), gguf=header)

    @classmethod
    def _open(cls, path: Path) -> Checkpoint:
        config = read_config(path)
        if (path / SINGLE).is_file():
            stale = sorted(file.name for file in path.glob(f"*{INDEX_SUFFIX}"))
            notes = [f"{path / name} is not read: {SINGLE} holds the whole model" for name in stale]
            return cls(path, config, (Shard.open(path / SINGLE),), notes=tuple(notes))
        if not (path / INDEX).is_file():
            raise CheckpointError(no_weights(path))
        shards, notes = _sharded(path, path / INDEX)
        return cls(path, config, shards, True, tuple(notes))

    @property
    def index(self) -> Path | None:
        """The index that names the shards; None if there is a single file."""
        return self.path / INDEX if self.indexed else None

    @cached_property
    def tensors(self) -> dict[str, tuple[Shard, TensorInfo]]:
        return {tensor.name: (shard, tensor) for shard in self.shards for tensor in shard.tensors}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, (_, tensor) in self.tensors.items()}

    @cached_property
    def layout(self) -> Layout | None:
        """How its matrices are quantised; None if they are not, and for GGUF. Raises CheckpointError."""
        if self.gguf is not None:
            return None
        parts = {name: Part(tensor.dtype, tensor.shape) for name, (_, tensor) in self.tensors.items()}
        return layout_of(self.config, parts, self.read_stored)

    @property
    def quantised(self) -> bool:
        """True if weights are stored as codes and scales, which must be dequantised before use."""
        return self.gguf is not None or self.layout is not None

    @property
    def formats(self) -> list[str]:
        """The names of its quantised formats, for messages."""
        if self.gguf is not None:
            return sorted({f"GGUF {entry.kind.name}" for entry in self.gguf.entries})
        return [] if self.layout is None else self.layout.formats

    @property
    def plain_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the unquantised checkpoint (for GGUF under GGUF's names)."""
        if self.gguf is not None:
            return {entry.name: entry.shape for entry in self.gguf.entries}
        return self.shapes if self.layout is None else self.layout.shapes

    def read_stored(self, name: str) -> np.ndarray:
        """A whole tensor as it is stored: BF16 as uint16, 8-bit floats as uint8."""
        shard, tensor = self.tensors[name]
        return np.frombuffer(read_raw(shard, tensor), DTYPES[tensor.dtype].numpy or "u1").reshape(tensor.shape)

    def read_number(self, name: str) -> float:
        """A tensor that holds one number."""
        return float(to_float(self.read_stored(name), self.tensors[name][1].dtype).reshape(-1)[0])

    def read_plain(self, name: str) -> np.ndarray:
        """A tensor of `plain_shapes` as numbers, dequantised: float32 (F64: float64). Not for GGUF."""
        if self.layout is not None:
            return self.layout.read(name)
        return to_float(self.read_stored(name), self.tensors[name][1].dtype)

    def slots(self, site: Site) -> dict[int, list[Slot]]:
        """Where each layer's factors go, {layer: [Slot, …]}; cached. Raises FamilyError."""
        if site not in self._slots:
            self._slots[site] = self._find_slots(site)
        return self._slots[site]

    def _find_slots(self, site: Site) -> dict[int, list[Slot]]:
        if self.gguf is not None:
            return gguf_carriers({entry.name: entry for entry in self.gguf.entries}, self.config, site)
        if self.layout is not None:
            return carriers(self.layout, self.config, site, self.read_stored)
        return slots(self.shapes, self.config, site)

    def layer_sizes(self, site: Site) -> list[int]:
        """How many neurons each layer has, [L]. Raises FamilyError."""
        return layer_sizes(self.slots(site))

    @cached_property
    def _slots(self) -> dict[Site, dict[int, list[Slot]]]:
        return {}

    def fingerprint(self) -> str:
        """SHA-256 that identifies the weights, however they are sharded; read from disk once."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        """SHA-256 over each tensor's name, dtype, shape and sample.

        The sample is 4 KiB from the tensor's middle. It tells a fine-tuned model from its base in a few milliseconds.
        It identifies the model; whether the files are undamaged is what the manifest's full hashes say.
        """
        digest = hashlib.sha256()
        opened, file = None, None
        try:
            for name, (shard, tensor) in sorted(self.tensors.items()):
                if (
                    opened is not shard or file is None
                ):  # one open file at a time: there can be more shards than file handles
                    if file is not None:
                        file.close()
                    opened, file = shard, open_input(shard.path)
                middle = (tensor.start + tensor.end) // 2
                file.seek(max(tensor.start, middle - 2048))
                digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
                digest.update(file.read(min(4096, tensor.end - tensor.start)))
        finally:
            if file is not None:
                file.close()
        return digest.hexdigest()

    def other_files(self) -> tuple[list[str], list[str]]:
        """`other_files` of the directory, without the shards; none for a GGUF file that was given alone."""
        if self.path == self.shards[0].path:
            return [], []
        return other_files(self.path, {shard.path.name for shard in self.shards}, self.indexed)


def other_files(
    path: Path, shards: Collection[str] = (), indexed: bool = False, private: bool = False
) -> tuple[list[str], list[str]]:
    """(files to carry over, weight files to leave out), as sorted paths relative to the directory.

    Left out: the same weights in other formats, and indexes of other files than the `shards`. They are not edited, and
    a loader could prefer them. In neither list: what is not part of the model, such as keys and a trainer's checkpoints
    (see `names.is_private`); with `private` they are carried over, too. Links to files are followed (see
    `files.forbid_links_out`). indexed: the index belongs to the shards.
    Raises CheckpointError for what cannot be carried over: links to folders, pipes, devices.
    """
    carry: list[str] = []
    leave: list[str] = []
    for root, folders, names in os.walk(path, onerror=_cannot_list):
        inside = Path(root).relative_to(path)
        skipped = is_hidden if private else is_private
        folders[:] = sorted(f for f in folders if not skipped((inside / f).as_posix()))
        for name in sorted(names + [f for f in folders if os.path.islink(os.path.join(root, f))]):
            relative = (inside / name).as_posix()
            if relative in shards or relative in (MANIFEST, UNDO, OLD_UNDO) or skipped(relative):
                continue
            if not os.path.isfile(os.path.join(root, name)):
                raise CheckpointError(
                    f"{path} holds {shown(relative)}, which is not a file (a pipe, a device, a link to a folder or to "
                    "nothing): remove it, or replace it by a copy of what it points to"
                )
            stale = name.endswith(INDEX_SUFFIX) and not (indexed and relative == INDEX)
            (leave if stale or is_weights(relative) else carry).append(relative)
    return carry, leave


def private_files(path: Path) -> list[str]:
    """Names in a model's folder that are not carried over, because they are not part of the model; sorted."""
    names = os.listdir(path) if path.is_dir() else []  # a GGUF file that was given alone has no folder
    return sorted(name for name in names if is_private(name) and not is_hidden(name))


def _cannot_list(error: OSError) -> None:
    raise CheckpointError(f"cannot read {error.filename}: {error.strerror}")


def _sharded(path: Path, index: Path) -> tuple[tuple[Shard, ...], list[str]]:
    """The shards that an index names, and notes. As in transformers, all tensors of these files count."""
    text = read_json(index)
    weight_map = text.get("weight_map") if isinstance(text, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map {{tensor: file}}: download it again")
    present = set(os.listdir(path))
    for name in dict.fromkeys(map(_text, weight_map.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {shown(name)}, which is not a safetensors file beside it")
        if name not in present:
            raise CheckpointError(f"{index} names {shown(name)}, which is missing: download it again")
    if not isinstance(text.get("metadata"), dict):
        raise CheckpointError(f'{index} has no metadata that transformers can read: write "metadata": {{}} into it')
    shards = tuple(Shard.open(path / name) for name in sorted(set(weight_map.values())))
    held: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in held:
                raise CheckpointError(
                    f"{path}: {shown(tensor.name)} is in two files, {held[tensor.name]} and {shard.path.name} "
                    "(transformers takes the latter): load the model with transformers and save it again"
                )
            held[tensor.name] = shard.path.name
    notes = []
    for name in sorted(weight_map.keys() - held.keys())[:3]:
        notes.append(f"{index} names {shown(name)}, which no file holds: ignored, as transformers does")
    for name in sorted(held.keys() - weight_map.keys())[:3]:
        notes.append(f"{index} does not name {shown(name)} of {held[name]}: used, as transformers does")
    for name in sorted(n for n in held.keys() & weight_map.keys() if held[n] != weight_map[n])[:3]:
        notes.append(
            f"{index} places {shown(name)} in {weight_map[name]}; it is in {held[name]}, and is read from there"
        )
    return shards, notes


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise CheckpointError(f"an index names {shown(value)} as a file")
    return value
