"""The forward pass of a module of routed experts, with a tap on h.

transformers 5 keeps all experts of a layer in one module, so there is no projection per expert to hook. This
module repeats its "eager" pass, expert by expert and operation by operation, so that the result is equal bit for bit.
Llama 4 differs: each expert takes every token, times the router's weight, which is 0 for experts that were not chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..families import Site

# expert, tokens [n] (which of the inputs this expert was given), values [n, F] of its neurons at the site -> what takes
# their place, or None
Tap = Callable[[int, Tensor, Tensor], "Tensor | None"]
# expert, input and output of the projection that the site belongs to -> what takes the output's place
After = Callable[[int, Tensor, Tensor], Tensor]


def run(
    experts: Any, hidden: Tensor, *routing: Tensor, tap: Tap, site: Site = "down", after: After | None = None
) -> Tensor:
    """hidden, routing: what the module is called with.

    tap: sees the input of the down-projection, or the output of the gate or up projection; after: the down-projection's
    output [n, D], or of the gate or up projection what the tap has made of it.
    """
    look = _Look(site, tap, after)
    return _run_chosen(experts, hidden, *routing, look=look) if routing else _run_all(experts, hidden, look)


class _Look(NamedTuple):
    """What `run` is asked to see and to change."""

    site: Site
    tap: Tap
    after: After | None

    def change(self, expert: int, tokens: Tensor, x: Tensor, values: Tensor) -> Tensor:
        """What takes the place of a gate or up projection's output. x: its input."""
        values = _or(self.tap(expert, tokens, values), values)
        return values if self.after is None else self.after(expert, x, values)


def chosen(hidden: Tensor, *routing: Tensor, experts: Any) -> Tensor:
    """What the router chose for each token, [T, any]. hidden, routing: what the module is called with."""
    return routing[0] if routing else _by_expert(experts, hidden).any(-1).T


def projection(experts: Any, expert: int, site: Site) -> Tensor:
    """One expert's projection, [in, out]: of down [F, D], of gate and up [D, F]."""
    weight = (experts.down_proj if site == "down" else experts.gate_up_proj)[expert]
    weight = weight if transposed(experts) else weight.T
    return weight if site == "down" else weight[:, half(experts, site)]


def half(experts: Any, site: Site) -> slice:
    """Where the outputs of gate or up stand among those of the fused projection."""
    if not getattr(experts, "is_concatenated", True):
        return slice(int(site == "up"), None, 2)
    neurons = experts.down_proj.shape[1 if transposed(experts) else 2]
    return slice(neurons, None) if site == "up" else slice(neurons)


def transposed(experts: Any) -> bool:
    """Whether the weights are [E, in, out]. Modules of which transformers has one implementation only do not say."""
    return getattr(experts, "is_transposed", True)


def _run_chosen(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor, *, look: _Look) -> Tensor:
    """hidden: [T, D]; index, weights: the router's choice for each token, [T, k]."""
    result = torch.zeros_like(hidden)
    for expert in torch.unique(index).tolist():
        if expert >= experts.num_experts:  # a router's mark for "no expert"
            continue
        position, tokens = torch.where((index == expert).T)
        x = hidden[tokens]
        opened = _project(experts, "gate_up_proj" if _gated(experts) else "up_proj", expert, x)
        if look.site != "down":
            opened = _in_half(experts, look.site, opened, partial(look.change, expert, tokens, x))
        h = experts._apply_gate(opened) if _gated(experts) else experts.act_fn(opened)
        if look.site == "down":
            h = _or(look.tap(expert, tokens, h), h)
        output: Any = _project(experts, "down_proj", expert, h)
        if look.after is not None and look.site == "down":
            output = look.after(expert, h, output)
        output = output * weights[tokens, position, None]
        result.index_add_(0, tokens, output.to(result.dtype))
    return result


def _run_all(experts: Any, hidden: Tensor, look: _Look) -> Tensor:
    """hidden: [E * T, D], the tokens as each expert takes them. Of those not chosen h is 0: no tap sees them."""
    x = _by_expert(experts, hidden)
    opened = torch.bmm(x, experts.gate_up_proj)
    tokens = [routed.nonzero()[:, 0] for routed in x.any(-1)]
    if look.site != "down":

        def tap_half(expert: int, routed: Tensor, values: Tensor) -> Tensor:
            def change(half: Tensor) -> Tensor:
                return look.change(expert, routed, x[expert, routed], half)

            return _in_half(experts, look.site, values, change)

        opened = _through(tap_half, tokens, opened)
    gate, up = opened.chunk(2, -1)
    h = up * experts.act_fn(gate)
    if look.site != "down":
        return torch.bmm(h, experts.down_proj).view(hidden.shape)
    h = _through(look.tap, tokens, h)
    output = torch.bmm(h, experts.down_proj)
    if (after := look.after) is not None:
        output = _through(lambda expert, routed, values: after(expert, h[expert, routed], values), tokens, output)
    return output.view(hidden.shape)


def _gated(experts: Any) -> bool:
    return getattr(experts, "has_gate", True)


def _in_half(experts: Any, site: Site, opened: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The fused projection's output with one half changed. opened: [n, 2 F]."""
    where = half(experts, site)
    result = opened.clone()
    result[:, where] = change(opened[:, where])
    return result


def _or(new: Tensor | None, old: Tensor) -> Tensor:
    return old if new is None else new


def _by_expert(experts: Any, hidden: Tensor) -> Tensor:
    return hidden.view(experts.num_experts, -1, hidden.shape[-1])


def _through(tap: Tap, tokens: list[Tensor], values: Tensor) -> Tensor:
    """values: [E, T, any]; what the tap makes of each expert's tokens takes their place."""
    result = list(values)
    for expert, routed in enumerate(tokens):
        if len(routed) and (new := tap(expert, routed, values[expert, routed])) is not None:
            result[expert] = values[expert].index_put((routed,), new)
    return torch.stack(result)


def _project(experts: Any, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(experts, name)[expert]
    y = x @ weight if transposed(experts) else nn.functional.linear(x, weight)
    return y + getattr(experts, name + "_bias")[expert] if experts.has_bias else y
