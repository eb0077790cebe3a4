"""scores.safetensors: what `locate` found, written question by question so that it can be resumed.

The file is laid out in full before the first question. A question's rows are written and synced before its `done`
flag, so whatever moment a run is killed at, the next one starts at the first question without a flag and ends with
the same bytes. Tensors: scores [Q, L, F] F32, p [Q], p_zero [Q, L], residual [Q, L], nodes [Q, L], p_best_wrong [Q],
done [Q] U8. The metadata holds questions, settings and the base's fingerprint.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .checkpoint import Shard
from .errors import CheckpointError, ScoresError
from .recipe import Question

_PLAN = {
    "nodes": ("I32", "QL"), "p": ("F32", "Q"), "p_best_wrong": ("F32", "Q"), "p_zero": ("F32", "QL"),
    "residual": ("F32", "QL"), "scores": ("F32", "QLF"), "done": ("U8", "Q"),  # last: it is the only unaligned one
}  # fmt: skip
_DTYPE = {"F32": "<f4", "I32": "<i4", "U8": "u1"}


@dataclass(frozen=True)
class Scores:
    """A finished scores file. values: [Q, L, F]; p: P(right answer), p_best_wrong: P(likeliest other answer), [Q]."""

    values: np.ndarray
    p: np.ndarray
    p_best_wrong: np.ndarray
    residual: np.ndarray
    nodes: np.ndarray
    questions: tuple[Question, ...]
    settings: dict
    site: str
    base: str

    @property
    def correct(self) -> np.ndarray:
        """True where the model prefers the right answer, [Q]."""
        return self.p > self.p_best_wrong


def load_scores(path: str | Path) -> Scores:
    """Read a scores file. Raises ScoresError."""
    arrays, meta = _read(Path(path))
    if not arrays["done"].all():
        raise ScoresError(f"{path} is unfinished ({int(arrays['done'].sum())} questions done): run locate again")
    questions = tuple(Question(**q) for q in meta["questions"])
    return Scores(
        arrays["scores"], arrays["p"], arrays["p_best_wrong"], arrays["residual"], arrays["nodes"], questions, meta,
        meta["site"], meta["base"],
    )  # fmt: skip


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    try:
        shard = Shard.open(path)
        with open(path, "rb") as file:
            header = json.loads(file.read(shard.data_start)[8:])
        meta = json.loads(header["__metadata__"]["kbne"])
        arrays = {
            t.name: np.memmap(path, _DTYPE[t.dtype], "r", t.start, t.shape) for t in shard.tensors if t.name in _PLAN
        }
        if set(arrays) != set(_PLAN) or not {"questions", "site", "base"} <= set(meta):
            raise KeyError
    except CheckpointError as error:
        raise ScoresError(str(error)) from None
    except (OSError, KeyError, TypeError, ValueError):
        raise ScoresError(f"{path} is not a scores file of `kbne-edit locate`") from None
    return arrays, meta


class ScoresWriter:
    """Writes a scores file in place; `done` lists the questions that an earlier run finished."""

    def __init__(self, path: Path, questions: tuple[Question, ...], layers: int, neurons: int, settings: dict):
        self.path, self._sizes = path, {"Q": len(questions), "L": layers, "F": neurons}
        meta = json.dumps({**settings, "questions": [asdict(q) for q in questions]}, sort_keys=True)
        if path.exists():
            _, found = _read(path)
            if json.dumps(found, sort_keys=True) != meta:
                raise ScoresError(
                    f"{path} was begun with another model, recipe or setting: move it away, or choose another --out"
                )
        else:
            self._lay_out(meta)
        shard = Shard.open(path)
        self._arrays = {
            t.name: np.memmap(path, _DTYPE[t.dtype], "r+", t.start, t.shape) for t in shard.tensors if t.name in _PLAN
        }

    def _lay_out(self, meta: str) -> None:
        header, position = {"__metadata__": {"kbne": meta}}, 0
        for name, (dtype, axes) in _PLAN.items():
            shape = [self._sizes[a] for a in axes]
            size = int(np.prod(shape)) * np.dtype(_DTYPE[dtype]).itemsize
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
            position += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        fresh = self.path.with_name(self.path.name + ".new")
        with open(fresh, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + position)
            os.fsync(file.fileno())
        os.rename(fresh, self.path)

    @property
    def done(self) -> np.ndarray:
        return np.array(self._arrays["done"], bool)

    def write(self, q: int, values: dict[str, np.ndarray | float]) -> None:
        """Store question q: every tensor of the plan except `done`."""
        for name, value in values.items():
            self._arrays[name][q] = value
            self._arrays[name].flush()
        self._arrays["done"][q] = 1
        self._arrays["done"].flush()
