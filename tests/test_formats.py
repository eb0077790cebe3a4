"""Other forms of an edit: PEFT makes of the adapter, and `apply` of the delta, what `bake` writes."""

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch
from command import run_command
from huggingface_hub import ModelCard
from manifests import is_sealed, read_manifest
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from hub import card_faults
from kbne_edit import Checks, Edit, Output, apply, applying, bake, hooked, revert, verify
from kbne_edit.disk.checkpoint import Checkpoint
from kbne_edit.errors import CheckpointError, EditError, FamilyError, KbneError, OutputError, ProofError
from kbne_edit.folding.adapter import read_adapter
from kbne_edit.proofs.outcome import BehaviourProof
from tiny import MULTIMODAL, tiny_model

ROOT = Path(__file__).resolve().parent.parent
IDS = torch.tensor([[5, 17, 40, 8, 22, 31, 9, 60]])
NEURONS = {0: (3, 47), 2: (0, 10, 11)}
GATED = ["llama", "llama-biased", "qwen3", "gemma2", "phi3", "glm", "gemma3"]
PLAIN = ["gpt2", "opt", "gpt_neox", "gptj", "falcon", "starcoder2", "gpt_neo"]


def _edit(factor, site="down"):
    return Edit(site, {layer: dict.fromkeys(neurons, factor) for layer, neurons in NEURONS.items()})


def _logits(model):
    with torch.no_grad():
        return model(IDS).logits


def _load(name, path, dtype):
    kind = AutoModelForImageTextToText if name in MULTIMODAL else AutoModelForCausalLM
    return kind.from_pretrained(path, dtype=dtype).eval()


