"""Which tokens a neuron writes: the logit lens, from the tensors on disk alone.

Neuron i adds h_i times column i of W_down to the residual stream. Here that column is multiplied by the unembedding,
with the final norm's weight folded in. This is an approximation, which ignores later layers and the norms between. Each
token gets a z-score over the vocabulary, since the norm makes the scale of a logit meaningless.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..disk.checkpoint import Checkpoint
from ..disk.dtypes import storage, to_float
from ..disk.slots import Readout, by_neuron, readout, slots
from ..disk.tensors import read_array
from ..edit import Edit
from ..errors import CheckpointError, short
from ..families import end
from ..files import open_input
from ..folding.columns import Columns, undo_path
from ..folding.plan import Plan

Neuron = tuple[int, int]  # layer, index in the layer

STEP = 32 << 20  # bytes of the unembedding at once: memory does not grow with the vocabulary


def columns(checkpoint: Checkpoint, edit: Edit) -> dict[Neuron, np.ndarray]:
    """Column of the down-projection of every edited neuron as it was in the base, float32 [D].

    checkpoint: a baked directory. At the down site the columns are read from its undo file (a factor of 0 leaves
    nothing of them in the weights); at the other sites the down-projection is unchanged. Raises CheckpointError.
    """
    result: dict[Neuron, np.ndarray] = {}
    if checkpoint.layout is not None:  # the down-projection is unchanged at either site
        for layer, places in slots(checkpoint.plain_shapes, checkpoint.config, "down").items():
            for place in places:
                inside = [n for n in edit.factors.get(layer, ()) if 0 <= n - place.offset < place.neurons]
                if inside:
                    matrix = checkpoint.read_plain(place.tensor)
                    result |= {(layer, n): matrix[:, n - place.offset] for n in inside}
        return result
    if checkpoint.gguf is not None:
        return result
    if edit.site != "down":
        for layer, places in checkpoint.slots("down").items():
            for place in places:
                wanted = [n for n in edit.factors.get(layer, ()) if place.offset <= n < end([place])]
                if wanted:
                    shard, tensor = checkpoint.tensors[place.tensor]
                    rows = by_neuron(read_array(shard, tensor), place)[np.array(wanted) - place.offset]
                    result |= {(layer, n): row for n, row in zip(wanted, to_float(rows, tensor.dtype), strict=True)}
        return result
    plan = Plan.of(checkpoint, Edit(edit.site, edit.factors))
    for name, rows in Columns.open(undo_path(checkpoint.path)).arrays(plan).items():
        target = plan.targets[name]
        if target.by_column:
            rows = rows.T
        neurons = (target.slot.offset + target.neurons).tolist()
        wide = to_float(rows, checkpoint.tensors[name][1].dtype)
        result |= {(target.slot.layer, n): row for n, row in zip(neurons, wide, strict=True)}
    return result


def vocabulary(path: Path) -> dict[int, str] | None:
    """{id: text} of every token, from tokenizer.json; None if there is no such file. Raises CheckpointError."""
    from tokenizers import Tokenizer

    if not (path / "tokenizer.json").is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        names = {index: name for name, index in tokenizer.get_vocab().items()}
        texts = tokenizer.decode_batch([[index] for index in names], skip_special_tokens=False)
    except Exception as error:  # the library raises bare exceptions for files from outside
        raise CheckpointError(f"{path / 'tokenizer.json'} is no tokenizer that can be read: {short(error)}") from None
    return {index: _text(name, text) for (index, name), text in zip(names.items(), texts, strict=True)}


def _text(name: str, text: str) -> str:
    """Decoders drop a leading space, and return a replacement character for a part of a character."""
    if not text or "\ufffd" in text:
        return name
    return f" {text}" if name.startswith(("▁", "Ġ")) and not text.startswith(" ") else text


def written(
    checkpoint: Checkpoint, down_columns: dict[Neuron, np.ndarray], known: set[int] | None, most: int
) -> dict[Neuron, tuple[list, list]] | None:
    """The tokens that each column raises most and lowers most: {neuron: ([(id, z), …], [(id, z), …])}.

    down_columns: from `columns`. known: ids that the tokenizer has (the unembedding may be padded); None: all. most:
    number of tokens at either end. Returns None if the model has no unembedding that the columns fit.
    """
    if checkpoint.gguf is not None:
        return None
    end = readout(checkpoint.plain_shapes, checkpoint.config)
    if end is None or checkpoint.plain_shapes[end.unembedding][1:] != next(iter(down_columns.values())).shape:
        return None
    directions = np.stack([_folded(column, checkpoint, end) for column in down_columns.values()], 1)  # [D, k]
    total, squares, count = np.zeros(len(down_columns)), np.zeros(len(down_columns)), 0
    ids, values = np.zeros((0, len(down_columns)), np.int64), np.zeros((0, len(down_columns)), np.float32)
    for first, rows in _rows(checkpoint, end.unembedding):
        keep = np.arange(first, first + len(rows))
        if known is not None:
            keep = keep[[int(index) in known for index in keep]]
        logits = rows[keep - first] @ directions
        total, squares = total + logits.sum(0, dtype=np.float64), squares + np.square(logits, dtype=np.float64).sum(0)
        count += len(keep)
        logits, owners = np.concatenate([values, logits]), np.concatenate([ids, _spread(keep, len(down_columns))])
        ends = _ends(logits, most)
        values, ids = np.take_along_axis(logits, ends, 0), np.take_along_axis(owners, ends, 0)
    spread = np.sqrt(np.maximum(squares / count - (total / count) ** 2, 1e-60))
    scores = (values - total / count) / spread
    return {neuron: _pairs(ids[:, j], scores[:, j], most) for j, neuron in enumerate(down_columns)}


def _folded(column: np.ndarray, checkpoint: Checkpoint, end: Readout) -> np.ndarray:
    column = column - column.mean() if end.centred else column
    if end.norm is None:
        return column
    return column * (checkpoint.read_plain(end.norm) + np.float32(end.offset))


def _rows(checkpoint: Checkpoint, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first row, rows as float32 [r, D]) of a matrix, piece by piece; a quantised one at once."""
    if name not in checkpoint.tensors or (checkpoint.layout and checkpoint.layout.matrix_of(name)):
        yield 0, checkpoint.read_plain(name)
        return
    shard, tensor = checkpoint.tensors[name]
    kind, (count, width) = storage(tensor.dtype, name), tensor.shape
    step = max(STEP // (width * kind.itemsize), 1)
    with open_input(shard.path) as file:
        file.seek(tensor.start)
        for first in range(0, count, step):
            raw = file.read(min(step, count - first) * width * kind.itemsize)
            yield first, to_float(np.frombuffer(raw, kind).reshape(-1, width), tensor.dtype)


def _spread(keep: np.ndarray, width: int) -> np.ndarray:
    return np.broadcast_to(keep[:, None], (len(keep), width))


def _ends(logits: np.ndarray, most: int) -> np.ndarray:
    """Indices of the `most` smallest and the `most` largest values of each column (all, if there are few)."""
    if len(logits) <= 2 * most:
        return _spread(np.arange(len(logits)), logits.shape[1])
    order = np.argpartition(logits, (most - 1, len(logits) - most), axis=0)
    return np.concatenate([order[:most], order[-most:]])


def _pairs(ids: np.ndarray, scores: np.ndarray, most: int) -> tuple[list, list]:
    pairs = [(int(index), round(float(z), 2)) for index, z in zip(ids, scores, strict=True)]
    raised = sorted((p for p in pairs if p[1] > 0), key=lambda p: (-p[1], p[0]))
    lowered = sorted((p for p in pairs if p[1] < 0), key=lambda p: (p[1], p[0]))
    return raised[:most], lowered[:most]
