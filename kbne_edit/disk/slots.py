"""Where a checkpoint stores its feed-forward neurons: in which tensor on disk, along which axis."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..architectures import beside
from ..errors import FamilyError, shown
from ..families import Family, Site, end, family_of, hidden_size, num_layers, owners, unknown_family_hint
from .layouts.codecs import Codec, codec_of
from .tensors import TensorInfo

Shapes = dict[str, tuple[int, ...]]  # of tensors on disk, by name


@dataclass(frozen=True)
class Slot:
    """One tensor on disk that carries factors: neurons `offset` to `offset + neurons` of the layer, along `axis`.

    In every format a neuron is a column or a row of one tensor whose numbers can be multiplied (for a quantised matrix
    the scales). So the rest of the package handles slots and no formats.
    experts: None, or the size of axis 0 where the tensor stacks all experts.
    start: index of the first neuron along the axis; stride: distance to the next one.
    For carriers of quantised matrices: codec: how the numbers are multiplied, a key of `CODECS` (None: by the dtype);
    view: the shape to read the tensor in, if not its own; block: where rows share a scale, (the tensor of scales, how
    many rows share one).
    """

    tensor: str
    layer: int
    axis: int
    offset: int
    neurons: int
    experts: int | None = None
    start: int = 0
    stride: int = 1
    codec: str | None = None
    view: tuple[int, ...] | None = None
    block: tuple[str, int] | None = None

    @property
    def along(self) -> slice:
        """The neurons' indices along the axis."""
        return slice(self.start, self.start + self.neurons * self.stride, self.stride)

    def numbers(self, tensor: TensorInfo) -> Codec:
        """How the tensor's numbers are read and multiplied. Raises CheckpointError where they cannot be."""
        return codec_of(self.codec or tensor.dtype, tensor.name)

    def shape(self, tensor: TensorInfo) -> tuple[int, ...]:
        """The shape to read the tensor in."""
        return self.view or tensor.shape


def slots(shapes: dict[str, tuple[int, ...]], config: dict[str, Any], site: Site) -> dict[int, list[Slot]]:
    """Where each layer's factors go: {layer: [Slot, …]} (a gate projection's bias is a slot of its own).

    `shapes` maps tensor names on disk to shapes. Raises FamilyError if a layer's tensor is absent or ambiguous.
    """
    family, count, size = family_of(config), num_layers(config), hidden_size(config)
    family.module(site)
    stack, shared = _decoder(shapes, family, count), owners(config)
    result: dict[int, list[Slot]] = {}
    for layer in range(count):
        if layer in shared:  # the block is stored at the first layer that uses it
            result[layer] = []
            continue
        tensors = stack.get(layer, {})
        result[layer] = []
        for names in filter(None, (family.disk, family)):
            on_disk = _Layer(layer, tensors, shapes, names, site)
            result[layer] = result[layer] or _expert_slots(on_disk, size) or _dense_slots(on_disk, names.down)
        if not result[layer] and not (family.sparse and tensors):
            name = f"{family.layers.rpartition('.')[2]}.{layer}.{family.module(site)}.weight"
            raise FamilyError(
                f"no tensor on disk for {name} of {shown(config['model_type'])}; "
                f"feed-forward tensors in the file: {unknown_family_hint(shapes) or 'none'}"
            )
    return result


