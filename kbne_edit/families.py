"""The only place with architecture names: where a family keeps its feed-forward neurons.

A family says, for one `model_type` of transformers, where the decoder layers are, which module of a layer is the
down-projection and which the gate projection, and what kind of module they are. The same dotted names serve on disk:
a checkpoint may put any prefix before them (`model.`, `transformer.`, `language_model.model.`, or none at all).

Neurons are counted within their layer. In a mixture of experts neuron `e * F + i` is the i-th of routed expert e, and
the shared expert's come after those of all routed ones; a layer without experts has the neurons of its dense block.

To add a family, add a line to `_TABLE` and a tiny configuration to `tests/tiny.py`; the contract test does the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from .errors import FamilyError, shown

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
    experts: str | None = None  # the module that holds the routed experts, in layers that have them
    expert_down: str = ""  # their down-projection on disk: one tensor per expert (N), or all in one [E, D, F]
    transposed: bool | None = False  # the latter is [E, F, D]; None: on disk it may be either, in memory it is not
    shared: str | None = None  # the down-projection of the expert that every token takes

    def module(self, site: Site) -> str:
        """Path of the site's module below a decoder layer. Raises FamilyError where the family has no gate."""
        if site == "down":
            return self.down
        if self.experts is not None:
            raise FamilyError("the gate site is not supported for mixtures of experts: use --site down")
        if self.gate is None:
            raise FamilyError("this architecture has no gate projection (plain feed-forward): use --site down")
        return self.gate


_GATED = Family("model.layers", "mlp.down_proj", "mlp.gate_proj")
_PACKED = Family("model.layers", "mlp.down_proj", "mlp.gate_up_proj", packed=True)


def _moe(block: str, expert_down: str, **kwargs) -> Family:
    return Family("model.layers", f"{block}.down_proj", experts=f"{block}.experts", expert_down=expert_down, **kwargs)


_TABLE: dict[Family, str] = {
    _GATED: "llama mistral ministral ministral3 qwen2 qwen3 gemma gemma2 gemma3_text gemma4_text olmo olmo2 olmo3 "
    "cohere cohere2 granite granite_swa smollm3 stablelm seed_oss exaone4 helium ernie4_5 hunyuan_v1_dense vaultgemma "
    "cwm minicpm3 youtu hyperclovax qwen2_vl_text qwen2_5_vl_text qwen3_vl_text",
    _PACKED: "phi3 glm glm4 glm4v_text",
    Family("model.layers", "mlp.fc2"): "phi nanochat",
    Family("model.layers", "mlp.down_proj"): "nemotron arcee apertus jais2",
    Family("model.layers", "mlp.dense_4h_to_h"): "persimmon",
    Family("model.layers", "fc2"): "xglm",
    Family("model.layers", "mlp.c_proj"): "starcoder2",
    Family("transformer.h", "mlp.c_proj", conv1d=True): "gpt2",
    Family("transformer.h", "mlp.c_proj"): "gpt_bigcode gpt_neo",
    Family("transformer.h", "mlp.fc_out"): "gptj codegen",
    Family("transformer.h", "mlp.dense_4h_to_h"): "falcon",
    Family("gpt_neox.layers", "mlp.dense_4h_to_h"): "gpt_neox",
    Family("model.decoder.layers", "fc2"): "opt",
    _moe("mlp", "mlp.experts.N.down_proj.weight"): "qwen3_moe olmoe flex_olmo mellum",
    _moe("mlp", "mlp.experts.N.down_proj.weight", shared="mlp.shared_expert.down_proj"): "qwen2_moe",
    _moe("mlp", "mlp.experts.N.down_proj.weight", shared="mlp.shared_experts.down_proj"): "deepseek_v2 deepseek_v3 "
    "glm4_moe glm4_moe_lite dots1 ernie4_5_moe exaone_moe afmoe solar_open glm4v_moe_text",
    _moe("mlp", "mlp.experts.N.down_proj.weight", shared="mlp.shared_mlp.down_proj"): "hunyuan_v1_moe",
    _moe("mlp", "block_sparse_moe.experts.N.w2.weight"): "mixtral phimoe minimax_m2",
    _moe("block_sparse_moe", "block_sparse_moe.output_linear.weight"): "granitemoe",
    _moe("mlp", "mlp.experts.down_proj", shared="mlp.shared_experts.down_proj"): "mistral4",
    _moe("mlp", "mlp.experts.down_proj", transposed=True): "gpt_oss",
    _moe("mlp", "mlp.experts.down_proj", transposed=None): "qwen3_vl_moe_text",
    _moe(
        "feed_forward", "feed_forward.experts.down_proj", transposed=True, shared="feed_forward.shared_expert.down_proj"
    ): "llama4_text",
}
FAMILIES: dict[str, Family] = {name: family for family, names in _TABLE.items() for name in names.split()}

