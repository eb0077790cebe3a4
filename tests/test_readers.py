"""What the software that serves models makes of an output: it globs for files by their ending and goes by names.

The loaders below follow the rules of vLLM and SGLang (files of the index, if there is one), TGI (every file, no name
twice) and nano-vllm (every file, each tensor copied into the parameter of its name, broadcast where it fits).
"""

import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from manifests import read_manifest, sha256, write_manifest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kbne_edit import Checks, Edit, Output, apply, bake, push, revert, verify
from kbne_edit.reporting import contents
from tiny import tiny_model

DEMO = Path(__file__).resolve().parent.parent / "kbne_edit" / "demo"
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
    "resharded": (None, "25KB"),
    "joined": ("20KB", "1GB"),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def made(request, tmp_path_factory):
    """(base, output)"""
    shards, size = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp("readers")
    tiny_model("llama", torch.bfloat16).save_pretrained(folder / "base", max_shard_size=shards or "5GB")
    bake(folder / "base", folder / "out", edit=EDIT, output=Output(shard_size=size))
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
    bake(base, out.parent / "delta", edit=EDIT, output=Output(form="delta", overwrite=True))
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
    bake(base, out.parent / "delta", edit=EDIT, output=Output(form="delta", overwrite=True))
    bake(base, out.parent / "adapter", edit=EDIT, output=Output(form="peft", overwrite=True))
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
    manifest = (earlier / "kbne_edit.json").read_bytes()
    forged = read_manifest(earlier)  # the undo file of earlier versions says nothing of the fold
    forged["edit"]["base"] = "0" * 64
    write_manifest(earlier, forged)
    assert any("another base" in fault for fault in verify(base, earlier, edit=EDIT, behaviour=False).faults)
    (earlier / "kbne_edit.json").write_bytes(manifest)
    (earlier / "kbne_undo.kbne").write_bytes((out / "kbne_undo.kbne").read_bytes())  # both: one of them is a stray
    assert not verify(base, earlier, behaviour=False).ok


def test_an_earlier_delta_is_applied(made, tmp_path):
    base, _ = made
    bake(base, tmp_path / "delta", edit=EDIT, output=Output(form="delta"))
    bake(base, tmp_path / "baked", edit=EDIT, checks=Checks(behaviour=False))
    _as_before(tmp_path / "delta", "kbne_delta.kbne")
    for given in (tmp_path / "delta", tmp_path / "delta" / "kbne_delta.safetensors"):
        apply(given, base, tmp_path / "out", checks=Checks(behaviour=False), output=Output(overwrite=True))
        for path in _globbed(tmp_path / "baked"):
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


# ------------------------------------------------------------------------- other software, where it is installed


def _installed(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"needs {name}")


@pytest.fixture(scope="module", params=LAYOUTS)
def served(request, tmp_path_factory):
    """The demo, with its tokenizer, edited: the output in this layout."""
    shards, size = {"single": (None, None), "sharded": ("100KB", None), "resharded": (None, "150KB")}.get(
        request.param, ("100KB", "1GB")
    )
    folder = tmp_path_factory.mktemp("served")
    AutoModelForCausalLM.from_pretrained(DEMO).save_pretrained(folder / "base", max_shard_size=shards or "5GB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "base" / name).write_bytes((DEMO / name).read_bytes())
    edit = Edit("down", {0: {3: 2.0}, 1: {7: 4.0}, 3: {100: 0.5}})
    bake(
        folder / "base",
        folder / "out",
        edit=edit,
        output=Output(shard_size=size),
        checks=Checks(behaviour=False, measure=False),
    )
    return folder / "out"


def _equal(state, out):
    expected = _transformers(out)
    return state.keys() == expected.keys() and all(torch.equal(state[name], v) for name, v in expected.items())


@pytest.mark.slow
@_installed("ctranslate2")
def test_ctranslate2(served, tmp_path):
    import ctranslate2

    ids = [2, 17, 40, 8, 99, 140, 33]
    ctranslate2.converters.TransformersConverter(str(served)).convert(str(tmp_path / "converted"))
    generator = ctranslate2.Generator(str(tmp_path / "converted"), device="cpu", compute_type="float32")
    tokens = AutoTokenizer.from_pretrained(served).convert_ids_to_tokens(ids)
    got = torch.tensor(np.array(generator.forward_batch([tokens])))[0]
    model = AutoModelForCausalLM.from_pretrained(served, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    with torch.no_grad():
        expected, unedited = (m(torch.tensor([ids])).logits[0] for m in (model, base))
    assert (got - expected).abs().max() < 1e-4 < 0.1 < (unedited - expected).abs().max()


@pytest.mark.slow
@_installed("mergekit")
def test_mergekit(served):
    from mergekit.io import LazyTensorLoader, ShardedTensorIndex

    index = ShardedTensorIndex.from_disk(str(served))
    loader = LazyTensorLoader(index, lazy_unpickle=True)
    assert _equal({name: loader.get_tensor(name) for name in index.tensor_paths}, served)


@pytest.mark.slow
@_installed("vllm")
def test_vllm_s_own_iterator(served):
    from vllm.model_executor.model_loader import weight_utils

    files = list(map(str, _globbed(served)))
    files = weight_utils.filter_duplicate_safetensors_files(files, str(served), "model.safetensors.index.json")
    assert _equal(dict(weight_utils.safetensors_weights_iterator(files, False)), served)


@pytest.mark.slow
@pytest.mark.skipif("CONVERT_HF_TO_GGUF" not in os.environ, reason="needs llama.cpp's script: CONVERT_HF_TO_GGUF=PATH")
def test_llama_cpp_converts_it(served, tmp_path):
    """Its check of the pre-tokenizer is left out: it knows the hashes of published tokenizers alone."""
    from gguf import GGUFReader, dequantize

    script = (
        "import sys, pathlib\n"
        "path, out, to = sys.argv[1:]\n"
        "sys.path.insert(0, str(pathlib.Path(path).parent))\n"
        "import convert_hf_to_gguf as convert\n"
        "kind = getattr(convert, 'TextModel', None) or convert.Model\n"
        "kind.get_vocab_base_pre = lambda self, tokenizer: 'gpt-2'\n"
        "place = ['--model', out] if '\"--model\"' in pathlib.Path(path).read_text() else [out]\n"
        "sys.argv = ['convert', *place, '--outfile', to, '--outtype', 'f32']\n"
        "convert.main()\n"
    )
    to = tmp_path / "out.gguf"
    subprocess.run([sys.executable, "-c", script, os.environ["CONVERT_HF_TO_GGUF"], served, to], check=True)
    result = {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(to).tensors}
    expected = AutoModelForCausalLM.from_pretrained(served, dtype=torch.float32).state_dict()
    assert len(result) == len(expected)
    for layer in range(4):
        weight = expected[f"model.layers.{layer}.mlp.down_proj.weight"].numpy()
        assert np.array_equal(result[f"blk.{layer}.ffn_down.weight"], weight)
