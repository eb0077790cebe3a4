"""Quantised checkpoints edited in place: the fold against hooks, through the formats' own libraries where they run."""

import filecmp
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import quantised
from kbne_edit import Checks, Output, Settings, apply, bake, fold, load_scores, locate, revert, verify
from kbne_edit.disk.checkpoint import Checkpoint
from kbne_edit.edit import Edit
from kbne_edit.errors import EditError, FamilyError, InputError
from kbne_edit.folding.plan import Plan
from kbne_edit.hub.source import DEMO
from kbne_edit.models import memory
from kbne_edit.models.loading import load_model
from kbne_edit.models.on_demand import on_demand
from kbne_edit.models.streamed import Streamed
from kbne_edit.proofs.behaviour import behaviour_proof

IDS = torch.tensor([[5, 17, 3, 80, 41, 9, 66, 2, 30]])
NEURONS = (0, 7, 100)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """What -> its tiny checkpoint of two layers; made once. Not to be changed."""
    made = {}

    def make(what, **options):
        key = what + str(options)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("quantised") / "model"
            made[key].mkdir()
            fixed = what.split("/")[0] in ("bitsandbytes", "torchao", "hqq", "gguf", "mxfp4")
            quantised.write(what, made[key], **({} if fixed else {"num_hidden_layers": 2}), **options)
        return made[key]

    return make


def edit_of(factor, neurons=NEURONS):
    return Edit("down", {0: dict.fromkeys(neurons, factor), 1: {3: factor}})


def by_library(path, dtype, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options).eval()


def logits(model, factors=None):
    """Logits, the inputs of the down-projections multiplied by hooks. factors: {layer: {neuron: factor}}."""
    handles = []
    for layer, actual in (factors or {}).items():

        def scale(module, args, actual=actual):
            h = args[0].clone()
            for neuron, factor in actual.items():
                h[..., neuron] *= factor
            return (h,)

        handles.append(model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(scale))
    with torch.no_grad():
        result = model(IDS).logits
    for handle in handles:
        handle.remove()
    return result


def bytes_changed(a, b):
    return int((np.fromfile(a, np.uint8) != np.fromfile(b, np.uint8)).sum())


def read_as(method):
    """How transformers is asked for plain weights."""
    import transformers

    if method == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
        return {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    return {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)}


# ------------------------------------------------------------------------------------------- powers of two, bit for bit


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8_DYNAMIC", "MXFP4A16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressed_tensors(scheme, dtype, checkpoints, tmp_path):
    base, edit = checkpoints(f"compressed-tensors/{scheme}"), edit_of(2.0)
    fold(base, edit, tmp_path / "out")
    options = read_as("compressed-tensors")
    model = by_library(base, dtype, **options)
    wanted = logits(model, edit.factors)
    assert torch.equal(logits(by_library(tmp_path / "out", dtype, **options)), wanted)
    assert not torch.equal(logits(model), wanted)
    if scheme != "MXFP4A16":
        assert bytes_changed(base / "model.safetensors", tmp_path / "out" / "model.safetensors") <= 4 * 4 * 2


def test_activations_that_are_quantised_as_well(checkpoints, tmp_path):
    """As the library runs it: int8 codes of h are made after the hook, and after the folded rows."""
    pytest.importorskip("compressed_tensors")
    base, edit = checkpoints("compressed-tensors/W8A8"), edit_of(4.0)
    fold(base, edit, tmp_path / "out")
    native, plain = by_library(base, torch.float32), by_library(base, torch.float32, **read_as("compressed-tensors"))
    assert torch.equal(logits(by_library(tmp_path / "out", torch.float32)), logits(native, edit.factors))
    assert not torch.equal(logits(native), logits(plain))


@pytest.mark.parametrize("kind", ["gptq/w4", "gptq/w8", "gptq/act-order", "awq/gemm"])
@pytest.mark.parametrize("factor", [2.0, 0.25, -1.0, 0.0])
def test_rows_of_group_scales(kind, factor, tmp_path):
    """Against the integers and scales as they were before they were packed."""
    wanted = quantised.write(kind, tmp_path / "base", num_hidden_layers=2)
    fold(tmp_path / "base", edit_of(factor), tmp_path / "out")
    result = Checkpoint.open(tmp_path / "out")
    wanted["model.layers.0.mlp.up_proj"][list(NEURONS)] *= factor
    wanted["model.layers.1.mlp.up_proj"][3] *= factor
    for name, value in wanted.items():
        assert torch.equal(torch.tensor(result.read_plain(f"{name}.weight")), value), name


