"""An edit at run time: the reference that the fold is measured against (method, section 4)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .edit import Edit
from .families import family_of, num_neurons, site_modules

if TYPE_CHECKING:
    import torch
    from torch import nn


@contextmanager
def hooked(model: nn.Module, edit: Edit) -> Iterator[nn.Module]:
    """Within the context, `model` computes h_i <- factor_i h_i at every position; afterwards it is as before.

    model: a causal language model of transformers. Raises EditError if the edit does not fit it.
    The product is taken in float32 and rounded once to the activation's dtype, as the fold does with the weights.
    """
    layers = site_modules(model, edit.site)
    edit.check(len(layers), num_neurons(model))
    rows = 2 * num_neurons(model) if edit.site == "gate" and family_of(model.config.to_dict()).packed else None
    handles = []
    try:
        for layer, factors in edit.factors.items():
            scale = _vector(factors, rows or num_neurons(model), layers[layer].weight)
            if edit.site == "down":
                handles.append(layers[layer].register_forward_pre_hook(_scale_input(scale)))
            else:
                handles.append(layers[layer].register_forward_hook(_scale_output(scale)))
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _vector(factors: dict[int, float], size: int, like: torch.Tensor) -> torch.Tensor:
    import torch

    scale = torch.ones(size, dtype=torch.float32)
    scale[list(factors)] = torch.tensor(list(factors.values()), dtype=torch.float32)
    return scale.to(like.device)


def _scale_input(scale: torch.Tensor):
    def hook(module, args):
        return ((args[0] * scale.to(args[0].device)).to(args[0].dtype), *args[1:])

    return hook


def _scale_output(scale: torch.Tensor):
    def hook(module, args, output):
        return (output * scale.to(output.device)).to(output.dtype)

    return hook
