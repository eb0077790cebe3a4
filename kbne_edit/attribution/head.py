"""From the last layer's output to the objective: norm, head, softmax over the vocabulary.

The gradient of log sum exp(W z) with respect to z is the mean of W's rows, weighted by their probabilities. Value and
gradient come from one pass over blocks of W, as in flash attention over keys: a block is used twice while it is in the
processor's cache, and no tensor [R, V] ever exists.

Legend: R rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from ..models.hooks import replaced
from ..models.places import decoder_layers, is_recurrent
from ..models.widening import computed_in
from .calls import Output, forward, new_cache, on_device

BLOCK = 4096  # rows of W at a time: 8 MB of logits with 512 rows
_ROWS = 192  # rows at a time where the model transforms its logits, which needs a tensor [R, V]


class Surfaces:
    """Token ids of each question's answer, padded."""

    def __init__(self, answer_ids: Sequence[Sequence[int]]):
        self.ids = [list(ids) for ids in answer_ids]
        width = max(map(len, self.ids))
        self._padded = torch.tensor([ids + [0] * (width - len(ids)) for ids in self.ids])
        self._absent = torch.tensor([[False] * len(ids) + [True] * (width - len(ids)) for ids in self.ids])

    def logsumexp(self, logits: Tensor, owner: np.ndarray, among: Tensor | None = None) -> Tensor:
        """Over the answer of each row's question -> [R]. logits: [R, V], or only of the sorted tokens `among`."""
        padded = self._padded if among is None else torch.searchsorted(among, self._padded).clamp_max(len(among) - 1)
        ids, absent = (table[torch.from_numpy(owner)].to(logits.device) for table in (padded, self._absent))
        return torch.logsumexp(logits.gather(1, ids).masked_fill(absent, -torch.inf), -1)


def objective(model: Any, hidden: Tensor, owner: np.ndarray, answers: Surfaces, others: Surfaces | None) -> Tensor:
    """The objective from the last layer's outputs [1, R, D], for rows of the questions `owner` -> [R].

    It is the probability of the answer, or with `others` its log-odds against them, which need no other logits.
    Differentiable with respect to `hidden`.
    """
    if not is_plain(model, hidden):
        parts = [slice(start, start + _ROWS) for start in range(0, len(owner), _ROWS)]
        return torch.cat([of_logits(head(model, hidden[:, part]), owner[part], answers, others) for part in parts])
    z, output = before_head(model, hidden), model.get_output_embeddings()
    weight, bias = output.weight, getattr(output, "bias", None)
    ids = torch.tensor(sorted({i for table in (answers, others) if table for row in table.ids for i in row}))
    known = nn.functional.linear(z, weight[ids], None if bias is None else bias[ids])
    answer = answers.logsumexp(known, owner, ids)
    if others:
        return answer - others.logsumexp(known, owner, ids)
    return torch.exp(answer - LogSumExp.apply(z, weight, bias))


def of_logits(logits: Tensor, owner: np.ndarray, answers: Surfaces, others: Surfaces | None) -> Tensor:
    """`objective` from logits [R, V]."""
    answer = answers.logsumexp(logits, owner)
    if others:
        return answer - others.logsumexp(logits, owner)
    return torch.exp(answer - torch.logsumexp(logits, -1))


class LogSumExp(torch.autograd.Function):
    """log sum_v exp(W z + b)_v of each row, [R]. z: [R, D]; weight: [V, D]; bias: [V] or None."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        largest = torch.full((len(z), 1), -torch.inf, device=z.device)
        total, mean = torch.zeros_like(largest), torch.zeros_like(z)
        for start in range(0, len(weight), BLOCK):
            block = weight[start : start + BLOCK]
            logits = nn.functional.linear(z, block, None if bias is None else bias[start : start + BLOCK])
            new = torch.maximum(largest, logits.amax(1, keepdim=True))
            shrink = (largest - new).exp_()
            logits.sub_(new).exp_()
            total.mul_(shrink).add_(logits.sum(1, keepdim=True))
            mean.mul_(shrink).addmm_(logits, block)
            largest = new
        ctx.save_for_backward(mean.div_(total))
        return (largest + total.log()).squeeze(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (mean,) = ctx.saved_tensors
        return gradient[:, None] * mean, None, None


_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def is_plain(model: Any, hidden: Tensor) -> bool:
    """True if logits are the float32 product with the head's weight and nothing else (no scale, no soft cap).

    Tested once per model with known numbers as the head's output, because configurations have many names for such
    steps. hidden: [1, R, D].
    """
    if model not in _plain:
        output = model.get_output_embeddings()
        plain = isinstance(output, nn.Linear) and computed_in(model) == torch.float32 and not output.weight.is_meta
        if plain:
            known = torch.linspace(-100, 100, len(output.weight), device=output.weight.device)
            with torch.no_grad(), replaced([output], lambda z, *args, **kwargs: known.expand(*z.shape[:-1], -1)):
                plain = torch.equal(head(model, hidden[:, :1].detach())[0], known)
        _plain[model] = plain
    return _plain[model]


class _AtHead(Exception):
    """Leaves the model's forward pass at its head. hidden: the head's input."""

    def __init__(self, hidden: Tensor):
        self.hidden = hidden


def before_head(model: Any, hidden: Tensor) -> Tensor:
    """The head's input for these outputs of the last layer: [1, R, D] -> [R, D]."""
    states = at_head(model, lambda: head(model, hidden))
    return states.reshape(-1, states.shape[-1])


def at_head(model: Any, run: Callable[[], Any]) -> Tensor:
    """The head's input when `run` runs the model, [B, N, D]. The run stops there."""

    def leave(hidden: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise _AtHead(hidden)

    try:
        with replaced([model.get_output_embeddings()], leave):
            run()
    except _AtHead as reached:
        return reached.hidden
    raise AssertionError(f"{type(model).__name__} did not call its head")


def after_head(model: Any, hidden: Tensor) -> Tensor:
    """The head and everything after it: states of `at_head`, [R, D] -> logits [R, V] float32.

    For models that run as a whole. Where something follows the head (a scale, a soft cap), the model runs on one token
    per row, with these states as the head's input.
    """
    output = model.get_output_embeddings()
    logits = output(hidden)

    def given(of_rows: Tensor) -> Tensor:
        ids = np.zeros((len(of_rows), 1), int)
        with replaced([output], lambda *_, **__: of_rows[:, None]):
            return model(input_ids=on_device(model, ids), use_cache=False).logits[:, -1]

    if model not in _ends_with_head:
        _ends_with_head[model] = torch.equal(given(logits[:1]), logits[:1])
    return (logits if _ends_with_head[model] else given(logits)).float()


_ends_with_head: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def head(model: nn.Module, hidden: Tensor) -> Tensor:
    """Everything after the last layer, by the model's own code: [1, R, D] -> logits [R, V] float32."""
    layers, rows = decoder_layers(model), hidden.reshape(-1, 1, hidden.shape[-1])
    ids = np.zeros((len(rows), 1), int)
    with replaced(layers, lambda *args, **kwargs: rows.as_subclass(Output)):
        if is_recurrent(model):  # their caches hold states, which the replaced layers do not make
            logits = model(input_ids=on_device(model, ids), use_cache=False, logits_to_keep=1)
        else:
            logits = forward(model, ids, new_cache(layers, None, 0, keep=False))
    return logits.logits[:, -1].float()
