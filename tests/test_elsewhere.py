"""`verify` of a directory that another program made: weights and other files judged apart, each fault said once."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kbne_edit import Edit, verify
from kbne_edit.errors import CheckpointError
from kbne_edit.folding import rewrite
from tiny import tiny_model

EDIT = Edit("down", {0: {3: 2.0, 9: 2.0}, 1: {7: 0.5}})


@pytest.fixture
def pair(tmp_path):
    """(base, the same with the edit, by hand)"""
    for name in ("base", "made"):
        tiny_model("llama", torch.bfloat16).save_pretrained(tmp_path / name)
    state = load_file(tmp_path / "made" / "model.safetensors")
    for layer, factors in EDIT.factors.items():
        for neuron, factor in factors.items():
            state[f"model.layers.{layer}.mlp.down_proj.weight"][:, neuron] *= factor
    save_file(state, tmp_path / "made" / "model.safetensors", {"format": "pt"})
    return tmp_path / "base", tmp_path / "made"


def test_files_that_no_loader_reads_are_notes(pair):
    base, made = pair
    (base / "README.md").write_text("the base's")
    for name in ("README.md", "mergekit_config.yml", "LICENSE.txt", "loss.png"):
        (made / name).write_text("new")
    (made / "training_args.bin").write_bytes(b"of a trainer")
    proofs = verify(base, made, behaviour=False)
    assert proofs.ok and proofs.edit.factors == EDIT.factors, proofs.faults
    noted = {note.split()[1] for note in proofs.files.notes}
    assert noted == {"README.md", "mergekit_config.yml", "LICENSE.txt", "loss.png"}


def test_a_configuration_that_says_the_same_is_a_note_and_another_is_a_fault(pair):
    base, made = pair
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"transformers_version": "4.0.0"}))
    proofs = verify(base, made, behaviour=False)
    assert proofs.ok and proofs.files.notes == ("file config.json is formatted differently, with the same content",)
    (made / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert verify(base, made, behaviour=False).faults == ("file config.json differs in rms_norm_eps",)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "modeling_own.py"])
def test_files_that_a_loader_reads_are_faults(name, pair):
    base, made = pair
    (made / name).write_text("{}")
    assert verify(base, made, behaviour=False).faults == (f"file {name} is new",)


def test_another_dtype_is_named(pair):
    base, made = pair
    state = load_file(made / "model.safetensors")
    save_file({name: value.float() for name, value in state.items()}, made / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"down_proj\.weight' as F32, which .* stores as BF16"):
        verify(base, made, behaviour=False)
    faults = verify(base, made, edit=EDIT, behaviour=False).faults
    assert f"tensor lm_head.weight is F32 {list(state['lm_head.weight'].shape)}; it was BF16" in " ".join(faults)


def test_a_fault_is_listed_once_however_many_chunks_it_has(pair, monkeypatch):
    base, made = pair
    state = load_file(made / "model.safetensors")
    state["model.embed_tokens.weight"] += 1
    save_file(state, made / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(rewrite, "CHUNK", 64)
    faults = verify(base, made, behaviour=False).faults
    assert faults == ("model.safetensors: model.embed_tokens.weight is not what the edit gives",)
