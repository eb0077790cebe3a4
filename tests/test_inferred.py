"""Architectures that are in no table: their structure against the table's, and what is refused."""

import importlib

import pytest
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kbne_edit import Checks, Edit, bake, fold, verify
from kbne_edit.architectures import INFERRED as READ_OFF
from kbne_edit.architectures import NOT_CAUSAL, REASONS
from kbne_edit.errors import FamilyError
from kbne_edit.families import FAMILIES as TABLE
from kbne_edit.families import family_of
from kbne_edit.structure import structure_of
from tiny import FAMILIES, INFERRED, MIXTURES, tiny_config, tiny_model

# Of these the configuration class gives no sizes that agree, or a layer has a second projection of the same form.
_OTHER = ("gemma4_text", "vaultgemma")


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith(_OTHER)])
def test_what_is_inferred_is_what_the_table_says(name):
    config = tiny_config(name).to_dict()
    structure, known = structure_of(config), TABLE[config["model_type"]]
    assert structure == (known.layers, known.down, known.conv1d)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_experts_are_not_taken_for_a_dense_block(name):
    with pytest.raises(FamilyError, match="stacks experts in one tensor|do not close with one projection"):
        structure_of(tiny_config(next(key for key in MIXTURES if key.split("-")[0] == name)).to_dict())


@pytest.mark.parametrize("name", INFERRED)
def test_an_inferred_family_says_so(name):
    family = family_of(tiny_config(name).to_dict())
    assert family.inferred and family.recurrent and family.gate is None


@pytest.mark.parametrize(
    "config, reason",
    [
        ({"model_type": "no-such-thing"}, "transformers cannot build it"),
        ({"model_type": "biogpt", "text_config": {"model_type": "biogpt"}}, "a part besides its language model"),
        ({"model_type": "biogpt", "num_hidden_layers": "many"}, "transformers cannot build it"),
        ({"model_type": "biogpt", "num_hidden_layers": 10**9}, "'num_hidden_layers': 1000000000, which no model has"),
    ],
)
def test_what_cannot_be_inferred_is_refused_with_the_reason(config, reason):
    with pytest.raises(FamilyError, match=f"unknown architecture .*{reason}"):
        family_of(config)


@pytest.mark.parametrize("name, reason", [("bloom", "ALiBi"), ("ernie", "encoder"), ("mamba", "no list|close")])
def test_structures_that_are_none_of_a_decoder(name, reason):
    with pytest.raises(FamilyError, match=reason):
        structure_of(AutoConfig.for_model(name, num_hidden_layers=2, hidden_size=48, vocab_size=97).to_dict())


def test_every_causal_architecture_of_transformers_has_an_answer():
    """In the table, by its text part, inferred (and tested), or refused with a reason of its own."""
    answered = {*TABLE, *READ_OFF, *REASONS, *(kind for kinds in NOT_CAUSAL.values() for kind in kinds)}
    unknown = []
    for name in {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - answered:
        config = CONFIG_MAPPING[name]()
        if not {config.model_type, config.get_text_config().model_type} & answered:
            unknown.append(name)
    assert not unknown and set(READ_OFF) == {name.split("-")[0] for name in INFERRED}
    assert not {*REASONS} & {*TABLE, *READ_OFF}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_an_architecture_that_the_table_loses_is_inferred_and_proven(name, tmp_path, monkeypatch):
    """The path of tomorrow's architectures: the same fold as by the table, and both proofs."""
    tiny_model(name).save_pretrained(tmp_path / "base")
    edit = Edit("down", {0: {3: 2.0}, 2: {17: 0.5}})
    fold(tmp_path / "base", edit, tmp_path / "known")
    for module in ("kbne_edit.families", "kbne_edit.architectures"):
        monkeypatch.delitem(importlib.import_module(module).FAMILIES, name, raising=False)
    assert family_of(tiny_config(name).to_dict()).inferred
    fold(tmp_path / "base", edit, tmp_path / "inferred")
    files = [tmp_path / which / "model.safetensors" for which in ("known", "inferred")]
    assert files[0].read_bytes() == files[1].read_bytes()
    proofs = verify(tmp_path / "base", tmp_path / "inferred")
    assert proofs.ok and all(proof.bit_equal for proof in proofs.behaviour)


def test_bake_says_what_was_inferred(tmp_path, caplog):
    caplog.set_level("INFO", "kbne_edit")
    tiny_model("biogpt").save_pretrained(tmp_path / "base")
    edit = Edit("down", {0: {3: 2.0}, 2: {17: 2.0}})
    result = bake(str(tmp_path / "base"), tmp_path / "out", edit=edit, checks=Checks(measure=False))
    assert result.proofs.both_held and all(proof.bit_equal for proof in result.proofs.behaviour)
    assert any("'biogpt' is not in the table of architectures" in line for line in caplog.messages)
