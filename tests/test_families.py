"""The contract that every family keeps: the folded checkpoint is the hooked model."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.pytorch_utils import Conv1D

from kbne_edit import Edit, fold, hooked, revert, verify
from kbne_edit.disk.checkpoint import Checkpoint
from kbne_edit.disk.slots import layers_beyond, slots
from kbne_edit.errors import FamilyError
from kbne_edit.families import family_of
from kbne_edit.folding.plan import Plan
from kbne_edit.models import memory
from kbne_edit.models.places import num_neurons, places
from kbne_edit.proofs import behaviour
from kbne_edit.proofs.passes import last_rounding
from tiny import FAMILIES, HYBRIDS, MIXTURES, MORE, MORE_HYBRIDS, MULTIMODAL, WHOLE, tiny_config, tiny_model

IDS = torch.tensor([[5, 17, 40, 8, 22, 31, 9, 60]])
NEURONS = {0: (3, 47), 2: (0, 10, 11)}


def _edit(factor, site="down"):
    return Edit(site=site, factors={layer: {n: factor for n in neurons} for layer, neurons in NEURONS.items()})


def _logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("site", ["down", "gate"])
@pytest.mark.parametrize("name", FAMILIES)
def test_fold_equals_hooks(name, site, dtype, tmp_path):
    model = tiny_model(name, dtype)
    model.save_pretrained(tmp_path / "base")
    if site == "gate" and family_of(model.config.to_dict()).gate is None:
        pytest.skip("plain feed-forward: no gate")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype).eval()
    fold(tmp_path / "base", _edit(2.0, site), tmp_path / "baked")
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "baked", dtype=dtype).eval()
    with hooked(base, _edit(2.0, site)):
        reference = _logits(base)
    assert torch.equal(_logits(baked), reference)
    assert not torch.equal(reference, _logits(base))  # the edit does something, and the hooks are gone


@pytest.mark.parametrize("factor", [3.5, 0.3])
@pytest.mark.parametrize("name", FAMILIES)
def test_other_factors_round_once(name, factor, tmp_path):
    model = tiny_model(name, torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    manifest = fold(tmp_path / "base", _edit(factor), tmp_path / "baked")
    before, after = load_file(tmp_path / "base/model.safetensors"), load_file(tmp_path / "baked/model.safetensors")
    assert before.keys() == after.keys() and len(manifest.tensors) == len(NEURONS)
    axis = 0 if isinstance(places(model, "down")[0][0].module, Conv1D) else 1
    for key, old in before.items():
        expected = old.clone()
        if key in manifest.tensors:
            index = torch.tensor(NEURONS[min(NEURONS) if f".{min(NEURONS)}." in key else max(NEURONS)])
            scaled = (old.index_select(axis, index).float() * factor).to(old.dtype)
            expected.index_copy_(axis, index, scaled)
        assert after[key].dtype == old.dtype and torch.equal(after[key], expected), key
    assert num_neurons(model) == 48


@pytest.mark.parametrize("site", ["down", "gate"])
@pytest.mark.parametrize("name", FAMILIES)
def test_other_factors_stay_within_the_rounding_bound(name, site, tmp_path):
    """`verify` computes the bound: see `proofs.noise`. Both factors in one edit, on bf16 weights, in both dtypes."""
    model = tiny_model(name, torch.bfloat16)
    if site == "gate" and family_of(model.config.to_dict()).gate is None:
        pytest.skip("plain feed-forward: no gate")
    model.save_pretrained(tmp_path / "base")
    edit = Edit(site=site, factors={0: {3: 3.5, 47: 0.3}, 2: {0: 0.3, 10: 3.5, 11: 3.5}})
    fold(tmp_path / "base", edit, tmp_path / "baked")
    report = verify(tmp_path / "base", tmp_path / "baked")
    assert report.ok and [entry.dtype for entry in report.behaviour] == ["float32", "bfloat16"]
    assert all(0 < entry.noise < 0.2 for entry in report.behaviour)  # the bound says something


@pytest.mark.parametrize("dtype, bits", [(torch.bfloat16, torch.int16), (torch.float32, torch.int32)])
def test_the_rounding_of_a_logit_is_a_uniform_error_of_one_step(dtype, bits):
    """The step: from the largest logit to the number that its dtype has next."""
    logits = torch.randn(40, 30, generator=torch.Generator().manual_seed(3)).to(dtype)
    largest = logits.abs().max()
    after = (largest.view(bits) + 1).view(dtype)
    deviation = float(after.double() - largest.double()) * (1 / 12) ** 0.5
    result = last_rounding(logits.float().numpy(), dtype)
    assert result == pytest.approx(deviation / float(logits.float().std(correction=0)), rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "llama-biased", "gpt2", "phi3"])
@pytest.mark.parametrize("site", ["down", "gate"])
@pytest.mark.parametrize("factor", [2.0, 3.5])
def test_site_by_site_where_the_model_does_not_fit(name, site, factor, tmp_path, monkeypatch):
    if site == "gate" and name == "gpt2":
        pytest.skip("plain feed-forward: no gate")
    monkeypatch.setattr(memory, "available", lambda: 1.0)
    tiny_model(name, torch.bfloat16).save_pretrained(tmp_path / "base")
    fold(tmp_path / "base", _edit(factor, site), tmp_path / "baked")
    base, baked = Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "baked")
    (entry,) = verify(tmp_path / "base", tmp_path / "baked").behaviour
    assert entry.how == "site by site" and entry.holds and entry.bit_equal == (factor == 2.0)
    (entry,) = behaviour.behaviour_proof(Plan.of(base, _edit(factor * 1.05, site)), baked)
    assert not entry.holds  # a factor that is five percent off is seen


def test_second_process_and_revert(tmp_path):
    """Plain transformers in a new interpreter computes what hooks compute here; all models in one, for its start."""
    names = ["llama", "gpt2", "phi3", "llama-tied", "llama4_text"]
    models = {name: tiny_model(name) for name in names}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name / "base", max_shard_size="20KB")
        fold(tmp_path / name / "base", _edit(2.0), tmp_path / name / "baked")
    code = (
        "import sys, json, torch; from transformers import AutoModelForCausalLM as A;"
        "models = [A.from_pretrained(path, dtype=torch.float32).eval() for path in sys.argv[1:]];"
        f"print(json.dumps([m(torch.tensor({IDS.tolist()})).logits.tolist() for m in models]))"
    )
    command = [sys.executable, "-c", code, *(tmp_path / name / "baked" for name in names)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    for name, logits in zip(names, json.loads(out.stdout), strict=True):
        with hooked(models[name], _edit(2.0)):
            assert torch.equal(torch.tensor(logits), _logits(models[name])), name
        revert(tmp_path / name / "baked", tmp_path / name / "again")
        files = sorted(p.name for p in (tmp_path / name / "base").iterdir())
        assert files == sorted(p.name for p in (tmp_path / name / "again").iterdir())
        base, again = tmp_path / name / "base", tmp_path / name / "again"
        assert all((base / f).read_bytes() == (again / f).read_bytes() for f in files)


@pytest.mark.parametrize("name", FAMILIES)
def test_ia3_of_peft(name):
    """PEFT's IA3 on the down-projection scales the same vector: an independent hook."""
    from peft import IA3Config, get_peft_model

    model, edit = tiny_model(name), _edit(3.5)
    with hooked(model, edit):
        ours = _logits(model)
    modules = rf".*\.{re.escape(family_of(model.config.to_dict()).down)}"
    adapted = get_peft_model(model, IA3Config(target_modules=modules, feedforward_modules=modules))
    with torch.no_grad():
        for layer, ((module, *_),) in enumerate(places(adapted.get_base_model(), "down")):
            vector = module.ia3_l["default"].view(-1)
            for neuron, factor in edit.factors.get(layer, {}).items():
                vector[neuron] = factor
    assert torch.equal(ours, _logits(adapted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MULTIMODAL)
def test_the_text_part_of_multimodal_models(name, dtype, tmp_path):
    tiny_model(name, dtype).save_pretrained(tmp_path / "base")
    base, baked = tmp_path / "base", tmp_path / "baked"
    manifest = fold(base, _edit(2.0), baked)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype).eval()
    with hooked(model, _edit(2.0)):
        reference = _logits(model)
    assert torch.equal(_logits(AutoModelForImageTextToText.from_pretrained(baked, dtype=dtype).eval()), reference)
    assert not torch.equal(_logits(model), reference)
    before, after = load_file(base / "model.safetensors"), load_file(baked / "model.safetensors")
    assert any("vision" in key or "visual" in key for key in before)
    assert {key for key, old in before.items() if not torch.equal(old, after[key])} == set(manifest.tensors)


