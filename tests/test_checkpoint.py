"""Directories as they are found: indexes that do not fit, files that are not part of the model, many shards."""

import errno
import fcntl
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from manifests import read_manifest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kbne_edit import Checks, Edit, bake, fold, revert, verify
from kbne_edit.disk.checkpoint import Checkpoint
from kbne_edit.errors import CheckpointError, EditError, OutputError
from kbne_edit.files import parse_json
from tiny import tiny_model

EDIT = Edit("down", {0: {3: 2.0}, 1: {7: 4.0}})
INDEX = "model.safetensors.index.json"


@pytest.fixture
def base(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base", max_shard_size="60KB")
    return tmp_path / "base"


def _change(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def _state(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def _unnamed(index):
    del index["weight_map"]["model.norm.weight"]


def _ghost(index):
    index["weight_map"]["model.layers.9.mlp.down_proj.weight"] = min(index["weight_map"].values())


def _elsewhere(index):
    index["weight_map"]["model.norm.weight"] = min(index["weight_map"].values())
    index["weight_map"]["lm_head.weight"] = max(index["weight_map"].values())


@pytest.mark.parametrize("change", [_unnamed, _ghost, _elsewhere])
def test_an_index_that_does_not_fit_is_read_as_transformers_does(change, base, tmp_path):
    _change(base, change)
    expected = _state(base)
    assert Checkpoint.open(base).notes
    bake(base, tmp_path / "out", edit=EDIT)  # with both proofs
    got = _state(tmp_path / "out")
    changed = {name for name, value in expected.items() if not torch.equal(value, got[name])}
    assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)}


def _twice(folder):
    first, *_, last = sorted(folder.glob("*.safetensors"))
    name = next(iter(load_file(first)))
    save_file(load_file(last) | {name: load_file(first)[name] * 2}, last, {"format": "pt"})


REFUSED = {
    "null metadata": (lambda f: _change(f, lambda i: i.update(metadata=None)), 'write "metadata": {} into it'),
    "no metadata": (lambda f: _change(f, lambda i: i.pop("metadata")), 'write "metadata": {} into it'),
    "in two files": (_twice, "load the model with transformers and save it again"),
    "a shard is missing": (lambda f: max(f.glob("*.safetensors")).unlink(), "is missing: download it again"),
    "a key twice": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace("{", '{"vocab_size": 7,', 1)),
        "a key appears twice, 'vocab_size': remove one of them",
    ),
    "a pointer": (
        lambda f: (f / "tokenizer.json").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 9\n"
        ),
        r"tokenizer\.json is a Git LFS pointer.*git lfs pull",
    ),
    "an adapter beside it": (lambda f: (f / "adapter_config.json").write_text("{}"), "move adapter_config.json away"),
    "other weights named": (
        lambda f: (f / "config.json").write_text(
            json.dumps(json.loads((f / "config.json").read_text()) | {"transformers_weights": "x.safetensors"})
        ),
        "transformers_weights",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_names_a_cure_that_helps(case, base, tmp_path):
    spoil, message = REFUSED[case]
    spoil(base)
    with pytest.raises(CheckpointError, match=message):
        fold(base, EDIT, tmp_path / "out")


def test_an_index_beside_a_single_file_is_left_out(base, tmp_path):
    """Loaders that go by the index would look for files that are not there."""
    tiny_model("llama").save_pretrained(base)
    assert (base / INDEX).is_file() and (base / "model.safetensors").is_file()
    bake(base, tmp_path / "out", edit=EDIT, checks=Checks(behaviour=False))
    assert not (tmp_path / "out" / INDEX).exists()
    left_out = read_manifest(tmp_path / "out")["left_out"]
    assert INDEX in left_out and len(left_out) == 1 + len(list(base.glob("model-*.safetensors")))
    assert verify(base, tmp_path / "out", behaviour=False).ok


# ------------------------------------------------------------------------------------------------ what is carried over

PRIVATE = [
    *(".env", "prod.env", "id_rsa", "server.pem", "credentials.json", "secrets.yaml", "token.txt", ".netrc"),
    *(".git/config", ".ssh/id_ed25519", "checkpoint-500/model.safetensors", "runs/Nov30/events.out.tfevents.1"),
    *("optimizer.pt", "training_args.bin", "trainer_state.json", "rng_state_0.pth", "scheduler.pt", "train.log"),
    *("wandb/run/config.yaml", "global_step100/mp_rank_00_model_states.pt", "__pycache__/own.cpython-311.pyc"),
]
CARRIED = [
    "tokenizer.json",
    "LICENSE",
    "NOTICE",
    "own.py",
    "chat_template.jinja",
    "figures/loss.png",
    "tokenizer.model",
]


def test_neither_keys_nor_clutter_are_carried_over(base, tmp_path):
    for name in PRIVATE + CARRIED:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("{}")
    bake(base, tmp_path / "out", edit=EDIT, checks=Checks(behaviour=False))
    held = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert not held & set(PRIVATE) and held >= set(CARRIED)
    assert verify(base, tmp_path / "out", behaviour=False).ok
    revert(tmp_path / "out", tmp_path / "again")
    assert not {p.relative_to(tmp_path / "again").as_posix() for p in (tmp_path / "again").rglob("*")} & set(PRIVATE)


def test_other_formats_are_named(base, tmp_path):
    for name in ("pytorch_model.bin", "model.gguf", "extra/weights.npz", "onnx/model.onnx"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(b"x")
    bake(base, tmp_path / "out", edit=EDIT, checks=Checks(behaviour=False))
    expected = ["extra/weights.npz", "model.gguf", "onnx/model.onnx", "pytorch_model.bin"]
    assert sorted(read_manifest(tmp_path / "out")["left_out"]) == expected
    assert sorted(revert(tmp_path / "out", tmp_path / "again").left_out) == expected


# --------------------------------------------------------------------------------------------------------- fingerprint


def test_the_fingerprint_tells_names_dtypes_and_values_and_no_files(base, tmp_path):
    state = {k: v for path in base.glob("*.safetensors") for k, v in load_file(path).items()}

    def fingerprint(changed):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "config.json").write_bytes((base / "config.json").read_bytes())
        save_file(changed, folder / "model.safetensors")
        return Checkpoint.open(folder).fingerprint()

    name = "model.layers.0.mlp.up_proj.weight"
    others = [
        {key.replace("norm.weight", "norm.scale"): value for key, value in state.items()},
        state | {name: state[name].half()},
        state | {name: state[name].T.contiguous()},
        state | {name: state[name] + 1},
        {key: value for key, value in state.items() if key != name},
    ]
    result = [Checkpoint.open(base).fingerprint(), fingerprint(state), *map(fingerprint, others)]
    assert result[0] == result[1] and len(set(result)) == 6


FEW_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from kbne_edit import Edit, fold, revert, verify
base, out, again = sys.argv[1:]
fold(base, Edit("down", {0: {3: 2.0}, 1: {7: 4.0}}), out)
assert verify(base, out, behaviour=False).ok
revert(out, again)
"""


def test_more_shards_than_files_may_be_open(tmp_path):
    """As many models have under `ulimit -n 256`, here smaller."""
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 64
    tiny_model("llama").save_pretrained(tmp_path / "base", max_shard_size="1KB")
    state = {f"extra.{n}.weight": torch.ones(2) for n in range(90)}
    index = json.loads((tmp_path / "base" / INDEX).read_text())
    for name, value in state.items():
        save_file({name: value}, tmp_path / "base" / f"model-{name}.safetensors")
        index["weight_map"][name] = f"model-{name}.safetensors"
    (tmp_path / "base" / INDEX).write_text(json.dumps(index))
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 100
    folders = [tmp_path / name for name in ("base", "out", "again")]
    command = [sys.executable, "-c", FEW_FILES, *map(str, folders)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent)
    assert result.returncode == 0, result.stderr


# --------------------------------------------------------------------------------------------------- clones, many cores


def test_a_clone_and_many_cores_give_the_same_bytes(base, tmp_path, monkeypatch):
    """A file system that can clone, simulated by a copy: only what changes is written over it."""
    fold(base, EDIT, tmp_path / "plain")
    cloned = []

    def clone(target, request, source):
        os.lseek(source, 0, os.SEEK_SET)
        data = os.pread(source, os.fstat(source).st_size, 0)
        os.pwrite(target, data, 0)
        cloned.append(len(data))
        return 0

    monkeypatch.setattr(fcntl, "ioctl", clone)
    fold(base, EDIT, tmp_path / "cloned")
    monkeypatch.undo()
    assert len(cloned) >= len(list(base.iterdir()))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    fold(base, EDIT, tmp_path / "wide")
    files = [{path.name: path.read_bytes() for path in (tmp_path / f).iterdir()} for f in ("plain", "cloned", "wide")]
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_clone_that_finds_the_disk_full_is_no_reason_to_write(number, base, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "ioctl", full)
    with pytest.raises(OutputError, match=os.strerror(number)) as caught:
        fold(base, EDIT, tmp_path / "out")
    assert caught.value.exit_code == 3 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "raw, said",
    [
        (b"[" * 51 + b"]" * 51, "nested deeper than 50 levels"),
        (b'{"a": ' * 60 + b"1" + b"}" * 60, "nested deeper"),
        (b"[" * 100_000 + b"]" * 100_000, "not JSON that can be read"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "a key appears twice, 'c'"),
        (b" " * ((24 << 20) + 1), "more than 24 MB"),
        (b"[" + b"[]," * (1 << 20) + b"[]]", "more than 1,048,576 lists and objects"),
        (b"[" + b"1," * ((4 << 20) + 1) + b"1]", "more than 4,194,304 values"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"\xff", "not JSON"),
        (b"\xef\xbb\xbf{}", "save it as UTF-8 without one"),
    ],
)
def test_json_is_read_within_bounds(raw, said):
    with pytest.raises(CheckpointError, match=said):
        parse_json(raw, "x.json")
    assert parse_json(b"[" * 50 + b"]" * 50, "x.json")


def test_a_factor_that_overflows_the_dtype_is_refused(tmp_path):
    tiny_model("llama", torch.float16).save_pretrained(tmp_path / "base")
    with pytest.raises(EditError, match=r"down_proj.weight overflow F16: pass a smaller --factor"):
        fold(tmp_path / "base", Edit("down", {1: {3: 2.0**20}}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_changed_byte_gives_no_base_back(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    fold(tmp_path / "base", Edit("down", {1: {3: 2.0}}), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")  # of the final norm, which no edit touches
    with pytest.raises(CheckpointError, match="changed after baking"):
        revert(tmp_path / "out", tmp_path / "again")
    assert not (tmp_path / "again").exists()
