"""Tiny quantised checkpoints, each written by its format's own library where that runs on a CPU.

`python tests/quantised.py KIND DIRECTORY` makes one again; the seeds make it the same.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(
    vocab_size=97,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
EXPERTS = dict(
    num_experts=4,
    num_local_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    n_routed_experts=4,
    n_shared_experts=1,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_rope_head_dim=16,
    qk_nope_head_dim=16,
    v_head_dim=32,
    head_dim=16,
)


def plain(kind: str = "llama", dtype: torch.dtype = torch.bfloat16, loud: int | None = None, **sizes):
    """A seeded model whose weights are large enough for an edit to show.

    loud: a neuron whose row of up is four times as large as the others', as real ones have a few.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
            if name.endswith("bias"):
                parameter.normal_()
            if loud is not None and name.endswith("up_proj.weight"):
                parameter[loud] *= 4
    return model.to(dtype).eval()


# --------------------------------------------------------------------------------------------------- compressed-tensors


def compressed_tensors(scheme: str, out: Path, kind: str = "llama", group: int = 32, **sizes) -> None:
    """A checkpoint in one of the library's preset schemes; the largest weights of a group give its scale.

    group: of the integers that the scheme keeps in groups of 128.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    model = plain(kind, **sizes)
    chosen = preset_name_to_scheme(scheme, ["Linear"])
    if chosen.weights.group_size == 128:
        chosen.weights.group_size = group
    settings = QuantizationConfig(config_groups={"group_0": chosen}, ignore=["lm_head"])
    apply_quantization_config(model, settings)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) and isinstance(module, nn.Linear):
            _set_scales(module)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(str(out))
    if any(".experts." in name for name, _ in model.named_parameters()):
        _compress_experts(out, chosen)


def _compress_experts(out: Path, scheme) -> None:
    """transformers keeps experts in stacks, which the library does not see: each is compressed as it was saved."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import initialize_module_for_quantization

    tensors = load_file(out / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name and name.endswith("_proj.weight")]:
        weight = tensors.pop(name)
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        module.weight.data = weight
        initialize_module_for_quantization(module, scheme)
        _set_scales(module)
        compressor = BaseCompressor.get_value_from_registry(infer_module_format(nn.Linear, scheme).value)
        parts = compressor.compress({key: value.data for key, value in module.named_parameters()}, scheme)
        tensors |= {name.removesuffix("weight") + part: value.contiguous() for part, value in parts.items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def _set_scales(module: nn.Linear) -> None:
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    weights, matrix = module.quantization_scheme.weights, module.weight.data.float()
    whole = None
    if hasattr(module, "weight_global_scale"):
        whole = generate_gparam(matrix.min(), matrix.max())
        module.weight_global_scale.data.copy_(whole)
    if weights.block_structure:
        a, b = weights.block_structure
        padded = nn.functional.pad(matrix, (0, -matrix.shape[1] % b, 0, -matrix.shape[0] % a))
        tiles = padded.reshape(padded.shape[0] // a, a, padded.shape[1] // b, b)
        low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
    elif weights.group_size and weights.group_size > 0:
        groups = matrix.reshape(matrix.shape[0], -1, weights.group_size)
        low, high = groups.amin(-1), groups.amax(-1)
    elif weights.strategy == "tensor":
        low, high = matrix.min().reshape(1), matrix.max().reshape(1)
    else:
        low, high = matrix.amin(1, keepdim=True), matrix.amax(1, keepdim=True)
    scale, zero = calculate_qparams(low, high, weights, global_scale=whole)
    module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))
    for name in ("input_scale", "output_scale"):
        if hasattr(module, name):
            getattr(module, name).data.fill_(0.05)
    if hasattr(module, "input_global_scale"):
        module.input_global_scale.data.fill_(64.0)


# ----------------------------------------------------------------------- layouts written as their formats document them


