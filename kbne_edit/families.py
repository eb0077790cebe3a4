"""The family of a checkpoint, and the sizes in its configuration.

A family (`architectures`) says for one `model_type` of transformers where the decoder layers are, which modules of a
layer are the down and gate projections, and of what kind they are. The same dotted names are used on disk, where they
may have any prefix (`model.`, `transformer.`, `language_model.model.`, or none).

Neurons are counted within their layer. In a mixture of experts neuron `e * F + i` is the i-th of routed expert e, and
the shared expert's neurons follow those of all routed experts; a layer without experts has those of its dense block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from .architectures import FAMILIES, NOT_CAUSAL, REASONS, SITES, TEXT_ALONE, TEXT_MODEL, Family, Site
from .errors import FamilyError, shown
from .structure import structure_of

__all__ = [
    "FAMILIES",
    "SITES",
    "TEXT_ALONE",
    "Extent",
    "Family",
    "Site",
    "auto_class",
    "end",
    "family_of",
    "hidden_size",
    "num_layers",
    "owners",
    "text_part",
    "unknown_family_hint",
]


def family_of(config: dict) -> Family:
    """The family of a checkpoint's `config.json`. Raises FamilyError, by name, for what cannot be edited."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise FamilyError("config.json has no model_type: the directory does not hold a transformers causal model")
    for kind, names in NOT_CAUSAL.items():
        if model_type in names:
            raise FamilyError(f"{model_type} is an {kind} model: kbne-edit edits decoder-only (causal) language models")
    if config.get("is_encoder_decoder"):
        raise FamilyError(f"{shown(model_type)} is an encoder-decoder: kbne-edit edits decoder-only language models")
    if model_type in REASONS:
        raise FamilyError(f"{model_type} cannot be edited: {REASONS[model_type]}")
    part = config if model_type in FAMILIES else text_part(config)
    if part.get("model_type") not in FAMILIES:
        return _inferred(config)
    family = FAMILIES[part["model_type"]]
    # Layers that use another layer's keys and values, or a table of positions (ALiBi), cannot run by themselves: such
    # models run as a whole, like recurrent ones.
    if part.get("num_kv_shared_layers") or part.get("alibi"):
        family = replace(family, recurrent=True)
    if part.get("enable_moe_block"):  # Gemma 4 may have experts and a dense block that every token uses
        family = replace(
            family,
            experts="experts",
            shared=family.down,
            expert_down="experts.down_proj",
            expert_gate_up="experts.gate_up_proj",
        )
    if part is config:
        return family
    return replace(family, layers=f"model.{TEXT_MODEL.get(model_type, 'language_model')}.layers")


def _inferred(config: dict) -> Family:
    """The family of an architecture that is not in the table, inferred from its modules. Raises FamilyError.

    Its layers may pass a state from token to token, so it is treated as recurrent.
    """
    try:
        if text_part(config):
            raise FamilyError("it has a part besides its language model")
        structure = structure_of(config)
    except FamilyError as error:
        raise FamilyError(
            f"unknown architecture {shown(config['model_type'])} ({_architectures(config)}), and its structure is not "
            f"one that could be inferred ({error}); known: {', '.join(sorted(FAMILIES))}. "
            "To add one: a line in kbne_edit/architectures.py and a tiny configuration in tests/tiny.py"
        ) from None
    return Family(structure.layers, structure.down, conv1d=structure.conv1d, recurrent=True, inferred=True)


def text_part(config: dict) -> dict:
    """The language model's part of a multimodal model's configuration; {} if there is none."""
    part = config.get("text_config")
    return part if isinstance(part, dict) else {}


def unknown_family_hint(names: Iterable[str]) -> str:
    """The names of a checkpoint's tensors without layer numbers, to help add a family."""
    shapes = sorted({re.sub(r"\.\d+\.", ".N.", name) for name in names if re.search(r"\.\d+\.", name)})
    ff = [s for s in shapes if re.search(r"mlp|ffn|feed_forward|fc\d|dense|experts|\bw[123]\b", s)] or shapes
    return ", ".join(ff[:12]) + (", …" if len(ff) > 12 else "")


def _architectures(config: dict) -> str:
    names = config.get("architectures")
    return f"architectures {shown(names)}" if names else "no architectures named"


def num_layers(config: dict) -> int:
    """L, under any of its names."""
    kinds = config.get("layers_block_type")  # Nemotron-H has no such key
    if isinstance(kinds, list) and kinds and "num_hidden_layers" not in config:
        return len(kinds)
    return _size(config, "number of layers", "num_hidden_layers", "n_layer", "num_layers", "n_layers")


def hidden_size(config: dict) -> int:
    """D, under any of its names."""
    return _size(config, "hidden size", "hidden_size", "n_embd", "d_model")


def _size(config: dict, what: str, *keys: str) -> int:
    for part in (config, text_part(config)):
        for key in keys:
            size = part.get(key)
            if isinstance(size, int) and not isinstance(size, bool) and size > 0:
                return size
    raise FamilyError(f"config.json names no {what} ({', '.join(keys)})")


class Extent(Protocol):
    """Neurons `offset` to `offset + neurons` of a layer, or of each of `experts`: a Slot, or a Place in memory."""

    @property
    def offset(self) -> int: ...
    @property
    def neurons(self) -> int: ...
    @property
    def experts(self) -> int | None: ...


def end(places: Sequence[Extent]) -> int:
    """The number of neurons of a layer with these slots (or places); 0 if it has no feed-forward block."""
    return max((place.offset + place.neurons * (place.experts or 1) for place in places), default=0)


def owners(config: dict) -> dict[int, int]:
    """Layers that use the feed-forward block of an earlier layer: {layer: the earlier layer}."""
    kind = family_of(config).tied
    if kind is None:
        return {}
    kinds = config.get("layers_block_type") or config.get("layer_types") or []
    layers = [layer for layer, other in enumerate(kinds) if other == kind]
    count = config.get("num_mem_blocks") or 1
    return {layer: layers[index % count] for index, layer in enumerate(layers) if index >= count}


def auto_class(config: dict) -> str:
    """The name of the class of transformers that loads a model. config: what config.json holds."""
    together = text_part(config) and config["model_type"] not in TEXT_ALONE
    return "AutoModelForImageTextToText" if together else "AutoModelForCausalLM"
