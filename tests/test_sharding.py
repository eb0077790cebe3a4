"""Weights resharded into files of a given size: the same tensors for every reader, and the way back to the byte."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command import run_command
from huggingface_hub import ModelCard
from manifests import read_manifest, write_manifest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kbne_edit import Checks, Edit, Output, apply, bake, fold, push, revert, verify
from kbne_edit.disk.checkpoint import Checkpoint
from kbne_edit.errors import CheckpointError, EditError, InputError, KbneError, ProofError
from kbne_edit.folding import rewrite
from kbne_edit.reporting import contents
from mutants import reseal, spoil_value
from tiny import tiny_model

ROOT = Path(__file__).resolve().parent.parent
EDIT = Edit("down", {0: {3: 2.0, 47: 0.3}, 2: {10: 3.5}})
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module", params=["single", "shards"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / request.param
    size = {"single": "1GB", "shards": "20KB"}[request.param]
    tiny_model("llama", torch.bfloat16).save_pretrained(folder, max_shard_size=size)
    return folder


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _weights(folder):
    return {name: tensor for path in folder.glob("model*.safetensors") for name, tensor in load_file(path).items()}


def _check_layout(folder, most):
    """Standard names, sizes, and an index that is right, by safetensors' own reader. Returns how many files."""
    shards = sorted(path.name for path in folder.glob("*.safetensors") if path.name != "kbne_undo.kbne")
    held = {}
    for name in shards:
        with safe_open(folder / name, "pt") as file:
            held |= dict.fromkeys(file.keys(), name)
            assert file.metadata()["format"] == "pt"
            assert (folder / name).stat().st_size <= most or len(file.keys()) == 1
    if len(shards) == 1:
        assert shards == ["model.safetensors"] and not (folder / INDEX).exists()
    else:
        assert shards == [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
        index = json.loads((folder / INDEX).read_text())
        assert index["weight_map"] == held
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in _weights(folder).values())
    return len(shards)


@pytest.mark.parametrize("size", [1, 9_000, "25KB", "40KB", "40KiB", "1GB"])
def test_the_same_tensors_in_other_files_and_back(size, base, tmp_path):
    fold(base, EDIT, tmp_path / "plain")
    manifest = fold(base, EDIT, tmp_path / "out", shard_size=size)
    most = {"25KB": 25_000, "40KB": 40_000, "40KiB": 40_960, "1GB": 10**9}.get(size, size)
    count = _check_layout(tmp_path / "out", most)
    assert count == (30 if size == 1 else 1 if size == "1GB" else count) and (most > 40_960 or count > 1)
    shards = Checkpoint.open(tmp_path / "out").shards
    for shard, after in zip(shards, shards[1:], strict=False):  # nothing more would have fitted
        first = after.tensors[0]
        assert shard.size + (first.end - first.start) + 200 > most
    expected, got = _weights(tmp_path / "plain"), _weights(tmp_path / "out")
    assert expected.keys() == got.keys() and all(torch.equal(got[name], expected[name]) for name in got)
    report = verify(base, tmp_path / "out", behaviour=False)
    assert report.ok and report.files.edit_from == "manifest", report.faults
    before = _files(base)
    for name, entry in manifest.resharded.items():
        if name != INDEX:
            (tmp_path / "x").write_bytes(before[name])
            names = load_file(tmp_path / "x")
            holding = [
                path.name for path in (tmp_path / "out").glob("model*s") if names.keys() & load_file(path).keys()
            ]
            assert sorted(holding) == list(entry.into)
    revert(tmp_path / "out", tmp_path / "again")
    assert _files(tmp_path / "again") == before


def test_in_many_small_chunks(base, tmp_path, monkeypatch):
    """Tensors of a real size are read in several; those that are edited in whole rows."""
    fold(base, EDIT, tmp_path / "one", shard_size="25KB")
    monkeypatch.setattr(rewrite, "CHUNK", 250)
    fold(base, EDIT, tmp_path / "many", shard_size="25KB")
    assert _files(tmp_path / "one") == _files(tmp_path / "many")
    assert verify(base, tmp_path / "many", behaviour=False).ok
    _flip(max((tmp_path / "many").glob("model-*.safetensors")))
    faults = verify(base, tmp_path / "many", behaviour=False).faults
    assert len(faults) == 2 and "is not what the edit gives" in faults[0]
    revert(tmp_path / "one", tmp_path / "again")
    assert _files(tmp_path / "again") == _files(base)