@pytest.mark.parametrize("kind", ["bitsandbytes/int8", "bitsandbytes/nf4", "torchao/int8", "torchao/fp8", "hqq/axis1"])
def test_other_libraries(kind, checkpoints, tmp_path):
    pytest.importorskip(kind.split("/")[0])
    base, edit = checkpoints(kind), edit_of(2.0)
    fold(base, edit, tmp_path / "out")
    plan = Plan.of(Checkpoint.open(base), edit)
    proofs = behaviour_proof(plan, Checkpoint.open(tmp_path / "out"))
    assert all(proof.bit_equal for proof in proofs)
    readers = {proof.how.rpartition(" ")[2] for proof in proofs}
    assert kind.split("/")[0] in readers or kind.startswith("hqq")


def gptq_module(tensors, kind):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    rows, words = tensors["qweight"].shape[::-1]
    module = TorchLinear(4, 32, False, kind == "act-order", words * 8, rows)
    module.load_state_dict(tensors, strict=False)
    convert_gptq_v1_to_v2_format_module(module, bits=4, pack_dtype=torch.int32)
    module.post_init()
    return module


def hqq_module(tensors, kind):
    from hqq.core.quantize import HQQLinear

    module = HQQLinear(None, None, compute_dtype=torch.float16, device="cpu")
    module.load_state_dict(tensors)
    return module


@pytest.mark.parametrize("kind", ["gptq/w4", "gptq/act-order", "hqq/axis1"])
def test_modules_of_libraries_without_a_model_on_a_cpu(kind, checkpoints, tmp_path):
    """The up-projection as the format's own module computes it: the edited outputs are doubled, to the bit."""
    pytest.importorskip("gptqmodel" if kind.startswith("gptq") else "hqq")
    base = checkpoints(kind)
    fold(base, edit_of(2.0), tmp_path / "out")
    outputs = []
    x = torch.randn(5, quantised.SIZES["hidden_size"], generator=torch.Generator().manual_seed(0)).half()
    for folder in (base, tmp_path / "out"):
        name = "model.layers.0.mlp.up_proj."
        tensors = load_file(folder / "model.safetensors")
        parts = {key.removeprefix(name): value for key, value in tensors.items() if key.startswith(name)}
        module = (gptq_module if kind.startswith("gptq") else hqq_module)(parts, kind.split("/")[1])
        with torch.no_grad():
            outputs.append(module(x))
    wanted = outputs[0].clone()
    wanted[:, list(NEURONS)] *= 2
    assert torch.equal(outputs[1], wanted) and not torch.equal(outputs[0], wanted)


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
def test_int4_experts(kind, checkpoints, tmp_path):
    """Neurons of two routed experts, and in a layer without experts (deepseek: also of the shared expert)."""
    pytest.importorskip("compressed_tensors")
    base = checkpoints("compressed-tensors/W4A16", kind=kind, **quantised.EXPERTS)
    last = 4 * 128 + 5 if kind == "deepseek_v3" else 130
    edit = Edit("down", {0: {1: 2.0}, 1: {2: 2.0, 128 * 2 + 7: 0.5, last: 2.0}})
    fold(base, edit, tmp_path / "out")
    proofs = verify(base, tmp_path / "out")
    assert proofs.ok and all(proof.bit_equal for proof in proofs.behaviour)
    assert {proof.how for proof in proofs.behaviour} == {"whole model, read by compressed-tensors"}
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "model.layers.1.mlp.experts.2.up_proj.weight_scale" in changed and all("scale" in name for name in changed)


# ------------------------------------------------------------------------------------------------ FP8: codes and blocks


