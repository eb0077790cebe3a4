"""scores.safetensors, the output of `locate`: written question by question, so that a run can be resumed.

The file has its full size before the first question. A question's entries are written and synced before its `done`
flag. So a run that is killed at any moment can be resumed at the first question without a flag, and ends with the same
bytes. Tensors: scores [Q, L, F] F32, p [Q], p_zero [Q, L], residual [Q, L], nodes [Q, L], p_best_wrong [Q],
p_answers [Q] (absent in files of earlier versions), done [Q] U8. The metadata holds questions, settings and the base's
fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from ..disk.publishing import claim, write_errors
from ..disk.tensors import Shard, header_bytes, read_metadata
from ..errors import CheckpointError, ScoresError
from ..families import SITES
from ..files import parse_json
from ..progress import say
from ..recipe import Question

_PLAN = {
    "nodes": ("I32", "QL"),
    "p": ("F32", "Q"),
    "p_answers": ("F32", "Q"),
    "p_best_wrong": ("F32", "Q"),
    "p_zero": ("F32", "QL"),
    "residual": ("F32", "QL"),
    "scores": ("F32", "QLF"),
    "done": ("U8", "Q"),  # last: it is the only unaligned one
}
_DTYPE = {"F32": "<f4", "I32": "<i4", "U8": "u1"}


@dataclass(frozen=True)
class Scores:
    """A finished scores file.

    values: [Q, L, F] float32. p: P(right answer), [Q]; p_best_wrong: P(likeliest wrong answer), [Q]. residual, nodes:
    of the quadrature, [Q, L]. settings: the file's metadata. p_answers: P of all answers together, [Q]; None in a file
    of an earlier version with more than two answers.
    """

    values: np.ndarray
    p: np.ndarray
    p_best_wrong: np.ndarray
    residual: np.ndarray
    nodes: np.ndarray
    questions: tuple[Question, ...]
    settings: dict
    site: str
    base: str
    p_answers: np.ndarray | None = None

    @property
    def correct(self) -> np.ndarray:
        """True where the model prefers the right answer, [Q]."""
        return self.p > self.p_best_wrong


def load_scores(path: str | Path) -> Scores:
    """Read a scores file. Raises ScoresError."""
    arrays, meta = _read(Path(path))
    if not arrays["done"].all():
        raise ScoresError(f"{path} is unfinished ({int(arrays['done'].sum())} questions done): run locate again")
    for name in ("p", "p_answers", "p_best_wrong", "residual", "scores"):
        if name in arrays and not all(np.isfinite(row).all() for row in arrays[name]):
            raise ScoresError(f"{path} holds values of {name} that are not finite: it is damaged, run locate again")
    return Scores(
        arrays["scores"],
        arrays["p"],
        arrays["p_best_wrong"],
        arrays["residual"],
        arrays["nodes"],
        tuple(Question(**q) for q in meta["questions"]),
        meta,
        meta["site"],
        meta["base"],
        _p_answers(arrays, meta),
    )


def _p_answers(arrays: dict[str, np.ndarray], meta: dict) -> np.ndarray | None:
    if "p_answers" in arrays:
        return arrays["p_answers"]
    two = len({q["answer"] for q in meta["questions"]}) == 2
    return arrays["p"] + arrays["p_best_wrong"] if two else None


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    try:
        shard = Shard.open(path)
        meta = parse_json(read_metadata(path)["kbne"].encode(), f"the metadata of {path}")
        known = {field.name: bool if field.name == "control" else str for field in fields(Question)}
        if not all({"twin": str} | {k: type(v) for k, v in q.items()} == known for q in meta["questions"]):
            raise TypeError
        if meta["site"] not in SITES or not all(isinstance(meta[k], str) for k in ("base", "model", "recipe")):
            raise TypeError
        tensors = {tensor.name: tensor for tensor in shard.tensors}
        sizes = dict(zip("QLF", tensors["scores"].shape, strict=True))
        layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        expected = _layout(sizes)
        if "p_answers" not in layout:
            del expected["p_answers"]
        if sizes["Q"] != len(meta["questions"]) or layout != expected:
            raise TypeError
        arrays: dict[str, np.ndarray] = {
            t.name: np.memmap(path, _DTYPE[t.dtype], "r", t.start, t.shape) for t in shard.tensors
        }
    except CheckpointError as error:
        raise ScoresError(str(error)) from None
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ScoresError(f"{path} is not a scores file of `kbne-edit locate`") from None
    return arrays, meta


def _layout(sizes: dict[str, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (dtype, tuple(sizes[axis] for axis in axes)) for name, (dtype, axes) in _PLAN.items()}


@dataclass(frozen=True)
class Row:
    """One question's entry. scores: [L, F]; p_zero, residual, nodes: [L], or one number for all layers.

    p, p_best_wrong, p_answers: as of `Scores`.
    """

    scores: np.ndarray
    p: float
    p_best_wrong: float
    p_answers: float
    p_zero: np.ndarray | float
    residual: np.ndarray | float
    nodes: np.ndarray | float


def gathered(questions: Sequence[Question], rows: Sequence[Row], settings: dict) -> Scores:
    """`Scores` from entries that were computed without a file. settings: as in a file's metadata."""

    def column(name: str, dtype: type = np.float32) -> np.ndarray:
        return np.array([getattr(row, name) for row in rows], dtype)

    return Scores(
        column("scores"),
        column("p"),
        column("p_best_wrong"),
        column("residual"),
        column("nodes", np.int32),
        tuple(questions),
        settings,
        settings["site"],
        settings["base"],
        column("p_answers"),
    )


