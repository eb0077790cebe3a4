"""What `--in` names, before anything is made of it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kbne_edit import Checks, Edit, Output, bake, fold, revert, verify
from kbne_edit.errors import CheckpointError, SourceError
from kbne_edit.hub.source import DEMO, resolved
from tiny import tiny_model

EDIT = Edit("down", {1: {5: 2.0}})
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "index, message",
    [
        ("[]", "has no weight_map"),
        ('{"weight_map": ["a.bin"]}', "has no weight_map"),
        ('{"weight_map": {"a": ["a.bin"]}}', "has no weight_map"),
        ('{"weight_map": {"a": "a.bin", "b": 3}}', "has no weight_map"),
        ('{"weight_map": {}, "weight_map": {}}', "a key appears twice"),
        ("[" * 100_000, "is not JSON that can be read"),
        (b"\xff{}", "is not JSON that can be read"),
        (" " * (25 << 20), "more than 24 MB"),
        ('{"weight_map": {"a": "../a.bin"}}', "names '../a.bin', which is missing"),
    ],
    ids=range(9),
)
def test_an_index_of_bin_weights_is_read_strictly(index, message, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model-1.bin").write_bytes(b"not reached")
    (tmp_path / "pytorch_model.bin.index.json").write_bytes(index if isinstance(index, bytes) else index.encode())
    with pytest.raises(SourceError, match=message) as error, resolved(str(tmp_path)):
        pass
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


# ------------------------------------------------------------------------------------------------------------- links


def _files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def base(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base", max_shard_size="60KB")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "extra").mkdir()
    (tmp_path / "base" / "extra" / "notes.txt").write_text("carried over")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    return tmp_path / "base"


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "secret").write_text("hunter2")
    return tmp_path / "secret"


def _absolute(base, secret):
    (base / "LICENSE").symlink_to(secret)


def _relative(base, secret):
    (base / "extra" / "LICENSE").symlink_to("../../secret")


def _two_steps(base, secret):
    (base / "extra" / "step").symlink_to(secret)
    (base / "LICENSE").symlink_to("extra/step")


def _configuration(base, secret):
    shutil.move(base / "config.json", secret)
    (base / "config.json").symlink_to(secret)


def _clone(base, secret):
    (base / ".git").mkdir()
    shutil.copyfile(secret, base / ".git" / "config")
    (base / "LICENSE").symlink_to(".git/config")


@pytest.mark.parametrize("link", [_absolute, _relative, _two_steps, _configuration, _clone])
def test_a_private_file_is_not_carried_over(link, base, secret, tmp_path):
    link(base, secret)
    for write in (fold, lambda *args: bake(str(args[0]), args[2], edit=args[1], checks=Checks(behaviour=False))):
        with pytest.raises(CheckpointError, match="a link to .*, which is outside") as error:
            write(base, EDIT, tmp_path / "out")
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_it_is_said_before_the_questions_are_asked(secret, tmp_path):
    with resolved("demo") as demo:
        shutil.copytree(demo.path, tmp_path / "base")
    (tmp_path / "base" / "LICENSE").symlink_to(secret)
    with pytest.raises(CheckpointError, match="which is outside"):
        bake(str(tmp_path / "base"), tmp_path / "out")
    assert not (tmp_path / "out.work").exists()
    bake(str(tmp_path / "base"), tmp_path / "delta", edit=EDIT, output=Output(form="delta"))  # copies nothing
    assert b"hunter2" not in b"".join(_files(tmp_path / "delta").values())


def test_nor_through_the_conversion_of_bin_weights(base, secret, tmp_path):
    torch.save({k: v for p in base.glob("*.safetensors") for k, v in load_file(p).items()}, base / "pytorch_model.bin")
    for path in base.glob("model*"):
        path.unlink()
    bake(str(base), tmp_path / "first", edit=EDIT, checks=Checks(behaviour=False))
    assert (tmp_path / "first" / "extra" / "notes.txt").is_file()
    _absolute(base, secret)
    with pytest.raises(CheckpointError, match="which is outside"):
        bake(str(base), tmp_path / "out", edit=EDIT, checks=Checks(behaviour=False))


def _linked_shards(base, tmp_path):
    """Large weights on another disk."""
    for path in base.glob("*.safetensors"):
        target = tmp_path / "disk" / path.name
        target.parent.mkdir(exist_ok=True)
        shutil.move(path, target)
        path.symlink_to(target)
    return base


def _links_inside(base, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        shutil.move(base / name, base / "extra" / name)
        (base / name).symlink_to(Path("extra", name))
    return base


def _cache(base, tmp_path):
    """The Hub's cache: blobs named by their hash, and a snapshot of relative links to them. Reached by a link."""
    repo = tmp_path / "disk" / "models--org--tiny"
    for name, number in zip(_files(base), range(99), strict=False):
        blob, link = repo / "blobs" / f"{number:040x}", repo / "snapshots" / "c0ffee" / name
        blob.parent.mkdir(parents=True, exist_ok=True), link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / name, blob)
        link.symlink_to(Path(*[".."] * (2 + name.count("/")), "blobs", blob.name))
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    return tmp_path / "cache" / "models--org--tiny" / "snapshots" / "c0ffee"