_TEXT_MODEL = {"idefics3": "text_model", "smolvlm": "text_model"}  # of a multimodal model, where not "language_model"
# Multimodal models of which the text part is loaded alone, as AutoModelForCausalLM does it: the forward pass of
# transformers' multimodal class (5.24) asks its text part for outputs that it does not have.
TEXT_ALONE = ("llama4",)

# Read by name so that the refusal can say what the model is instead of "unknown".
_NOT_CAUSAL = {
    "encoder-decoder": "t5 mt5 umt5 bart mbart pegasus marian m2m_100 blenderbot led longt5 switch_transformers "
    "whisper t5gemma",
    "encoder-only": "bert roberta distilbert albert electra deberta deberta-v2 xlm-roberta mpnet modernbert camembert "
    "esm eurobert",
}

# A mask keeps the questions of a packed row apart only where attention is all that tokens have of each other.
_RECURRENT = (
    "mamba mamba2 falcon_mamba rwkv xlstm recurrent_gemma jamba bamba zamba zamba2 nemotron_h falcon_h1 olmo_hybrid "
    "granitemoehybrid qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text lfm2 lfm2_moe lfm2_vl minimax "
    "kimi_linear"
)


def family_of(config: dict) -> Family:
    """The family of a checkpoint's `config.json`. Raises FamilyError, by name, for what cannot be edited."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise FamilyError("config.json has no model_type: the directory does not hold a transformers causal model")
    for kind, names in _NOT_CAUSAL.items():
        if model_type in names.split():
            raise FamilyError(f"{model_type} is an {kind} model: kbne-edit edits decoder-only (causal) language models")
    if config.get("is_encoder_decoder"):
        raise FamilyError(f"{shown(model_type)} is an encoder-decoder: kbne-edit edits decoder-only language models")
    if config.get("alibi"):  # its position table is cut for the prompt's batch, and rows of one batch entry do not fit
        raise FamilyError(f"{shown(model_type)}: ALiBi positions are not supported, only its rotary variants are")
    if model_type in _RECURRENT.split():
        raise FamilyError(
            f"{model_type} has layers that hand a state from token to token (recurrent, linear attention, "
            "convolution): questions that stand side by side in a row would mix. Use a model whose layers all attend"
        )
    part = config if model_type in FAMILIES else text_part(config)
    if part.get("model_type") not in FAMILIES:
        raise FamilyError(
            f"unknown architecture {shown(model_type)} ({_architectures(config)}); known: "
            f"{', '.join(sorted(FAMILIES))}. "
            "To add one: a line in kbne_edit/families.py and a tiny configuration in tests/tiny.py"
        )
    if part.get("num_kv_shared_layers"):  # layers are computed one by one, and these need what others have computed
        raise FamilyError(f"{shown(model_type)}: layers that share keys and values are not supported, use one without")
    family = FAMILIES[part["model_type"]]
    if part.get("enable_moe_block"):  # Gemma 4 may have experts beside the dense block, which every token takes
        family = replace(family, experts="experts", expert_down="experts.down_proj", shared=family.down)
    if part is config:
        return family
    return replace(family, layers=f"model.{_TEXT_MODEL.get(model_type, 'language_model')}.layers")


def text_part(config: dict) -> dict:
    """The language model's part of a multimodal model's configuration; {} if there is none."""
    part = config.get("text_config")
    return part if isinstance(part, dict) else {}


def unknown_family_hint(names: Iterable[str]) -> str:
    """What a checkpoint's tensors look like, layer numbers folded: helps whoever wants to add a family."""
    shapes = sorted({re.sub(r"\.\d+\.", ".N.", name) for name in names if re.search(r"\.\d+\.", name)})
    ff = [s for s in shapes if re.search(r"mlp|ffn|feed_forward|fc\d|dense|experts|\bw[123]\b", s)] or shapes
    return ", ".join(ff[:12]) + (", …" if len(ff) > 12 else "")


def _architectures(config: dict) -> str:
    found = config.get("architectures")
    return f"architectures {shown(found)}" if found else "no architectures named"


def num_layers(config: dict) -> int:
    """L, whatever the family calls it."""
    return _size(config, "number of layers", "num_hidden_layers", "n_layer", "num_layers")


