"""The carriers of a quantised checkpoint: which stored numbers take the factor of a neuron.

h_i = act(gate_i) * up_i is linear in up_i, so scaling up_i scales h_i. Where the down-projection is quantised, row i of
the up-projection takes the factor, in the scales of that row and in entry i of the bias. For a power of two that is
exact. Where h is not linear in up (a clamp, a block without a gate), there is no such carrier.
At the sites gate and up, row i of that projection takes the factor itself.
"""

from __future__ import annotations

from typing import Any

from ...errors import FamilyError, shown
from ...families import Site, family_of, num_layers, text_part
from ..slots import Slot, slots
from ..tensors import TensorInfo
from .gguf import Entry, neuron_rows
from .layout import Layout, ReadTensor


def carriers(layout: Layout, config: dict[str, Any], site: Site, read: ReadTensor) -> dict[int, list[Slot]]:
    """Where each layer's factors go in a quantised checkpoint, {layer: [Slot, …]}.

    Raises FamilyError with the reason if no stored number can take a neuron's factor.
    """
    result: dict[int, list[Slot]] = {}
    for layer, places in slots(layout.shapes, config, site).items():
        result[layer] = []
        for place in places:
            result[layer] += _rows(place, layout, config, site, read)
    return result


def _rows(place: Slot, layout: Layout, config: dict[str, Any], site: Site, read: ReadTensor) -> list[Slot]:
    """The slots for a slot of the unquantised checkpoint: the slot itself if its tensor is not quantised."""
    matrix = layout.matrices.get(place.tensor)
    if matrix is None:
        return [place]
    if matrix.format.columns:
        if site != "down":
            raise FamilyError(f"{place.tensor} is stored as {matrix.format.name}: its {site} cannot take a factor")
        return [_carrier(place.tensor, place, 0, layout, read)]
    name, start = place.tensor.removesuffix(".weight"), place.start
    if site == "down":
        check_linear(config)
        name, packed = _up_of(name, place, layout)
        start = place.neurons if packed else 0
    result = [_carrier(f"{name}.weight", place, start, layout, read)]
    if site == "down" and f"{name}.bias" in layout.shapes:  # at the other sites the bias has a slot of its own
        result.append(Slot(f"{name}.bias", place.layer, 0, place.offset, place.neurons, start=start))
    return result


def check_linear(config: dict[str, Any]) -> None:
    """Raise FamilyError unless h is linear in up."""
    family = family_of(config)
    kind = shown(config["model_type"])
    if family.gate is None and family.experts is None:
        raise FamilyError(
            f"{kind} has no gate projection: act(W x + b) is not linear in W x, so a quantised W cannot take the "
            "factor. Edit the unquantised model and quantise the result"
        )
    for part in (config, text_part(config)):
        limits = [key for key, value in part.items() if key.startswith("swiglu_limit") and value]
        if limits or part.get("model_type") == "gpt_oss":
            raise FamilyError(
                f"{kind} clamps its up-projection ({', '.join(limits) or 'swiglu_limit'}): h is not linear in it, so "
                "its quantised rows cannot take the factor. Edit the unquantised model and quantise the result"
            )


_SIBLINGS = {"down_proj": ("up_proj", "gate_up_proj"), "w2": ("w3",)}


def _up_of(down: str, place: Slot, layout: Layout) -> tuple[str, bool]:
    """(name of the up-projection of a down-projection's block, True if the gate's rows come first in it)."""
    parent, _, last = down.rpartition(".")
    for sibling in _SIBLINGS.get(last, ()):
        name = f"{parent}.{sibling}"
        if f"{name}.weight" in layout.shapes:
            rows = layout.shapes[f"{name}.weight"][0]
            packed = sibling == "gate_up_proj"
            if rows == place.neurons * (2 if packed else 1):
                return name, packed
            raise FamilyError(f"{name} has {rows} rows, and {down} takes {place.neurons} neurons")
    raise FamilyError(f"{down} is quantised, and its block has no up-projection that could take the factor")


def _carrier(name: str, place: Slot, start: int, layout: Layout, read: ReadTensor) -> Slot:
    matrix = layout.matrices.get(name)
    if matrix is None:
        return Slot(name, place.layer, 0, place.offset, place.neurons, start=start)
    carrier = matrix.carrier(read)
    if isinstance(carrier, str):
        raise FamilyError(f"{name} is stored as {matrix.format.name}: {carrier}")
    return Slot(
        tensor=matrix.parts[carrier.part],
        layer=place.layer,
        axis=carrier.axis,
        offset=place.offset,
        neurons=place.neurons,
        experts=place.experts,
        start=start,
        codec=carrier.codec,
        view=carrier.view,
        block=(matrix.parts[carrier.block[0]], carrier.block[1]) if carrier.block else None,
    )


def gguf_carriers(entries: dict[str, Entry], config: dict[str, Any], site: Site) -> dict[int, list[Slot]]:
    """Where each layer's factors go in a GGUF file. Raises FamilyError."""
    check_linear(config)
    result = {}
    for layer in range(num_layers(config)):
        result[layer] = [
            Slot(
                tensor=rows.tensor,
                layer=layer,
                axis=0 if rows.experts is None else 1,
                offset=rows.offset,
                neurons=rows.neurons,
                experts=rows.experts,
                start=rows.start,
                codec=_codec(entries[rows.tensor]),
            )
            for rows in neuron_rows(entries, layer, site)
        ]
    return result


def _codec(entry: Entry) -> str | None:
    return f"GGUF {entry.kind.name}" if entry.kind.fields else None


def stored(entry: Entry) -> TensorInfo:
    """A tensor of a GGUF file as the fold sees it: rows of bytes, or of plain numbers."""
    shape = (*entry.shape[:-1], entry.row) if entry.kind.fields else entry.shape
    return TensorInfo(entry.name, entry.kind.name, shape, entry.start, entry.start + entry.size)
