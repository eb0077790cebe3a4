"""A model larger than memory: each layer is read from the checkpoint when it is needed.

The modules are created without weights. Embeddings, final norm and head are loaded once. Each layer is loaded while it
computes, and the next one is read and converted in the background. transformers' own loader fills in each layer,
because it knows the names of tensors in memory and how they are put together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from ..disk.checkpoint import Checkpoint
from ..disk.dtypes import DTYPES
from ..disk.refusals import gguf_file
from ..errors import CheckpointError, InputError
from ..families import family_of, hidden_size
from ..progress import progress, say
from .dequantised import plain_config
from .gguf import GGUFTensors, gguf_config
from .loading import foreign, load_config, model_class, quiet
from .memory import in_memory, streamed
from .places import decoder_layers, num_neurons


class Streamed:
    """Supplies a checkpoint's layers one by one (`gradients.Layers`). memory: budget in bytes.

    device: where the layers compute. A layer is assembled in the machine's memory (pinned for devices that copy from
    there asynchronously), and copied to the device while the layer before it computes. dtype: of the weights.
    bytes_read: bytes of weights read so far. Raises CheckpointError if a tensor is missing, InputError if not even one
    question fits the budget.
    """

    graphs: float = 0  # the weights are released before the backward pass
    max_rows = float("inf")  # bounded by the budget already

    def __init__(self, checkpoint: Checkpoint, memory: float, device: str = "cpu", dtype: torch.dtype = torch.float32):
        self._device, self._dtype = torch.device(device), dtype
        self._checkpoint, self._memory, self.bytes_read = checkpoint, memory, 0
        self._supplied: set[int] = set()
        self.model = _skeleton(checkpoint, dtype)
        self._layers, self._path = decoder_layers(self.model), family_of(self.model.config.to_dict()).layers + "."
        file = gguf_file(checkpoint.path)
        self._gguf = GGUFTensors(file, self.model) if file else None
        self._shapes = self._gguf.shapes if self._gguf else checkpoint.plain_shapes
        self._names = self._whose_tensors()
        self.load(None)
        for module in self.model.modules():  # in layers only the buffers: their parameters are not loaded yet
            _to_device(module, self._device)
        self.model.tie_weights()
        outer = [(name, p) for name, p in self.model.named_parameters() if not name.startswith(self._path)]
        self._complete(name for name, p in outer if p.is_meta)

    def _whose_tensors(self) -> dict[int | None, list[str]]:
        """The names on disk of each layer's tensors; under None those of everything else."""
        known, path = self.model.state_dict(), self._path
        transforms = get_model_conversion_mapping(self.model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        result: dict[int | None, list[str]] = {}
        for name in self._shapes:
            target, _ = rename_source_key(name, renamings, converters, self.model.base_model_prefix, known)
            if target in known:
                layer = int(target.removeprefix(path).split(".")[0]) if target.startswith(path) else None
                result.setdefault(layer, []).append(name)
        return result

    def load(self, layer: int | None) -> None:
        """Read a layer's tensors (None: everything outside the layers) and let transformers assign them."""
        names = self._names.get(layer, [])
        mapping: Any = get_model_conversion_mapping(self.model)
        config = LoadStateDictConfig(
            dtype=self._dtype,
            dtype_plan=self.model._get_dtype_plan(self._dtype),
            weight_mapping=mapping,
        )
        with quiet():  # outside the layers no tensor is assembled from several, so one at a time is enough
            for part in [names] if layer is not None else [[name] for name in names]:
                convert_and_load_state_dict_in_model(self.model, {name: self._read(name) for name in part}, config)
        self.model.requires_grad_(False)
        if layer is not None:
            self._complete(name for name, p in self._layers[layer].named_parameters() if p.is_meta)
            for module in self._layers[layer].modules():
                _to_device(module, self._device)

    def _complete(self, absent: Iterable[str]) -> None:
        if name := next(iter(absent), None):
            raise CheckpointError(f"{self._checkpoint.path} has no tensor for {name}: it cannot be read layer by layer")

    def _read(self, name: str) -> Tensor:
        if self._gguf:
            self.bytes_read += self._gguf.size(name)
            return torch.from_numpy(self._gguf.read(name))
        if self._checkpoint.layout is not None:
            self.bytes_read += sum(self._size(part) for part in self._checkpoint.layout.names(name))
            return torch.from_numpy(self._checkpoint.read_plain(name))
        shard, tensor = self._checkpoint.tensors[name]
        kind = DTYPES[tensor.dtype]
        if not kind.editable:
            raise CheckpointError(f"{name} is stored as {tensor.dtype}: only plain floating-point weights are read")
        raw = np.fromfile(shard.path, np.uint8, tensor.end - tensor.start, offset=tensor.start)
        self.bytes_read += len(raw)
        return torch.from_numpy(raw).view(getattr(torch, kind.torch)).view(tensor.shape)  # type: ignore[arg-type]

    def _size(self, name: str) -> int:
        _, tensor = self._checkpoint.tensors[name]
        return tensor.end - tensor.start

    def forward(self) -> Iterator[tuple[int, nn.Module]]:
        return self._supply(range(len(self._layers)), "forward")

    def backward(self) -> Iterator[tuple[int, nn.Module]]:
        return self._supply(range(len(self._layers) - 1, -1, -1), "backward")

    def _supply(self, order: Sequence[int], direction: str) -> Iterator[tuple[int, nn.Module]]:
        with ThreadPoolExecutor(1) as pool, progress(f"layers, {direction} pass", len(order), "layer") as update:
            pending = pool.submit(self.load, order[0])
            for index, following in zip(order, [*order[1:], None], strict=True):
                pending.result()
                if following is not None:
                    pending = pool.submit(self.load, following)
                self._supplied.add(index)
                try:
                    yield index, self._layers[index]
                finally:
                    self._supplied.remove(index)
                    self.unload(index)
                update(1)

    def is_supplied(self, layer: int) -> bool:
        """Whether `forward` or `backward` has this layer out at the moment."""
        return layer in self._supplied

    def unload(self, layer: int) -> None:
        """Let go of a layer's weights."""
        _empty(self._layers[layer])

    def group(self, packs: Sequence[Sequence[int]], rows: Sequence[int], bare: int) -> int:
        """How many of the packs fit the budget together. Arguments as of `Layers`."""
        layer = max(
            sum(4 * math.prod(self._shapes[name]) for name in names)
            for layer, names in self._names.items()
            if layer is not None
        )
        size, neurons, count = hidden_size(self._checkpoint.config), num_neurons(self.model), len(rows)
        widest = max(sum(pack) + len(pack) * (sum(rows) + bare) for pack in packs)
        outer = in_memory(self._checkpoint) - layer * len(self._layers)
        free = self._memory - streamed(outer, layer, widest, size)
        held = sum((n + bare) * (count - index) for index, n in enumerate(rows)) * size
        held += (sum(rows) + 3 * count * bare) * neurons
        needs = [4 * (len(pack) * held + 2 * sum(pack) * size * count) for pack in packs]
        fit = int(np.searchsorted(np.cumsum(needs), free, "right"))
        if not fit:
            raise InputError(
                f"this model needs at least {(self._memory - free + needs[0]) / 1e9:.1f} GB of memory, and "
                f"{self._memory / 1e9:.1f} GB are available: close other programs, or pass a larger --memory"
            )
        at_once, questions = sum(map(len, packs[:fit])), sum(map(len, packs))
        say(f"reading the weights layer by layer, for {at_once} of {questions} questions at a time")
        return fit


class _Unallocated(TorchFunctionMode):
    """Makes `torch.empty` allocate nothing. Parameters begin with it, buffers such as rotary tables do not."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.empty:
            kwargs = {**(kwargs or {}), "device": "meta"}
        return function(*args, **(kwargs or {}))


def _skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    with foreign(checkpoint.path), _Unallocated():
        file = gguf_file(checkpoint.path)
        config = gguf_config(file) if file else plain_config(load_config(checkpoint.path))
        model = model_class(config).from_config(config, dtype=dtype, experts_implementation="eager")
        _empty(model)  # norms begin as ones, which would hide a missing weight
    return model.eval().requires_grad_(False)


def _to_device(module: nn.Module, device: torch.device) -> None:
    """Move a module's own weights and buffers, except those on the meta device."""
    for name, parameter in module.named_parameters(recurse=False):
        if not parameter.is_meta and parameter.device != device:
            setattr(module, name, nn.Parameter(_sent(parameter.data, device), requires_grad=False))
    for name, buffer in module.named_buffers(recurse=False):
        if not buffer.is_meta and buffer.device != device:
            setattr(module, name, _sent(buffer, device))


def _sent(values: Tensor, device: torch.device) -> Tensor:
    pinned = device.type in ("cuda", "xpu") and values.device.type == "cpu"
    return values.pin_memory().to(device, non_blocking=True) if pinned else values.to(device)


def _empty(part: nn.Module) -> None:
    """Release the weights of a layer or a model; buffers stay."""
    for module in part.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