class ScoresWriter:
    """Writes a scores file in place; `done` lists the questions that an earlier run finished.

    The file is locked until `close`. aside: True renames an existing file of other settings, and reuses it when those
    settings come back; False raises ScoresError for it. Raises OutputError if the file cannot be written, or another
    run is writing it.
    """

    def __init__(
        self,
        path: Path,
        questions: tuple[Question, ...],
        layers: int,
        neurons: int,
        settings: dict,
        aside: bool = False,
    ):
        self.path = path
        # `twin` is written only if there is one, so that files of other recipes keep their bytes.
        records = [{k: v for k, v in asdict(q).items() if k != "twin" or v} for q in questions]
        meta = json.dumps({**settings, "questions": records}, sort_keys=True)
        sizes = {"Q": len(questions), "L": layers, "F": neurons}
        with write_errors(path):
            path.absolute().parent.mkdir(parents=True, exist_ok=True)
            self._handle = self._open(meta, sizes)
        try:
            arrays, stored = _read(path)
            if (other := json.dumps(stored, sort_keys=True)) != meta and aside:
                self._put_aside(other, meta, sizes)
                arrays, stored = _read(path)
            if json.dumps(stored, sort_keys=True) != meta:
                raise ScoresError(
                    f"{path} was begun with another model, recipe or setting: move it away, or choose another --out"
                )
        except BaseException:
            self.close()
            raise
        self._tensors = {tensor.name: tensor for tensor in Shard.open(path).tensors}
        self.done = np.array(arrays["done"], bool)

    def _open(self, meta: str, sizes: dict[str, int]) -> int:
        """Open and lock the file. A new one is laid out under another name, so that under its own name it is whole."""
        if not self.path.exists():
            fresh = self.path.with_name(self.path.name + ".new")
            handle = os.open(fresh, os.O_RDWR | os.O_CREAT, 0o666)
            claim(handle, self.path)
            if not self.path.exists():
                try:
                    _lay_out(handle, meta, sizes)
                    os.rename(fresh, self.path)
                except OSError:
                    fresh.unlink()
                    raise
                return handle
            fresh.unlink()  # another run was faster
            os.close(handle)
        handle = os.open(self.path, os.O_RDWR)
        claim(handle, self.path)
        return handle

    def _put_aside(self, other: str, meta: str, sizes: dict[str, int]) -> None:
        """Rename the locked file, whose metadata is `other`, and open the one for `meta`, new or earlier."""
        kept, earlier = (
            self.path.with_stem(f"{self.path.stem}-{hashlib.sha256(text.encode()).hexdigest()[:8]}")
            for text in (other, meta)
        )
        say(f"{self.path} has another model, recipe or setting: it was renamed to {kept.name}")
        with write_errors(self.path):
            os.rename(self.path, kept)
            if earlier.exists():
                os.rename(earlier, self.path)
            handle = self._open(meta, sizes)
        os.close(self._handle)
        self._handle = handle

    def write(self, q: int, row: Row) -> None:
        """Store question q. Raises ScoresError, OutputError."""
        values = {field.name: getattr(row, field.name) for field in fields(row) if field.name in self._tensors}
        if not all(np.isfinite(np.asarray(value)).all() for value in values.values()):
            raise ScoresError(
                f"question {q + 1} has scores that are not finite: the model overflows, try --dtype float32"
            )
        with write_errors(self.path):
            for name, value in sorted(values.items()):
                self._put(name, q, value)
            os.fsync(self._handle)
            self._put("done", q, 1)
            os.fsync(self._handle)

    def _put(self, name: str, q: int, value: np.ndarray | float) -> None:
        """Write one value. Rejected: a memory map, which on a full disk would kill the process by a signal."""
        tensor = self._tensors[name]
        row = np.broadcast_to(np.asarray(value, _DTYPE[tensor.dtype]), tensor.shape[1:]).tobytes()
        position = tensor.start + q * len(row)
        while row:
            written = os.pwrite(self._handle, row, position)
            row, position = row[written:], position + written

    def close(self) -> None:
        os.close(self._handle)


def _lay_out(handle: int, meta: str, sizes: dict[str, int]) -> None:
    tensors = [
        (name, dtype, shape, math.prod(shape) * np.dtype(_DTYPE[dtype]).itemsize)
        for name, (dtype, shape) in _layout(sizes).items()
    ]
    head = header_bytes(tensors, {"kbne": meta})
    os.truncate(handle, 0)
    os.pwrite(handle, head, 0)
    size = len(head) + sum(size for *_, size in tensors)
    if hasattr(os, "posix_fallocate"):  # reserve the space now: on a full disk, touching a hole would kill the process
        os.posix_fallocate(handle, 0, size)
    else:
        os.truncate(handle, size)
    os.fsync(handle)
