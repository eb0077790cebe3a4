"""What the software that serves models makes of an output: it globs for files by their ending and goes by names.

The loaders below follow the rules of vLLM and SGLang (files of the index, if there is one), TGI (every file, no name
twice) and nano-vllm (every file, each tensor copied into the parameter of its name, broadcast where it fits).
"""

import json
import struct
from pathlib import Path

import pytest
import torch
from manifests import read_manifest, sha256, write_manifest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kbne_edit import Edit, apply, bake, push, revert, verify
from kbne_edit.reporting import contents
from tiny import tiny_model

EDIT = Edit("down", {0: {3: 2.0}, 1: {7: 4.0}, 2: {47: 0.5}})  # one neuron a layer: its column can be broadcast
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz", ".h5", ".msgpack")


def _globbed(folder):
    return sorted(Path(folder).glob("*.safetensors"))


def vllm(folder):
    files, index = _globbed(folder), Path(folder) / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text())["weight_map"].values())
        files = [file for file in files if file.name in named]
    state = {}
    for file in files:
        state |= load_file(file)
    return state


def tgi(folder):
    state = {}
    for file in _globbed(folder):
        held = load_file(file)
        assert not held.keys() & state.keys(), "a tensor in two files"
        state |= held
    return state


def nano_vllm(folder):
    state = {name: torch.zeros_like(value) for name, value in _transformers(folder).items()}
    for file in _globbed(folder):
        with safe_open(file, "pt") as held:
            for name in held.keys():  # noqa: SIM118  no mapping
                state[name].copy_(held.get_tensor(name))
    return state


def _transformers(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


LAYOUTS = {
    "single": (None, None),
    "sharded": ("20KB", None),
    "cut anew": (None, "25KB"),
    "joined": ("20KB", "1GB"),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def made(request, tmp_path_factory):
    """(base, output)"""
    shards, size = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp("readers")
    tiny_model("llama", torch.bfloat16).save_pretrained(folder / "base", max_shard_size=shards or "5GB")
    bake(folder / "base", folder / "out", edit=EDIT, shard_size=size)
    return folder / "base", folder / "out"


@pytest.mark.parametrize("loader", [vllm, tgi, nano_vllm])
def test_a_loader_that_globs_reads_the_edited_model(loader, made):
    base, out = made
    expected = _transformers(base)
    for layer, factors in EDIT.factors.items():
        weight = expected[f"model.layers.{layer}.mlp.down_proj.weight"]
        for neuron, factor in factors.items():
            weight[:, neuron] *= factor
    got = loader(out)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_no_file_but_a_shard_ends_like_weights(made):
    base, out = made
    bake(base, out.parent / "delta", edit=EDIT, form="delta", overwrite=True)
    shards = (
        {*json.loads((out / "model.safetensors.index.json").read_text())["weight_map"].values()}
        if (out / "model.safetensors.index.json").is_file()
        else {"model.safetensors"}
    )
    assert {path.name for path in out.rglob("*") if path.name.endswith(WEIGHTS)} == shards
    assert not [path.name for path in (out.parent / "delta").rglob("*") if path.name.endswith(WEIGHTS)]


def _names(path):
    data = path.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]).keys() - {"__metadata__"}


def test_no_tensor_name_stands_in_two_files(made):
    """Not even in files that end otherwise, for loaders that look into all of them."""
    base, out = made
    bake(base, out.parent / "delta", edit=EDIT, form="delta", overwrite=True)
    bake(base, out.parent / "adapter", edit=EDIT, form="peft", overwrite=True)
    adapter, delta = (out.parent / "adapter").glob("*.safetensors"), (out.parent / "delta").glob("*.kbne")
    for files in ([*_globbed(out), *out.glob("*.kbne"), *adapter], [*_globbed(out), *delta]):
        names = [name for path in files for name in _names(path)]
        assert len(files) > 1 and len(names) == len(set(names))


# ---------------------------------------------------------------------------------------------------- earlier outputs


def _as_before(out, file):
    """A file of columns as earlier versions wrote it: ending like weights, its tensors under the weights' own names."""
    old = out / file.replace(".kbne", ".safetensors")
    with safe_open(out / file, "pt") as held:
        metadata = held.metadata()
        state = {}
        for name in held.keys():  # noqa: SIM118  no mapping
            state[name.removeprefix("kbne.weight.").removeprefix("kbne.header.")] = held.get_tensor(name)
    save_file(state, old, metadata)
    (out / file).unlink()
    manifest = read_manifest(out)
    if "form" in manifest:
        del manifest["files"][file]
        manifest["files"][old.name] = {"in": None, "out": sha256(old)}
    else:
        manifest["undo"] = sha256(old)
        # The card named the file as it was called then.
        card = out / "README.md"
        card.write_text(card.read_text().replace("kbne_undo.kbne", "kbne_undo.safetensors"))
        manifest["files"]["README.md"]["out"] = sha256(card)
    write_manifest(out, manifest)


def test_an_earlier_output_is_proven_reverted_reported_and_pushed(made, tmp_path):
    base, out = made
    earlier = tmp_path / "out"
    earlier.mkdir()
    for path in out.iterdir():
        (earlier / path.name).write_bytes(path.read_bytes())
    _as_before(earlier, "kbne_undo.kbne")
    assert verify(base, earlier, behaviour=False).ok
    revert(earlier, tmp_path / "again")
    assert {p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()} == {
        p.name: p.read_bytes() for p in base.iterdir()
    }
    assert contents.report(earlier).edit.neurons == 3
    assert "kbne_undo.safetensors" in push(earlier, "org/other", dry_run=True).files
    (earlier / "kbne_undo.kbne").write_bytes((out / "kbne_undo.kbne").read_bytes())  # both: one of them is a stray
    assert not verify(base, earlier, behaviour=False).ok


def test_an_earlier_delta_is_applied(made, tmp_path):
    base, _ = made
    bake(base, tmp_path / "delta", edit=EDIT, form="delta")
    bake(base, tmp_path / "baked", edit=EDIT, behaviour=False)
    _as_before(tmp_path / "delta", "kbne_delta.kbne")
    for given in (tmp_path / "delta", tmp_path / "delta" / "kbne_delta.safetensors"):
        apply(given, base, tmp_path / "out", behaviour=False, overwrite=True)
        for path in _globbed(tmp_path / "baked"):
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