def test_every_family_is_under_the_contract():
    from kbne_edit.families import FAMILIES as known

    text_parts = {tiny_config(name).text_config.model_type for name in WHOLE}
    assert set(known) == {
        name.split("-")[0] for name in [*FAMILIES, *MIXTURES, *HYBRIDS, *MORE_HYBRIDS]
    } | text_parts | {*MORE}


def _stack(prefix, layers):
    names = ("mlp.down_proj.weight", "mlp.gate_proj.weight", "self_attn.q_proj.weight")
    return {f"{prefix}layers.{layer}.{name}": (8, 16) for layer in range(layers) for name in names}


@pytest.mark.parametrize("other", ["mtp.", "draft.", "model.mtp.", "v_head.model."])
@pytest.mark.parametrize("layers", [1, 3])
def test_more_prediction_heads_are_not_the_decoder(other, layers):
    """They have a layer of the decoder's own shape, under another prefix."""
    config = {"model_type": "llama", "num_hidden_layers": layers, "hidden_size": 8}
    result = slots(_stack(other, 1) | _stack("model.", layers), config, "down")
    assert [slot.tensor for layer in range(layers) for slot in result[layer]] == [
        f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(layers)
    ]


def test_two_decoders_are_refused_by_name():
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8}
    with pytest.raises(FamilyError, match=r"student\.layers, teacher\.layers"):
        slots(_stack("student.", 2) | _stack("teacher.", 2), config, "down")


