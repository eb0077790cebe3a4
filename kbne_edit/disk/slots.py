"""Where a checkpoint keeps its feed-forward neurons: which tensor on disk carries which of them, along which axis."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..errors import FamilyError, shown
from ..families import Family, Site, end, family_of, hidden_size, num_layers, unknown_family_hint
from .layouts.codecs import Codec, codec_of
from .tensors import TensorInfo

Shapes = dict[str, tuple[int, ...]]  # of tensors on disk, by name


@dataclass(frozen=True)
class Slot:
    """One tensor on disk that carries factors: neurons `offset` to `offset + neurons` of the layer, along `axis`.

    Whatever the format, what carries a neuron is a column or a row of one tensor whose dtype can be multiplied (of a
    quantised matrix: of its scales). The rest of the tool knows slots and no formats.
    experts: None, or the size of axis 0 where the tensor stacks all experts.
    start: where along the axis the first of the neurons stands. Of a quantised matrix's carrier also: codec, how its
    numbers are multiplied (a key of `CODECS`; None: as its dtype says); view: the shape that it is read in, where that
    is not its own; block: where rows share a scale, the tensor that holds it and how many rows do.
    """

    tensor: str
    layer: int
    axis: int
    offset: int
    neurons: int
    experts: int | None = None
    start: int = 0
    codec: str | None = None
    view: tuple[int, ...] | None = None
    block: tuple[str, int] | None = None

    def numbers(self, tensor: TensorInfo) -> Codec:
        """How the tensor's numbers are read and multiplied. Raises CheckpointError where they cannot be."""
        return codec_of(self.codec or tensor.dtype, tensor.name)

    def shape(self, tensor: TensorInfo) -> tuple[int, ...]:
        """The shape that the tensor is read in."""
        return self.view or tensor.shape


def slots(shapes: dict[str, tuple[int, ...]], config: dict[str, Any], site: Site) -> dict[int, list[Slot]]:
    """Where each layer's factors go: {layer: [Slot, …]} (a gate projection's bias is a slot of its own).

    `shapes` maps tensor names on disk to shapes. Raises FamilyError if a layer's tensor is absent or ambiguous.
    """
    family, count, size = family_of(config), num_layers(config), hidden_size(config)
    stack = _decoder(shapes, family, count)
    result = {}
    for layer in range(count):
        own = stack.get(layer, {})
        result[layer] = _expert_slots(own, shapes, layer, family, size) or _dense_slots(
            own, shapes, layer, family, site
        )
        if not result[layer]:
            name = f"{family.layers.rpartition('.')[2]}.{layer}.{family.module(site)}.weight"
            raise FamilyError(
                f"no tensor on disk for {name} of {shown(config['model_type'])}; "
                f"feed-forward tensors in the file: {unknown_family_hint(shapes) or 'none'}"
            )
    return result


def _decoder(shapes: Iterable[str], family: Family, count: int) -> dict[int, dict[str, str]]:
    """The tensors of the decoder's layers: {layer: {name below the layer: full name}}. Raises FamilyError.

    Other parts of a checkpoint have layers, too (vision towers, more prediction heads, draft models). They stand under
    another prefix. The decoder's prefix is the one that has all `count` layers; where several have, the one that the
    family names (`model.layers`).
    """
    stem = family.layers.rpartition(".")[2]
    pattern = re.compile(rf"((?:.*?\.)??){re.escape(stem)}\.(\d+)\.(.+)")
    stacks: dict[str, dict[int, dict[str, str]]] = {}
    for name in shapes:
        if (match := pattern.fullmatch(name)) and not _OTHER_PARTS.search(name):
            prefix, layer, below = match.groups()
            if layer == str(int(layer)) and int(layer) < count:
                stacks.setdefault(prefix, {}).setdefault(int(layer), {})[below] = name
    whole = [prefix for prefix, stack in stacks.items() if len(stack) == count]
    if len(whole) > 1:
        named = family.layers.removesuffix(stem)
        whole = [prefix for prefix in whole if prefix == named] or whole
    if len(whole) > 1:
        raise FamilyError(
            f"{len(whole)} parts of this checkpoint could be the decoder: "
            f"{', '.join(f'{prefix}{stem}' for prefix in sorted(whole)[:3])}. Remove the others from the checkpoint"
        )
    best = whole[0] if whole else max(stacks, key=lambda prefix: len(stacks[prefix]), default="")
    return stacks.get(best, {})


