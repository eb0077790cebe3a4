"""Files of edited columns: the undo file, which holds them as they were, and the delta, as they become.

Inside they are safetensors files, but neither their names nor those of their tensors are a checkpoint's: whoever serves
a model may read every *.safetensors in its folder (TGI, vLLM without an index), and would take columns for weights.
Earlier outputs hold the same tensors under the names of the weights; those are read as well.
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
    """A file of columns, opened. weights: {tensor of the checkpoint: where its columns are}; headers: {file of the
    base: where all before its data is}, in the undo file of resharded weights.
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
            raise CheckpointError(f"{path} is no file of columns that kbne-edit wrote, or is damaged")
        return cls(shard, weights, headers)

    def weight_bytes(self) -> dict[str, bytes]:
        """The columns of each tensor, as they are stored."""
        return {name: read_raw(self.shard, tensor) for name, tensor in self.weights.items()}

    def header_bytes(self) -> dict[str, bytes]:
        """All before the data of each file of the base."""
        return {name: read_raw(self.shard, tensor) for name, tensor in self.headers.items()}

    def arrays(self, plan: Plan) -> dict[str, np.ndarray]:
        """The columns of each target of the plan: [D, k], [k, D] or [k]. Raises CheckpointError if they do not fit."""
        expected, storage = {}, {}
        for name, target in plan.targets.items():
            tensor = plan.checkpoint.tensors[name][1]
            expected[name] = (kept_dtype(tensor), target.kept_shape(tensor))
            storage[name] = target.slot.numbers(tensor).storage
        if {name: (tensor.dtype, tensor.shape) for name, tensor in self.weights.items()} != expected:
            raise CheckpointError(
                f"{self.shard.path} does not hold what its edit changes in this checkpoint: it is damaged"
            )
        return {
            name: np.frombuffer(read_raw(self.shard, tensor), storage[name]).reshape(tensor.shape)
            for name, tensor in self.weights.items()
        }


def kept_dtype(tensor: TensorInfo) -> str:
    """What a file of columns calls a tensor's dtype: rows of a GGUF file are bytes there."""
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
    """The undo file of an output, also of an earlier one."""
    return _either(directory, UNDO, OLD_UNDO)


def delta_path(path: str | Path) -> Path:
    """The file of a delta, given itself or its directory."""
    return _either(Path(path), DELTA, OLD_DELTA) if Path(path).is_dir() else Path(path)


def _either(directory: Path, name: str, old: str) -> Path:
    there = (directory / name).is_file() or not (directory / old).is_file()
    return directory / (name if there else old)