def test_slots_take_time_in_proportion_to_the_layers():
    """Reads of the names are counted, not seconds."""

    class Counted(dict):
        reads = 0

        def __iter__(self):
            for name in super().__iter__():
                Counted.reads += 1
                yield name

    counts = []
    for layers in (20, 40):
        Counted.reads = 0
        slots(
            Counted(_stack("model.", layers)),
            {"model_type": "llama", "num_hidden_layers": layers, "hidden_size": 8},
            "down",
        )
        counts.append(Counted.reads)
    assert counts[1] == 2 * counts[0]


@pytest.mark.parametrize(
    ("config", "expected"),
    [({}, [2, 3]), ({"num_nextn_predict_layers": 1}, [3]), ({"num_nextn_predict_layers": 2}, [])],
)
def test_layers_that_config_does_not_count_are_known(config, expected):
    names = [f"model.layers.{n}.mlp.{part}_proj.weight" for n in range(4) for part in ("gate", "up", "down")]
    shapes = {name: (6, 4) for name in (*names, "vision.layers.7.mlp.down_proj.weight", "lm_head.weight")}
    base = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 4}
    assert layers_beyond(shapes, base | config) == expected
    assert layers_beyond(shapes, base | {"num_hidden_layers": 4}) == []


@pytest.mark.parametrize("count", [True, "2", 2.0, 0, -1, None])
def test_a_number_of_layers_that_is_none(count):
    with pytest.raises(FamilyError, match=r"config\.json names no number of layers"):
        slots(_stack("model.", 2), {"model_type": "llama", "num_hidden_layers": count, "hidden_size": 8}, "down")
