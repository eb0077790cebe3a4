"""Layouts of quantised matrices against another reader: their own library, or the numbers before they were packed."""

import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import quantised
from kbne_edit.disk.layouts.base import Part
from kbne_edit.disk.layouts.codecs import CODECS
from kbne_edit.disk.layouts.ggml import TYPES
from kbne_edit.disk.layouts.gguf import config_of, neuron_rows, read_header
from kbne_edit.disk.layouts.layout import layout_of
from kbne_edit.disk.tensors import Shard, read_raw
from kbne_edit.errors import CheckpointError, FamilyError
from kbne_edit.files import read_json

_NUMPY = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "I32": "<i4", "I64": "<i8", "I8": "i1"}


def layout(folder):
    shard = Shard.open(folder / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in shard.tensors}

    def read(name):
        tensor = tensors[name]
        return np.frombuffer(read_raw(shard, tensor), _NUMPY.get(tensor.dtype, "u1")).reshape(tensor.shape)

    parts = {name: Part(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    return layout_of(read_json(folder / "config.json"), parts, read)


def modules(found):
    return [name.removesuffix(".weight") for name in found.matrices]


# ------------------------------------------------------------------------------------------------------------- codecs


def test_fp8_is_that_of_torch():
    codes = torch.arange(256, dtype=torch.uint8)
    codec = CODECS["F8_E4M3"]
    assert np.array_equal(codec.values(codes.numpy()), codes.view(torch.float8_e4m3fn).float().numpy(), equal_nan=True)
    for factor in (2, 0.5, 1.3, -1, 0, 3e-4):
        wanted = (codes.view(torch.float8_e4m3fn).float() * factor).clamp(-448, 448).to(torch.float8_e4m3fn)
        got = codec.times(codes.numpy(), np.float32(factor))
        assert np.array_equal(got, wanted.view(torch.uint8).numpy()), factor
    assert not codec.exact(np.array([126], np.uint8), np.float32(2)).any()  # 448 saturates
    assert codec.exact(np.array([118], np.uint8), np.float32(2)).all()  # 224 does not


def test_exponents_are_added():
    codec = CODECS["F8_E8M0"]
    stored = np.array([0, 1, 127, 254, 255], np.uint8)
    wanted = stored.copy()
    assert np.array_equal(codec.values(stored)[:4], torch.tensor(wanted).view(torch.float8_e8m0fnu).float().numpy()[:4])
    assert codec.times(stored, np.float32(4)).tolist() == [2, 3, 129, 255, 255]
    assert codec.times(stored, np.float32(0.5)).tolist() == [255, 0, 126, 253, 255]
    assert codec.exact(stored, np.float32(0.5)).tolist() == [False, True, True, True, False]
    for factor in (3, 0, -2):
        assert not codec.exact(stored, np.float32(factor)).any()


def test_pairs_of_codes():
    codec = CODECS["F4 pair"]
    stored = np.arange(256, dtype=np.uint8)
    assert np.array_equal(codec.times(stored, np.array([1, 1], np.float32)), stored)  # also the two zeros
    flipped = codec.times(stored, np.array([-1, 1], np.float32))
    assert np.array_equal(codec.values(flipped), codec.values(stored) * [-1, 1])
    assert np.array_equal(codec.values(codec.times(stored, np.array([1, 0], np.float32)))[:, 1], np.zeros(256))
    for factors in ((-1, 0), (0, -1)):
        assert codec.exact(stored, np.array(factors, np.float32)).all()
    doubled = codec.exact(stored, np.array([2, 1], np.float32))[:, 0]
    assert np.array_equal(doubled, np.isin(stored & 7, (0, 1, 2, 3, 4, 5)))  # 0, 0.5, 1, 1.5, 2 and 3, not 4 and 6


def test_scales_of_nvfp4_take_no_sign():
    stored = np.array([56], np.uint8)
    assert CODECS["F8_E4M3"].exact(stored, np.float32(-2)).all()
    assert not CODECS["F8_E4M3 scale"].exact(stored, np.float32(-2)).any()


# --------------------------------------------------------------------------------------------- matrices, dequantised

COMPRESSED = "W4A16 W4A16_ASYM W8A16 W3A16 W8A8 FP8_DYNAMIC FP8 FP8_BLOCK NVFP4A16 MXFP4A16".split()


def rounded(values, dtype):
    return torch.tensor(values).to(dtype).float()


@pytest.mark.parametrize("scheme", COMPRESSED)
def test_compressed_tensors(scheme, tmp_path):
    """The library multiplies in bfloat16, the dtype of its scales: one rounding of what the layout gives."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    quantised.write(f"compressed-tensors/{scheme}", tmp_path, num_hidden_layers=1)
    result = layout(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    assert len(result.matrices) == 7
    assert result.shapes == {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in result.shapes:
        assert torch.equal(rounded(result.read(name), torch.bfloat16), model.get_parameter(name).float()), name


@pytest.mark.parametrize("kind", ["gptq/w4", "gptq/w8", "gptq/act-order", "awq/gemm", "fp8/block", "fp8/tensor"])
def test_before_packing(kind, tmp_path):
    """The writer's integers and scales, multiplied before they were packed."""
    wanted = quantised.write(kind, tmp_path, num_hidden_layers=1)
    result = layout(tmp_path)
    assert sorted(modules(result)) == sorted(wanted) and len(wanted) == 7
    for name, value in wanted.items():
        assert torch.equal(torch.tensor(result.read(f"{name}.weight")), value), name


def test_awq_is_as_another_reader_unpacks_it(tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    quantised.write("awq/gemm", tmp_path, num_hidden_layers=1)
    result, converter = layout(tmp_path), AutoAWQConverter(group_size=32)
    tensors = converter.process(load_file(tmp_path / "model.safetensors"))
    (scheme,) = converter.update_config(None).config_groups.values()
    reader = BaseCompressor.get_value_from_registry("pack-quantized")
    for name in modules(result):
        parts = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        other = reader.decompress(parts, scheme)["weight"]
        assert torch.equal(rounded(result.read(f"{name}.weight"), torch.float16), other.float())


@pytest.mark.parametrize("kind", ["w4", "w8", "act-order"])
def test_gptq_is_as_its_library_unpacks_it(kind, tmp_path):
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    quantised.write(f"gptq/{kind}", tmp_path, num_hidden_layers=1)
    result, tensors = layout(tmp_path), load_file(tmp_path / "model.safetensors")
    bits = 8 if kind == "w8" else 4
    name = "model.layers.0.mlp.up_proj"
    out, size = result.shapes[f"{name}.weight"]
    module = TorchLinear(bits, 32, False, kind == "act-order", size, out)
    parts = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    module.load_state_dict(parts, strict=False)
    convert_gptq_v1_to_v2_format_module(module, bits=bits, pack_dtype=torch.int32)
    module.post_init()
    assert torch.equal(rounded(result.read(f"{name}.weight"), torch.float16), module.dequantize_weight().T.float())


@pytest.mark.parametrize("kind", ["block", "tensor", "static"])
def test_fp8_is_as_transformers_reads_it(kind, tmp_path):
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    quantised.write(f"fp8/{kind}", tmp_path, num_hidden_layers=1, num_key_value_heads=4)
    result = layout(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    for name in result.shapes:
        assert torch.equal(torch.tensor(result.read(name)), model.get_parameter(name)), name


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4", "nf4-double"])
def test_bitsandbytes(kind, tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    from transformers import AutoModelForCausalLM

    quantised.write(f"bitsandbytes/{kind}", tmp_path)
    result = layout(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, device_map="cpu")
    for name in modules(result):
        weight = model.get_submodule(name).weight
        if kind == "int8":
            other = functional.int8_vectorwise_dequant(weight.data, weight.SCB)
            assert np.allclose(result.read(f"{name}.weight"), other.numpy(), rtol=2**-22)  # 1 / 127 is rounded
        else:
            other = functional.dequantize_4bit(weight.data, weight.quant_state)
            assert torch.equal(rounded(result.read(f"{name}.weight"), other.dtype), other.float()), name


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_torchao(kind, tmp_path):
    pytest.importorskip("torchao")
    from transformers import AutoModelForCausalLM

    quantised.write(f"torchao/{kind}", tmp_path)
    result = layout(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", device_map="cpu")
    for name in modules(result):
        other = model.get_submodule(name).weight.dequantize()
        assert torch.equal(rounded(result.read(f"{name}.weight"), other.dtype), other.float())


@pytest.mark.parametrize("axis", [0, 1])
def test_hqq(axis, tmp_path):
    quantize = pytest.importorskip("hqq.core.quantize")
    quantised.write(f"hqq/axis{axis}", tmp_path)
    result, tensors = layout(tmp_path), load_file(tmp_path / "model.safetensors")
    for name in modules(result):
        parts = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        module = quantize.HQQLinear(None, None, compute_dtype=torch.float32, device="cpu")
        module.load_state_dict(parts)
        assert torch.equal(torch.tensor(result.read(f"{name}.weight")), module.dequantize())


# ----------------------------------------------------------------------------------------------------------- refusals


def fake(settings, tensors):
    parts = {name: Part(*about) for name, about in tensors.items()}
    return layout_of({"quantization_config": settings} if settings else {}, parts, lambda name: np.zeros(2, np.int64))


def test_fp8_whose_scale_is_not_known():
    weight, scale = ("F8_E4M3", (8, 8)), ("F32", (1, 1))
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert fake(settings, {"a.weight": weight, "a.weight_scale_inv": scale}).matrices
    for tensors in ({"a.weight": weight, "a.scale": scale}, {"a.weight": weight}):
        for requests in (settings, None):
            with pytest.raises(CheckpointError, match="its scale is not known"):
                fake(requests, tensors)


def test_integers_that_no_format_explains():
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    with pytest.raises(CheckpointError, match="a.qweight.* stored as I32"):
        fake(settings, {"a.qweight": ("I32", (8, 8)), "a.scales": ("F16", (1, 8))})


@pytest.mark.parametrize(
    "settings", [{"quant_method": "exl3"}, {"quant_method": None}, {"quant_method": "gptq"}, ["gptq"]]
)
def test_what_is_not_known_is_refused(settings):
    with pytest.raises(CheckpointError):
        fake(settings, {"a.weight": ("BF16", (8, 8))})


def test_a_setting_that_is_missing_is_named():
    with pytest.raises(CheckpointError, match=r"quantization_config \(gptq\) has no '?group_size"):
        fake({"quant_method": "gptq", "bits": 4}, {"a.weight": ("BF16", (8, 8))})


def test_a_plain_checkpoint_has_no_layout():
    assert fake(None, {"a.weight": ("BF16", (8, 8))}) is None


# --------------------------------------------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize("number", [number for number, kind in TYPES.items() if kind.fields])
def test_rows_of_gguf_are_multiplied_exactly(number):
    gguf = pytest.importorskip("gguf")
    kind, codec = TYPES[number], CODECS[f"GGUF {TYPES[number].name}"]
    other = gguf.GGMLQuantizationType(number)
    assert (other.name, gguf.GGML_QUANT_SIZES[other]) == (kind.name, (kind.weights, kind.size))
    draws = np.random.default_rng(0)
    rows = draws.integers(0, 256, (5, 3 * kind.size), dtype=np.uint8)
    for block in range(3):  # multipliers of a usual size in random blocks
        for field in kind.fields:
            at = block * kind.size + field
            if kind.name == "MXFP4":
                rows[:, at] = draws.integers(100, 140, 5)
            elif kind.name == "IQ1_M":  # the highest bits of four words: the exponent's are in the last of them
                rows[:, at + 7] = (rows[:, at + 7] & 15) | (draws.integers(2, 4, 5) << 4)
            else:
                rows[:, at : at + 2] = draws.normal(size=5).astype("<f2")[:, None].view(np.uint8)
    before = gguf.dequantize(rows, other)
    for factor in (2, 0.5, 4):
        factors = np.full((5, 1), factor, np.float32)
        after = codec.times(rows, factors)
        assert codec.exact(rows, factors).all()
        assert np.array_equal(gguf.dequantize(after, other), before * np.float32(factor))
        assert (after != rows).sum() <= rows.size // kind.size * 2 * len(kind.fields) * (2 if number == 29 else 1)
    if kind.name != "MXFP4":
        spread = np.abs(gguf.dequantize(codec.times(rows, np.full((5, 1), 1.5, np.float32)), other) - before * 1.5)
        assert spread.max() <= np.abs(before * 1.5).max() * 2.0**-10 and spread.max() > 0


def gguf_file(path, tensors=(("blk.0.ffn_up.weight", (4, 32)), ("blk.0.ffn_down.weight", (32, 32))), **metadata):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, metadata.pop("architecture", "llama"))
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_token_list([b"a", b"bc", b""])
    for key, value in metadata.items():
        writer.add_string(key, value)
    for name, shape in tensors:
        values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_header_of_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = gguf_file(tmp_path / "model.gguf", text="x" * 500)
    header, other = read_header(path), gguf.GGUFReader(path)
    assert config_of(header, path) == {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "vocab_size": 3,
    }
    assert [(e.name, e.start, e.size) for e in header.entries] == [
        (t.name, t.data_offset, t.n_bytes) for t in other.tensors
    ]
    assert header.metadata["text"] == "x" * 500


def test_damaged_gguf(tmp_path):
    whole = gguf_file(tmp_path / "model.gguf").read_bytes()
    head = read_header(tmp_path / "model.gguf").data_start
    bad = tmp_path / "bad.gguf"
    rng = np.random.default_rng(0)
    refused = 0
    for case in range(300):
        data = bytearray(whole)
        if case % 3 == 0:
            data = data[: rng.integers(0, len(whole))]
        else:
            at = int(rng.integers(0, head - 8))
            data[at : at + 8] = struct.pack("<Q", [0, 7, 2**31, 2**63, 2**64 - 1][rng.integers(5)])
        bad.write_bytes(data)
        try:
            header = read_header(bad)
        except CheckpointError:
            refused += 1
            continue
        assert all(entry.start + entry.size <= len(data) for entry in header.entries)
    assert refused > 150


def test_gguf_of_other_architectures(tmp_path):
    path = gguf_file(tmp_path / "model.gguf", architecture="mamba")
    with pytest.raises(FamilyError, match="mamba"):
        config_of(read_header(path), path)


def test_rows_of_neurons_in_gguf(tmp_path):
    shapes = {
        "blk.0.ffn_down.weight": (32, 64),
        "blk.0.ffn_up.weight": (128, 32),  # gate and up in one, as phi3 has it
        "blk.1.ffn_down.weight": (32, 64),
        "blk.1.ffn_up.weight": (64, 32),
        "blk.1.ffn_gate.weight": (64, 32),
        "blk.2.ffn_up_exps.weight": (4, 96, 32),
        "blk.2.ffn_up_shexp.weight": (160, 32),
        "blk.3.ffn_down.weight": (32, 64),
        "blk.3.ffn_up.weight": (63, 32),
    }
    path = gguf_file(tmp_path / "model.gguf", list(shapes.items()))
    entries = {entry.name: entry for entry in read_header(path).entries}
    (packed,) = neuron_rows(entries, 0, "down")
    assert (packed.tensor, packed.start, packed.neurons) == ("blk.0.ffn_up.weight", 64, 64)
    assert neuron_rows(entries, 0, "gate")[0].start == 0
    assert neuron_rows(entries, 1, "gate")[0].tensor == "blk.1.ffn_gate.weight"
    routed, shared = neuron_rows(entries, 2, "down")
    assert (routed.experts, routed.neurons, shared.offset, shared.neurons) == (4, 96, 384, 160)
    for layer in (3, 4):
        with pytest.raises(FamilyError):
            neuron_rows(entries, layer, "down")