def _rewritten(out: Path, settings: dict, matrices, kind: str = "llama", dtype=torch.float16, **sizes) -> dict:
    """A plain model whose projections are replaced by the tensors that `matrices` makes of each weight.

    matrices: a weight to (its tensors, what they stand for). Returns the latter, {name: [O, I] float32}.
    """
    if (demo := sizes.pop("model", None)) is not None:  # a folder to quantise instead
        shutil.copytree(demo, out, dirs_exist_ok=True)
    else:
        plain(kind, dtype, **sizes).save_pretrained(out)
    tensors, wanted = load_file(out / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        parts, wanted[name.removesuffix(".weight")] = matrices(tensors.pop(name).float())
        tensors |= {name.removesuffix("weight") + part: value for part, value in parts.items()}
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, out / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": settings}, indent=2))
    return wanted


def _product(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What integers in groups along the rows stand for, [O, I]."""
    groups = codes.float().reshape(*scales.shape, -1) - zeros[..., None]
    return (groups * scales.float()[..., None]).reshape(codes.shape)


def _integers(weight: torch.Tensor, group: int, bits: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes [O, I], zeros [O, G], scales [O, G] float16) of groups along the rows, with zero points."""
    groups = weight.reshape(len(weight), -1, group)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / (2**bits - 1)).half().float()
    zeros = (-low / scales).round().clamp(1, 2**bits - 1)
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 2**bits - 1)
    return codes.reshape(weight.shape).int(), zeros.int(), scales.half()


def _words(values: torch.Tensor, bits: int, order=None) -> torch.Tensor:
    """Integers [..., n] in int32 words [..., n bits / 32], the first in the lowest bits."""
    per_word = 32 // bits
    grouped = values.reshape(*values.shape[:-1], -1, per_word).long()
    grouped = grouped[..., order] if order else grouped
    words = sum(grouped[..., k] << (bits * k) for k in range(per_word))
    return torch.where(words >= 2**31, words - 2**32, words).int()


def gptq(name: str, out: Path, group: int = 32, **sizes) -> dict:
    """name: "w4", "w8", or "act-order", where inputs are in groups in a shuffled order."""
    bits = 8 if name == "w8" else 4

    def matrices(weight):
        columns = weight.shape[1]
        order = torch.randperm(columns) if name == "act-order" else torch.arange(columns)
        codes, zeros, scales = _integers(weight[:, order], group, bits)
        g_idx = torch.empty(columns, dtype=torch.int32)
        g_idx[order] = torch.arange(columns, dtype=torch.int32) // group
        back = torch.argsort(order)
        parts = {
            "qweight": _words(codes[:, back], bits).T,
            "qzeros": _words((zeros - 1).T, bits),
            "scales": scales.T,
            "g_idx": g_idx,
        }
        return parts, _product(codes, zeros, scales)[:, back]

    settings = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": name == "act-order",
        "sym": False,
    }
    return _rewritten(out, settings | {"checkpoint_format": "gptq"}, matrices, **sizes)


def awq(name: str, out: Path, group: int = 32, **sizes) -> dict:
    def matrices(weight):
        codes, zeros, scales = _integers(weight, group)
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        parts = {
            "qweight": _words(codes.T, 4, order),
            "qzeros": _words(zeros.T, 4, order),
            "scales": scales.T,
        }
        return parts, _product(codes, zeros, scales)

    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": name}
    return _rewritten(out, settings, matrices, **sizes)