def _decoder(shapes: Iterable[str], family: Family, count: int) -> dict[int, dict[str, str]]:
    """The tensors of the decoder's layers: {layer: {name below the layer: full name}}. Raises FamilyError.

    Other parts of a checkpoint have layers, too (vision towers, more prediction heads, draft models). They have
    another prefix. The decoder's prefix is the one with all `count` layers; if there are several, the one that the
    family names (`model.layers`).
    """
    family = family.disk or family
    suffix = family.layers.rpartition(".")[2]
    pattern = re.compile(rf"((?:.*?\.)??){re.escape(suffix)}\.(\d+)\.(.+)")
    stacks: dict[str, dict[int, dict[str, str]]] = {}
    for name in shapes:
        if (match := pattern.fullmatch(name)) and not _OTHER_PARTS.search(name):
            prefix, layer, below = match.groups()
            if layer == str(int(layer)) and int(layer) < count:
                stacks.setdefault(prefix, {}).setdefault(int(layer), {})[below] = name
    whole = [prefix for prefix, stack in stacks.items() if len(stack) == count]
    if len(whole) > 1:
        named = family.layers.removesuffix(suffix)
        whole = [prefix for prefix in whole if prefix == named] or whole
    if len(whole) > 1:
        raise FamilyError(
            f"{len(whole)} parts of this checkpoint could be the decoder: "
            f"{', '.join(f'{prefix}{suffix}' for prefix in sorted(whole)[:3])}. Remove the others from the checkpoint"
        )
    best = whole[0] if whole else max(stacks, key=lambda prefix: len(stacks[prefix]), default="")
    return stacks.get(best, {})


def layers_beyond(shapes: Iterable[str], config: dict[str, Any]) -> list[int]:
    """Layers of the decoder's stack on disk that config.json does not count: transformers does not load them.

    Those that it counts as further prediction heads are left out.
    """
    family, count = family_of(config), num_layers(config)
    stack = _decoder(shapes, family, count)
    first = next((name.removesuffix(f"0.{below}") for below, name in stack.get(0, {}).items()), None)
    numbers = {name.removeprefix(first).partition(".")[0] for name in shapes if first and name.startswith(first)}
    heads = config.get("num_nextn_predict_layers")
    known = count + (heads if isinstance(heads, int) else 0)
    return sorted(int(number) for number in numbers if number.isdecimal() and int(number) >= known)


def layer_sizes(by_layer: dict[int, list[Slot]]) -> list[int]:
    """How many neurons each layer has, [L]. by_layer: of `slots`."""
    return [end(by_layer[layer]) for layer in sorted(by_layer)]


_OTHER_PARTS = re.compile(
    r"(?:^|[._])(?:vision|visual|audio)"
)  # towers have layers, too; only the language model is edited


class _Layer(NamedTuple):
    """A layer on disk. tensors: {name below the layer: full name}; shapes: of all tensors; family: names on disk."""

    number: int
    tensors: dict[str, str]
    shapes: Shapes
    family: Family
    site: Site


def _dense_slots(layer: _Layer, down: str, offset: int = 0) -> list[Slot]:
    """The slots of a dense block. down: name of its down-projection below the layer."""
    family, site = layer.family, layer.site
    # W_down is [D, F] in nn.Linear and [F, D] in Conv1D; W_gate is [F, D], packed [2 F, D] with the gate first.
    axis, share = (0 if site != "down" or family.conv1d else 1), (2 if site != "down" and family.packed else 1)
    path = family.module(site) if down == family.down else beside(down, site)
    result = []
    for kind in ("weight", "bias") if site != "down" else ("weight",):
        if name := layer.tensors.get(f"{path}.{kind}"):
            shape = _shape(name, layer.shapes, 2 if kind == "weight" else 1)
            neurons = shape[axis] // share
            start = neurons if share == 2 and site == "up" else 0
            result.append(Slot(name, layer.number, axis, offset, neurons, start=start))
    return result if result and result[0].tensor.endswith("weight") else []


def _expert_slots(layer: _Layer, size: int) -> list[Slot]:
    """The slots of a layer's experts, the shared ones last. size: D."""
    family = layer.family
    if family.experts is None:
        return []
    stacked = "N" not in family.expert_down
    result = _stacked(layer, size) if stacked else _one_by_one(layer)
    if result and family.shared:
        result += _dense_slots(layer, family.shared, end(result))
    return result


