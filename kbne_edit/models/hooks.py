"""An edit at run time: the reference that the fold must equal (docs/method.md, section 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..errors import EditError
from ..families import Site, end
from .places import Place, places

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# h of the neurons that begin at `offset`, tokens (of an expert: which of the layer's positions they are; else None),
# offset -> what takes the place of h, or None
Tap = Callable[["Tensor", "Tensor | None", int], "Tensor | None"]


class Scaling(Protocol):
    """What an `Edit` is here: `Edit.hooks` calls this module, so this module does not import it."""

    @property
    def site(self) -> Site: ...
    @property
    def factors(self) -> dict[int, dict[int, float]]: ...
    def check(self, neurons: Sequence[int], base: str | None = None) -> None: ...


@contextmanager
def hooked(model: nn.Module, edit: Scaling) -> Iterator[nn.Module]:
    """Within the context, `model` computes h_i <- factor_i h_i at every position; afterwards it is as before.

    model: a causal language model of transformers. Raises EditError if the edit does not fit it.
    The product is taken in float32 and rounded once to the activation's dtype, as the fold does with the weights.
    """
    layers = places(model, edit.site)
    edit.check([end(layer) for layer in layers])
    with ExitStack() as stack:
        for layer, factors in edit.factors.items():
            tap = _scale(_vector(factors, end(layers[layer])))
            stack.enter_context(tapped(layers[layer], edit.site, tap))
        yield model


def apply_(model: nn.Module, edit: Scaling) -> nn.Module:
    """Scale the weights of a model in memory, in place, as `fold` does on disk: in float32, rounded once. Returns it.

    Raises EditError if the edit does not fit the model, or its weights are quantised.
    """
    import torch

    by_layer = places(model, edit.site)
    edit.check([end(layer) for layer in by_layer])
    targets = [
        (part, _vector(factors, end(by_layer[layer]))[place.offset :])
        for layer, factors in edit.factors.items()
        for place in _once(by_layer[layer])
        for part in _parts(place, edit.site)
    ]
    for part, _ in targets:
        if not part.values.is_floating_point() or part.values.element_size() < 2 or part.values.is_meta:
            raise EditError(
                f"a weight is {part.values.dtype}, not a floating-point type: apply the edit before quantising"
            )
    with torch.no_grad():
        for part, scale in targets:
            part.times(scale)
    return model


def _once(layer: Sequence[Place]) -> list[Place]:
    """A block that later layers use again is scaled once."""
    return list({place.offset: place for place in layer}.values())


class _Part(NamedTuple):
    """A view of what carries a place's factors. axis: of its neurons; experts: axis 0, where all are in one tensor."""

    values: Tensor
    axis: int
    experts: int | None = None

    def times(self, factors: Tensor) -> None:
        """In place, in float32, rounded once. factors: [F] or more; of experts [E * F] or more, one after the other."""
        import torch

        values, shape = self.values, [1] * self.values.dim()
        shape[self.axis] = values.shape[self.axis]
        if self.experts:
            shape[0] = self.experts
        factors = factors[: math.prod(shape)].view(shape).to(values.device)
        wide = torch.promote_types(values.dtype, torch.float32)
        values.copy_(torch.where(factors == 1, values, (values.to(wide) * factors).to(values.dtype)))


def _parts(place: Place, site: Site) -> Iterator[_Part]:
    module: Any = place.module
    if place.experts:
        yield from _expert_parts(module, site, place.experts)
        return
    rows = slice(place.start, place.start + place.neurons)
    conv1d = type(module).__name__ == "Conv1D"  # transformers' own, [in, out]
    if site == "down":
        yield _Part(module.weight.data, 0 if conv1d else 1)
        return
    yield _Part(module.weight.data[rows], 0)
    if module.bias is not None:
        yield _Part(module.bias.data[rows], 0)


def _expert_parts(module: Any, site: Site, count: int) -> Iterator[_Part]:
    from .experts import half, transposed

    if site == "down":
        yield _Part(module.down_proj.data, 1 if transposed(module) else 2, count)
        return
    where = half(module, site)
    if transposed(module):
        yield _Part(module.gate_up_proj.data[:, :, where], 2, count)
    else:
        yield _Part(module.gate_up_proj.data[:, where], 1, count)
    if getattr(module, "has_bias", False):
        yield _Part(module.gate_up_proj_bias.data[:, where], 1, count)


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
            stack.enter_context(_tapped_experts(place, site, tap) if place.experts else _tapped(place, site, tap))
        yield


@contextmanager
def _tapped(place: Place, site: Site, tap: Tap) -> Iterator[None]:
    import torch

    def call(h: Tensor) -> Tensor | None:
        if h.shape[-1] == place.neurons:
            return tap(h, None, place.offset)
        end = place.start + place.neurons  # of a fused gate_up
        new = tap(h[..., place.start : end], None, place.offset)
        return None if new is None else torch.cat([h[..., : place.start], new, h[..., end:]], -1)

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
def _tapped_experts(place: Place, site: Site, tap: Tap) -> Iterator[None]:
    from . import experts

    def call(expert: int, tokens: Tensor, h: Tensor) -> Tensor | None:
        return tap(h, tokens, place.offset + expert * place.neurons)

    with replaced([place.module], partial(experts.run, place.module, tap=call, site=site)):
        yield


@contextmanager
def replaced(modules: Sequence[nn.Module] | nn.ModuleList, forward: Callable) -> Iterator[None]:
    """Every module answers with `forward` instead of its own."""
    originals = [vars(module).get("forward") for module in modules]  # set where a dispatcher wraps the module
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module, old in zip(modules, originals, strict=True):
            if old is None:
                del module.forward
            else:
                module.forward = old