@pytest.mark.parametrize("arrange", [_linked_shards, _links_inside, _cache])
def test_other_links_are_followed(arrange, base, tmp_path):
    shutil.copytree(base, tmp_path / "plain")
    linked = arrange(base, tmp_path)
    plain = tmp_path / "plain"
    if arrange is _links_inside:  # what is linked to is carried over as well
        for name in ("config.json", "tokenizer.json"):
            shutil.copyfile(plain / name, plain / "extra" / name)
    for source, out in ((plain, "a"), (linked, "b")):
        fold(source, EDIT, tmp_path / out)
    assert _files(tmp_path / "a") == _files(tmp_path / "b")
    assert not any(path.is_symlink() for path in (tmp_path / "b").rglob("*"))
    assert verify(linked, tmp_path / "b", behaviour=False).ok
    revert(tmp_path / "b", tmp_path / "again")
    assert _files(tmp_path / "again") == _files(plain)


def _other_model(snapshot, secret):
    other = snapshot.parents[2] / "models--org--private" / "blobs" / "00"
    other.parent.mkdir(parents=True)
    shutil.copyfile(secret, other)
    (snapshot / "LICENSE").symlink_to(other)


def _false_blobs(snapshot, secret):
    """A clone that is laid out as a cache is, with a link in the place of the blobs."""
    blobs = snapshot.parents[1] / "blobs"
    for link in [path for path in snapshot.rglob("*") if path.is_symlink()]:
        content = link.read_bytes()
        link.unlink()
        link.write_bytes(content)
    shutil.rmtree(blobs)
    blobs.symlink_to(secret.parent, target_is_directory=True)
    (snapshot / "LICENSE").symlink_to("../../blobs/secret")


@pytest.mark.parametrize("link", [_other_model, _false_blobs])
def test_a_cache_is_no_way_out_either(link, base, secret, tmp_path):
    snapshot = _cache(base, tmp_path)
    link(snapshot, secret)
    with pytest.raises(CheckpointError, match="which is outside"):
        fold(snapshot, EDIT, tmp_path / "out")


def _bin(folder, state, **how):
    """A demo whose weights are a .bin file with this state."""
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save(state, folder / "pytorch_model.bin", **how)
    return folder


@pytest.mark.parametrize("zipped", [True, False])  # False: as torch before 1.6 wrote it
def test_bin_weights_of_every_build_keep_their_values(zipped, tmp_path):
    """Tied ones under each of their names, views as they are read, parameters, empty ones, one value for all."""
    tied = torch.arange(12.0).reshape(3, 4).bfloat16()
    state = {
        "tied": tied,
        "again": tied,
        "turned": tied.T,
        "part": tied[1:, 2:],
        "row": tied[1],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "none": torch.zeros(0, 4),
        "same": torch.ones(1).expand(5),
        "whole": torch.arange(3),
        "half": torch.ones(2, dtype=torch.float16),
    }
    with resolved(str(_bin(tmp_path / "bin", state, _use_new_zipfile_serialization=zipped))) as result:
        got = load_file(result.path / "model.safetensors")
    assert got.keys() == state.keys()
    for name, tensor in state.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


def test_bin_weights_become_the_file_that_safetensors_writes(tmp_path):
    dtypes = [
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.float8_e5m2,
        torch.float8_e4m3fn,
        torch.int16,
        torch.float16,
        torch.bfloat16,
        torch.int32,
        torch.float32,
        torch.complex64,
        torch.float64,
        torch.int64,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    ]
    state = {f"{name} {dtype}": torch.arange(5).to(dtype) for dtype in dtypes for name in ("b", "a")}
    state |= {"scalar": torch.tensor(3.0), "none": torch.zeros(2, 0), "turned": torch.arange(6.0).reshape(2, 3).T}
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "expected", metadata={"format": "pt"})
    with resolved(str(_bin(tmp_path / "bin", state))) as result:
        assert (result.path / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.ones(2, dtype=torch.complex128),
        torch.ones(2, device="meta"),
    ],
    ids=["sparse", "complex128", "without values"],
)
def test_bin_weights_that_are_no_plain_numbers_are_refused(tensor, tmp_path):
    folder = _bin(tmp_path / "bin", {"w": tensor})
    with pytest.raises(SourceError, match="cannot be read as plain weights"), resolved(str(folder)):
        pass


# Prints by how many bytes the memory that no file backs grew while the weights were converted, at the most.
GROWTH = """
import re, sys, threading
from pathlib import Path
import safetensors.torch, torch
from kbne_edit.hub.source import resolved
def used():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
def watch():
    while not done.is_set():
        seen.append(used())
done, seen = threading.Event(), [used()]
watcher = threading.Thread(target=watch)
watcher.start()
with resolved(sys.argv[1]) as found:
    done.set(), watcher.join()
print(max(seen) - seen[0], len(seen))
"""


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_bin_weights_are_not_held_in_memory(shared, tmp_path):
    flat = torch.zeros(64, 2, 2**19)  # 268 MB, 4 MB each
    state = {f"{i}": weight if shared else weight.clone() for i, weight in enumerate(flat)}
    state |= {"again": state["1"], "turned": state["1"].T}
    folder = _bin(tmp_path / "bin", state)
    command = [sys.executable, "-c", GROWTH, str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    growth, samples = map(int, result.stdout.split())
    assert growth < 40e6 and samples > 20
