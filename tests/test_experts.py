"""Mixtures of experts keep the contract: neuron e * F + i is the i-th of routed expert e, the shared one's follow."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache

from kbne_edit import Edit, Integral, attribute, fold, hooked, revert, verify
from kbne_edit.attribution.gradients import attributions
from kbne_edit.disk.checkpoint import Checkpoint
from kbne_edit.errors import FamilyError
from kbne_edit.families import end
from kbne_edit.models.experts import transposed
from kbne_edit.models.loading import load_model
from kbne_edit.models.places import places
from kbne_edit.models.streamed import Streamed
from tiny import MIXTURES, MULTIMODAL_MIXTURES, auto_class, tiny_model

ALL = [*MIXTURES, *MULTIMODAL_MIXTURES]
IDS = torch.tensor([[5, 17, 40, 8, 22, 31, 9, 60]])
PROMPT, ANSWER = [5, 17, 40, 8, 22, 31], [11, 12]


def _edit(model, factor):
    """The first, the last and some neurons between, of every layer: of every expert, and of the shared one."""
    return Edit(
        "down",
        {
            layer: dict.fromkeys(range(layer, end(result), 11), factor) | {end(result) - 1: factor}
            for layer, result in enumerate(places(model, "down"))
        },
    )


def _load(name, path, dtype):
    return _plain(auto_class(name), path, dtype)


def _plain(auto, path, dtype=torch.float32):
    return auto.from_pretrained(path, dtype=dtype, experts_implementation="eager").eval()


def _logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ALL)
def test_fold_equals_hooks(name, dtype, tmp_path):
    tiny_model(name, dtype).save_pretrained(tmp_path / "base")
    base = _load(name, tmp_path / "base", dtype)
    edit = _edit(base, 2.0)
    manifest = fold(tmp_path / "base", edit, tmp_path / "baked")
    with hooked(base, edit):
        reference = _logits(base)
    assert torch.equal(_logits(_load(name, tmp_path / "baked", dtype)), reference)
    assert not torch.equal(reference, _logits(base))
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("base", "baked"))
    assert before.keys() == after.keys()
    for key, old in before.items():
        assert torch.equal(old, after[key]) != (key in manifest.tensors), key
    revert(tmp_path / "baked", tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "base/model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ALL)
def test_verify_with_and_without_manifest(name, tmp_path):
    model = tiny_model(name, torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    fold(tmp_path / "base", _edit(model, 3.5), tmp_path / "baked")
    report = verify(tmp_path / "base", tmp_path / "baked")
    assert report.ok and not report.behaviour[0].bit_equal and report.behaviour[0].noise > 0
    for extra in ("kbne_edit.json", "kbne_undo.kbne"):
        (tmp_path / "baked" / extra).unlink()
    result = verify(tmp_path / "base", tmp_path / "baked", behaviour=False)
    assert result.ok and result.edit.factors == _edit(model, 3.5).factors


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("name", ALL)
def test_scores_equal_gradients_of_the_weights(name, positions):
    """h_i dP/dh_i is the sum over j of W_ji dP/dW_ji: plain transformers on the last tokens, W scaled by gamma."""
    model = tiny_model(name)
    scores = attribute(
        model, [PROMPT, PROMPT[2:]], [ANSWER, ANSWER], Integral(quadrature="gauss-8", positions=positions)
    )[0]
    prefix = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(torch.tensor([PROMPT[:-positions]]), past_key_values=prefix, use_cache=True)
    nodes, weights = np.polynomial.legendre.leggauss(8)
    for layer, result in enumerate(places(model, "down")):
        for place in result:
            parameter = place.module.down_proj if place.experts else place.module.weight
            original = parameter.detach().clone()
            want = 0
            for gamma, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
                parameter_of_others = [(p.module.down_proj if p.experts else p.module.weight) for p in result]
                kept = [p.detach().clone() for p in parameter_of_others]
                with torch.no_grad():
                    for p in parameter_of_others:
                        p.mul_(gamma)
                logits = model(torch.tensor([PROMPT[-positions:]]), past_key_values=copy.deepcopy(prefix)).logits[0, -1]
                (gradient,) = torch.autograd.grad(logits.softmax(-1)[ANSWER].sum(), parameter)
                with torch.no_grad():
                    for p, old in zip(parameter_of_others, kept, strict=True):
                        p.copy_(old)
                axis = 2 if place.experts and transposed(place.module) else 1 if place.experts else 0
                want = want + weight * (original * gradient).sum(axis)
            got = scores[layer, place.offset : place.offset + want.numel()]
            assert (got - want.reshape(-1)).abs().max() <= 1e-5 * scores.abs().max()


@pytest.mark.parametrize("site", ["gate", "up"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss", "llama4_text", "granitemoe", "gemma4_text"])
def test_gate_and_up_of_experts(name, site, tmp_path):
    """Apart, side by side, interleaved with biases, transposed, beside a shared expert: fold, hooks and apply_."""
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "base")
    sizes = [end(result) for result in places(model, site)]
    edit = Edit(site, {layer: {n: 2.0 for n in (3, size // 2, size - 1)} for layer, size in enumerate(sizes)})
    fold(tmp_path / "base", edit, tmp_path / "out")
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        before = model(ids).logits
        with hooked(model, edit):
            expected = model(ids).logits
        assert not torch.equal(before, expected)
        assert torch.equal(load_model(tmp_path / "out", torch.float32)(ids).logits, expected)
        assert verify(tmp_path / "base", tmp_path / "out").ok
        assert torch.equal(edit.apply_(model)(ids).logits, expected)


@pytest.mark.parametrize("name", ["mixtral", "phi3"])
def test_up_is_linear(name):
    """Of an ordinary gated block, a factor on up is a factor on h."""
    model, ids, neurons = tiny_model(name), torch.tensor([PROMPT]), {0: {3: 4.0, 40: 0.5}}
    logits = []
    for site in ("down", "up", "gate"):
        with torch.no_grad(), hooked(model, Edit(site, neurons)):
            logits.append(model(ids).logits)
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


def test_a_plain_block_has_neither_gate_nor_up():
    with pytest.raises(FamilyError, match="--site down"), hooked(tiny_model("gpt2"), Edit("up", {0: {1: 2.0}})):
        pass


def test_experts_either_way_round(tmp_path):
    """Qwen3-VL: published checkpoints hold [E, F, D], those that transformers writes [E, D, F]; it reads both."""
    model = tiny_model("qwen3_vl_moe")
    model.save_pretrained(tmp_path / "base")
    edit, path = _edit(model, 2.0), tmp_path / "base/model.safetensors"
    tensors = load_file(path)
    turned = {key for key in tensors if "mlp.experts" in key}
    save_file(
        {key: t.mT.contiguous() if key in turned else t for key, t in tensors.items()}, path, metadata={"format": "pt"}
    )
    fold(tmp_path / "base", edit, tmp_path / "baked")
    with hooked(model, edit):
        reference = _logits(model)
    assert turned and torch.equal(_logits(_load("qwen3_vl_moe", tmp_path / "baked", torch.float32)), reference)
    assert not torch.equal(_logits(model), reference)


def test_the_text_part_alone(tmp_path):
    """Llama 4: the multimodal checkpoint is edited as a whole and run as a causal model, by plain transformers too."""
    whole = tiny_model("llama4")
    whole.save_pretrained(tmp_path / "base")
    base = load_model(tmp_path / "base", torch.float32)
    with torch.no_grad():
        assert torch.equal(_logits(base), whole.language_model(IDS).logits)
    edit = _edit(base, 2.0)
    manifest = fold(tmp_path / "base", edit, tmp_path / "baked")
    with hooked(base, edit):
        reference = _logits(base)
    assert torch.equal(_logits(_plain(AutoModelForCausalLM, tmp_path / "baked")), reference)
    assert not torch.equal(_logits(base), reference)
    together = _plain(AutoModelForImageTextToText, tmp_path / "baked")
    with torch.no_grad():
        assert torch.equal(together.language_model(IDS).logits, reference)
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("base", "baked"))
    assert {key for key, old in before.items() if not torch.equal(old, after[key])} == set(manifest.tensors)
    assert verify(tmp_path / "base", tmp_path / "baked").behaviour[0].how == "whole model"
    (streamed,) = attributions(Streamed(Checkpoint.open(tmp_path / "base"), 64e9), [PROMPT], [ANSWER])
    (want,) = attributions(base, [PROMPT], [ANSWER])
    assert (streamed.scores - want.scores).abs().max() <= 1e-6 * want.scores.abs().max()
    with pytest.raises(FamilyError, match="AutoModelForCausalLM"):
        attribute(whole, [PROMPT], [ANSWER])