def test_another_process_computes_the_same_logits(base, tmp_path):
    bake(str(base), tmp_path / "plain", edit=EDIT, checks=Checks(behaviour=False))
    bake(str(base), tmp_path / "out", edit=EDIT, output=Output(shard_size="25KB"))  # with both proofs
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A;"
        "a, b = (A.from_pretrained(path).eval()(torch.arange(3, 40)[None]).logits for path in sys.argv[1:]);"
        "print(torch.equal(a, b), 'kbne_edit' in sys.modules)"
    )
    paths = [tmp_path / "plain", tmp_path / "out"]
    result = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.split() == ["True", "False"], result.stderr


def test_a_layout_that_is_there_already_is_left_alone(base, tmp_path):
    """Byte for byte what `fold` writes without the option."""
    fold(base, EDIT, tmp_path / "once", shard_size="25KB")
    fold(tmp_path / "once", EDIT, tmp_path / "plain")
    fold(tmp_path / "once", EDIT, tmp_path / "same", shard_size="25KB")
    assert _files(tmp_path / "plain") == _files(tmp_path / "same")
    assert "resharded" not in read_manifest(tmp_path / "same")


def test_as_many_files_with_other_tensors(tmp_path):
    """The names are those of the base's files, which says nothing of what is in them."""
    tiny_model("llama").save_pretrained(tmp_path / "base", max_shard_size="50KB")
    fold(tmp_path / "base", EDIT, tmp_path / "out", shard_size="48KB")
    names = [sorted(p.name for p in (tmp_path / f).glob("model-*")) for f in ("base", "out")]
    assert names[0] == names[1] and "resharded" in read_manifest(tmp_path / "out")
    assert verify(tmp_path / "base", tmp_path / "out", behaviour=False).ok
    for name in ("kbne_edit.json", "kbne_undo.kbne"):
        (tmp_path / "out" / name).unlink()
    report = verify(tmp_path / "base", tmp_path / "out", behaviour=False)
    assert report.ok and report.edit.factors == EDIT.factors


def test_verify_without_a_manifest(base, tmp_path):
    fold(base, EDIT, tmp_path / "out", shard_size="25KB")
    for name in ("kbne_edit.json", "kbne_undo.kbne"):
        (tmp_path / "out" / name).unlink()
    report = verify(base, tmp_path / "out", behaviour=False)
    assert report.ok and report.edit.factors == EDIT.factors and report.files.edit_from == "recovered from the weights"
    shard = max((tmp_path / "out").glob("model-*.safetensors"))
    weights = load_file(shard)
    next(iter(weights.values())).view(-1)[-1] += 1
    save_file(weights, shard)
    assert not verify(base, tmp_path / "out", edit=EDIT, behaviour=False).ok


def test_dtypes_of_several_widths_stay_aligned(tmp_path):
    """A mask of odd size, an empty tensor, a scalar between others: each where its width divides the offset."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    odd = {
        "a.mask": torch.ones(13, dtype=torch.bool),
        "b.steps": torch.arange(5),
        "c.scale": torch.tensor(2.5),
        "d.half": torch.ones(3, dtype=torch.float16),
        "e.empty": torch.zeros(0, 4),
        "f.bytes": torch.zeros(7).byte(),
    }
    save_file(load_file(path) | odd, path, metadata={"format": "pt", "note": "kept"})
    fold(tmp_path / "base", EDIT, tmp_path / "out", shard_size="60KB")
    assert _check_layout(tmp_path / "out", 60_000) > 1
    got = _weights(tmp_path / "out")
    assert all(torch.equal(got[name], tensor) for name, tensor in odd.items())
    width = {"F32": 4, "F16": 2, "I64": 8, "BOOL": 1, "U8": 1}
    for shard in Checkpoint.open(tmp_path / "out").shards:
        assert all(tensor.start % width[tensor.dtype] == 0 for tensor in shard.tensors)
        with safe_open(shard.path, "pt") as file:
            assert file.metadata() == {"format": "pt", "note": "kept"}
    revert(tmp_path / "out", tmp_path / "again")
    assert _files(tmp_path / "again") == _files(tmp_path / "base")


def test_a_header_that_no_writer_of_ours_makes(tmp_path):
    """Spaces, another order of keys, a length that eight does not divide: all come back."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = dict(reversed(json.loads(data[8 : 8 + length]).items()))
    text = json.dumps(header, indent=3).encode()
    text += b" " * (3 - len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    fold(tmp_path / "base", EDIT, tmp_path / "out", shard_size="60KB")
    assert _check_layout(tmp_path / "out", 60_000) > 1
    assert verify(tmp_path / "base", tmp_path / "out", behaviour=False).ok
    revert(tmp_path / "out", tmp_path / "again")
    assert _files(tmp_path / "again") == _files(tmp_path / "base")


@pytest.mark.parametrize("size", ["5", "5 apples", "0GB", 0, -1])
def test_what_is_no_size(size, base, tmp_path):
    with pytest.raises(InputError, match="shard size"):
        fold(base, EDIT, tmp_path / "out", shard_size=size)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["peft", "delta"])
