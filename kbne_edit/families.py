"""The only place with architecture names: where a family keeps its feed-forward neurons.

A family says, for one `model_type` of transformers, where the decoder layers are, which module of a layer is the
down-projection and which the gate projection, and what kind of module they are. The same dotted names serve on disk:
a checkpoint may put any prefix before them (`model.`, `transformer.`, `language_model.model.`, or none at all).

To add a family, add a line to `_TABLE` and a tiny configuration to `tests/tiny.py`; the contract test does the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .errors import FamilyError

if TYPE_CHECKING:
    from torch import nn

Site = Literal["down", "gate"]
SITES: tuple[Site, ...] = ("down", "gate")


@dataclass(frozen=True)
class Family:
    """Names of one architecture. `layers` is the path of the decoder's layer list below the causal model."""

    layers: str
    down: str
    gate: str | None = None  # None: a plain feed-forward block, act(W_1 x + b_1), has no gate
    packed: bool = False  # the gate is the first half of the rows of a fused gate_up projection
    conv1d: bool = False  # transformers' Conv1D keeps its weight as [in, out], nn.Linear as [out, in]

    def module(self, site: Site) -> str:
        """Path of the site's module below a decoder layer. Raises FamilyError where the family has no gate."""
        if site == "down":
            return self.down
        if self.gate is None:
            raise FamilyError("this architecture has no gate projection (plain feed-forward): use --site down")
        return self.gate


_GATED = Family("model.layers", "mlp.down_proj", "mlp.gate_proj")
_PACKED = Family("model.layers", "mlp.down_proj", "mlp.gate_up_proj", packed=True)

_TABLE: dict[Family, str] = {
    _GATED: "llama mistral ministral qwen2 qwen3 gemma gemma2 gemma3_text olmo olmo2 olmo3 cohere cohere2 granite "
    "smollm3 stablelm seed_oss exaone4 helium",
    _PACKED: "phi3 glm glm4",
    Family("model.layers", "mlp.fc2"): "phi",
    Family("model.layers", "mlp.down_proj"): "nemotron arcee",
    Family("model.layers", "mlp.c_proj"): "starcoder2",
    Family("transformer.h", "mlp.c_proj", conv1d=True): "gpt2",
    Family("transformer.h", "mlp.c_proj"): "gpt_bigcode gpt_neo",
    Family("transformer.h", "mlp.fc_out"): "gptj codegen",
    Family("transformer.h", "mlp.dense_4h_to_h"): "falcon",
    Family("gpt_neox.layers", "mlp.dense_4h_to_h"): "gpt_neox",
    Family("model.decoder.layers", "fc2"): "opt",
}
FAMILIES: dict[str, Family] = {name: family for family, names in _TABLE.items() for name in names.split()}

# Read by name so that the refusal can say what the model is instead of "unknown".
_NOT_CAUSAL = {
    "encoder-decoder": "t5 mt5 umt5 bart mbart pegasus marian m2m_100 blenderbot led longt5 switch_transformers "
    "whisper t5gemma",
    "encoder-only": "bert roberta distilbert albert electra deberta deberta-v2 xlm-roberta mpnet modernbert camembert "
    "esm eurobert",
}


def family_of(config: dict) -> Family:
    """The family of a checkpoint's `config.json`. Raises FamilyError, by name, for what cannot be edited."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise FamilyError("config.json has no model_type: the directory does not hold a transformers causal model")
    for kind, names in _NOT_CAUSAL.items():
        if model_type in names.split():
            raise FamilyError(f"{model_type} is an {kind} model: kbne-edit edits decoder-only (causal) language models")
    if config.get("is_encoder_decoder"):
        raise FamilyError(f"{model_type} is an encoder-decoder model: kbne-edit edits decoder-only language models")
    if config.get("alibi"):  # its position table is cut for the prompt's batch, and rows of one batch entry do not fit
        raise FamilyError(f"{model_type} with ALiBi positions is not supported: kbne-edit reads its rotary variants")
    if model_type not in FAMILIES:
        raise FamilyError(
            f"unknown architecture {model_type!r} ({_architectures(config)}); known: {', '.join(sorted(FAMILIES))}. "
            "To add one: a line in kbne_edit/families.py and a tiny configuration in tests/tiny.py"
        )
    return FAMILIES[model_type]


def unknown_family_hint(names: Iterable[str]) -> str:
    """What a checkpoint's tensors look like, layer numbers folded: helps whoever wants to add a family."""
    shapes = sorted({re.sub(r"\.\d+\.", ".N.", name) for name in names if re.search(r"\.\d+\.", name)})
    ff = [s for s in shapes if re.search(r"mlp|ffn|feed_forward|fc\d|dense|experts|\bw[123]\b", s)] or shapes
    return ", ".join(ff[:12]) + (", …" if len(ff) > 12 else "")