@pytest.mark.parametrize("kind", ["fp8/block", "compressed-tensors/FP8_BLOCK"])
def test_blocks_are_rescued(kind, checkpoints, tmp_path):
    """bfloat16 is bit-equal; in float32 codes of the lowest range that were halved cost 2^-18 at most."""
    base, edit = checkpoints(kind), edit_of(2.0)
    fold(base, edit, tmp_path / "out")
    options = read_as(kind.split("/")[0])
    for dtype, most in ((torch.bfloat16, 0), (torch.float32, 2.0**-16)):
        model = by_library(base, dtype, **options)
        wanted, got = logits(model, edit.factors), logits(by_library(tmp_path / "out", dtype, **options))
        assert (got - wanted).abs().max() <= most * wanted.std()
        assert (logits(model) - wanted).abs().max() > 0.01 * wanted.std()
    old, new = Checkpoint.open(base), Checkpoint.open(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    scales = "weight_scale_inv" if kind == "fp8/block" else "weight_scale"
    assert (new.read_stored(name.replace("weight", scales)) != old.read_stored(name.replace("weight", scales))).any()
    wanted = old.read_plain(name)
    wanted[list(NEURONS)] *= 2
    block = np.abs(wanted).max()
    assert np.abs(new.read_plain(name) - wanted).max() <= block * 2.0**-17  # 448 codes, half a step of 2^-9, doubled


def test_codes_alone_where_they_can(checkpoints, tmp_path):
    """Halving a row never saturates: its block's scale and its neighbours stay."""
    base = checkpoints("fp8/block")
    fold(base, Edit("down", {0: {5: 0.5}}), tmp_path / "out")
    changed = bytes_changed(base / "model.safetensors", tmp_path / "out" / "model.safetensors")
    assert 0 < changed <= quantised.SIZES["hidden_size"]


def test_what_would_saturate_is_refused_by_name(checkpoints, tmp_path):
    base = checkpoints("fp8/tensor")
    checkpoint = Checkpoint.open(base)
    codes = np.abs(
        torch.tensor(checkpoint.read_stored("model.layers.0.mlp.up_proj.weight").copy())
        .view(torch.float8_e4m3fn)
        .float()
        .numpy()
    ).max(1)
    loud, calm = int(np.argmax(codes)), int(np.argmin(codes))
    assert codes[loud] > 224 >= codes[calm] * 0.5
    with pytest.raises(EditError, match=rf"1 neurons .*: 0\.{loud}\. Pass --skip-inexact"):
        Plan.of(checkpoint, Edit("down", {0: {loud: 2.0, calm: 0.5}}))
    plan = Plan.of(checkpoint, Edit("down", {0: {loud: 2.0, calm: 0.5}}), inexact="skip")
    assert plan.edit.factors == {0: {calm: 0.5}}
    with pytest.raises(EditError):  # nothing is left
        Plan.of(checkpoint, Edit("down", {0: {loud: 2.0}}), inexact="skip")
    result = bake(
        str(base),
        tmp_path / "out",
        edit=Edit("down", {0: {loud: 2.0, calm: 0.5}}),
        checks=Checks(measure=False),
        output=Output(skip_inexact=True),
    )
    assert result.edit.factors == {0: {calm: 0.5}} and result.proofs.both_held


@pytest.mark.parametrize("scale", [0.5, 1e-6])
def test_static_activations(scale, tmp_path):
    """A factor that the quantiser of the down-projection's input would clip is refused; one that fits is not."""
    base = tmp_path / "base"
    quantised.write("fp8/static", base, num_hidden_layers=2)
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if name.endswith("down_proj.activation_scale")]:
        tensors[name] = torch.tensor(scale)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    codes = tensors["model.layers.0.mlp.up_proj.weight"].float().abs().amax(1)
    edit = Edit("down", {0: {int(codes.argmin()): 2.0}})
    assert codes.min() <= 224
    if scale < 0.1:
        with pytest.raises(EditError, match=rf"static scale, and 1 neurons .*: 0\.{int(codes.argmin())} "):
            bake(str(base), tmp_path / "out", edit=edit, checks=Checks(measure=False))
        assert not (tmp_path / "out").exists()
        edit = edit.with_factor(0.5)  # takes nothing out of the range
    assert bake(str(base), tmp_path / "out", edit=edit, checks=Checks(measure=False)).proofs.both_held


