"""Architectures that are in no table: their structure against the table's, and what is refused."""

import pytest
from transformers import AutoConfig

from kbne_edit import Edit, bake
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
        (AutoConfig.for_model("bloom", n_layer=2, hidden_size=32, n_head=4).to_dict(), "ALiBi"),
        (AutoConfig.for_model("ernie", num_hidden_layers=2).to_dict(), "encoder"),
        ({"model_type": "biogpt", "text_config": {"model_type": "biogpt"}}, "a part besides its language model"),
        ({"model_type": "biogpt", "num_hidden_layers": "many"}, "transformers cannot build it"),
        ({"model_type": "biogpt", "num_hidden_layers": 10**9}, "'num_hidden_layers': 1000000000, which no model has"),
    ],
)
def test_what_cannot_be_inferred_is_refused_with_the_reason(config, reason):
    with pytest.raises(FamilyError, match=f"unknown architecture .*{reason}"):
        family_of(config)


def test_bake_says_what_was_inferred(tmp_path, caplog):
    caplog.set_level("INFO", "kbne_edit")
    tiny_model("biogpt").save_pretrained(tmp_path / "base")
    edit = Edit("down", {0: {3: 2.0}, 2: {17: 2.0}})
    result = bake(str(tmp_path / "base"), tmp_path / "out", edit=edit, measure=False)
    assert result.proofs.both_held and all(proof.bit_equal for proof in result.proofs.behaviour)
    assert any("'biogpt' is not in the table of architectures" in line for line in caplog.messages)
