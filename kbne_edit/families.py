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
from typing import Any, Literal, Protocol

from .errors import FamilyError, shown
from .structure import structure_of

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
    post_norm: str | None = None  # the norm of the feed-forward block's output, where a layer has one
    centred: bool = False  # the final norm takes the mean off its input
    one_plus: bool = False  # the final norm multiplies by 1 + its weight
    recurrent: bool = False  # some layers hand a state from token to token: rows of tokens cannot be packed
    inferred: bool = False  # not in the table: read off the modules that transformers builds

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


def _moe(block: str, expert_down: str, **kwargs: Any) -> Family:
    return Family("model.layers", f"{block}.down_proj", experts=f"{block}.experts", expert_down=expert_down, **kwargs)


_TABLE: dict[Family, str] = {
    _GATED: "llama mistral ministral ministral3 qwen2 qwen3 granite granite_swa smollm3 seed_oss helium ernie4_5 "
    "hunyuan_v1_dense cwm minicpm3 youtu qwen2_vl_text qwen2_5_vl_text qwen3_vl_text",
    replace(_GATED, one_plus=True): "gemma vaultgemma",
    replace(_GATED, one_plus=True, post_norm="post_feedforward_layernorm"): "gemma2 gemma3_text",
    replace(_GATED, post_norm="post_feedforward_layernorm"): "gemma4_text olmo2 olmo3 exaone4",
    replace(_GATED, centred=True): "stablelm olmo cohere cohere2",
    replace(_GATED, post_norm="post_norm2"): "hyperclovax",
    _PACKED: "phi3 glm",
    replace(_PACKED, post_norm="post_mlp_layernorm"): "glm4 glm4v_text",
    Family("model.layers", "mlp.fc2"): "nanochat",
    Family("model.layers", "mlp.fc2", centred=True): "phi",
    Family("model.layers", "mlp.down_proj"): "arcee apertus",
    Family("model.layers", "mlp.down_proj", centred=True): "jais2",
    Family("model.layers", "mlp.down_proj", centred=True, one_plus=True): "nemotron",
    Family("model.layers", "mlp.dense_4h_to_h", centred=True): "persimmon",
    Family("model.layers", "fc2", centred=True): "xglm",
    Family("model.layers", "mlp.c_proj", centred=True): "starcoder2",
    Family("transformer.h", "mlp.c_proj", conv1d=True, centred=True): "gpt2",
    Family("transformer.h", "mlp.c_proj", centred=True): "gpt_bigcode gpt_neo",
    Family("transformer.h", "mlp.fc_out", centred=True): "gptj codegen",
    Family("transformer.h", "mlp.dense_4h_to_h", centred=True): "falcon",
    Family("gpt_neox.layers", "mlp.dense_4h_to_h", centred=True): "gpt_neox",
    Family("model.decoder.layers", "fc2", centred=True): "opt",
    _moe("mlp", "mlp.experts.N.down_proj.weight"): "qwen3_moe olmoe mellum",
    _moe("mlp", "mlp.experts.N.down_proj.weight", post_norm="post_feedforward_layernorm"): "flex_olmo",
    _moe("mlp", "mlp.experts.N.down_proj.weight", shared="mlp.shared_expert.down_proj"): "qwen2_moe",
    _moe("mlp", "mlp.experts.N.down_proj.weight", shared="mlp.shared_experts.down_proj"): "deepseek_v2 deepseek_v3 "
    "glm4_moe glm4_moe_lite dots1 ernie4_5_moe exaone_moe solar_open glm4v_moe_text",
    _moe(
        "mlp", "mlp.experts.N.down_proj.weight", shared="mlp.shared_experts.down_proj", post_norm="post_mlp_layernorm"
    ): "afmoe",
    _moe("mlp", "mlp.experts.N.down_proj.weight", shared="mlp.shared_mlp.down_proj"): "hunyuan_v1_moe",
    _moe("mlp", "block_sparse_moe.experts.N.w2.weight"): "mixtral phimoe minimax_m2",
    _moe("block_sparse_moe", "block_sparse_moe.output_linear.weight"): "granitemoe",
    _moe("mlp", "mlp.experts.down_proj", shared="mlp.shared_experts.down_proj"): "mistral4",
    _moe("mlp", "mlp.experts.down_proj", transposed=True): "gpt_oss",
    _moe("mlp", "mlp.experts.down_proj", transposed=None): "qwen3_vl_moe_text",
    _moe(
        "feed_forward", "feed_forward.experts.down_proj", transposed=True, shared="feed_forward.shared_expert.down_proj"
    ): "llama4_text",
    # Hybrids: attention in some layers, a recurrence or a convolution in the others; the feed-forward block is as ever.
    replace(_GATED, one_plus=True, recurrent=True): "qwen3_5_text",
    replace(_GATED, recurrent=True): "olmo_hybrid",
    Family("model.layers", "feed_forward.w2", "feed_forward.w1", recurrent=True): "lfm2",
    Family("model.layers", "feed_forward.down_proj", "feed_forward.gate_proj", recurrent=True): "falcon_h1 bamba",
    Family(
        "model.layers", "shared_mlp.output_linear", "shared_mlp.input_linear", packed=True, recurrent=True
    ): "granitemoehybrid",
    _moe(
        "mlp",
        "mlp.experts.N.down_proj.weight",
        shared="mlp.shared_expert.down_proj",
        one_plus=True,
        recurrent=True,
    ): "qwen3_next qwen3_5_moe_text",
}
FAMILIES: dict[str, Family] = {name: family for family, names in _TABLE.items() for name in names.split()}