def test_scales_of_nvfp4(checkpoints, tmp_path):
    pytest.importorskip("compressed_tensors")
    base = checkpoints("compressed-tensors/NVFP4A16")
    for factor in (1.5, -1.0, 2.0):  # rounded; negative; the largest scales of these weights are 448
        with pytest.raises(EditError, match="cannot take"):
            Plan.of(Checkpoint.open(base), edit_of(factor))
    edit = edit_of(0.5)
    fold(base, edit, tmp_path / "out")
    options = read_as("compressed-tensors")
    wanted = logits(by_library(base, torch.float32, **options), edit.factors)
    assert torch.equal(logits(by_library(tmp_path / "out", torch.float32, **options)), wanted)


@pytest.mark.parametrize("kind", ["compressed-tensors/NVFP4A16", "compressed-tensors/FP8_DYNAMIC", "fp8/tensor"])
def test_doubling_beside_a_loud_row(kind, checkpoints, tmp_path):
    """In the formats whose numbers can saturate: the loud row is refused by name, the others are exact."""
    options = read_as(kind.split("/")[0])
    base, edit = checkpoints(kind, loud=9), edit_of(2.0)
    if kind != "compressed-tensors/FP8_DYNAMIC":  # a scale a row, in bfloat16: nothing saturates
        with pytest.raises(EditError, match=r"1 neurons .*: 0\.9\. "):
            Plan.of(Checkpoint.open(base), edit_of(2.0, (9, 100)))
    fold(base, edit, tmp_path / "out")
    for dtype in (torch.float32, torch.bfloat16):
        model = by_library(base, dtype, **options)
        wanted = logits(model, edit.factors)
        assert torch.equal(logits(by_library(tmp_path / "out", dtype, **options)), wanted)
        assert not torch.equal(logits(model), wanted)


@pytest.mark.parametrize("factor", [0.0, -1.0, 3.0])
def test_exponents_take_powers_of_two_alone(factor, checkpoints):
    pytest.importorskip("compressed_tensors")
    with pytest.raises(EditError, match="4 neurons cannot take"):
        Plan.of(Checkpoint.open(checkpoints("compressed-tensors/MXFP4A16")), edit_of(factor))


# ----------------------------------------------------------------------------------------------- gpt-oss: codes of down


@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_codes_of_gpt_oss(factor, checkpoints, tmp_path):
    """Neurons that share a byte, of several experts, against hooks, by transformers' own reading of MXFP4."""
    base = checkpoints("mxfp4/experts")
    edit = Edit("down", {0: {4: factor, 5: factor, 96 + 7: factor}, 1: {3 * 96 + 95: factor}})
    fold(base, edit, tmp_path / "out")
    proofs = verify(base, tmp_path / "out")
    assert proofs.ok and all(proof.bit_equal for proof in proofs.behaviour)
    assert {proof.how for proof in proofs.behaviour} == {"whole model, read by transformers"}
    wanted = Checkpoint.open(base).read_plain("model.layers.0.mlp.experts.down_proj").copy()
    for expert, neuron in ((0, 4), (0, 5), (1, 7)):
        wanted[expert, neuron] *= factor
    assert np.array_equal(Checkpoint.open(tmp_path / "out").read_plain("model.layers.0.mlp.experts.down_proj"), wanted)
    revert(tmp_path / "out", tmp_path / "back")
    assert filecmp.cmp(base / "model.safetensors", tmp_path / "back" / "model.safetensors", shallow=False)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{layer}.mlp.experts.down_proj_blocks" for layer in (0, 1)}


def test_gpt_oss_takes_no_other_factor(checkpoints):
    with pytest.raises(EditError, match=r"1 neurons cannot .*: 0\.4\."):
        Plan.of(Checkpoint.open(checkpoints("mxfp4/experts")), Edit("down", {0: {4: 2.0, 5: -1.0}}))


def test_gpt_oss_is_read_as_transformers_does(tmp_path):
    from transformers import Mxfp4Config

    wanted = quantised.write("mxfp4/experts", tmp_path)
    result = Checkpoint.open(tmp_path)
    model = by_library(tmp_path, torch.float32, quantization_config=Mxfp4Config(dequantize=True))
    for name, value in wanted.items():
        assert torch.equal(torch.tensor(result.read_plain(name)), value), name
        assert torch.equal(model.get_parameter(name).float(), value), name


