"""A 16-bit model that computes in float32, without a float32 copy of it.

The weights stay as they are loaded, which for safetensors is a view of the file. A layer's are widened while that layer
runs, the embeddings' row by row, the head's in blocks. Every number of 16 bits is one of float32, so the result is that
of a model loaded in float32, up to the order in which the head's products are added.

Rejected: loading in float32. It reads the file and writes twice its size, for passes that use each weight a few times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..disk.checkpoint import Checkpoint
from . import memory
from .hooks import replaced
from .loading import load_model
from .places import decoder_layers, is_recurrent

_BLOCK = 8192  # rows of the head at a time: 32 MB at a hidden size of 1,024
_NARROW = (torch.bfloat16, torch.float16)
_wide: WeakSet[nn.Module] = WeakSet()  # the models that are within `widened`


def can_widen(model: nn.Module) -> bool:
    """True if `widened` gives this model what a load in float32 gives.

    Buffers of 16 bits were rounded while loading, and layers with a state read weights outside of their own modules.
    Gemma's scale of the embeddings is known unrounded, too.
    """
    for module in model.modules():
        names = (name for name, buffer in module.named_buffers(recurse=False) if buffer.dtype in _NARROW)
        if any(name != "embed_scale" or not hasattr(module, "scalar_embed_scale") for name in names):
            return False
    if is_recurrent(model):
        return False
    return all(parameter.dtype in _NARROW for parameter in model.parameters())


def computed_in(model: Any) -> torch.dtype:
    """The dtype of a model's activations."""
    return torch.float32 if model in _wide else model.get_input_embeddings().weight.dtype


def narrow_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    """The one dtype of 16 bits in which all of a checkpoint's weights are stored; None if there is none such."""
    name = memory.narrow(checkpoint)
    return None if name is None else getattr(torch, name)


@contextmanager
def float32_model(checkpoint: Checkpoint) -> Iterator[Any]:
    """The model of a checkpoint, by plain transformers, computing in float32. Raises CheckpointError."""
    narrow = narrow_dtype(checkpoint)
    model = load_model(checkpoint.path, narrow or torch.float32)
    if narrow and not can_widen(model):
        del model
        model = load_model(checkpoint.path, torch.float32)
    with widened(model):
        yield model


def narrow_(model: nn.Module, dtype: torch.dtype) -> None:
    """Round a model's weights in place, as a load in `dtype` does; its buffers stay."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@contextmanager
def widened(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context a model of 16 bits computes in float32."""
    layers = decoder_layers(model)
    inside = {module for layer in layers for module in layer.modules()}
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_widened(layer, list(layer.modules())))
        for module in model.modules():
            if module not in inside and any(p.dtype in _NARROW for p in module.parameters(recurse=False)):
                stack.enter_context(_widened(module, [module]))
        _wide.add(model)
        stack.callback(_wide.discard, model)
        yield model


@contextmanager
def _widened(module: nn.Module, owners: Iterable[nn.Module]) -> Iterator[None]:
    """The parameters of `owners` are float32 while `module` runs."""
    with replaced([module], _forward(module, list(owners))):
        yield


def _forward(module: Any, owners: list[nn.Module]) -> Callable[..., Any]:
    if type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and hasattr(module, "scalar_embed_scale")):
        scale = torch.tensor(getattr(module, "scalar_embed_scale", 1.0))
        return lambda ids: nn.functional.embedding(ids, module.weight, module.padding_idx).float() * scale
    if type(module) is nn.Linear:
        return lambda x: _in_blocks(x, module.weight, module.bias)
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        narrow = [
            (owner, name, parameter)
            for owner in owners
            for name, parameter in owner._parameters.items()
            if parameter is not None and parameter.dtype in _NARROW
        ]
        try:
            for owner, name, parameter in narrow:
                owner._parameters[name] = nn.Parameter(parameter.float(), requires_grad=False)
            return original(*args, **kwargs)
        finally:
            for owner, name, parameter in narrow:
                owner._parameters[name] = parameter

    return forward


def _in_blocks(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b for x [..., D] in float32 and W [V, D] in 16 bits -> [..., V]."""
    result = torch.empty(*x.shape[:-1], len(weight), dtype=torch.float32, device=x.device)
    for start in range(0, len(weight), _BLOCK):
        part = slice(start, start + _BLOCK)
        shift = None if bias is None else bias[part].float()
        result[..., part] = nn.functional.linear(x, weight[part].float(), shift)
    return result
