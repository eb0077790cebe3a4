"""Running one decoder layer: the arguments that the model itself would pass to it, and the cache."""

from __future__ import annotations

from inspect import signature
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..models.hooks import replaced
from ..models.places import decoder_layers


class CacheLayer(DynamicLayer):
    """One layer's keys and values: those of the earlier segments, then this segment's.

    length: of the earlier segments; the model asks for it while it prepares masks, before any layer runs. The mask
    handles sliding windows, so all keys and values of a prompt are kept. keep: False discards what a pass adds.
    """

    def __init__(self, before: CacheLayer | None, length: int, keep: bool):
        super().__init__()
        self.before, self.length, self.keep = before, length, keep

    def get_seq_length(self, *_: Any) -> int:
        return self.length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.keep:
            self.keys, self.values, self.is_initialized = key_states, value_states, True
        earlier = self.before.chain() if self.before else []
        keys, values = zip(*earlier, (key_states, value_states), strict=True)
        return torch.cat(keys, -2), torch.cat(values, -2)

    def chain(self) -> list[tuple[Any, Any]]:
        """(keys, values) of the earlier segments and of this one."""
        return [*(self.before.chain() if self.before else []), (self.keys, self.values)]


def new_cache(layers: nn.ModuleList, before: DynamicCache | None, length: int, keep: bool = True) -> DynamicCache:
    """The cache of a segment that follows `before`. length, keep: as of `CacheLayer`."""
    cache = DynamicCache()
    earlier: Any = before.layers if before else [None] * len(layers)
    cache.layers = [CacheLayer(old, length, keep) for old in earlier]
    return cache


class Call(NamedTuple):
    """The arguments of a call of one layer, without the hidden states."""

    args: tuple
    kwargs: dict

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        output = layer(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output  # some architectures return a tuple


class _Reached(Exception):
    """Leaves the model's forward pass at a layer. hidden: its input; call: its other arguments."""

    def __init__(self, hidden: Tensor, call: Call):
        self.hidden, self.call = hidden, call


def call_of(
    model: nn.Module, index: int, ids: np.ndarray, depth: np.ndarray, mask: Tensor | dict, cache: DynamicCache
) -> tuple[Tensor, Call]:
    """(embedded tokens, call of layer `index` for them), without running a layer. ids, depth: [N]."""

    def leave(*args: Any, **kwargs: Any) -> NoReturn:
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        raise _Reached(hidden, Call(args, kwargs))

    layers = decoder_layers(model)
    try:
        with torch.no_grad(), replaced(layers[:index], _identity), replaced([layers[index]], leave):
            positions = on_device(model, depth[None])
            forward(model, ids[None], cache, attention_mask=mask, position_ids=positions)
    except _Reached as reached:
        return reached.hidden, reached.call
    raise AssertionError(f"{type(model).__name__} did not call layer {index}")


def _identity(*args: Any, **kwargs: Any) -> Tensor:
    """A layer that returns its input."""
    return (args[0] if args else kwargs["hidden_states"]).as_subclass(Output)


def on_device(model: Any, values: np.ndarray) -> Tensor:
    """A tensor on the device of the model's embeddings."""
    return torch.from_numpy(values).to(model.get_input_embeddings().weight.device)


def forward(model: nn.Module, ids: np.ndarray, cache: DynamicCache, **kwargs: Any) -> Any:
    """The model's output for token ids [B, N], with the logits of the last position only."""
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    return model(input_ids=on_device(model, ids), **{name: cache}, use_cache=True, logits_to_keep=1, **kwargs)


class Output(Tensor):
    """A layer's output, for models that use it directly and for models that take the first entry of a tuple."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results are plain tensors

    def __getitem__(self, index: Any) -> Any:
        return self if isinstance(index, int) and index == 0 else super().__getitem__(index)

    def __iter__(self) -> Any:
        return iter((self, None))  # Bamba unpacks a layer's output and its attention weights