# ------------------------------------------------------------------------------------------------------ other factors


@pytest.mark.parametrize("kind", ["compressed-tensors/W4A16", "compressed-tensors/W8A8", "gptq/w4"])
def test_other_factors_are_one_rounding(kind, checkpoints, tmp_path):
    if kind.startswith("compressed"):
        pytest.importorskip("compressed_tensors")
    base, edit = checkpoints(kind), edit_of(1.7)
    plan = Plan.of(Checkpoint.open(base), edit)
    assert not plan.exact
    fold(base, edit, tmp_path / "out")
    for proof in behaviour_proof(plan, Checkpoint.open(tmp_path / "out")):
        assert proof.holds and 0 < proof.difference < 0.1
    # A factor that is off by 5 % is not rounding.
    wrong = replace(plan, edit=edit.with_factor(1.7 * 1.05))
    assert not behaviour_proof(wrong, Checkpoint.open(tmp_path / "out"))[0].holds


# --------------------------------------------------------------------------------- the house knows slots and no formats


@pytest.mark.parametrize("kind", ["compressed-tensors/MXFP4A16", "fp8/block", "awq/gemm", "gguf/Q4_0"])
def test_there_and_back(kind, checkpoints, tmp_path):
    """fold, verify, revert; delta and apply: the same bytes as the fold's."""
    pytest.importorskip({"compressed-tensors": "compressed_tensors", "gguf": "gguf"}.get(kind.split("/")[0], "torch"))
    base, edit = checkpoints(kind), edit_of(2.0)
    weights = "model.gguf" if kind.startswith("gguf") else "model.safetensors"
    fold(base, edit, tmp_path / "out")
    assert verify(base, tmp_path / "out", behaviour=False).ok
    revert(tmp_path / "out", tmp_path / "back")
    assert filecmp.cmp(base / weights, tmp_path / "back" / weights, shallow=False)
    bake(str(base), tmp_path / "delta", edit=edit, output=Output(form="delta"), checks=Checks(measure=False))
    apply(tmp_path / "delta", base, tmp_path / "applied", checks=Checks(behaviour=False))
    assert filecmp.cmp(tmp_path / "out" / weights, tmp_path / "applied" / weights, shallow=False)
    data = bytearray((tmp_path / "out" / weights).read_bytes())
    data[-40] ^= 1
    (tmp_path / "out" / weights).write_bytes(data)
    assert not verify(base, tmp_path / "out", behaviour=False).files.holds


@pytest.mark.parametrize("kind", ["compressed-tensors/W4A16", "gptq/w4", "gguf/Q4_0"])
def test_an_edit_is_read_off_the_scales(kind, checkpoints, tmp_path):
    pytest.importorskip({"compressed-tensors": "compressed_tensors", "gguf": "gguf"}.get(kind.split("/")[0], "torch"))
    base, edit = checkpoints(kind), edit_of(1.7)
    fold(base, edit, tmp_path / "out")
    for name in ("kbne_edit.json", "kbne_undo.kbne"):
        (tmp_path / "out" / name).unlink()
    proofs = verify(base, tmp_path / "out", behaviour=False)
    assert proofs.ok and proofs.edit.factors == edit.factors


def test_the_gate_site(checkpoints, tmp_path):
    base = checkpoints("gptq/w4")
    edit = replace(edit_of(2.0), site="gate")
    fold(base, edit, tmp_path / "out")
    old, new = Checkpoint.open(base), Checkpoint.open(tmp_path / "out")
    name = "model.layers.0.mlp.gate_proj.weight"
    wanted = old.read_plain(name).copy()
    wanted[list(NEURONS)] *= 2
    assert np.array_equal(new.read_plain(name), wanted)
    assert np.array_equal(new.read_plain(name.replace("gate", "up")), old.read_plain(name.replace("gate", "up")))


