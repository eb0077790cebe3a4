"""The only place with architecture names: where each has its feed-forward neurons, and which cannot be edited, and why.

To add one, add a line to `_TABLE` and a tiny configuration to `tests/tiny.py`. The contract tests cover the rest, and
`python benchmarks/architectures.py NAME` runs all of them on it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from .errors import FamilyError

Site = Literal["down", "gate", "up"]
SITES: tuple[Site, ...] = ("down", "gate", "up")

# The gate and up projections in the block of a down-projection, by the last part of its name.
_BESIDE: dict[str, dict[Site, str]] = {
    "down_proj": {"gate": "gate_proj", "up": "up_proj"},
    "w2": {"gate": "w1", "up": "w3"},
    "c_proj": {"gate": "c_fc_0", "up": "c_fc_1"},
    "proj_down": {"gate": "proj_up_gate", "up": "proj_up"},
}


def beside(down: str, site: Site) -> str:
    """The projection of a site in the block of a down-projection, given and returned as a dotted name."""
    if site == "down":
        return down
    parent, _, last = down.removesuffix(".weight").rpartition(".")
    return f"{parent}.{_BESIDE[last][site]}" + (".weight" if down.endswith(".weight") else "")


@dataclass(frozen=True)
class Family:
    """Names of one architecture. `layers` is the path of the decoder's layer list below the causal model."""

    layers: str
    down: str
    gate: str | None = None  # None: a plain feed-forward block, act(W_1 x + b_1), has no gate
    packed: bool = False  # gate and up are the halves of the rows of a fused gate_up projection, the gate first
    conv1d: bool = False  # transformers' Conv1D keeps its weight as [in, out], nn.Linear as [out, in]
    experts: str | None = None  # the module that holds the routed experts, in layers that have them
    expert_down: str = ""  # their down-projection on disk: one tensor per expert (N), or all in one [E, D, F]
    expert_gate_up: str | None = None  # in the latter case their gate and up on disk, in one [E, 2 F, D]
    transposed: bool | None = False  # stacked on disk as [E, in, out]; None: it may be either, in memory it is not
    interleaved: bool = False  # the experts' gate and up alternate, where they are one tensor
    shared: str | None = None  # the down-projection of the expert that every token takes
    post_norm: str | None = None  # the norm of the feed-forward block's output, if there is one
    centred: bool = False  # the final norm takes the mean off its input
    one_plus: bool = False  # the final norm multiplies by 1 + its weight
    recurrent: bool = False  # some layers pass a state from token to token: rows of tokens cannot be packed
    sparse: bool = False  # some layers have no feed-forward block
    tied: str | None = None  # the kind of layer whose blocks are used again by later layers of that kind
    disk: Family | None = None  # the names on disk, if they differ from those in memory
    inferred: bool = False  # not in the table: inferred from the modules that transformers builds

    def module(self, site: Site) -> str:
        """Path of the site's module below a decoder layer. Raises FamilyError where the family has no gate."""
        if site == "down":
            return self.down
        if self.gate is None:
            raise FamilyError("this architecture has no gate projection (plain feed-forward): use --site down")
        if self.packed or site == "gate":
            return self.gate
        return beside(self.down, site)


_GATED = Family("model.layers", "mlp.down_proj", "mlp.gate_proj")
_PACKED = Family("model.layers", "mlp.down_proj", "mlp.gate_up_proj", packed=True)
_W123 = Family("model.layers", "feed_forward.w2", "feed_forward.w1")
_FEED_FORWARD = Family("model.layers", "feed_forward.down_proj", "feed_forward.gate_proj")


def _moe(block: str, expert_down: str, **kwargs: Any) -> Family:
    """block: the path of the feed-forward block below a layer."""
    names = {"down": f"{block}.down_proj", "gate": f"{block}.gate_proj", "experts": f"{block}.experts"}
    return Family("model.layers", **names | {"expert_down": expert_down} | kwargs)


