"""The forward pass of a module of routed experts, with a tap on h.

transformers 5 keeps all experts of a layer in one module, so there is no projection per expert to hook. This
module repeats its "eager" pass, expert by expert and operation by operation, so that the result is equal bit for bit.
Llama 4 differs: each expert takes every token, times the router's weight, which is 0 for experts that were not chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# expert, tokens [n] (which of the inputs this expert was given), h [n, F] -> what takes the place of h, or None
Tap = Callable[[int, Tensor, Tensor], "Tensor | None"]


def run(experts: Any, hidden: Tensor, *routing: Tensor, tap: Tap, after: Tap | None = None) -> Tensor:
    """hidden, routing: what the module is called with. after: a tap on the output [n, D], which it returns anew."""
    return (_run_chosen if routing else _run_all)(experts, hidden, *routing, tap=tap, after=after)


def chosen(hidden: Tensor, *routing: Tensor, experts: Any) -> Tensor:
    """What the router chose for each token, [T, any]. hidden, routing: what the module is called with."""
    return routing[0] if routing else _by_expert(experts, hidden).any(-1).T


def down_proj(experts: Any, expert: int) -> Tensor:
    """One expert's down-projection, [F, D]."""
    weight = experts.down_proj[expert]
    return weight if transposed(experts) else weight.T


def transposed(experts: Any) -> bool:
    """Whether the weights are [E, in, out]. Modules of which transformers has one implementation only do not say."""
    return getattr(experts, "is_transposed", True)


def _run_chosen(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor, *, tap: Tap, after: Tap | None) -> Tensor:
    """hidden: [T, D]; index, weights: the router's choice for each token, [T, k]."""
    result = torch.zeros_like(hidden)
    for expert in torch.unique(index).tolist():
        if expert >= experts.num_experts:  # a router's mark for "no expert"
            continue
        position, tokens = torch.where((index == expert).T)
        h = experts._apply_gate(_project(experts, "gate_up_proj", expert, hidden[tokens]))
        new = tap(expert, tokens, h)
        output: Any = _project(experts, "down_proj", expert, h if new is None else new)
        if after is not None:
            output = after(expert, tokens, output)
        output = output * weights[tokens, position, None]
        result.index_add_(0, tokens, output.to(result.dtype))
    return result


def _run_all(experts: Any, hidden: Tensor, *, tap: Tap, after: Tap | None) -> Tensor:
    """hidden: [E * T, D], the tokens as each expert takes them. Of those not chosen h is 0: no tap sees them."""
    x = _by_expert(experts, hidden)
    gate, up = torch.bmm(x, experts.gate_up_proj).chunk(2, -1)
    tokens = [own.nonzero()[:, 0] for own in x.any(-1)]
    h = _through(tap, tokens, up * experts.act_fn(gate))
    output = torch.bmm(h, experts.down_proj)
    return (output if after is None else _through(after, tokens, output)).view(hidden.shape)


def _by_expert(experts: Any, hidden: Tensor) -> Tensor:
    return hidden.view(experts.num_experts, -1, hidden.shape[-1])


def _through(tap: Tap, tokens: list[Tensor], values: Tensor) -> Tensor:
    """values: [E, T, any]; what the tap makes of each expert's tokens takes their place."""
    result = list(values)
    for expert, own in enumerate(tokens):
        if len(own) and (new := tap(expert, own, values[expert, own])) is not None:
            result[expert] = values[expert].index_put((own,), new)
    return torch.stack(result)


def _project(experts: Any, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(experts, name)[expert]
    y = x @ weight if transposed(experts) else nn.functional.linear(x, weight)
    return y + getattr(experts, name + "_bias")[expert] if experts.has_bias else y