@pytest.mark.parametrize("site", ["down", "gate"])
def test_gate_and_up_in_one_matrix(site, tmp_path):
    """phi3: the rows of up follow those of the gate."""
    wanted = quantised.write("gptq/w4", tmp_path / "base", kind="phi3", num_hidden_layers=2)
    fold(tmp_path / "base", replace(edit_of(2.0), site=site), tmp_path / "out")
    first = 0 if site == "gate" else quantised.SIZES["intermediate_size"]
    wanted["model.layers.0.mlp.gate_up_proj"][[first + neuron for neuron in NEURONS]] *= 2
    wanted["model.layers.1.mlp.gate_up_proj"][first + 3] *= 2
    result = Checkpoint.open(tmp_path / "out")
    for name, value in wanted.items():
        assert torch.equal(torch.tensor(result.read_plain(f"{name}.weight")), value), name
    proofs = verify(tmp_path / "base", tmp_path / "out")
    assert proofs.ok and all(proof.bit_equal for proof in proofs.behaviour)


def test_biases_of_up_are_multiplied_as_well(checkpoints, tmp_path):
    base, edit = checkpoints("gptq/w4", mlp_bias=True), edit_of(2.0)
    fold(base, edit, tmp_path / "out")
    old, new = (load_file(path / "model.safetensors") for path in (base, tmp_path / "out"))
    bias = "model.layers.0.mlp.up_proj.bias"
    wanted = old[bias].clone()
    wanted[list(NEURONS)] *= 2
    assert torch.equal(new[bias], wanted) and wanted.abs().min() > 0
    proofs = verify(base, tmp_path / "out")
    assert proofs.ok and all(proof.bit_equal for proof in proofs.behaviour)


def test_streamed_layers_are_the_resident_ones(checkpoints):
    base = checkpoints("gptq/w4")
    model = load_model(base, torch.float32)
    streamed = Streamed(Checkpoint.open(base), 8e9)
    for index, layer in streamed.forward():
        for (name, got), wanted in zip(layer.named_parameters(), model.model.layers[index].parameters(), strict=True):
            assert torch.equal(got, wanted), name
    assert 0 < streamed.bytes_read < sum(p.numel() for p in model.parameters()) * 2


def test_the_whole_line(tmp_path):
    """Located, folded, proven and measured on the quantised model itself; its scores are those of its plain twin."""
    base, twin = tmp_path / "base", tmp_path / "twin"
    wanted = quantised.write("gptq/w4", base, group=16, model=DEMO)
    shutil.copytree(DEMO, twin)
    tensors = load_file(twin / "model.safetensors")
    tensors |= {f"{name}.weight": value for name, value in wanted.items()}
    save_file(tensors, twin / "model.safetensors", {"format": "pt"})
    settings = Settings(recipe="demo", questions=9)
    result = bake(str(base), tmp_path / "out", settings)
    assert result.proofs.both_held and result.edit.num_neurons > 0
    assert result.impact.effect is not None or result.impact.cost is not None
    locate(str(twin), tmp_path / "twin.safetensors", settings)
    own, other = (
        load_scores(path) for path in (tmp_path / "out.work" / "scores.safetensors", tmp_path / "twin.safetensors")
    )
    np.testing.assert_allclose(own.values, other.values, atol=1e-6)


def test_layers_that_are_not_quantised_keep_their_columns(checkpoints, tmp_path):
    """A checkpoint of which one layer is plain (many leave out the first or the last)."""
    base = tmp_path / "base"
    wanted = quantised.write("gptq/w4", base, num_hidden_layers=2)
    tensors = load_file(base / "model.safetensors")
    for name, value in wanted.items():
        if ".layers.0." in name:
            tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{name}.")}
            tensors[f"{name}.weight"] = value.half()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    slots = Checkpoint.open(base).slots("down")
    assert [slots[layer][0].tensor.split("mlp.")[1] for layer in (0, 1)] == ["down_proj.weight", "up_proj.scales"]
    fold(base, edit_of(2.0), tmp_path / "out")
    proofs = verify(base, tmp_path / "out")
    assert proofs.ok and all(proof.bit_equal for proof in proofs.behaviour)


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("bitsandbytes/nf4-double", "double quantisation"),
        ("hqq/axis0", "groups along axis 0 mix"),
    ],
)
def test_scales_that_neurons_share(kind, reason, checkpoints):
    pytest.importorskip(kind.split("/")[0])
    with pytest.raises(FamilyError, match=reason):
        Checkpoint.open(checkpoints(kind)).slots("down")