# Granite has experts and a dense block that every token uses; either may be absent.
_GRANITE = Family(
    "model.layers",
    "shared_mlp.output_linear",
    "shared_mlp.input_linear",
    packed=True,
    experts="block_sparse_moe.experts",
    expert_down="block_sparse_moe.output_linear.weight",
    expert_gate_up="block_sparse_moe.input_linear.weight",
    shared="shared_mlp.output_linear",
)
_EXPERTS = "mlp.experts.N.down_proj.weight"
_STACKED: dict[str, Any] = {"expert_down": "mlp.experts.down_proj", "expert_gate_up": "mlp.experts.gate_up_proj"}
_SHARED: dict[str, Any] = {"shared": "mlp.shared_experts.down_proj"}

_KIMI_ON_DISK = _moe(
    "block_sparse_moe",
    "block_sparse_moe.experts.N.w2.weight",
    shared="block_sparse_moe.shared_experts.down_proj",
)

_DEEPSEEK_ON_DISK = _moe("ffn", "ffn.experts.N.w2.weight", down="ffn.w2", gate="ffn.w1", shared="ffn.shared_experts.w2")

_TABLE: dict[Family, str] = {
    _GATED: "llama mistral ministral ministral3 qwen2 qwen3 granite granite_swa smollm3 seed_oss helium ernie4_5 "
    "hunyuan_v1_dense cwm minicpm3 youtu qwen2_vl_text qwen2_5_vl_text qwen3_vl_text beam bitnet internlm3 iquestcoder",
    replace(_GATED, one_plus=True): "gemma vaultgemma",
    replace(_GATED, one_plus=True, post_norm="post_feedforward_layernorm"): "gemma2 gemma3_text",
    replace(_GATED, post_norm="post_feedforward_layernorm"): "gemma4_text gemma4_unified_text olmo2 olmo3 exaone4",
    replace(_GATED, centred=True): "stablelm olmo cohere cohere2",
    replace(_GATED, post_norm="post_norm2"): "hyperclovax",
    replace(_GATED, disk=Family("transformer.h", "mlp.c_proj", "mlp.c_fc_0")): "exaone",
    _PACKED: "phi3 glm",
    replace(_PACKED, post_norm="post_mlp_layernorm"): "glm4 glm4v_text",
    Family("model.layers", "mlp.Wo", "mlp.Wi", packed=True, centred=True): "modernbert-decoder",
    Family("model.layers", "mlp.fc2", "mlp.fc1", packed=True, recurrent=True): "moshi",
    Family("model.layers", "mlp.fc2"): "nanochat",
    Family("model.layers", "mlp.fc2", centred=True): "phi",
    Family("model.layers", "mlp.down_proj"): "arcee apertus apertus1p5_text",
    Family("model.layers", "mlp.down_proj", centred=True): "jais2",
    Family("model.layers", "mlp.down_proj", centred=True, one_plus=True): "nemotron",
    Family("model.layers", "mlp.dense_4h_to_h", centred=True): "persimmon",
    Family("model.layers", "fc2", centred=True): "xglm",
    Family("model.layers", "mlp.c_proj", centred=True): "starcoder2",
    Family("transformer.h", "mlp.c_proj", conv1d=True, centred=True): "gpt2",
    Family("transformer.h", "mlp.c_proj", conv1d=True, recurrent=True): "openai-gpt",
    Family("transformer.h", "mlp.c_proj", centred=True): "gpt_bigcode gpt_neo",
    Family("transformer.h", "mlp.fc_out", centred=True): "gptj codegen",
    Family("transformer.h", "mlp.dense_4h_to_h", centred=True): "falcon",
    Family("transformer.h", "mlp.dense_4h_to_h", centred=True, recurrent=True): "bloom",
    Family("transformer.h", "ffn.2", centred=True, recurrent=True): "ctrl",
    Family("transformer.blocks", "ffn.down_proj", centred=True, recurrent=True): "mpt",
    Family("gpt_neox.layers", "mlp.dense_4h_to_h", centred=True): "gpt_neox",
    Family("model.decoder.layers", "fc2", centred=True): "opt",
    _moe("mlp", _EXPERTS): "qwen3_moe olmoe mellum mimo_v2_flash",
    _moe("mlp", _EXPERTS, post_norm="post_feedforward_layernorm"): "flex_olmo",
    _moe("mlp", _EXPERTS, shared="mlp.shared_expert.down_proj"): "qwen2_moe laguna",
    _moe("mlp", _EXPERTS, **_SHARED): "deepseek_v2 deepseek_v3 glm4_moe glm4_moe_lite dots1 ernie4_5_moe exaone_moe "
    "solar_open glm4v_moe_text axk1 sarvam_moe sarvam_mla",
    _moe("mlp", _EXPERTS, **_SHARED, post_norm="post_mlp_layernorm"): "afmoe",
    _moe("mlp", _EXPERTS, shared="mlp.shared_mlp.down_proj"): "hunyuan_v1_moe hy_v3",
    _moe("mlp", _EXPERTS, **_SHARED, centred=True): "cohere2_moe",
    _moe("mlp", "block_sparse_moe.experts.N.w2.weight"): "mixtral phimoe minimax_m2",
    _GRANITE: "granitemoe granitemoeshared",
    _moe("mlp", **_STACKED, **_SHARED): "mistral4",
    _moe("mlp", **_STACKED, transposed=True, interleaved=True): "gpt_oss",
    _moe("mlp", **_STACKED, transposed=None): "qwen3_vl_moe_text",
    _moe(
        "mlp",
        "mlp.experts.fc2.weight",
        expert_gate_up="mlp.experts.fc1.weight",
        transposed=True,
        **_SHARED,
    ): "aria_text",
    _moe(
        "feed_forward",
        "feed_forward.experts.down_proj",
        expert_gate_up="feed_forward.experts.gate_up_proj",
        transposed=True,
        shared="feed_forward.shared_expert.down_proj",
    ): "llama4_text",
    # Hybrids: attention in some layers, a recurrence or a convolution in the others; the feed-forward block is as ever.
    replace(_GATED, one_plus=True, recurrent=True): "qwen3_5_text",
    replace(_GATED, recurrent=True): "olmo_hybrid doge gemma3n_text",
    replace(_GATED, down="mlp_block.down_proj", gate="mlp_block.gate_proj", one_plus=True, recurrent=True): (
        "recurrent_gemma"
    ),
    replace(_W123, recurrent=True): "lfm2 lfm3",
    replace(_FEED_FORWARD, recurrent=True): "falcon_h1 bamba",
    Family("rwkv.blocks", "feed_forward.value", centred=True, recurrent=True): "rwkv",
    Family("backbone.blocks", "ffn.proj_down", "ffn.proj_up_gate", recurrent=True): "xlstm",
    _moe(
        "mlp", _EXPERTS, shared="mlp.shared_expert.down_proj", one_plus=True, recurrent=True
    ): "qwen3_next qwen3_5_moe_text",
    _moe("feed_forward", "feed_forward.experts.N.down_proj.weight", recurrent=True): "jamba",
    _moe("mlp", "block_sparse_moe.experts.N.w2.weight", recurrent=True): "minimax",
    _moe(
        "feed_forward",
        "feed_forward.experts.N.w2.weight",
        down="feed_forward.w2",
        gate="feed_forward.w1",
        recurrent=True,
    ): "lfm2_moe",
    replace(_GRANITE, recurrent=True): "granitemoehybrid",
    _moe(
        "mlp", _EXPERTS, **_SHARED, recurrent=True
    ): "bailing_hybrid dots3_note_text deepseek_v32 glm_moe_dsa axk2 kolibri1",
    _moe("mlp", _EXPERTS, **_SHARED, recurrent=True, disk=_KIMI_ON_DISK): "kimi_linear",
    _moe("mlp", _EXPERTS, shared="mlp.shared_expert.down_proj", recurrent=True): "flint qwen4_exp_text",
    _moe("mlp", **_STACKED, recurrent=True): "zaya",
    _moe("mlp", **_STACKED, shared="mlp.shared_expert.down_proj", recurrent=True): "lara_mini",
    _moe("mlp", **_STACKED, **_SHARED, recurrent=True, disk=_DEEPSEEK_ON_DISK): "deepseek_v4",
    _moe("mlp", **_STACKED, **_SHARED, gate=None, recurrent=True): "hy_v4",
    replace(
        _GRANITE,
        expert_down="block_sparse_moe.experts.down_proj",
        expert_gate_up="block_sparse_moe.experts.gate_up_proj",
        recurrent=True,
    ): "granitemoe_swa",
    Family(
        "model.layers",
        "mixer.down_proj",
        experts="mixer.experts",
        expert_down="mixer.experts.N.down_proj.weight",
        shared="mixer.shared_experts.down_proj",
        recurrent=True,
        sparse=True,
    ): "nemotron_h",
    Family(
        "model.layers",
        "shared_transformer.feed_forward.down_proj",
        "shared_transformer.feed_forward.gate_up_proj",
        packed=True,
        recurrent=True,
        sparse=True,
        tied="hybrid",
    ): "zamba2",
    Family(
        "model.layers",
        "shared_transf.feed_forward.down_proj",
        "shared_transf.feed_forward.gate_proj",
        recurrent=True,
        sparse=True,
        tied="hybrid",
    ): "zamba",
}
FAMILIES: dict[str, Family] = {name: family for family, names in _TABLE.items() for name in names.split()}

