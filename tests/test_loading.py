"""What transformers loads is what is edited: a checkpoint that lacks weights, or has others, is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kbne_edit.disk.checkpoint import Checkpoint
from kbne_edit.errors import CheckpointError
from kbne_edit.models.loading import load_model
from kbne_edit.models.streamed import Streamed
from tiny import tiny_model


def _saved(path, change, name="llama"):
    tiny_model(name).save_pretrained(path)
    weights = change(load_file(path / "model.safetensors"))
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


def _without(*names):
    return lambda weights: {name: value for name, value in weights.items() if name not in names}


CASES = {
    "head lost": (_without("lm_head.weight"), r"lacks lm_head\.weight, .*random.*complete checkpoint"),
    "norm lost": (_without("model.norm.weight"), r"lacks model\.norm\.weight"),
    "many lost": (
        lambda w: {name: value for name, value in w.items() if "self_attn" not in name},
        r"lacks model\.layers\.0\.self_attn\.\w+\.weight, .* and 9 more",
    ),
    "wrapped": (lambda w: {f"_orig_mod.{name}": value for name, value in w.items()}, r"begin with '_orig_mod\.'"),
    "reward head": (
        lambda w: {name.replace("lm_head", "score"): value for name, value in w.items()},
        r"lacks lm_head\.weight.*it has score\.weight.*reward model",
    ),
    "other shape": (
        lambda w: w | {"model.layers.1.mlp.up_proj.weight": torch.zeros(40, 32)},
        r"model\.layers\.1\.mlp\.up_proj\.weight has shape \[40, 32\], but config\.json makes it \[48, 32\]",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_that_are_not_the_model_are_refused(name, tmp_path):
    change, message = CASES[name]
    path = _saved(tmp_path / "m", change)
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(path, torch.float32)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 500


@pytest.mark.parametrize("name", ["head lost", "norm lost", "many lost", "other shape"])
def test_nor_are_they_read_layer_by_layer(name, tmp_path):
    path = _saved(tmp_path / "m", CASES[name][0])
    with pytest.raises(CheckpointError):
        for _ in Streamed(Checkpoint.open(path), 64e9).forward():
            pass


def test_a_whole_checkpoint_is_loaded_as_it_is(tmp_path):
    """Tied weights lack a tensor on disk, and tensors that no model needs may be there."""
    path = _saved(
        tmp_path / "m", lambda w: w | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, "llama-tied"
    )
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    model = load_model(path, torch.float32)
    for name, value in tiny_model("llama-tied").state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_an_adapter_beside_the_weights_would_be_loaded_with_them(tmp_path):
    from peft import LoraConfig, get_peft_model

    path = _saved(tmp_path / "m", dict)
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(path)
    with pytest.raises(CheckpointError, match="PEFT adapter.*merge"):
        load_model(path, torch.float32)
    with pytest.raises(CheckpointError, match="PEFT adapter.*merge"):
        Streamed(Checkpoint.open(path), 64e9)


def test_weights_that_the_configuration_names(tmp_path):
    path = _saved(tmp_path / "m", dict)
    save_file({"a": torch.zeros(1)}, path / "other.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    with pytest.raises(CheckpointError, match=r"transformers_weights: 'other\.safetensors'"):
        load_model(path, torch.float32)


@pytest.mark.parametrize("value", ["x", True, [2, "x"], 1.5])
def test_special_tokens_that_are_none(value, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match="eos_token_id"):
        load_model(tmp_path / "m", torch.float32)


def test_a_greedy_continuation_knows_no_beams_and_penalties(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "m")
    settings = {"eos_token_id": [2, 5], "num_beams": 4, "repetition_penalty": 9.0, "temperature": [1], "min_length": 9}
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(settings))
    kept = load_model(tmp_path / "m", torch.float32).generation_config
    assert kept.eos_token_id == [2, 5] and kept.num_beams in (None, 1) and kept.repetition_penalty in (None, 1.0)