def hidden_size(config: dict) -> int:
    """D, whatever the family calls it."""
    return _size(config, "hidden size", "hidden_size", "n_embd", "d_model")


def _size(config: dict, what: str, *keys: str) -> int:
    for part in (config, text_part(config)):
        for key in keys:
            if isinstance(part.get(key), int) and part[key] > 0:
                return part[key]
    raise FamilyError(f"config.json names no {what} ({', '.join(keys)})")


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


class Place(NamedTuple):
    """Neurons `offset` to `offset + neurons` of a layer: the input (or output) of `module`.

    experts: None for one projection; for a module of routed experts their number, each with `neurons` neurons.
    """

    module: nn.Module
    offset: int
    neurons: int
    experts: int | None = None


def places(model: nn.Module, site: Site) -> list[list[Place]]:
    """Where the neurons of each layer are, [L] lists. The factor scales the input of `down`, the output of `gate`."""
    family = family_of(model.config.to_dict())
    path = family.module(site)
    return [_places(layer, family, path) for layer in decoder_layers(model)]


def _places(layer: nn.Module, family: Family, path: str) -> list[Place]:
    found = []
    if family.experts and _has(layer, family.experts):
        experts = layer.get_submodule(family.experts)
        count, a, b = experts.down_proj.shape
        found.append(Place(experts, 0, a if family.transposed else b, count))
        if family.shared and _has(layer, family.shared):
            shared = layer.get_submodule(family.shared)
            found.append(Place(shared, found[0].neurons * count, shared.weight.shape[1]))
        return found
    down = layer.get_submodule(family.down).weight
    return [Place(layer.get_submodule(path), 0, down.shape[0 if family.conv1d else 1])]


