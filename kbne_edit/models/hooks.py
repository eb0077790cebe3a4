"""An edit at run time: the reference that the fold must equal (docs/method.md, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from ..edit import Edit
from ..errors import EditError
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


def apply_(model: nn.Module, edit: Edit) -> nn.Module:
    """Scale the weights of a model in memory, in place, as `fold` does on disk: in float32, rounded once. Returns it.

    Raises EditError if the edit does not fit the model, or its weights are quantised.
    """
    import torch

    by_layer = places(model, edit.site)
    edit.check([end(layer) for layer in by_layer])
    targets = [
        (*target, _vector(factors, end(by_layer[layer]))[place.offset :])
        for layer, factors in edit.factors.items()
        for place in by_layer[layer]
        for target in _weights(place, edit.site)
    ]
    for weight, *_ in targets:
        if not weight.is_floating_point() or weight.element_size() < 2 or weight.is_meta:
            raise EditError(f"a weight is {weight.dtype}, not a floating-point type: apply the edit before quantising")
    with torch.no_grad():
        for weight, axis, neurons, scale in targets:
            if weight.dim() == 3:  # all experts of a layer
                part, factors = weight, scale[: len(weight) * neurons].view(len(weight), neurons)
                factors = factors.unsqueeze(2 if axis == 1 else 1)
            else:
                part, shape = weight.narrow(axis, 0, neurons), [1] * weight.dim()
                shape[axis] = neurons
                factors = scale[:neurons].view(shape)
            factors, wide = factors.to(part.device), torch.promote_types(part.dtype, torch.float32)
            part.copy_(torch.where(factors == 1, part, (part.to(wide) * factors).to(part.dtype)))
    return model


def _weights(place: Place, site: Site) -> Iterator[tuple[Tensor, int, int]]:
    """(weight, axis of the neurons, how many) of what carries a place's factors; of a fused gate_up the gate's half."""
    module: Any = place.module
    if place.experts:
        from .experts import transposed

        yield module.down_proj.data, 1 if transposed(module) else 2, place.neurons
        return
    conv1d = type(module).__name__ == "Conv1D"  # transformers' own, [in, out]
    yield module.weight.data, int((site == "down") != conv1d), place.neurons
    if site == "gate" and module.bias is not None:
        yield module.bias.data, 0, place.neurons


def _vector(factors: dict[int, float], size: int) -> torch.Tensor:
    import torch

    scale = torch.ones(size, dtype=torch.float32)
    scale[list(factors)] = torch.tensor(list(factors.values()), dtype=torch.float32)
    return scale


def _scale(scale: torch.Tensor) -> Tap:
    def tap(h: Tensor, tokens: Tensor | None, offset: int) -> Tensor:
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

    def call(h: Tensor) -> Tensor | None:
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

    def call(expert: int, tokens: Tensor, h: Tensor) -> Tensor | None:
        return tap(h, tokens, place.offset + expert * place.neurons)

    with replaced([place.module], partial(experts.run, place.module, tap=call)):
        yield


@contextmanager
def replaced(modules: Sequence[nn.Module] | nn.ModuleList, forward: Callable) -> Iterator[None]:
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
