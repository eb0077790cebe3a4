"""A model in its whole form whose layers have weights only while they run.

What is written for a model in memory (hooks, proofs, effect, evaluation) works on it unchanged: each layer is read when
the model calls it, and the next one beside it. So a pass is one read of all weights, and gives the same bits.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import nn

from ..disk.checkpoint import Checkpoint
from ..errors import CheckpointError
from .memory import can_stream
from .places import decoder_layers
from .streamed import Streamed

_SUPPLY = "_kbne_supply"  # the attribute of a model that holds what supplies its layers


def on_demand(checkpoint: Checkpoint, dtype: torch.dtype, device: str = "cpu") -> Any:
    """The causal model of a checkpoint, computing on `device`, with all layers empty. Raises CheckpointError."""
    gc.collect()  # an earlier model and its reader hold each other
    if not can_stream(checkpoint):
        raise CheckpointError(f"{checkpoint.path} cannot be read layer by layer")
    supply = Streamed(checkpoint, math.inf, device, dtype)
    reader = _Reader(supply)
    for index, layer in enumerate(decoder_layers(supply.model)):
        layer.forward = reader.reading(index, layer.forward)
    setattr(supply.model, _SUPPLY, supply)
    return supply.model


def supply_of(model: nn.Module) -> Streamed | None:
    """What supplies the layers of this model; None for a model in memory."""
    return getattr(model, _SUPPLY, None)


class _Pending(NamedTuple):
    layer: int
    load: Future[None]


class _Reader:
    """Reads each layer when it is called, and then the next one beside it."""

    def __init__(self, supply: Streamed):
        self._supply, self._pool = supply, ThreadPoolExecutor(1)
        self._count = len(decoder_layers(supply.model))
        self._pending: _Pending | None = None

    def reading(self, index: int, tensors: Callable[..., Any]) -> Callable[..., Any]:
        """The forward pass of layer `index`, with its weights there."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._fetch(index)
            try:
                return tensors(*args, **kwargs)
            finally:
                self._supply.unload(index)

        return forward

    def _fetch(self, index: int) -> None:
        pending, self._pending = self._pending, None
        if pending and pending.layer != index:  # a pass was left before this layer
            pending.load.result()
            self._supply.unload(pending.layer)
            pending = None
        load = pending.load if pending else self._pool.submit(self._supply.load, index)
        load.result()
        if index + 1 < self._count:
            self._pending = _Pending(index + 1, self._pool.submit(self._supply.load, index + 1))
