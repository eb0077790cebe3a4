"""Where a model in memory keeps its feed-forward neurons: modules, and which of their values are neurons."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ..architectures import beside
from ..errors import FamilyError
from ..families import Family, Site, end, family_of, owners

if TYPE_CHECKING:
    from torch import nn


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder's layers of a causal model of transformers, [L] modules. Raises FamilyError."""
    family = family_of(model.config.to_dict())
    try:
        return model.get_submodule(family.layers)
    except AttributeError:
        children = ", ".join(name for name, _ in model.named_children())
        raise FamilyError(
            f"{type(model).__name__} has no {family.layers} (its modules: {children}): load it as a causal "
            "language model, e.g. with AutoModelForCausalLM"
        ) from None


def is_recurrent(model: Any) -> bool:
    """True if some layers hand a state from token to token, so that no mask keeps rows of tokens apart."""
    return family_of(model.config.to_dict()).recurrent


class Place(NamedTuple):
    """Neurons `offset` to `offset + neurons` of a layer: the input (or output) of `module`.

    experts: None for one projection; for a module of routed experts their number, each with `neurons` neurons.
    start: of a gate or up projection, which of its outputs is the first neuron.
    """

    module: nn.Module
    offset: int
    neurons: int
    experts: int | None = None
    start: int = 0


def places(model: Any, site: Site) -> list[list[Place]]:
    """Where the neurons of each layer are, [L] lists, empty for a layer without a feed-forward block.

    The factor scales the input of `down`, the output of `gate` and `up`. A block that later layers use again stands in
    several modules, with the same weights: all of them are places of the layer that uses it first.
    """
    config = model.config.to_dict()
    family = family_of(config)
    family.module(site)
    result = [_places(layer, family, site) for layer in decoder_layers(model)]
    for layer, owner in owners(config).items():
        result[owner] += result[layer]
        result[layer] = []
    return result


def _places(layer: nn.Module, family: Family, site: Site) -> list[Place]:
    result = []
    if family.experts and _has(layer, family.experts):
        experts: Any = layer.get_submodule(family.experts)
        count, a, b = experts.down_proj.shape
        result.append(Place(experts, 0, a if family.transposed else b, count))
        if family.shared and _has(layer, family.shared):
            result.append(_dense(layer, family, family.shared, site, result[0].neurons * count))
        return result
    return [] if family.sparse and not _has(layer, family.down) else [_dense(layer, family, family.down, site, 0)]


def _dense(layer: nn.Module, family: Family, down: str, site: Site, offset: int) -> Place:
    """down: the path of the down-projection."""
    neurons = _inputs(layer.get_submodule(down))
    path = family.module(site) if down == family.down else beside(down, site)
    start = neurons if site == "up" and family.packed else 0
    return Place(layer.get_submodule(path), offset, neurons, start=start)


def _inputs(module: Any) -> int:
    """How many inputs a projection has: nn.Linear, and what libraries of quantised formats put in its place, say so."""
    return getattr(module, "in_features", None) or module.weight.shape[0]  # Conv1D keeps its weight as [in, out]


def _has(layer: nn.Module, path: str) -> bool:
    value: Any = layer
    for name in path.split("."):
        value = getattr(value, name, None)
    return value is not None


def post_norm(model: Any) -> str | None:
    """The norm, below a layer, that the output of the feed-forward block goes through; None where there is none."""
    name, layer = family_of(model.config.to_dict()).post_norm, decoder_layers(model)[0]
    if not name or not _has(layer, name):
        return None
    return name if list(layer.get_submodule(name).parameters()) else None  # a configuration may put an Identity there


def num_neurons(model: nn.Module) -> int:
    """F, the neurons of a layer: the intermediate size, or in a mixture of experts that of all experts together."""
    return max(end(layer) for layer in places(model, "down"))