def layer_sizes(by_layer: dict[int, list[Slot]]) -> list[int]:
    """How many neurons each layer has, [L]. by_layer: of `slots`."""
    return [end(by_layer[layer]) for layer in sorted(by_layer)]


_OTHER_PARTS = re.compile(r"(?:^|[._])(?:vision|visual|audio)")  # towers have layers, too; only the text is edited


def _dense_slots(
    own: dict[str, str], shapes: dict[str, tuple[int, ...]], layer: int, family: Family, site: Site
) -> list[Slot]:
    """own: {name below the layer: full name}."""
    # W_down is [D, F] in nn.Linear and [F, D] in Conv1D; W_gate is [F, D], packed [2 F, D] with the gate first.
    axis, share = (0 if site == "gate" or family.conv1d else 1), (2 if site == "gate" and family.packed else 1)
    result = []
    for kind in ("weight", "bias") if site == "gate" else ("weight",):
        if name := own.get(f"{family.module(site)}.{kind}"):
            shape = _shape(name, shapes, 2 if kind == "weight" else 1)
            result.append(Slot(name, layer, axis, 0, shape[axis] // share))
    return result if result and result[0].tensor.endswith("weight") else []


def _expert_slots(
    own: dict[str, str], shapes: dict[str, tuple[int, ...]], layer: int, family: Family, size: int
) -> list[Slot]:
    """own: as of `_dense_slots`; size: D."""
    if family.experts is None:
        return []
    result = []
    if "N" not in family.expert_down:
        if name := own.get(family.expert_down):
            experts, a, b = _shape(name, shapes, 3)
            transposed = a != size if family.transposed is None else family.transposed  # as transformers decides it
            result.append(Slot(name, layer, *((1, 0, a) if transposed else (2, 0, b)), experts))
    else:
        pattern = re.compile(re.escape(family.expert_down).replace("N", r"(\d+)"))
        numbered = {int(match[1]): name for below, name in own.items() if (match := pattern.fullmatch(below))}
        if sorted(numbered) != list(range(len(numbered))):
            raise FamilyError(f"layer {layer} lacks the tensors of some experts: it has {len(numbered)}")
        for expert, name in sorted(numbered.items()):
            size = _shape(name, shapes, 2)[1]
            result.append(Slot(name, layer, 1, expert * size, size))
    if result and family.shared and (name := own.get(f"{family.shared}.weight")):
        result.append(Slot(name, layer, 1, end(result), _shape(name, shapes, 2)[1]))
    return result


class Readout(NamedTuple):
    """What turns the last layer's output x into logits: unembedding @ norm(x). Names on disk; norm None: no weight.

    offset: what the norm adds to its weight; centred: True where it takes the mean off x first.
    """

    unembedding: str
    norm: str | None
    offset: float
    centred: bool


_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "layer_norm")
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")


def readout(shapes: dict[str, tuple[int, ...]], config: dict[str, Any]) -> Readout | None:
    """The final norm and the unembedding on disk; None where the last layer's output does not fit the unembedding."""
    family = family_of(config)
    first = slots(shapes, config, "down")[0][0].tensor
    stem = family.layers.rpartition(".")[2]
    prefix = first[: first.rindex(f"{stem}.0.")]
    heads = [name for name in shapes if re.search(r"(?:^|\.)(?:lm_head|embed_out)\.weight$", name)]
    tied = [name for part in _EMBEDDINGS if (name := f"{prefix}{part}.weight") in shapes]
    norms = [name for part in _NORMS if (name := f"{prefix}{part}.weight") in shapes]
    if not (heads or tied) or (norms and shapes[norms[0]] != shapes[(heads or tied)[0]][1:]):
        return None
    return Readout((heads or tied)[0], norms[0] if norms else None, float(family.one_plus), family.centred)


def _shape(name: str, shapes: dict[str, tuple[int, ...]], dimensions: int) -> tuple[int, ...]:
    if len(shapes[name]) != dimensions:
        raise FamilyError(f"{name} has shape {list(shapes[name])}; {dimensions} dimensions expected")
    return shapes[name]


def by_neuron(array: np.ndarray, slot: Slot) -> np.ndarray:
    """A slot's tensor with one row per neuron of the slot, [neurons, …]."""
    if slot.experts:
        moved = np.moveaxis(array, slot.axis, 1)
        return moved.reshape(slot.experts * slot.neurons, -1)
    moved = np.moveaxis(array, slot.axis, 0)[slot.start : slot.start + slot.neurons]
    return moved.reshape(len(moved), -1)
