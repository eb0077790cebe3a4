"""The forward pass of a module of routed experts, with a tap on h.

transformers 5 keeps all experts of a layer in one module, so there is no projection per expert to hook. This is the
pass that it calls "eager", expert by expert and operation by operation, so that it gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

# expert, tokens [n] (which of the inputs this expert was given), h [n, F] -> what takes the place of h, or None
Tap = Callable[[int, Tensor, Tensor], "Tensor | None"]


def run(experts: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor, *, tap: Tap, after: Tap | None = None):
    """hidden: [T, D]; index, weights: the router's choice for each token, [T, k]. after: a tap on the output [n, D]."""
    result = torch.zeros_like(hidden)
    for expert in torch.unique(index).tolist():
        if expert >= experts.num_experts:  # a router's mark for "no expert"
            continue
        position, tokens = torch.where((index == expert).T)
        h = experts._apply_gate(_project(experts, "gate_up_proj", expert, hidden[tokens]))
        new = tap(expert, tokens, h)
        output = _project(experts, "down_proj", expert, h if new is None else new)
        if after is not None:
            output = after(expert, tokens, output)
        output = output * weights[tokens, position, None]
        result.index_add_(0, tokens, output.to(result.dtype))
    return result


def _project(experts: nn.Module, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(experts, name)[expert]
    y = x @ weight if experts.is_transposed else nn.functional.linear(x, weight)
    return y + getattr(experts, name + "_bias")[expert] if experts.has_bias else y
