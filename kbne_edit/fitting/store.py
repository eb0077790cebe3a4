"""gradients.safetensors: what a fit needs of the model, so that it can be resumed, and repeated without the model.

The file is laid out in full before the first pass. An entry's values are written before its `done` flag, so whatever
moment a run is killed at, the next one goes on with the entries that have no flag. Tensors: rows [U, K, P] BF16 and
values [U, K] F32 of the units, fisher [R, S, P] BF16, likelihood [P] BF16 (of the Fisher texts), done [U + R + 1] U8.
A row that a unit does not have has the value NaN.

Legend: U units, K kinds of rows, R Fisher texts, S rows of each, P factors.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..disk.publishing import claim, write_errors
from ..disk.tensors import Shard, TensorInfo, header_bytes, read_metadata
from ..errors import CheckpointError, ScoresError
from ..files import parse_json

_BYTES = {"BF16": 2, "F32": 4, "U8": 1}
_KEY = "kbne_gradients"


@dataclass(frozen=True)
class Sizes:
    """units U, kinds K, texts R, samples S, factors P."""

    units: int
    kinds: int
    texts: int
    samples: int
    factors: int

    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """{name: (dtype, shape)}, in the order on disk."""
        return {
            "rows": ("BF16", (self.units, self.kinds, self.factors)),
            "fisher": ("BF16", (self.texts, self.samples, self.factors)),
            "likelihood": ("BF16", (self.factors,)),
            "values": ("F32", (self.units, self.kinds)),
            "done": ("U8", (self.units + self.texts + 1,)),
        }


class GradientFile:
    """Writes and reads the file in place; locked until `close`.

    done: [U + R + 1], which entries are finished. Raises OutputError if it cannot be written or another run is writing
    it, ScoresError if it was begun with other settings.
    """

    def __init__(self, path: Path, sizes: Sizes, settings: dict):
        self.path, self.sizes = path, sizes
        meta = json.dumps(settings, sort_keys=True)
        with write_errors(path):
            path.absolute().parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            claim(self._handle, path)
            if os.fstat(self._handle).st_size == 0:
                self._lay_out(meta)
        try:
            self._tensors, known = _opened(path)
            if json.dumps(known, sort_keys=True) != meta:
                raise ScoresError(
                    f"{path} was begun with another model, pairs or settings: move it away, or choose another file"
                )
        except BaseException:
            self.close()
            raise
        self.done = np.array(_mapped(path, self._tensors["done"])).astype(bool)

    def _lay_out(self, meta: str) -> None:
        tensors = [
            (name, dtype, shape, math.prod(shape) * _BYTES[dtype])
            for name, (dtype, shape) in self.sizes.layout().items()
        ]
        head = header_bytes(tensors, {_KEY: meta})
        os.pwrite(self._handle, head, 0)
        os.truncate(self._handle, len(head) + sum(size for *_, size in tensors))

    def write_unit(self, index: int, rows: Tensor, values: np.ndarray) -> None:
        """rows: [K, P] float32; values: [K]."""
        self._finite(rows, f"unit {index + 1}")
        self._put("rows", index, rows.bfloat16().view(torch.int16).numpy().tobytes())
        self._put("values", index, values.astype("<f4").tobytes())
        self._mark(index)

    def write_fisher(self, index: int, rows: Tensor) -> None:
        """rows: [S, P] float32."""
        self._finite(rows, f"Fisher text {index + 1}")
        self._put("fisher", index, rows.bfloat16().view(torch.int16).numpy().tobytes())
        self._mark(self.sizes.units + index)

    def write_likelihood(self, row: Tensor) -> None:
        """The gradient of the texts' mean log-probability per token, [P] float32."""
        self._finite(row, "the texts")
        self._put("likelihood", 0, row.bfloat16().view(torch.int16).numpy().tobytes())
        self._mark(self.sizes.units + self.sizes.texts)

    def _finite(self, values: Tensor, what: str) -> None:
        if not torch.isfinite(values).all():
            raise ScoresError(f"{what} has gradients that are not numbers: the model overflows, try --dtype float32")

    def _mark(self, entry: int) -> None:
        self._put("done", entry, b"\1")
        self.done[entry] = True

    def _put(self, name: str, index: int, raw: bytes) -> None:
        """Not through a memory map: on a full disk that would end the process by a signal."""
        position = self._tensors[name].start + index * len(raw)
        with write_errors(self.path):
            while raw:
                written = os.pwrite(self._handle, raw, position)
                raw, position = raw[written:], position + written

    def close(self) -> None:
        os.close(self._handle)


@dataclass(frozen=True)
class Gradients:
    """A finished file. rows: [U, K, P] bfloat16, mapped; values: [U, K]; fisher: [R, S, P], likelihood: [P],
    both bfloat16.
    """

    rows: Tensor
    values: np.ndarray
    fisher: Tensor
    likelihood: Tensor
    settings: dict


def load_gradients(path: Path) -> Gradients:
    """Raises ScoresError for a file that is unfinished or is none."""
    tensors, settings = _opened(path)
    done = _mapped(path, tensors["done"])
    if not done.all():
        raise ScoresError(f"{path} is unfinished ({int(done.sum())} of {len(done)} done): run fit again")
    rows, fisher, likelihood = (
        torch.from_numpy(np.array(_mapped(path, tensors[name]), copy=False)).view(torch.bfloat16)
        for name in ("rows", "fisher", "likelihood")
    )
    return Gradients(rows, np.array(_mapped(path, tensors["values"])), fisher, likelihood, settings)


_NUMPY = {"BF16": "<i2", "F32": "<f4", "U8": "u1"}


def _mapped(path: Path, tensor: TensorInfo) -> np.ndarray:
    # "c": pages are read on demand and nothing is written back; torch wants memory that may be written to.
    return np.memmap(path, _NUMPY[tensor.dtype], "c", tensor.start, tensor.shape)


def _opened(path: Path) -> tuple[dict[str, TensorInfo], dict]:
    try:
        shard = Shard.open(path)
        settings = parse_json(read_metadata(path)[_KEY].encode(), f"the metadata of {path}")
        tensors = {tensor.name: tensor for tensor in shard.tensors}
        units, kinds, factors = tensors["rows"].shape
        texts, samples, _ = tensors["fisher"].shape
        layout = Sizes(units, kinds, texts, samples, factors).layout()
        if layout != {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} or not isinstance(settings, dict):
            raise TypeError
    except CheckpointError as error:
        raise ScoresError(str(error)) from None
    except (KeyError, TypeError, ValueError):
        raise ScoresError(f"{path} is not a file of gradients of `kbne-edit fit`") from None
    return tensors, settings