def _has(layer: nn.Module, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    return hasattr(layer.get_submodule(parent), name)


def num_neurons(model: nn.Module) -> int:
    """F, the neurons of a layer: the intermediate size, or in a mixture of experts that of all experts together."""
    return max(end(found) for found in places(model, "down"))


def end(found: Sequence[Place | Slot]) -> int:
    """How many neurons a layer has whose places (or slots) these are."""
    return max(place.offset + place.neurons * (place.experts or 1) for place in found)


# ------------------------------------------------------------------------------------------------------------ on disk


class Slot(NamedTuple):
    """One tensor on disk that carries factors: neurons `offset` to `offset + neurons` of the layer, along `axis`.

    experts: None, or the size of axis 0 where the tensor stacks all experts.
    """

    tensor: str
    layer: int
    axis: int
    offset: int
    neurons: int
    experts: int | None = None


def slots(shapes: dict[str, tuple[int, ...]], config: dict, site: Site) -> dict[int, list[Slot]]:
    """Where each layer's factors go: {layer: [Slot, …]} (a gate projection's bias is a slot of its own).

    `shapes` maps tensor names on disk to shapes. Raises FamilyError if a layer's tensor is absent or ambiguous.
    """
    family, count, size = family_of(config), num_layers(config), hidden_size(config)
    stem = family.layers.rsplit(".", 1)[-1]
    by_tail: dict[str, list[str]] = {}
    for name in shapes:
        if (match := re.search(rf"(?:^|\.){stem}\.(\d+\..+)$", name)) and not _OTHER_PARTS.search(name):
            by_tail.setdefault(match[1], []).append(name)
    found = {}
    for layer in range(count):
        own = {tail.partition(".")[2]: names for tail, names in by_tail.items() if tail.startswith(f"{layer}.")}
        found[layer] = _expert_slots(own, shapes, layer, family, size) or _dense_slots(own, shapes, layer, family, site)
        if not found[layer]:
            raise FamilyError(
                f"no tensor on disk for {stem}.{layer}.{family.module(site)}.weight of {shown(config['model_type'])}; "
                f"feed-forward tensors found: {unknown_family_hint(shapes) or 'none'}"
            )
    return found


def layer_sizes(found: dict[int, list[Slot]]) -> list[int]:
    """How many neurons each layer has, [L]."""
    return [end(found[layer]) for layer in sorted(found)]


_OTHER_PARTS = re.compile(r"(?:^|[._])(?:vision|visual|audio)")  # towers have layers, too; only the text is edited


def _only(names: list[str]) -> str:
    if len(names) > 1:
        raise FamilyError(f"{len(names)} tensors on disk could be the same one: {', '.join(names[:3])}")
    return names[0]


def _dense_slots(own: dict[str, list[str]], shapes: dict, layer: int, family: Family, site: Site) -> list[Slot]:
    """own: {name below the layer: full names}."""
    # W_down is [D, F] in nn.Linear and [F, D] in Conv1D; W_gate is [F, D], packed [2 F, D] with the gate first.
    axis, share = (0 if site == "gate" or family.conv1d else 1), (2 if site == "gate" and family.packed else 1)
    result = []
    for kind in ("weight", "bias") if site == "gate" else ("weight",):
        if names := own.get(f"{family.module(site)}.{kind}"):
            shape = _shape(_only(names), shapes, 2 if kind == "weight" else 1)
            result.append(Slot(names[0], layer, axis, 0, shape[axis] // share))
    return result if result and result[0].tensor.endswith("weight") else []


def _expert_slots(own: dict[str, list[str]], shapes: dict, layer: int, family: Family, size: int) -> list[Slot]:
    """own: as of `_dense_slots`; size: D."""
    if family.experts is None:
        return []
    result = []
    if "N" not in family.expert_down:
        if names := own.get(family.expert_down):
            experts, a, b = _shape(_only(names), shapes, 3)
            transposed = a != size if family.transposed is None else family.transposed  # as transformers decides it
            result.append(Slot(names[0], layer, *((1, 0, a) if transposed else (2, 0, b)), experts))
    else:
        pattern = re.compile(re.escape(family.expert_down).replace("N", r"(\d+)"))
        numbered = {int(match[1]): _only(names) for tail, names in own.items() if (match := pattern.fullmatch(tail))}
        if sorted(numbered) != list(range(len(numbered))):
            raise FamilyError(f"layer {layer} lacks the tensors of some experts: it has {len(numbered)}")
        for expert, name in sorted(numbered.items()):
            size = _shape(name, shapes, 2)[1]
            result.append(Slot(name, layer, 1, expert * size, size))
    if result and family.shared and (names := own.get(f"{family.shared}.weight")):
        result.append(Slot(_only(names), layer, 1, end(result), _shape(names[0], shapes, 2)[1]))
    return result


class Readout(NamedTuple):
    """What turns the last layer's output x into logits: unembedding @ norm(x). Names on disk; norm None: no weight.

    offset: what the norm adds to its weight; centred: True where it takes the mean off x first.
    """

    unembedding: str
    norm: str | None
    offset: float
    centred: bool


_CENTRED = (
    "gpt2 gpt_bigcode gpt_neo gptj codegen falcon gpt_neox opt phi starcoder2 nemotron stablelm cohere cohere2 olmo "
    "jais2 persimmon xglm"
)
_ONE_PLUS = "gemma gemma2 gemma3_text nemotron vaultgemma"
_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "layer_norm")
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")


def readout(shapes: dict[str, tuple[int, ...]], config: dict) -> Readout | None:
    """The final norm and the unembedding on disk; None where the last layer's output does not fit the unembedding."""
    kind = config["model_type"] if config["model_type"] in FAMILIES else text_part(config).get("model_type")
    first = slots(shapes, config, "down")[0][0].tensor
    stem = family_of(config).layers.rsplit(".", 1)[-1]
    prefix = re.match(rf"((?:.*\.)?){stem}\.0\.", first)[1]
    heads = [name for name in shapes if re.search(r"(?:^|\.)(?:lm_head|embed_out)\.weight$", name)]
    tied = [name for part in _EMBEDDINGS if (name := f"{prefix}{part}.weight") in shapes]
    norms = [name for part in _NORMS if (name := f"{prefix}{part}.weight") in shapes]
    if not (heads or tied) or (norms and shapes[norms[0]] != shapes[(heads or tied)[0]][1:]):
        return None
    return Readout(
        (heads or tied)[0], norms[0] if norms else None, float(kind in _ONE_PLUS.split()), kind in _CENTRED.split()
    )


def _shape(name: str, shapes: dict, dimensions: int) -> tuple[int, ...]:
    if len(shapes[name]) != dimensions:
        raise FamilyError(f"{name} has shape {list(shapes[name])}; {dimensions} dimensions expected")
    return shapes[name]


def by_neuron(array: np.ndarray, slot: Slot) -> np.ndarray:
    """A slot's tensor with one row per neuron of the slot, [neurons, …]."""
    if slot.experts:
        moved = np.moveaxis(array, slot.axis, 1)
        return moved.reshape(slot.experts * slot.neurons, -1)
    moved = np.moveaxis(array, slot.axis, 0)
    return moved.reshape(len(moved), -1)[: slot.neurons]