TEXT_MODEL = {"idefics3": "text_model", "smolvlm": "text_model"}  # of a multimodal model, where not "language_model"
# Multimodal models of which the text part is loaded alone, as AutoModelForCausalLM does it: the forward pass of
# transformers' multimodal class (5.24) asks its text part for outputs that it does not have.
TEXT_ALONE = ("llama4",)

# Multimodal models whose text part is edited, as far as they are tested; others of the same build are taken as well.
MULTIMODAL = (
    "gemma3 gemma4 glm4v glm4v_moe llama4 llava mistral3 qwen2_5_vl qwen2_vl qwen3_vl qwen3_vl_moe smolvlm".split()
)

# Architectures of other kinds, so that the refusal can say more than "unknown".
NOT_CAUSAL: dict[str, tuple[str, ...]] = {
    kind: tuple(names.split())
    for kind, names in {
        "encoder-decoder": "t5 mt5 umt5 bart mbart pegasus marian m2m_100 blenderbot led longt5 switch_transformers "
        "whisper t5gemma bigbird_pegasus blenderbot-small plbart mvp prophetnet trocr",
        "encoder-only": "bert roberta distilbert albert electra deberta deberta-v2 xlm-roberta mpnet modernbert "
        "camembert esm eurobert bert-generation big_bird data2vec-text ernie megatron-bert rembert "
        "roberta-prelayernorm roc_bert roformer xlm xlm-roberta-xl xmod",
    }.items()
}
_REASONS: dict[str, str] = {
    "its layers have no feed-forward block": "mamba mamba2 falcon_mamba",
    "its layers run several times in one pass, in an order of their own": "dory hrm_text inkling2_loop_text",
    "its experts share one matrix, in a form that no hook separates": "jetmoe dbrx",
    "its shared experts are stacked in one tensor and weighted by the router": "inkling_text inkling2_text",
    "identity experts and two dense blocks stand in each layer": "longcat_flash",
    "its shared expert is fused beside experts that are not: not tested": "minimax_m3_vl_text",
    "it reads bytes in patches, through several decoders": "blt",
    "it predicts tokens of a permuted text, not the next one": "xlnet",
    "it hashes tokens at random to choose what attends to what": "reformer",
    "it needs segments that its own tokenizer alone makes": "cpmant",
    "it drafts for another model, whose hidden states it reads": "gemma4_assistant gemma4_unified_assistant",
    "it is an embedding model": "cohere_compass_text",
    "it is multimodal, and its language model is not in the table": "emu3 fuyu git mllama phi4_multimodal qwen4_exp "
    "dots3_note",
    "it is a decoder of speech or music, not of text": "musicgen musicgen_melody",
}
REASONS: dict[str, str] = {name: reason for reason, names in _REASONS.items() for name in names.split()}

# Not in the table; the tests infer them from their modules.
INFERRED = ("biogpt", "diffllama", "gpt_neox_japanese")
