"""Files of edited columns: the undo file holds them before the edit, the delta after it.

They are safetensors files under other file and tensor names. Servers may load every *.safetensors in a folder (TGI, and
vLLM without an index), and would mistake columns for weights. Earlier versions used the names of the weights; such
files can still be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..disk.dtypes import DTYPES
from ..disk.names import DELTA, OLD_DELTA, OLD_UNDO, UNDO
from ..disk.tensors import Shard, TensorInfo, read_raw, write_tensors
from ..errors import CheckpointError
from .plan import Plan

FOLD_KEY = "kbne_fold"  # of the undo file's metadata: `Manifest.fold_sha256`
_WEIGHT, _HEADER = "kbne.weight.", "kbne.header."


@dataclass(frozen=True)
class Columns:
    """An open file of columns. weights: {tensor of the checkpoint: its columns}; headers: {file of the base: its
    header}, in the undo file of resharded weights.
    """

    shard: Shard
    weights: dict[str, TensorInfo]
    headers: dict[str, TensorInfo]

    @classmethod
    def open(cls, path: Path) -> Columns:
        """Raises CheckpointError if it is not a file of columns."""
        shard = Shard.open(path)
        weights = {t.name.removeprefix(_WEIGHT): t for t in shard.tensors if t.name.startswith(_WEIGHT)}
        headers = {t.name.removeprefix(_HEADER): t for t in shard.tensors if t.name.startswith(_HEADER)}
        if path.name in (OLD_UNDO, OLD_DELTA):
            weights = {t.name: t for t in shard.tensors if t.dtype != "U8"}
            headers = {t.name: t for t in shard.tensors if t.dtype == "U8"}
        if len(weights) + len(headers) != len(shard.tensors):
            raise CheckpointError(f"{path} is damaged, or kbne-edit did not write it")
        return cls(shard, weights, headers)

    def weight_bytes(self) -> dict[str, bytes]:
        """The columns of each tensor, as they are stored."""
        return {name: read_raw(self.shard, tensor) for name, tensor in self.weights.items()}

    def header_bytes(self) -> dict[str, bytes]:
        """The header of each file of the base."""
        return {name: read_raw(self.shard, tensor) for name, tensor in self.headers.items()}

    def arrays(self, plan: Plan) -> dict[str, np.ndarray]:
        """The columns of each target of the plan: [D, k], [k, D] or [k]. Raises CheckpointError if they do not fit."""
        expected, storage = {}, {}
        for name, target in plan.targets.items():
            tensor = plan.checkpoint.tensors[name][1]
            expected[name] = (kept_dtype(tensor), target.kept_shape(tensor))
            storage[name] = target.slot.numbers(tensor).storage
        if {name: (tensor.dtype, tensor.shape) for name, tensor in self.weights.items()} != expected:
            raise CheckpointError(f"{self.shard.path} does not hold the columns that its edit changes: it is damaged")
        return {
            name: np.frombuffer(read_raw(self.shard, tensor), storage[name]).reshape(tensor.shape)
            for name, tensor in self.weights.items()
        }


def kept_dtype(tensor: TensorInfo) -> str:
    """A tensor's dtype in a file of columns: rows of a GGUF file are stored as bytes."""
    return tensor.dtype if tensor.dtype in DTYPES else "U8"


def write_columns(
    path: Path,
    weights: dict[str, tuple[str, np.ndarray]],
    headers: dict[str, bytes] | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a file of columns. weights: {tensor: (dtype, values as stored)}; headers: as of `Columns`."""
    tensors = {_WEIGHT + name: value for name, value in weights.items()}
    tensors |= {_HEADER + name: ("U8", np.frombuffer(head, np.uint8)) for name, head in (headers or {}).items()}
    write_tensors(path, tensors, metadata)


def undo_path(directory: Path) -> Path:
    """The undo file of an output, also of an earlier version."""
    return _either(directory, UNDO, OLD_UNDO)


def delta_path(path: str | Path) -> Path:
    """The file of a delta, given the file or its directory."""
    return _either(Path(path), DELTA, OLD_DELTA) if Path(path).is_dir() else Path(path)


def _either(directory: Path, name: str, old: str) -> Path:
    is_new = (directory / name).is_file() or not (directory / old).is_file()
    return directory / (name if is_new else old)