def _stacked(layer: _Layer, size: int) -> list[Slot]:
    """All experts in one tensor, [E, out, in] or transposed."""
    family, site = layer.family, layer.site
    if not (down := layer.tensors.get(family.expert_down)):
        return []
    experts, a, b = _shape(down, layer.shapes, 3)
    transposed = a != size if family.transposed is None else family.transposed  # as transformers decides it
    neurons = a if transposed else b
    if site == "down":
        return [Slot(down, layer.number, 1 if transposed else 2, 0, neurons, experts)]
    result = []
    for name in (family.expert_gate_up, f"{family.expert_gate_up}_bias"):
        if full := layer.tensors.get(name or ""):
            shape = _shape(full, layer.shapes, 3 if name == family.expert_gate_up else 2)
            axis = 2 if transposed and len(shape) == 3 else 1
            start, stride = (int(site == "up"), 2) if family.interleaved else (neurons * int(site == "up"), 1)
            result.append(Slot(full, layer.number, axis, 0, neurons, experts, start=start, stride=stride))
    return result


def _one_by_one(layer: _Layer) -> list[Slot]:
    """Each expert in a tensor of its own."""
    family, site = layer.family, layer.site
    pattern = re.compile(re.escape(beside(family.expert_down, site)).replace("N", r"(\d+)"))
    numbered = {int(match[1]): name for below, name in layer.tensors.items() if (match := pattern.fullmatch(below))}
    if sorted(numbered) != list(range(len(numbered))):
        raise FamilyError(f"layer {layer.number} lacks tensors of some experts: it has {len(numbered)}")
    result = []
    axis = 1 if site == "down" else 0
    for expert, name in sorted(numbered.items()):
        neurons = _shape(name, layer.shapes, 2)[axis]
        result.append(Slot(name, layer.number, axis, expert * neurons, neurons))
    return result


class Readout(NamedTuple):
    """From the last layer's output x to logits: unembedding @ norm(x). Names on disk; norm: None if it has no weight.

    offset: what the norm adds to its weight; centred: True if it subtracts the mean of x first.
    """

    unembedding: str
    norm: str | None
    offset: float
    centred: bool


_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "layer_norm")
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")


def readout(shapes: dict[str, tuple[int, ...]], config: dict[str, Any]) -> Readout | None:
    """The final norm and the unembedding on disk; None if the last layer's output does not fit the unembedding."""
    family = family_of(config)
    first = next(slot for layer in slots(shapes, config, "down").values() for slot in layer)
    suffix = (family.disk or family).layers.rpartition(".")[2]
    prefix = first.tensor[: first.tensor.rindex(f"{suffix}.{first.layer}.")]
    heads = [name for name in shapes if re.search(r"(?:^|\.)(?:lm_head|embed_out)\.weight$", name)]
    tied = [name for part in _EMBEDDINGS if (name := f"{prefix}{part}.weight") in shapes]
    norms = [name for part in _NORMS if (name := f"{prefix}{part}.weight") in shapes]
    if not (heads or tied) or (norms and shapes[norms[0]] != shapes[(heads or tied)[0]][1:]):
        return None
    if tied and config.get("tie_word_embeddings") is True:  # a head that is stored all the same is not the model's
        heads = []
    return Readout((heads or tied)[0], norms[0] if norms else None, float(family.one_plus), family.centred)


def _shape(name: str, shapes: dict[str, tuple[int, ...]], dimensions: int) -> tuple[int, ...]:
    if len(shapes[name]) != dimensions:
        raise FamilyError(f"{name} has shape {list(shapes[name])}; {dimensions} dimensions expected")
    return shapes[name]


def by_neuron(array: np.ndarray, slot: Slot) -> np.ndarray:
    """A slot's tensor with one row per neuron of the slot, [neurons, …]."""
    if slot.experts:
        moved = np.moveaxis(array, slot.axis, 1)[:, slot.along]
        return moved.reshape(slot.experts * slot.neurons, -1)
    moved = np.moveaxis(array, slot.axis, 0)[slot.along]
    return moved.reshape(len(moved), -1)