def test_other_forms_have_no_shards(form, base, tmp_path):
    with pytest.raises(InputError, match="--shard-size"):
        bake(str(base), tmp_path / "out", edit=EDIT, output=Output(form=form, shard_size="5GB"))


# ----------------------------------------------------------------------------------------------- what must be noticed


@pytest.fixture
def out(base, tmp_path):
    fold(base, EDIT, tmp_path / "out", shard_size="25KB")
    return tmp_path / "out"


def _flip(path, position=-3):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def _metadata(path):
    save_file(load_file(path), path, metadata={"format": "pt", "by": "someone"})


TAMPERING = {
    "weight": lambda out: _flip(max(out.glob("model-*.safetensors"))),
    "metadata": lambda out: _metadata(max(out.glob("model-*.safetensors"))),
    "index": lambda out: (out / INDEX).write_text((out / INDEX).read_text() + " "),
    "undo": lambda out: _flip(out / "kbne_undo.kbne"),
    "manifest": lambda out: (out / "kbne_edit.json").write_text((out / "kbne_edit.json").read_text() + "\n"),
}


@pytest.mark.parametrize("case", TAMPERING)
def test_tampering_is_found(case, base, out, tmp_path):
    TAMPERING[case](out)
    assert not verify(base, out, behaviour=False).ok
    if case not in ("metadata", "index"):  # which the base has not
        with pytest.raises(CheckpointError, match="changed"):
            revert(out, tmp_path / "again")
        assert not (tmp_path / "again").exists()
    with pytest.raises(KbneError, match="changed|proof"):
        push(out, "org/other", dry_run=True)


def test_another_base_is_found(base, out, tmp_path):
    shutil.copytree(base, tmp_path / "other")
    path = max((tmp_path / "other").glob("*.safetensors"))
    save_file(load_file(path), path, metadata={"format": "pt", "by": "someone"})  # the same tensors in another file
    faults = verify(tmp_path / "other", out, behaviour=False).faults
    assert list(faults) == [f"{path.name} of the base is not the file that was baked (SHA-256 differs)"]
    weights = load_file(path)
    weights[min(weights)].view(-1)[0] += 1
    save_file(weights, path)
    assert len(verify(tmp_path / "other", out, behaviour=False).faults) == 2


@pytest.mark.parametrize("name", ["../model.safetensors", "/tmp/model.safetensors", "a/model.safetensors", "x.py", ""])
def test_a_manifest_cannot_name_a_place_outside(name, out, tmp_path):
    manifest = read_manifest(out)
    manifest["resharded"] = {name: next(iter(manifest["resharded"].values()))}
    del manifest["sha256"]
    write_manifest(out, manifest)
    with pytest.raises(CheckpointError, match="damaged"):
        revert(out, tmp_path / "again")


def test_hostile_manifests_and_heads(base, out, tmp_path):
    """By someone who can compute the hashes: refused in one line, or the base all the same."""
    import random

    rng, refused, sound = random.Random(0), 0, _files(out)
    for _ in range(60):
        shutil.rmtree(out)
        out.mkdir()
        for name, data in sound.items():
            (out / name).write_bytes(data)
        if rng.random() < 0.5:
            manifest = json.loads(sound["kbne_edit.json"])
            manifest["resharded"] = spoil_value(rng, manifest["resharded"])
            (out / "kbne_edit.json").write_text(json.dumps(manifest))
        else:
            path = out / "kbne_undo.kbne"
            with safe_open(path, "np") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith("kbne.header.")}
            name = rng.choice(sorted(tensors))
            head = tensors[name].tobytes()
            header = spoil_value(rng, json.loads(head[0 if name.endswith(INDEX) else 8 :]))
            _replace(path, name, head[: 0 if name.endswith(INDEX) else 8] + json.dumps(header).encode())
        reseal(out)
        try:
            revert(out, tmp_path / "again", overwrite=True)
            assert _files(tmp_path / "again") == _files(base)
        except KbneError as error:
            assert "\n" not in str(error).encode("unicode_escape").decode()
            refused += 1
    assert refused > 40