_TEXT_MODEL = {"idefics3": "text_model", "smolvlm": "text_model"}  # of a multimodal model, where not "language_model"
# Multimodal models of which the text part is loaded alone, as AutoModelForCausalLM does it: the forward pass of
# transformers' multimodal class (5.24) asks its text part for outputs that it does not have.
TEXT_ALONE = ("llama4",)

# Multimodal models whose text part is edited, as far as they are tested; others of the same build are taken as well.
_MULTIMODAL = "gemma3 gemma4 glm4v glm4v_moe llama4 llava mistral3 qwen2_5_vl qwen2_vl qwen3_vl qwen3_vl_moe smolvlm"

# Read by name so that the refusal can say what the model is instead of "unknown".
_NOT_CAUSAL = {
    "encoder-decoder": "t5 mt5 umt5 bart mbart pegasus marian m2m_100 blenderbot led longt5 switch_transformers "
    "whisper t5gemma",
    "encoder-only": "bert roberta distilbert albert electra deberta deberta-v2 xlm-roberta mpnet modernbert camembert "
    "esm eurobert",
}

# Recurrent models of which some layers have no feed-forward block, or that nobody has put to the tests.
_RECURRENT = (
    "mamba mamba2 falcon_mamba rwkv xlstm recurrent_gemma jamba zamba zamba2 nemotron_h lfm2_moe lfm2_vl minimax "
    "kimi_linear"
)

REFUSED: dict[str, tuple[str, ...]] = {
    **{f"{kind}, not a causal language model": tuple(names.split()) for kind, names in _NOT_CAUSAL.items()},
    "recurrent layers, and a feed-forward block that is not in every layer or not tested": tuple(_RECURRENT.split()),
}  # {reason: architectures}


def text_parts() -> tuple[str, ...]:
    """Multimodal architectures of which the text part is edited, as far as they are tested."""
    return tuple(_MULTIMODAL.split())


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
    if model_type in _RECURRENT.split():
        raise FamilyError(
            f"{model_type} has layers that hand a state from token to token (recurrent, linear attention, "
            "convolution), and not a feed-forward block in every one: this build is not known. Hybrids that are: "
            f"{', '.join(name for name, family in FAMILIES.items() if family.recurrent)}"
        )
    part = config if model_type in FAMILIES else text_part(config)
    if part.get("model_type") not in FAMILIES:
        return _inferred(config)
    if part["model_type"] == "granitemoehybrid" and part.get("num_local_experts"):
        raise FamilyError("granitemoehybrid with routed experts is not supported, only its dense variant is")
    family = FAMILIES[part["model_type"]]
    # Keys and values of another layer, and a table of positions made for the prompt, are lost where layers run by
    # themselves: such models run whole, as recurrent ones do.
    if part.get("num_kv_shared_layers") or part.get("alibi"):
        family = replace(family, recurrent=True)
    if part.get("enable_moe_block"):  # Gemma 4 may have experts beside the dense block, which every token takes
        family = replace(family, experts="experts", expert_down="experts.down_proj", shared=family.down)
    if part is config:
        return family
    return replace(family, layers=f"model.{_TEXT_MODEL.get(model_type, 'language_model')}.layers")


def _inferred(config: dict) -> Family:
    """The family of an architecture that is in no table, read off its modules. Raises FamilyError.

    Whether its layers hand a state on is not known, so it is treated as if they did.
    """
    try:
        if text_part(config):
            raise FamilyError("it has a part besides its language model")
        structure = structure_of(config)
    except FamilyError as error:
        raise FamilyError(
            f"unknown architecture {shown(config['model_type'])} ({_architectures(config)}), and its structure is not "
            f"one that could be inferred ({error}); known: {', '.join(sorted(FAMILIES))}. "
            "To add one: a line in kbne_edit/families.py and a tiny configuration in tests/tiny.py"
        ) from None
    return Family(structure.layers, structure.down, conv1d=structure.conv1d, recurrent=True, inferred=True)


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
    return _size(config, "number of layers", "num_hidden_layers", "n_layer", "num_layers", "n_layers")


def hidden_size(config: dict) -> int:
    """D, whatever the family calls it."""
    return _size(config, "hidden size", "hidden_size", "n_embd", "d_model")


def _size(config: dict, what: str, *keys: str) -> int:
    for part in (config, text_part(config)):
        for key in keys:
            if isinstance(part.get(key), int) and part[key] > 0:
                return part[key]
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
    """How many neurons a layer has whose slots (or places in memory) these are."""
    return max(place.offset + place.neurons * (place.experts or 1) for place in places)
