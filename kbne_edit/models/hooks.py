"""An edit at run time: the reference that the fold is measured against (method, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from ..edit import Edit
from ..families import Site, end
from .places import Place, places

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# h of the neurons that begin at `offset`, tokens (of an expert: which of the layer's positions they are; else None),
# offset -> what takes the place of h, or None
Tap = Callable[["Tensor", "Tensor | None", int], "Tensor | None"]


@contextmanager
def hooked(model: nn.Module, edit: Edit) -> Iterator[nn.Module]:
    """Within the context, `model` computes h_i <- factor_i h_i at every position; afterwards it is as before.

    model: a causal language model of transformers. Raises EditError if the edit does not fit it.
    The product is taken in float32 and rounded once to the activation's dtype, as the fold does with the weights.
    """
    found = places(model, edit.site)
    edit.check([end(layer) for layer in found])
    with ExitStack() as stack:
        for layer, factors in edit.factors.items():
            tap = _scale(_vector(factors, end(found[layer])))
            stack.enter_context(tapped(found[layer], edit.site, tap))
        yield model


def _vector(factors: dict[int, float], size: int) -> torch.Tensor:
    import torch

    scale = torch.ones(size, dtype=torch.float32)
    scale[list(factors)] = torch.tensor(list(factors.values()), dtype=torch.float32)
    return scale


def _scale(scale: torch.Tensor) -> Tap:
    def tap(h, tokens, offset):
        return (h * scale[offset : offset + h.shape[-1]].to(h.device)).to(h.dtype)

    return tap


@contextmanager
def tapped(layer: Sequence[Place], site: Site, tap: Tap) -> Iterator[None]:
    """Call `tap` on everything that holds the layer's neurons; what it returns, if anything, takes its place."""
    with ExitStack() as stack:
        for place in layer:
            stack.enter_context(_tapped_experts(place, tap) if place.experts else _tapped(place, site, tap))
        yield


@contextmanager
def _tapped(place: Place, site: Site, tap: Tap) -> Iterator[None]:
    import torch

    def call(h):
        if h.shape[-1] == place.neurons:
            return tap(h, None, place.offset)
        new = tap(h[..., : place.neurons], None, place.offset)  # a fused gate_up: the gate comes first
        return None if new is None else torch.cat([new, h[..., place.neurons :]], -1)

    if site == "down":
        handle = place.module.register_forward_pre_hook(
            lambda _, args: None if (new := call(args[0])) is None else (new, *args[1:])
        )
    else:
        handle = place.module.register_forward_hook(lambda _, args, output: call(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _tapped_experts(place: Place, tap: Tap) -> Iterator[None]:
    from . import experts

    def call(expert, tokens, h):
        return tap(h, tokens, place.offset + expert * place.neurons)

    with replaced([place.module], partial(experts.run, place.module, tap=call)):
        yield


@contextmanager
def replaced(modules: Sequence[nn.Module], forward: Callable) -> Iterator[None]:
    """Every module answers with `forward` instead of its own."""
    own = [vars(module).get("forward") for module in modules]  # set where a dispatcher wraps the module
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module, old in zip(modules, own, strict=True):
            if old is None:
                del module.forward
            else:
                module.forward = old