@pytest.fixture
def base(tmp_path):
    tiny_model("llama", torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    return tmp_path / "base"


# ---------------------------------------------------------------------------------------------------------------- IA3


@pytest.mark.parametrize("factor", [2.0, 3.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name, site", [(n, "down") for n in GATED + PLAIN] + [(n, "gate") for n in GATED])
def test_peft_loads_and_merges_the_adapter(name, site, dtype, factor, tmp_path, recwarn):
    tiny_model(name, dtype).save_pretrained(tmp_path / "base")
    edit = _edit(factor, site)
    bake(tmp_path / "base", tmp_path / "adapter", edit=edit, output=Output(form="peft"))
    bake(tmp_path / "base", tmp_path / "baked", edit=edit, checks=Checks(behaviour=False))
    model = _load(name, tmp_path / "base", dtype)
    plain = _logits(model)
    with hooked(model, edit):
        reference = _logits(model)
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert not [w for w in recwarn if "fan_in_fan_out" in str(w.message)]  # PEFT would have to correct it
    assert torch.equal(_logits(adapted), reference) and not torch.equal(reference, plain)
    merged, baked = adapted.merge_and_unload(), _load(name, tmp_path / "baked", dtype)
    for (key, got), want in zip(merged.state_dict().items(), baked.state_dict().values(), strict=True):
        assert torch.equal(got, want), key


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("site", ["down", "gate"])
def test_an_adapter_of_peft_is_read_as_an_edit(name, site, tmp_path):
    if (name, site) == ("gpt2", "gate"):
        pytest.skip("plain feed-forward: no gate")
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "base")
    last = {"llama": ("down_proj", "gate_proj"), "gpt2": ("mlp.c_proj",), "phi3": ("down_proj", "gate_up_proj")}[name]
    target = last[site == "gate"]
    config = IA3Config(
        target_modules=[target], feedforward_modules=[target] if site == "down" else [], fan_in_fan_out=name == "gpt2"
    )
    adapted = get_peft_model(model, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for key, vector in adapted.named_parameters():
            if "ia3_l" in key:
                vector.view(-1)[:48] = 1 + torch.randn(48) * 0.5
    adapted.save_pretrained(tmp_path / "adapter")
    edit = read_adapter(tmp_path / "adapter", Checkpoint.open(tmp_path / "base"))
    assert edit.site == site and edit.num_neurons == 3 * 48
    expected = _logits(adapted)
    bake(tmp_path / "base", tmp_path / "baked", edit=tmp_path / "adapter")  # with both proofs
    with hooked(_load(name, tmp_path / "base", torch.float32), edit) as reference:
        assert torch.equal(_logits(reference), expected)


def _trained(tmp_path, config):
    """An adapter of the tiny llama in which every parameter is random."""
    adapted = get_peft_model(tiny_model("llama"), config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.rand_like(parameter) + 2)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


REFUSED = {
    "lora": (LoraConfig(target_modules=["down_proj"]), "'LORA'"),
    "attention": (IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), "k_proj"),
    "output of down": (IA3Config(target_modules=["down_proj"], feedforward_modules=[]), r"\[32, 1\]"),
    "input of gate": (IA3Config(target_modules=["gate_proj"], feedforward_modules=["gate_proj"]), r"\[1, 32\]"),
    "both": (IA3Config(target_modules=["down_proj", "gate_proj"], feedforward_modules=["down_proj"]), "several sites"),
    "head": (
        IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"], modules_to_save=["lm_head"]),
        "lm_head",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_is_no_edit_is_refused(case, base, tmp_path):
    config, message = REFUSED[case]
    with pytest.raises(EditError, match=message) as error:
        bake(base, tmp_path / "out", edit=_trained(tmp_path, config))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_an_adapter_that_scales_nothing_is_refused(base, tmp_path):
    get_peft_model(
        tiny_model("llama"), IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"])
    ).save_pretrained(tmp_path / "adapter")
    with pytest.raises(EditError, match="scales nothing"):
        bake(base, tmp_path / "out", edit=tmp_path / "adapter")


def test_half_of_a_packed_projection_is_no_gate(tmp_path):
    tiny_model("phi3").save_pretrained(tmp_path / "base")
    bake(tmp_path / "base", tmp_path / "adapter", edit=_edit(2.0, "gate"), output=Output(form="peft"))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    vectors = load_file(path)
    next(iter(vectors.values()))[48] = 2  # the first row of the up half
    save_file(vectors, path)
    with pytest.raises(EditError, match="nothing else"):
        read_adapter(tmp_path / "adapter", Checkpoint.open(tmp_path / "base"))


def test_experts_have_no_ia3(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "base")
    with pytest.raises(FamilyError, match="mixture of experts"):
        bake(tmp_path / "base", tmp_path / "adapter", edit=_edit(2.0), output=Output(form="peft"))
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_knows_its_base(base, tmp_path):
    bake(base, tmp_path / "adapter", edit=_edit(2.0), output=Output(form="peft"))
    tiny_model("llama-tied", torch.bfloat16).save_pretrained(tmp_path / "other")
    with pytest.raises(EditError, match="another model"):
        bake(tmp_path / "other", tmp_path / "out", edit=tmp_path / "adapter")


# -------------------------------------------------------------------------------------------------------------- delta


def _bytes(folder, pattern="*"):
    return {p.name: p.read_bytes() for p in folder.glob(pattern) if p.is_file()}


@pytest.mark.parametrize("factor", [2.0, 0.3])
@pytest.mark.parametrize(
    "name, site",
    [
        ("llama", "down"),
        ("llama-biased", "gate"),
        ("phi3", "gate"),
        ("phi3", "up"),
        ("gpt2", "down"),
        ("mixtral", "down"),
        ("gpt_oss", "down"),
        ("granitemoe", "down"),
    ],
)
def test_a_delta_gives_what_bake_writes(name, site, factor, tmp_path):
    tiny_model(name, torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    base, edit = tmp_path / "base", _edit(factor, site)
    bake(base, tmp_path / "baked", edit=edit, checks=Checks(behaviour=False))
    bake(base, tmp_path / "delta", edit=edit, output=Output(form="delta"))
    report = apply(tmp_path / "delta", base, tmp_path / "applied")
    assert (
        report.ok
        and report.proofs.behaviour
        and report.proofs.files.edited == len(load_file(tmp_path / "delta" / "kbne_delta.kbne"))
    )
    weights = _bytes(tmp_path / "baked", "*.safetensors*")
    assert len(weights) > 2 and _bytes(tmp_path / "applied", "*.safetensors*") == weights
    assert verify(base, tmp_path / "applied", behaviour=False).ok
    revert(tmp_path / "applied", tmp_path / "again")
    assert _bytes(tmp_path / "again") == _bytes(base)


def test_what_is_applied_is_what_a_bake_leaves(base, tmp_path):
    """Manifest, card and proofs are as of a bake to which the edit was given, so all that takes one takes the other."""
    bake(base, tmp_path / "delta", edit=_edit(2.0), output=Output(form="delta"))
    bake(base, tmp_path / "baked", edit=_edit(2.0))
    apply(tmp_path / "delta", base, tmp_path / "applied")
    assert _bytes(tmp_path / "applied") == _bytes(tmp_path / "baked")


def test_a_second_proof_that_fails_leaves_nothing(base, tmp_path, monkeypatch):
    bake(base, tmp_path / "delta", edit=_edit(2.0), output=Output(form="delta"))
    monkeypatch.setattr(
        applying, "behaviour_proof", lambda *_: (BehaviourProof("float32", "whole model", False, False, 1.0, 0.0, 3),)
    )
    with pytest.raises(ProofError, match="second proof failed"):
        apply(tmp_path / "delta", base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert apply(tmp_path / "delta", base, tmp_path / "out", checks=Checks(behaviour=False)).proofs.behaviour is None


@pytest.mark.parametrize("form", ["peft", "delta"])
def test_an_edit_alone_says_what_it_is(form, base, tmp_path):
    """The same bytes wherever it is made; the hashes of its files; a card with the licence of the base."""
    (base / "README.md").write_text("---\nlicense: llama3.2\ntags: [chat]\n---\n")
    for out in ("one", "two"):
        bake(base, tmp_path / out, edit=_edit(3.5), output=Output(form=form))
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "two")
    manifest = read_manifest(tmp_path / "one")
    assert is_sealed(tmp_path / "one", manifest) and Edit.from_dict(manifest["edit"]).factors == _edit(3.5).factors
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in _bytes(tmp_path / "one").items()}
    assert {name: entry["out"] for name, entry in manifest["files"].items()} == {
        name: digest for name, digest in hashes.items() if name != "kbne_edit.json"
    }
    card = ModelCard.load(tmp_path / "one" / "README.md")
    assert not card_faults(card.data.to_dict()) and "base_model" not in card.data.to_dict()  # not one of the Hub
    assert card.data.license == "llama3.2" and card.data.tags[0] == "chat" and "Built with Llama." in card.text
    assert card.data.library_name == {"peft": "peft", "delta": "kbne-edit"}[form]


def test_the_columns_of_a_delta_are_the_edited_weights(base, tmp_path):
    """Anyone can put them in by hand: they are plain tensors."""
    bake(base, tmp_path / "baked", edit=_edit(3.5), checks=Checks(behaviour=False))
    bake(base, tmp_path / "delta", edit=_edit(3.5), output=Output(form="delta"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "baked").state_dict()
    for name, columns in load_file(tmp_path / "delta" / "kbne_delta.kbne").items():
        assert torch.equal(columns, model[name.removeprefix("kbne.weight.")][:, list(NEURONS[int(name.split(".")[4])])])


def test_a_delta_is_refused_for_another_base(base, tmp_path):
    bake(base, tmp_path / "delta", edit=_edit(2.0), output=Output(form="delta"))
    tiny_model("qwen2", torch.bfloat16).save_pretrained(tmp_path / "other")
    with pytest.raises(EditError, match="another model"):
        apply(tmp_path / "delta", tmp_path / "other", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_delta_is_applied_to_its_base_in_other_files(base, tmp_path):
    """The tensors count, not how they are cut; one value that differs is another base."""
    bake(base, tmp_path / "delta", edit=_edit(2.0), output=Output(form="delta"), checks=Checks(measure=False))
    bake(base, tmp_path / "baked", edit=_edit(2.0), checks=Checks(behaviour=False, measure=False))
    tiny_model("llama", torch.bfloat16).save_pretrained(tmp_path / "other")
    assert len(list((tmp_path / "other").glob("*.safetensors"))) == 1 < len(list(base.glob("*.safetensors")))
    apply(tmp_path / "delta", tmp_path / "other", tmp_path / "out", checks=Checks(behaviour=False, measure=False))
    merged = {k: v for path in (tmp_path / "baked").glob("*.safetensors") for k, v in load_file(path).items()}
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == merged.keys() and all(torch.equal(got[name], merged[name]) for name in got)
    path = tmp_path / "other" / "model.safetensors"
    state = load_file(path)
    state["model.embed_tokens.weight"].view(-1)[0] += 1  # outside the sample of the fingerprint
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(EditError, match="other weights.*apply it to 'base' as published"):
        apply(tmp_path / "delta", tmp_path / "other", tmp_path / "new", checks=Checks(behaviour=False, measure=False))


def _spoil(delta, change):
    """The delta with `change` applied to what it says of itself and to its columns."""
    path = delta / "kbne_delta.kbne"
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["kbne"])
    columns = load_file(path)
    change(about, columns)
    save_file(columns, path, metadata={"kbne": json.dumps(about)})


def test_a_base_that_differs_where_no_sample_is_taken(tmp_path):
    """The fingerprint samples 4 KiB of each tensor; the hashes cover every byte."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors") | {"extra": torch.zeros(64, 48)}
    save_file(weights, tmp_path / "base" / "model.safetensors")
    bake(tmp_path / "base", tmp_path / "delta", edit=_edit(2.0), output=Output(form="delta"))
    weights["extra"][0, 0] = 1
    save_file(weights, tmp_path / "base" / "model.safetensors")
    with pytest.raises(EditError, match="SHA-256 differs"):
        apply(tmp_path / "delta", tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_delta_that_was_tampered_with_proves_nothing(base, tmp_path):
    def value(about, columns):
        next(iter(columns.values()))[0, 0] += 1

    def factor(about, columns):
        about["edit"]["factors"]["0"]["3"] = 4.0

    def promise(about, columns):
        for entry in about["files"].values():
            entry["out"] = entry["in"]

    for change in (value, factor, promise):
        bake(base, tmp_path / "delta", edit=_edit(2.0), output=Output(form="delta", overwrite=True))
        _spoil(tmp_path / "delta", change)
        with pytest.raises(ProofError, match="first proof failed"):
            apply(tmp_path / "delta", base, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_damaged_deltas_and_adapters_never_pass(base, tmp_path):
    """Bytes changed anywhere: an error of the tool's own, or (in what is not read) the same weights."""
    rng = random.Random(0)
    bake(base, tmp_path / "baked", edit=_edit(2.0), checks=Checks(behaviour=False))
    bake(base, tmp_path / "delta", edit=_edit(2.0), output=Output(form="delta"))
    bake(base, tmp_path / "adapter", edit=_edit(2.0), output=Output(form="peft"))
    weights, refused = _bytes(tmp_path / "baked", "*.safetensors*"), 0
    for name in ["delta/kbne_delta.kbne", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"]:
        sound = (tmp_path / name).read_bytes()
        for _ in range(40):
            data = bytearray(sound)
            data[rng.randrange(len(data))] = rng.randrange(256)
            (tmp_path / name).write_bytes(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])])
            try:
                if name.startswith("delta"):
                    apply(
                        tmp_path / "delta",
                        base,
                        tmp_path / "out",
                        checks=Checks(behaviour=False),
                        output=Output(overwrite=True),
                    )
                    assert _bytes(tmp_path / "out", "*.safetensors*") == weights
                else:
                    read_adapter(tmp_path / "adapter", Checkpoint.open(base))
            except KbneError as error:
                assert "\n" not in str(error)
                refused += 1
        (tmp_path / name).write_bytes(sound)
    assert refused > 60


@pytest.mark.parametrize(
    "path, message",
    [("nothing", "cannot read"), ("base", "cannot read"), ("base/config.json", "not a safetensors file")],
)
def test_what_is_no_delta(path, message, base, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        apply(tmp_path / path, base, tmp_path / "out")


def test_a_checkpoint_is_no_delta(base, tmp_path):
    with pytest.raises(CheckpointError, match="is damaged, or kbne-edit did not write it"):
        apply(Checkpoint.open(base).shards[0].path, base, tmp_path / "out")


def test_overwrite_replaces_a_delta_and_nothing_else(base, tmp_path):
    bake(base, tmp_path / "delta", edit=_edit(2.0), output=Output(form="delta"))
    with pytest.raises(OutputError, match="exists"):
        bake(base, tmp_path / "delta", edit=_edit(2.0), output=Output(form="peft"))
    bake(base, tmp_path / "delta", edit=_edit(2.0), output=Output(form="peft", overwrite=True))
    assert set(_bytes(tmp_path / "delta")) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "kbne_edit.json",
        "README.md",
    }
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(OutputError, match="replaces nothing else"):
        bake(base, tmp_path / "mine", edit=_edit(2.0), output=Output(form="delta", overwrite=True))


@pytest.mark.slow
def test_the_demo_on_the_command_line(tmp_path):
    def run(*args):
        done = run_command(*args, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    _edit(2.0).save(tmp_path / "edit.json")
    out = run("bake", "--in", "demo", "--edit", "edit.json", "--as", "peft", "--out", "adapter")
    assert "read back, the adapter is the edit" in out
    run("bake", "--in", "demo", "--edit", "adapter", "--out", "baked")
    run("bake", "--in", "demo", "--edit", "edit.json", "--as", "delta", "--out", "delta")
    assert "proof 1, the files hold the edit: holds" in run("apply", "delta", "--in", "demo", "--out", "applied", "-v")
    weights = "model.safetensors"
    assert (tmp_path / "applied" / weights).read_bytes() == (tmp_path / "baked" / weights).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(ROOT / "kbne_edit" / "demo").eval()
    merged = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
    assert torch.equal(_logits(merged), _logits(AutoModelForCausalLM.from_pretrained(tmp_path / "baked").eval()))
    assert (tmp_path / "delta" / "kbne_delta.kbne").stat().st_size < 20_000
