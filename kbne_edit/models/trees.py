"""Many rows of tokens in one pass; prefixes that neighbouring rows share are computed once.

Rows are packed into one long row as a *tree*: a shared prefix is stored once, and attention sees only the tokens on the
path from the root. Positions count from the root. So nothing is computed twice or padded, and a pass holds as many
tokens as suits the machine. The output head and the normalisation over the vocabulary, a third of the work on a small
model, are computed at kept positions only.

Rejected: a key/value cache of each shared prefix. Prefixes of different length need separate batches, and on a CPU some
fifty passes over the weights cost as much as the tokens that they save.

Legend: N tokens of a tree, K kept positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .bounds import check_numbers, check_tokens
from .masks import attention_mask, longest
from .places import is_recurrent

_TOKENS_CPU, _TOKENS = 512, 4096  # of one pass: attention within a pass grows with the square
_LOGIT_BYTES = 1 << 29  # of one pass: its tokens shrink as the vocabulary grows


class Tree:
    """Rows of tokens, each shared beginning of neighbours once.

    tokens, depth: [N]; seen: [N, N], what each token is preceded by, itself included; paths: each row's tokens' places.
    """

    def __init__(self, rows: Sequence[Sequence[int]]):
        self.tokens: list[int] = []
        self.depth: list[int] = []
        self.paths: list[list[int]] = []
        previous: Sequence[int] = ()
        path: list[int] = []
        for row in rows:
            shared = _common(previous, row)
            path = path[:shared] + list(range(len(self.tokens), len(self.tokens) + len(row) - shared))
            self.tokens += row[shared:]
            self.depth += range(shared, len(row))
            self.paths.append(path)
            previous = row
        self.seen = np.zeros((len(self.tokens),) * 2, bool)
        for path in self.paths:
            for length, node in enumerate(path, 1):
                self.seen[node, path[:length]] = True


def cut(rows: Sequence[Sequence[int]], tokens: int) -> Iterator[slice]:
    """Cut rows, in their order, into trees of at most `tokens` tokens (but one row at least)."""
    start, size = 0, 0
    for i, row in enumerate(rows):
        added = len(row) - (_common(rows[i - 1], row) if i > start else 0)
        if i > start and size + added > tokens:
            yield slice(start, i)
            start, size, added = i, 0, len(row)
        size += added
    if rows:
        yield slice(start, len(rows))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def tokens_of_a_pass(model: Any) -> int:
    """How many tokens of a tree one pass of this model should hold."""
    weight = model.get_input_embeddings().weight
    most = _TOKENS_CPU if weight.device.type == "cpu" else _TOKENS
    return int(min(most, max(_LOGIT_BYTES // (4 * len(weight)), 64), longest(model)))


@torch.inference_mode()
def logits_at(model: Any, tree: Tree, keep: Sequence[int]) -> Tensor:
    """Logits [K, V] float32 of the tree's tokens `keep`. Raises InputError for tokens that the model does not have.

    The head is given the kept positions only, by a hook on its input; what a model does to its logits after the head
    (scales, soft caps) works element by element, and so does not mind.
    """
    check_tokens(model, tree.tokens, tree.depth)
    if is_recurrent(model):
        logits = unpacked(tree, lambda ids: model(input_ids=ids, use_cache=False).logits, model)[0, list(keep)]
        check_numbers(logits, model)
        return logits.float()
    device = model.get_input_embeddings().weight.device
    index, depth = torch.tensor(keep), np.array(tree.depth)
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: (args[0][:, index.to(args[0].device)], *args[1:])
    )
    try:
        logits = model(
            input_ids=torch.tensor([tree.tokens], device=device),
            position_ids=torch.tensor([tree.depth], device=device),
            attention_mask=attention_mask(model, tree.seen, depth, depth),
            use_cache=False,
        ).logits[0]
    finally:
        handle.remove()
    check_numbers(logits, model)
    return logits.float()


def unpacked(tree: Tree, run: Callable[[Tensor], Tensor], model: Any) -> Tensor:
    """A tree's rows one by one, where no mask can keep them apart: what `run` gives for each token, [E, N, …].

    run: token ids [1, T] of one row -> [E, T, …].
    """
    device = model.get_input_embeddings().weight.device
    places: dict[int, Tensor] = {}
    for path in tree.paths:
        outputs = run(torch.tensor([[tree.tokens[node] for node in path]], device=device))
        places |= {node: outputs[:, position] for position, node in enumerate(path)}
    return torch.stack([places[node] for node in range(len(tree.tokens))], 1)
