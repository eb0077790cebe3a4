"""gradients.safetensors: what a fit needs of the model, so that a fit can be resumed, and repeated without the model.

The file has its full size before the first pass. An entry's values are written before its `done` flag, so a run that is
killed at any moment can be resumed with the entries that have no flag. Tensors: rows [N, P] BF16; place [U, K] I32, the
index of a unit's row of a kind (-1: none); values [U, K] F32, NaN where there is no row; fisher [R, S, P] BF16;
likelihood [H, P] BF16, by kind of text; done [U + R + H] U8.

Legend: U units, K kinds of rows, N rows that there are, R Fisher texts, S rows of each, H kinds of texts, P factors.
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

_BYTES = {"BF16": 2, "F32": 4, "I32": 4, "U8": 1}
_KEY = "kbne_gradients"


@dataclass(frozen=True)
class Sizes:
    """units U, kinds K, rows N, texts R, samples S, held H, factors P."""

    units: int
    kinds: int
    rows: int
    texts: int
    samples: int
    held: int
    factors: int

    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """{name: (dtype, shape)}, in the order on disk."""
        return {
            "rows": ("BF16", (self.rows, self.factors)),
            "fisher": ("BF16", (self.texts, self.samples, self.factors)),
            "likelihood": ("BF16", (self.held, self.factors)),
            "place": ("I32", (self.units, self.kinds)),
            "values": ("F32", (self.units, self.kinds)),
            "done": ("U8", (self.units + self.texts + self.held,)),
        }


class GradientFile:
    """Writes and reads the file in place; locked until `close`.

    place: [U, K], indices of each unit's rows, in order; -1: none. done: [U + R + H], True for finished entries. Raises
    OutputError if it cannot be written or another run is writing it, ScoresError if it was begun with other settings.
    """

    def __init__(self, path: Path, sizes: Sizes, place: np.ndarray, settings: dict):
        self.path, self.sizes, self._place = path, sizes, place
        meta = json.dumps(settings, sort_keys=True)
        with write_errors(path):
            path.absolute().parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            claim(self._handle, path)
            if os.fstat(self._handle).st_size == 0:
                self._lay_out(meta)
        try:
            self._tensors, known = _opened(path)
            same = np.array_equal(_mapped(path, self._tensors["place"]), place)
            if json.dumps(known, sort_keys=True) != meta or not same:
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
        before = [size for name, *_, size in tensors[: list(self.sizes.layout()).index("place")]]
        os.pwrite(self._handle, self._place.astype("<i4").tobytes(), len(head) + sum(before))

    def write_unit(self, index: int, rows: Tensor, values: np.ndarray) -> None:
        """rows: of the kinds that the unit has, in order, [n, P] float32; values: [K]."""
        self._finite(rows, f"unit {index + 1}")
        first = self._place[index][self._place[index] >= 0][0]
        self._put("rows", int(first) * self.sizes.factors * 2, _bfloat16(rows))
        self._put("values", index * self.sizes.kinds * 4, values.astype("<f4").tobytes())
        self._mark(index)

    def write_fisher(self, index: int, rows: Tensor) -> None:
        """rows: [S, P] float32."""
        self._finite(rows, f"Fisher text {index + 1}")
        self._put("fisher", index * rows.numel() * 2, _bfloat16(rows))
        self._mark(self.sizes.units + index)

    def write_likelihood(self, index: int, row: Tensor) -> None:
        """The gradient of the mean log-probability per token of the texts of a kind, [P] float32."""
        self._finite(row, "the texts")
        self._put("likelihood", index * row.numel() * 2, _bfloat16(row))
        self._mark(self.sizes.units + self.sizes.texts + index)

    def _finite(self, values: Tensor, what: str) -> None:
        if not torch.isfinite(values).all():
            raise ScoresError(f"{what} has gradients that are not finite: the model overflows, try --dtype float32")

    def _mark(self, entry: int) -> None:
        self._put("done", entry, b"\1")
        self.done[entry] = True

    def _put(self, name: str, offset: int, raw: bytes) -> None:
        """Write at a byte offset. Rejected: a memory map, which on a full disk would kill the process by a signal."""
        position = self._tensors[name].start + offset
        with write_errors(self.path):
            while raw:
                written = os.pwrite(self._handle, raw, position)
                raw, position = raw[written:], position + written

    def close(self) -> None:
        os.close(self._handle)


def _bfloat16(rows: Tensor) -> bytes:
    return rows.bfloat16().view(torch.int16).numpy().tobytes()


@dataclass(frozen=True)
class Gradients:
    """A finished file. rows: [N, P] bfloat16, mapped; place, values: [U, K]; fisher: [R, S, P], likelihood: [H, P],
    both bfloat16.
    """

    rows: Tensor
    place: np.ndarray
    values: np.ndarray
    fisher: Tensor
    likelihood: Tensor
    settings: dict


def load_gradients(path: Path) -> Gradients:
    """Open a file. Raises ScoresError if it is unfinished, or not a gradients file."""
    tensors, settings = _opened(path)
    done = _mapped(path, tensors["done"])
    if not done.all():
        raise ScoresError(f"{path} is unfinished ({int(done.sum())} of {len(done)} done): run fit again")
    place, values = (np.array(_mapped(path, tensors[name])) for name in ("place", "values"))
    if not np.array_equal(np.sort(place[place >= 0]), np.arange(tensors["rows"].shape[0])):
        raise ScoresError(f"{path} is damaged (its rows are not in place): delete it, and run fit again")
    rows, fisher, likelihood = (
        torch.from_numpy(np.array(_mapped(path, tensors[name]), copy=False)).view(torch.bfloat16)
        for name in ("rows", "fisher", "likelihood")
    )
    return Gradients(rows, place, values, fisher, likelihood, settings)


_NUMPY = {"BF16": "<i2", "F32": "<f4", "I32": "<i4", "U8": "u1"}


def _mapped(path: Path, tensor: TensorInfo) -> np.ndarray:
    # "c": pages are read on demand and never written back; torch needs writable memory.
    return np.memmap(path, _NUMPY[tensor.dtype], "c", tensor.start, tensor.shape)


def _opened(path: Path) -> tuple[dict[str, TensorInfo], dict]:
    try:
        shard = Shard.open(path)
        settings = parse_json(read_metadata(path)[_KEY].encode(), f"the metadata of {path}")
        tensors = {tensor.name: tensor for tensor in shard.tensors}
        if "place" not in tensors and "rows" in tensors:
            raise ScoresError(f"{path} was written by an earlier version of `kbne-edit fit`: delete it")
        units, kinds = tensors["place"].shape
        texts, samples, factors = tensors["fisher"].shape
        sizes = Sizes(units, kinds, tensors["rows"].shape[0], texts, samples, tensors["likelihood"].shape[0], factors)
        layout = sizes.layout()
        if layout != {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} or not isinstance(settings, dict):
            raise TypeError
    except CheckpointError as error:
        raise ScoresError(str(error)) from None
    except (KeyError, TypeError, ValueError):
        raise ScoresError(f"{path} is not a file of gradients of `kbne-edit fit`") from None
    return tensors, settings