def test_blocks_that_are_not_linear_in_up(checkpoints):
    checkpoint = Checkpoint.open(checkpoints("gptq/w4"))
    clamped = replace(checkpoint, config=checkpoint.config | {"swiglu_limit": 7.0})
    with pytest.raises(FamilyError, match=r"clamps its up-projection \(swiglu_limit\)"):
        clamped.slots("down")
    plain = replace(checkpoint, config=checkpoint.config | {"model_type": "arcee"})
    with pytest.raises(FamilyError, match="has no gate projection"):
        plain.slots("down")


# --------------------------------------------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q5_1"])
def test_gguf(kind, checkpoints, tmp_path):
    """From a file to a directory with the same file but for some scales, by transformers' own reader of GGUF."""
    pytest.importorskip("gguf")
    base, edit = checkpoints(f"gguf/{kind}"), edit_of(2.0)
    result = bake(str(base / "model.gguf"), tmp_path / "out", edit=edit, checks=Checks(measure=False))
    assert result.proofs.both_held and all(proof.bit_equal for proof in result.proofs.behaviour)
    model = by_library(base, torch.float32, gguf_file="model.gguf")
    wanted = logits(model, edit.factors)
    assert torch.equal(logits(by_library(tmp_path / "out", torch.float32, gguf_file="model.gguf")), wanted)
    assert not torch.equal(logits(model), wanted)
    fields = 2 if kind == "Q5_1" else 1
    assert bytes_changed(base / "model.gguf", tmp_path / "out" / "model.gguf") <= 4 * 4 * 2 * fields
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "kbne_edit.json",
        "kbne_undo.kbne",
        "model.gguf",
    ]
    assert verify(base / "model.gguf", tmp_path / "out").ok


def test_gguf_is_loaded_as_transformers_does(checkpoints):
    pytest.importorskip("gguf")
    base = checkpoints("gguf/Q4_0")
    own, other = load_model(base / "model.gguf", torch.float32), by_library(base, torch.float32, gguf_file="model.gguf")
    assert own.config.to_dict() | {"_name_or_path": None} == other.config.to_dict() | {"_name_or_path": None}
    for (name, a), (_, b) in zip(own.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", ["gguf/Q4_0", "compressed-tensors/W4A16"])
def test_quantised_weights_that_are_read_when_they_run(kind, checkpoints, monkeypatch, tmp_path):
    """Layer by layer: the bits of the model in memory, and both proofs."""
    pytest.importorskip({"compressed-tensors": "compressed_tensors", "gguf": "gguf"}[kind.split("/")[0]])
    base = checkpoints(kind)
    base = base / "model.gguf" if kind.startswith("gguf") else base
    checkpoint = Checkpoint.open(base)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(logits(on_demand(checkpoint, dtype)), logits(load_model(base, dtype)))
    fold(base, edit_of(2.0), tmp_path / "out")
    monkeypatch.setattr(memory, "way", lambda checkpoint, free=None: "layer by layer")
    proofs = verify(base, tmp_path / "out")
    reader = "gguf" if kind.startswith("gguf") else "kbne-edit"
    assert proofs.ok and {proof.how for proof in proofs.behaviour} == {f"whole model, read by {reader}, layer by layer"}
    assert all(proof.bit_equal for proof in proofs.behaviour)


def test_gguf_is_not_cut_anew(checkpoints, tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(InputError, match="cannot be resharded"):
        fold(checkpoints("gguf/Q4_0"), edit_of(2.0), tmp_path / "out", shard_size="1MB")


def test_several_gguf_files_are_a_choice(checkpoints, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes((checkpoints("gguf/Q4_0") / "model.gguf").read_bytes())
    with pytest.raises(
        InputError, match=re.escape(f"holds 2 GGUF files: give one of them, e.g. --in {tmp_path}/a.gguf")
    ):
        Checkpoint.open(tmp_path)
    assert Checkpoint.open(tmp_path / "b.gguf").layer_sizes("down") == [160, 160]