def _architectures(config: dict) -> str:
    found = config.get("architectures")
    return ", ".join(map(str, found)) if isinstance(found, list) and found else "no architectures named"


def num_layers(config: dict) -> int:
    """L, whatever the family calls it."""
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        if isinstance(config.get(key), int) and config[key] > 0:
            return config[key]
    raise FamilyError("config.json names no number of layers (num_hidden_layers, n_layer)")


# ---------------------------------------------------------------------------------------------------------- in memory


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers of a causal model of transformers, [L] modules. Raises FamilyError."""
    family = family_of(model.config.to_dict())
    try:
        return model.get_submodule(family.layers)
    except AttributeError:
        children = ", ".join(name for name, _ in model.named_children())
        raise FamilyError(
            f"{type(model).__name__} has no {family.layers} (its modules: {children}): load it as a causal "
            "language model, e.g. with AutoModelForCausalLM"
        ) from None


def site_modules(model: nn.Module, site: Site) -> list[nn.Module]:
    """The site's module of every layer, [L]. The factor scales the input of `down` and the output of `gate`."""
    path = family_of(model.config.to_dict()).module(site)
    return [layer.get_submodule(path) for layer in decoder_layers(model)]


def num_neurons(model: nn.Module) -> int:
    """F, the intermediate size, read off the first layer's down-projection."""
    weight = site_modules(model, "down")[0].weight
    return weight.shape[0 if family_of(model.config.to_dict()).conv1d else 1]


# ------------------------------------------------------------------------------------------------------------ on disk


@dataclass(frozen=True)
class Slot:
    """One tensor on disk that carries factors: neuron i is index `i` of axis `axis`, `neurons` of them."""

    tensor: str
    layer: int
    axis: int
    neurons: int


def slots(shapes: dict[str, tuple[int, ...]], config: dict, site: Site) -> dict[int, list[Slot]]:
    """Where each layer's factors go: {layer: [Slot, …]} (a gate projection's bias is a slot of its own).

    `shapes` maps tensor names on disk to shapes. Raises FamilyError if a layer's tensor is absent or ambiguous.
    """
    family, count = family_of(config), num_layers(config)
    stem = f"{family.layers.rsplit('.', 1)[-1]}.{{}}.{family.module(site)}"
    by_tail: dict[str, list[str]] = {}
    for name in shapes:
        if match := re.search(r"(?:^|\.)(" + re.escape(stem).replace(r"\{\}", r"\d+") + r"\.(?:weight|bias))$", name):
            by_tail.setdefault(match[1], []).append(name)
    result = {}
    for layer in range(count):
        tail = stem.format(layer)
        weight = by_tail.get(f"{tail}.weight", [])
        if len(weight) != 1:
            what = "no tensor" if not weight else f"{len(weight)} tensors ({', '.join(weight[:3])})"
            raise FamilyError(
                f"{what} on disk for {tail}.weight of {config['model_type']}; feed-forward tensors found: "
                f"{unknown_family_hint(shapes) or 'none'}"
            )
        names = weight + (by_tail.get(f"{tail}.bias", []) if site == "gate" else [])
        result[layer] = [_slot(name, layer, shapes[name], family, site) for name in names]
    return result


def _slot(name: str, layer: int, shape: tuple[int, ...], family: Family, site: Site) -> Slot:
    expected = 1 if name.endswith(".bias") else 2
    if len(shape) != expected:
        raise FamilyError(f"{name} has shape {list(shape)}; {expected} dimension{'s' * (expected > 1)} expected")
    # W_down is [D, F] in nn.Linear and [F, D] in Conv1D; W_gate is [F, D], packed [2 F, D] with the gate first.
    axis = 0 if site == "gate" or family.conv1d else 1
    return Slot(name, layer, axis, shape[axis] // (2 if site == "gate" and family.packed else 1))
