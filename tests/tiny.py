"""Tiny seeded models, one per family, made from their configuration class: nothing is downloaded."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

_COMMON = dict(vocab_size=97, bos_token_id=1, eos_token_id=2, pad_token_id=0)
_LLAMA = _COMMON | dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
_GPT2 = _COMMON | dict(n_embd=32, n_inner=48, n_layer=3, n_head=4, n_positions=64)
_NEOX = _COMMON | dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64
)
_LATENT = dict(
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, num_key_value_heads=4
)

_GEMMA4 = _LLAMA | dict(hidden_size_per_layer_input=0, sliding_window=4, global_head_dim=16)
FAMILIES: dict[str, dict] = {
    "llama": _LLAMA,
    "llama-tied": _LLAMA | dict(tie_word_embeddings=True),
    "llama-biased": _LLAMA | dict(mlp_bias=True, attention_bias=True),
    "mistral": _LLAMA | dict(sliding_window=4),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _LLAMA | dict(sliding_window=8),
    "gemma3_text": _LLAMA | dict(sliding_window=8),
    "phi3": _LLAMA,
    "gpt2": _GPT2,
    "opt": _COMMON
    | dict(
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        dropout=0.0,
    ),
    "gpt_neox": _NEOX,
    "gptj": _GPT2 | dict(rotary_dim=8),
    "falcon": _COMMON
    | dict(
        hidden_size=32,
        ffn_hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        alibi=False,
        new_decoder_architecture=False,
        max_position_embeddings=64,
    ),
    "olmo2": _LLAMA,
    "starcoder2": _LLAMA | dict(use_bias=True),
    "cohere": _LLAMA,
    "glm": _LLAMA,
    "glm4": _LLAMA,
    "gpt_bigcode": _GPT2,
    "gemma": _LLAMA,
    "phi": _NEOX,
    "granite": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "olmo": _LLAMA,
    "olmo3": _LLAMA,
    "cohere2": _LLAMA,
    "nemotron": _LLAMA,
    "ministral": _LLAMA | dict(sliding_window=8),
    "seed_oss": _LLAMA,
    "exaone4": _LLAMA | dict(sliding_window=8),
    "helium": _LLAMA,
    "arcee": _LLAMA,
    "codegen": _GPT2 | dict(rotary_dim=8),
    "gpt_neo": _COMMON
    | dict(
        hidden_size=32,
        intermediate_size=48,
        num_layers=3,
        num_heads=4,
        attention_types=[[["global"], 3]],
        max_position_embeddings=64,
    ),
    "gemma4_text-dense": _GEMMA4 | dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=97),
    "ministral3": _LLAMA
    | dict(
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 4,
            "llama_4_scaling_beta": 0.5,
        }
    ),
    "ernie4_5": _LLAMA,
    "hunyuan_v1_dense": _LLAMA,
    "vaultgemma": _LLAMA | dict(sliding_window=8),
    "cwm": _LLAMA | dict(sliding_window=8),
    "minicpm3": _LLAMA | _LATENT,
    "youtu": _LLAMA | _LATENT,
    "hyperclovax": _LLAMA,
    "granite_swa": _LLAMA | dict(sliding_window=8),
    "apertus": _LLAMA,
    "jais2": _LLAMA,
    "nanochat": _LLAMA,
    "persimmon": _NEOX,
    "xglm": _COMMON | dict(d_model=32, ffn_dim=48, num_layers=3, attention_heads=4, max_position_embeddings=64),
}

_MOE = _LLAMA | dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
_LLAMA4 = _MOE | dict(
    intermediate_size_mlp=40, moe_layers=[0, 2], no_rope_layers=[1, 0, 1], attention_chunk_size=4, num_experts_per_tok=1
)
_SHARED = _MOE | dict(
    n_routed_experts=4, n_shared_experts=1, num_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1
)
_GEMMA4_MOE = _MOE | _GEMMA4 | dict(enable_moe_block=True, top_k_experts=2)
MIXTURES: dict[str, dict] = {
    "mixtral": _MOE,
    "qwen2_moe": _MOE | dict(shared_expert_intermediate_size=40, decoder_sparse_step=1, mlp_only_layers=[1]),
    "qwen3_moe": _MOE,
    "olmoe": _MOE,
    "granitemoe": _MOE,
    "deepseek_v2": _MOE
    | dict(
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        num_key_value_heads=4,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
    ),
    "deepseek_v3": _MOE
    | dict(
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        num_key_value_heads=4,
        n_group=1,
        topk_group=1,
    ),
    "gpt_oss": _MOE | dict(sliding_window=8),
    "llama4_text": _LLAMA4,
    "gemma4_text": _GEMMA4_MOE,
    "flex_olmo": _MOE,
    "mellum": _MOE | dict(sliding_window=8),
    "glm4_moe": _SHARED,
    "glm4_moe_lite": _SHARED | _LATENT,
    "dots1": _SHARED,
    "ernie4_5_moe": _SHARED | dict(moe_k=2, moe_num_experts=4, moe_num_shared_experts=1),
    "exaone_moe": _SHARED | dict(sliding_window=8),
    "afmoe": _SHARED | dict(sliding_window=8),
    "solar_open": _SHARED,
    "hunyuan_v1_moe": _MOE | dict(moe_topk=2),
    "phimoe": _MOE,
    "minimax_m2": _MOE,
}

_VISION = dict(
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
)
_ROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]})
_GLM_ROPE = dict(rope_parameters=_ROPE["rope_parameters"] | {"partial_rotary_factor": 1.0})
_QWEN_VISION = dict(depth=2, hidden_size=32, intermediate_size=40, num_heads=2, out_hidden_size=32, embed_dim=32)
MULTIMODAL: dict[str, dict] = {
    "gemma3": dict(text_config=_LLAMA | dict(model_type="gemma3_text"), vision_config=_VISION, mm_tokens_per_image=4),
    "mistral3": dict(text_config=_LLAMA | dict(model_type="mistral"), vision_config=_VISION | dict(head_dim=16)),
    "qwen2_vl": dict(text_config=_LLAMA | _ROPE, vision_config=_QWEN_VISION),
    "qwen2_5_vl": dict(text_config=_LLAMA | _ROPE, vision_config=_QWEN_VISION),
    "qwen3_vl": dict(text_config=_LLAMA | _ROPE, vision_config=_QWEN_VISION),
    "smolvlm": dict(text_config=_LLAMA | dict(model_type="llama"), vision_config=_VISION),
    "llava": dict(text_config=_LLAMA | dict(model_type="llama"), vision_config=_VISION),
    "glm4v": dict(text_config=_LLAMA | _GLM_ROPE, vision_config=_QWEN_VISION),
}
MULTIMODAL_MIXTURES: dict[str, dict] = {
    "qwen3_vl_moe": dict(text_config=_MOE | _ROPE, vision_config=_QWEN_VISION),
    "mistral3-mistral4": dict(
        text_config=_SHARED | _LATENT | dict(model_type="mistral4", head_dim=16),
        vision_config=_VISION | dict(head_dim=16),
    ),
    "gemma4": dict(text_config=_GEMMA4_MOE | dict(model_type="gemma4_text"), vision_config=_VISION, audio_config=None),
    "glm4v_moe": dict(text_config=_SHARED | _GLM_ROPE, vision_config=_QWEN_VISION),
}
TEXT_ALONE: dict[str, dict] = {  # made as a whole, run without the rest
    "llama4": dict(
        text_config=_LLAMA4,
        vision_config=_VISION | dict(vision_output_dim=32, projector_input_dim=32, projector_output_dim=32),
    ),
}
# Attention in some layers, a recurrence or a convolution in the others.
_LINEAR = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_conv_kernel_dim=4,
    layer_types=["linear_attention", "full_attention", "linear_attention"],
)
_MAMBA = dict(
    mamba_n_heads=8,
    mamba_d_head=8,
    mamba_n_groups=1,
    mamba_d_state=16,
    mamba_d_ssm=64,
    mamba_expand=2,
    mamba_chunk_size=8,
    mamba_d_conv=4,
)
HYBRIDS: dict[str, dict] = {
    "qwen3_5_text": _LLAMA | _LINEAR,
    "olmo_hybrid": _LLAMA | _LINEAR,
    "lfm2": _LLAMA
    | dict(
        block_ff_dim=48, block_auto_adjust_ff_dim=False, conv_L_cache=3, layer_types=["conv", "full_attention", "conv"]
    ),
    "falcon_h1": _LLAMA | _MAMBA,
    "bamba": _LLAMA | _MAMBA | dict(attn_layer_indices=[1]),
    "granitemoehybrid": _LLAMA
    | _MAMBA
    | dict(num_local_experts=0, shared_intermediate_size=48, layer_types=["mamba", "attention", "mamba"]),
    "qwen3_next": _MOE | _LINEAR | dict(shared_expert_intermediate_size=40, decoder_sparse_step=1),
    "qwen3_5_moe_text": _MOE | _LINEAR | dict(shared_expert_intermediate_size=40),
}
_SHARED_EXPERT = _MOE | dict(shared_expert_intermediate_size=40, decoder_sparse_step=1)
_KIMI = _SHARED | dict(
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    num_key_value_heads=4,
    linear_attn_config=dict(short_conv_kernel_size=4, head_dim=8, num_heads=4, kda_layers=[1, 3], full_attn_layers=[2]),
)
_ZAMBA = _COMMON | dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    attention_head_dim=16,
    mamba_d_state=16,
    n_mamba_heads=4,
    chunk_size=8,
    use_mamba_kernels=False,
    max_position_embeddings=64,
    adapter_rank=4,
    layers_block_type=["hybrid", "mamba", "hybrid", "hybrid"],
)
# Hybrids of which some layers have no feed-forward block, or use an earlier one again; others that run whole.
MORE_HYBRIDS: dict[str, dict] = {
    "jamba": _MOE
    | dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1)
    | dict(mamba_d_state=16, mamba_d_conv=4, mamba_expand=2, mamba_dt_rank=4, use_mamba_kernels=False),
    "nemotron_h": _SHARED
    | dict(
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=1,
        ssm_state_size=16,
        chunk_size=8,
        conv_kernel=4,
        moe_shared_expert_intermediate_size=40,
        use_mamba_kernels=False,
    ),
    "zamba2": _ZAMBA | dict(num_mem_blocks=2),
    "zamba": _ZAMBA | dict(mamba_expand=2, mamba_d_conv=4, mamba_dt_rank=4),
    "lfm2_moe": _MOE | dict(num_dense_layers=1, conv_L_cache=3, layer_types=["conv", "full_attention", "conv"]),
    "minimax": _MOE | dict(layer_types=["linear_attention", "full_attention", "linear_attention"], block_size=4),
    "kimi_linear": _KIMI,
    "granitemoehybrid-moe": _MOE
    | _MAMBA
    | dict(shared_intermediate_size=40, layer_types=["mamba", "attention", "mamba"]),
    "bloom": _COMMON | dict(hidden_size=32, n_layer=3, n_head=4),
    "mpt": _COMMON | dict(d_model=32, n_heads=4, n_layers=3, expansion_ratio=2, max_seq_len=64),
    "gemma3n_text": _GEMMA4
    | dict(
        num_hidden_layers=4,
        intermediate_size=[48, 40, 48, 48],
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=97,
        altup_num_inputs=2,
        laurel_rank=4,
    ),
}
# What architectures call their sizes. `MORE` takes of it what a configuration class knows.
_ANY = (
    _SHARED
    | _LATENT
    | _MAMBA
    | dict(n_embd=32, n_inner=48, n_layer=3, n_head=4, n_positions=64, d_model=32, n_heads=4, n_layers=3, ffn_dim=48)
    | dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
    | dict(linear_conv_kernel_dim=4, shared_expert_intermediate_size=40, decoder_sparse_step=1, sliding_window=8)
    | dict(
        d_ff=48, dff=48, dim_ff=48, attention_window_size=8, lru_width=32, chunk_size=8, dropout=0.0, resid_pdrop=0.0
    )
)
# Architectures of the table that the suite leaves to benchmarks/architectures.py, which runs all of them.
MORE: dict[str, dict] = {
    "apertus1p5_text": {},
    "aria_text": dict(moe_num_experts=4, moe_topk=2),
    "axk1": {},
    "axk2": dict(num_key_value_heads=4, index_n_heads=2, index_head_dim=8, index_topk=4),
    "bailing_hybrid": dict(
        num_key_value_heads=4, layer_types=["linear_attention", "full_attention", "linear_attention"]
    ),
    "beam": {},
    "bitnet": {},
    "cohere2_moe": {},
    "ctrl": dict(n_ctx=64),
    "deepseek_v32": dict(num_key_value_heads=4, index_n_heads=2, index_head_dim=8, index_topk=4),
    "deepseek_v4": dict(num_key_value_heads=1, index_n_heads=2, index_head_dim=8, index_topk=4),
    "doge": {},
    "dots3_note_text": dict(num_key_value_heads=4),
    "exaone": {},
    "flint": {},
    "gemma4_unified_text": dict(global_head_dim=16),
    "glm_moe_dsa": dict(num_key_value_heads=4, index_n_heads=2, index_head_dim=8, index_topk=4),
    "granitemoe_swa": {},
    "granitemoeshared": dict(shared_intermediate_size=40),
    "hy_v3": {},
    "hy_v4": dict(num_key_value_heads=4),
    "internlm3": {},
    "iquestcoder": {},
    "kolibri1": {},
    "laguna": {},
    "lara_mini": {},
    "lfm3": dict(layer_types=["conv", "full_attention", "conv"], conv_L_cache=3),
    "mimo_v2_flash": dict(num_key_value_heads=2),
    "modernbert-decoder": dict(local_attention=8),
    "moshi": dict(ffn_dim=96),
    "openai-gpt": {},
    "qwen4_exp_text": dict(
        indexer_budget=8,
        indexer_compress_ratio=2,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    "recurrent_gemma": {},
    "rwkv": dict(attention_hidden_size=32, context_length=64),
    "sarvam_mla": dict(num_key_value_heads=4),
    "sarvam_moe": {},
    "xlstm": dict(hidden_size=128, embedding_dim=128, num_heads=4, num_blocks=3, chunk_size=16),
    "zaya": dict(num_experts_per_tok=1),
}
# In no table: their structure is read off the modules. ALiBi and shared keys and values are computed whole, too.
INFERRED: dict[str, dict] = {
    "biogpt": _NEOX,
    "diffllama": _LLAMA | dict(num_key_value_heads=4),
    "gpt_neox_japanese": _NEOX | dict(intermediate_multiple_size=2),
}
WHOLE_PROMPTS: dict[str, dict] = {
    "falcon-alibi": FAMILIES["falcon"] | dict(alibi=True),
    "gemma4_text-shared": _GEMMA4
    | dict(
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=97,
    ),
}
WHOLE = MULTIMODAL | MULTIMODAL_MIXTURES | TEXT_ALONE


def tiny_config(name: str):
    if name in MORE:
        known = type(AutoConfig.for_model(name))
        names = {*known().to_dict(), *getattr(known, "attribute_map", {})}
        return known(**{key: value for key, value in _ANY.items() if key in names} | MORE[name])
    model_type, *_ = name.split("-")
    return AutoConfig.for_model(
        model_type, **(FAMILIES | MIXTURES | HYBRIDS | MORE_HYBRIDS | INFERRED | WHOLE_PROMPTS | WHOLE)[name]
    )


def auto_class(name: str):
    return AutoModelForImageTextToText if name in WHOLE else AutoModelForCausalLM


def tiny_model(name: str, dtype: torch.dtype = torch.float32):
    """A seeded causal model of the family; weights wide enough that layers and biases matter."""
    torch.manual_seed(sum(map(ord, name)))
    build = auto_class(name).from_config
    model = build(tiny_config(name), dtype=torch.float32, experts_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        saved = model.state_dict().keys()
        for name, buffer in model.named_buffers():  # a router's bias, a layer's scale
            # MiniMax saves what makes its linear attention causal.
            if name in saved and buffer.is_floating_point() and "decay" not in name:
                buffer.add_(torch.randn_like(buffer) * 0.05)
    return model if dtype == torch.float32 else model.to(dtype)
