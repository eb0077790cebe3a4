"""A checkpoint directory: its configuration, its shards, the places of its neurons, and the files beside them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..errors import CheckpointError, shown
from ..families import Site
from ..files import open_input, read_json
from .names import INDEX, INDEX_SUFFIX, MANIFEST, OLD_UNDO, SINGLE, UNDO, is_weights
from .refusals import no_weights, read_config
from .slots import Slot, layer_sizes, slots
from .tensors import Shard, TensorInfo


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
        single, indexes = path / SINGLE, sorted(path.glob(f"*{INDEX_SUFFIX}"))
        if single.is_file():
            return cls(path, config, (Shard.open(single),))
        index = path / INDEX
        if index not in indexes:
            raise CheckpointError(no_weights(path))
        return cls(path, config, _sharded(path, index))

    @cached_property
    def tensors(self) -> dict[str, tuple[Shard, TensorInfo]]:
        return {tensor.name: (shard, tensor) for shard in self.shards for tensor in shard.tensors}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, (_, tensor) in self.tensors.items()}

    def slots(self, site: Site) -> dict[int, list[Slot]]:
        """Where each layer's factors go, {layer: [Slot, …]}; found once. Raises FamilyError."""
        if site not in self._slots:
            self._slots[site] = slots(self.shapes, self.config, site)
        return self._slots[site]

    def layer_sizes(self, site: Site) -> list[int]:
        """How many neurons each layer has, [L]. Raises FamilyError."""
        return layer_sizes(self.slots(site))

    @cached_property
    def _slots(self) -> dict[Site, dict[int, list[Slot]]]:
        return {}

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
            if relative in shards or relative in (MANIFEST, UNDO, OLD_UNDO):
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