def _replace(path, name, content):
    """The undo file with other bytes under this name."""
    from kbne_edit.disk.tensors import Shard, read_raw, write_tensors

    shard = Shard.open(path)
    kinds = {"BF16": np.uint16, "U8": np.uint8}
    tensors = {
        t.name: (t.dtype, np.frombuffer(read_raw(shard, t), kinds[t.dtype]).reshape(t.shape)) for t in shard.tensors
    }
    write_tensors(path, tensors | {name: ("U8", np.frombuffer(content, np.uint8))})


# ---------------------------------------------------------------------------------- what else is made of such an output


def test_apply(base, tmp_path):
    bake(str(base), tmp_path / "delta", edit=EDIT, output=Output(form="delta"))
    bake(str(base), tmp_path / "baked", edit=EDIT, output=Output(shard_size="25KB"), checks=Checks(behaviour=False))
    assert apply(tmp_path / "delta", base, tmp_path / "out", output=Output(shard_size="25KB")).ok
    assert {n: d for n, d in _files(tmp_path / "out").items() if n.startswith("model")} == {
        n: d for n, d in _files(tmp_path / "baked").items() if n.startswith("model")
    }
    assert verify(base, tmp_path / "out", behaviour=False).ok
    revert(tmp_path / "out", tmp_path / "again")
    assert _files(tmp_path / "again") == _files(base)


def test_apply_still_compares_with_what_the_delta_promises(base, tmp_path):
    bake(str(base), tmp_path / "delta", edit=EDIT, output=Output(form="delta"))
    path = tmp_path / "delta" / "kbne_delta.kbne"
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["kbne"])
    promise = json.loads(json.dumps(about))
    for entry in promise["files"].values():
        entry["out"] = entry["in"]
    save_file(load_file(path), path, metadata={"kbne": json.dumps(promise)})
    with pytest.raises(ProofError, match="promises"):
        apply(tmp_path / "delta", base, tmp_path / "out", output=Output(shard_size="25KB"))
    for entry in (*about["files"].values(), about["weights"]):
        entry["in"] = entry["out"]
    save_file(load_file(path), path, metadata={"kbne": json.dumps(about)})
    with pytest.raises(EditError, match="SHA-256 differs"):
        apply(tmp_path / "delta", base, tmp_path / "out", output=Output(shard_size="25KB"))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def proven(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("proven") / "out"
    bake(str(base), folder, edit=EDIT, output=Output(shard_size="25KB"))
    return folder


def test_report_card_and_push(base, proven):
    count = len(list(proven.glob("model-*.safetensors")))
    report = contents.report(proven)
    old = {row.name: row for row in report.provenance.resharded}
    assert set(old) == {path.name for path in base.glob("model*")}
    page = report.html()
    assert all(row.sha256 in page for row in old.values()) and "resharded" in page
    before = len(list(base.glob("*.safetensors")))
    assert f"({before} became {count})" in ModelCard.load(proven / "README.md").text
    sent = push(proven, "org/other", dry_run=True).files
    assert set(sent) == {path.name for path in proven.iterdir()}


def test_on_the_command_line(tmp_path):
    def run(*args):
        done = run_command(*args, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    EDIT.save(tmp_path / "edit.json")
    bake_it = ["bake", "--in", "demo", "--edit", "edit.json", "--shard-size", "200KB", "--no-behaviour", "--out", "out"]
    planned = run(*bake_it, "--dry-run")
    assert not (tmp_path / "out").exists()
    run(*bake_it)
    count = _check_layout(tmp_path / "out", 200_000)
    assert f"weights: in {count} files instead of 1" in planned
    index = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert all(f"  {name} ({index[name]})" in planned for name in read_manifest(tmp_path / "out")["tensors"])
    run("revert", "out", "--out", "again")
    assert _files(tmp_path / "again") == _files(ROOT / "kbne_edit" / "demo")


def test_new_files_say_their_format_where_the_base_does_not(tmp_path):
    """Loaders ask for it."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    save_file(load_file(file), file)
    fold(tmp_path / "base", Edit("down", {0: {3: 2.0}}), tmp_path / "out", shard_size="40KB")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        with safe_open(shard, "pt") as held:
            assert held.metadata() == {"format": "pt"}
