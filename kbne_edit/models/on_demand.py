"""A model in its whole form whose layers have weights only while they run.

What is written for a model in memory (hooks, proofs, effect, evaluation) works on it unchanged: each layer is read when
the model calls it, and the next one beside it. So a pass is one read of all weights, and gives the same bits.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

from ..disk.checkpoint import Checkpoint
from ..distributed import LOCAL_SIZE
from ..errors import CheckpointError
from ..progress import say
from . import memory
from .devices import SPREAD, chosen_device, device_memory
from .loading import load_model
from .places import decoder_layers
from .streamed import Streamed

_SUPPLY = "_kbne_supply"  # the attribute of a model that holds what supplies its layers


def on_demand(checkpoint: Checkpoint, dtype: torch.dtype, device: str = "cpu") -> Any:
    """The causal model of a checkpoint, computing on `device`, with all layers empty. Raises CheckpointError."""
    gc.collect()  # an earlier model and its reader hold each other
    if not memory.can_stream(checkpoint):
        raise CheckpointError(f"{checkpoint.path} cannot be read layer by layer")
    supply = Streamed(checkpoint, math.inf, device, dtype)
    reader = _Reader(supply)
    for index, layer in enumerate(decoder_layers(supply.model)):
        layer.forward = reader.reading(index, layer.forward)
    setattr(supply.model, _SUPPLY, supply)
    return supply.model


def load_that_fits(path: Path, dtype: torch.dtype, device: str = "cpu") -> Any:
    """The causal model of a directory, in memory if it fits there, else with layers that are read when they run.

    device: of torch, or "auto". Raises CheckpointError.
    """
    checkpoint, device = Checkpoint.open(path), chosen_device(device)
    most = memory.room() / LOCAL_SIZE if device in ("cpu", SPREAD) else memory.SHARE * device_memory(device)
    need = memory.in_memory(checkpoint, dtype.itemsize)
    if device == SPREAD or need <= most or not memory.can_stream(checkpoint):
        return load_model(path, dtype, device)
    say(f"{path} takes {need / 1e9:.1f} GB, {most / 1e9:.1f} GB may be used: reading it layer by layer")
    return on_demand(checkpoint, dtype, device)


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
        self._last = -1  # the layer that was read last

    def reading(self, index: int, run: Callable[..., Any]) -> Callable[..., Any]:
        """The forward pass of layer `index`, with its weights there."""

        def read(*args: Any, **kwargs: Any) -> Any:
            self._fetch(index)
            try:
                return run(*args, **kwargs)
            finally:
                self._supply.unload(index)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._supply.is_supplied(index):  # by `Streamed.forward`, for many passes
                return run(*args, **kwargs)
            if torch.is_grad_enabled():  # the backward pass reads the layer again, and computes it again
                return recomputed(read, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
            return read(*args, **kwargs)

        return forward

    def _fetch(self, index: int) -> None:
        pending, self._pending = self._pending, None
        if pending and pending.layer != index:  # a pass was left before this layer
            pending.load.result()
            self._supply.unload(pending.layer)
            pending = None
        load = pending.load if pending else self._pool.submit(self._supply.load, index)
        load.result()
        following = index - 1 if index == self._last - 1 else index + 1  # backward, or forward
        self._last = index
        if 0 <= following < self._count:
            self._pending = _Pending(following, self._pool.submit(self._supply.load, following))
