"""A 16-bit model that computes in float32, without a float32 copy of it.

The weights stay as they are loaded, which for safetensors is a view of the file. A layer's are widened while that layer
runs, the embeddings' row by row, the head's in blocks, and so a layer's projections where few rows go through it. Every
number of 16 bits is one of float32, so the result is that of a model loaded in float32, up to the order in which
products are added.

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
from ..progress import say
from . import memory
from .hooks import replaced
from .loading import load_model
from .on_demand import on_demand
from .places import decoder_layers, is_recurrent

# Values of a weight that are widened at a time. With few rows the widening is most of the work, and takes half the time
# where the block stays in the processor's cache until it is used.
_BLOCK, _CACHED = 1 << 20, 1 << 18
_FEW = 128  # rows
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
    """The model of a checkpoint, by plain transformers, computing in float32; layer by layer if it does not fit.

    Raises CheckpointError.
    """
    if memory.way(checkpoint) == "layer by layer":
        say(f"{checkpoint.path} does not fit in memory: reading it layer by layer")
        yield on_demand(checkpoint, torch.float32)
        return
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
            for module in layer.modules():
                if type(module) is nn.Linear:
                    stack.enter_context(_widened(module, [module]))
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
        return lambda x: _linear(x, module.weight, module.bias)
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        few = _has_few_rows(args, kwargs)
        narrow = [
            (owner, name, parameter)
            for owner in owners
            if not (few and type(owner) is nn.Linear)
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


def _has_few_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True if a layer is given so few rows that its products take less time than widening it."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    return isinstance(hidden, Tensor) and hidden.numel() < _FEW * hidden.shape[-1]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b for x [..., D] in float32 and W [V, D] -> [..., V]. A weight of 16 bits is widened block by block."""
    few = x.numel() < _FEW * x.shape[-1]
    rows = max((_CACHED if few else _BLOCK) // weight.shape[1], 1)
    if weight.dtype not in _NARROW or len(weight) <= rows:
        return nn.functional.linear(x, weight.float(), None if bias is None else bias.float())
    result = torch.empty(*x.shape[:-1], len(weight), dtype=torch.float32, device=x.device)
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        shift = None if bias is None else bias[part].float()
        result[..., part] = nn.functional.linear(x, weight[part].float(), shift)
    return result