def mxfp4(name: str, out: Path) -> dict:
    """gpt-oss as it is published: experts in MXFP4, the rest in bfloat16."""
    sizes = dict(hidden_size=64, intermediate_size=96, head_dim=16, num_local_experts=4, num_hidden_layers=2)
    model = plain("gpt_oss", torch.bfloat16, num_experts_per_tok=2, **sizes)
    model.save_pretrained(out)
    tensors, wanted = load_file(out / "model.safetensors"), {}
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for key in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        weight = tensors.pop(key).float().transpose(1, 2)  # [E, out, in]
        groups = weight.reshape(*weight.shape[:2], -1, 32)
        exponent = torch.floor(torch.log2(groups.abs().amax(-1, keepdim=True) / 6)).clamp(-127, 127) + 1
        codes = (groups / 2**exponent)[..., None].abs().sub(levels).abs().argmin(-1)
        values = levels[codes] * groups.sign() * 2**exponent
        codes = codes | (groups < 0) << 3
        tensors[f"{key}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
        tensors[f"{key}_scales"] = (exponent[..., 0] + 127).to(torch.uint8)
        wanted[key] = values.reshape(weight.shape).transpose(1, 2)
    save_file({key: value.contiguous() for key, value in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": settings}, indent=2))
    return wanted


def fp8(name: str, out: Path, kind: str = "llama", **sizes) -> dict:
    """name: "block" (128x128), "tensor", or "static" (a scale of activations as well)."""

    def matrices(weight):
        rows, columns = weight.shape
        if name == "block":
            padded = nn.functional.pad(weight, (0, -columns % 128, 0, -rows % 128))
            tiles = padded.reshape(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128)
            scale = tiles.abs().amax((1, 3)) / 448
            wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
        else:
            scale = wide = weight.abs().max() / 448
        extra = {"activation_scale": torch.tensor(0.05)} if name == "static" else {}
        codes = (weight / wide).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale_inv": scale, **extra}, codes.float() * wide

    block = [128, 128] if name == "block" else None
    scheme = "static" if name == "static" else "dynamic"
    settings = {"quant_method": "fp8", "activation_scheme": scheme, "weight_block_size": block}
    return _rewritten(out, settings, matrices, kind, torch.bfloat16, **sizes)


# ----------------------------------------------------------------------------------------- libraries of their formats


def bitsandbytes(name: str, out: Path) -> None:
    """name: "int8", "nf4", "fp4" or "nf4-double"."""
    from transformers import BitsAndBytesConfig

    if name == "int8":
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        kind, _, double = name.partition("-")
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=bool(double)
        )
    _quantised_on_loading(out, settings)


def torchao(name: str, out: Path) -> None:
    """name: "int8" or "fp8"."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    _quantised_on_loading(
        out, TorchAoConfig(Int8WeightOnlyConfig(version=2) if name == "int8" else Float8WeightOnlyConfig())
    )


def _quantised_on_loading(out: Path, settings) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plain().save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=settings, device_map="cpu", dtype="auto"
        )
        model.save_pretrained(out)


def hqq(name: str, out: Path) -> dict:
    """name: "axis1" or "axis0"."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    axis = int(name[-1])
    settings = BaseQuantizeConfig(nbits=4, group_size=32, axis=axis)

    def matrices(weight):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight
        module = HQQLinear(linear, settings, compute_dtype=torch.float16, device="cpu")
        return module.state_dict(), module.dequantize()

    return _rewritten(out, {"quant_method": "hqq", "quant_config": settings}, matrices)


# --------------------------------------------------------------------------------------------------------------- GGUF

_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf(name: str, out: Path) -> None:
    """A qwen2 model as out / "model.gguf", with a tokenizer of single letters. name: the type of its matrices."""
    import gguf as library

    model = plain("qwen2", torch.float32, num_hidden_layers=2, intermediate_size=160)
    out.mkdir(parents=True, exist_ok=True)
    writer = library.GGUFWriter(out / "model.gguf", "qwen2")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(160)
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([chr(33 + n) for n in range(94)] + ["\u0120", "<s>", "</s>"])
    writer.add_token_types([1] * 95 + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(96)
    kind = library.GGMLQuantizationType[name]
    for key, value in model.state_dict().items():
        array = value.numpy()
        if array.ndim == 2:
            writer.add_tensor(_gguf_name(key), library.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(_gguf_name(key), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(key: str) -> str:
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module, _, part = key.rpartition(".")
    if module in names:
        return f"{names[module]}.{part}"
    _, _, layer, below = module.split(".", 3)
    return f"blk.{layer}.{_GGUF_NAMES[below]}.{part}"


WRITERS = {
    "compressed-tensors": compressed_tensors,
    "gptq": gptq,
    "awq": awq,
    "fp8": fp8,
    "mxfp4": mxfp4,
    "bitsandbytes": bitsandbytes,
    "torchao": torchao,
    "hqq": hqq,
    "gguf": gguf,
}


def write(what: str, out: Path, **options) -> dict | None:
    """what: "format/name", as the writers say. Returns the matrices' values, where the writer packs them itself."""
    family, _, name = what.partition("/")
    return WRITERS[family](name, out, **options)


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
