""".bin files: which of them are the model is asked of transformers itself, and hostile ones are read within bounds."""

import io
import json
import pickle
import resource
import shutil
import struct
import time
import zipfile

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kbne_edit.disk import bins
from kbne_edit.disk.bins import read_bin
from kbne_edit.errors import SourceError
from kbne_edit.hub.source import resolved
from tiny import tiny_model


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(1)
    return tiny_model("llama").state_dict()


@pytest.fixture
def folder(state, tmp_path):
    """A llama without weights."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    return tmp_path / "model"


def _sharded(folder, state, count, factor=1.0, index=True):
    """The state, scaled, in `count` files; with the index that names them."""
    names = sorted(state)
    weight_map = {}
    for number in range(count):
        file = f"pytorch_model-{number + 1:05}-of-{count:05}.bin"
        part = names[number::count]
        torch.save({name: state[name] * factor for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if index:
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
        (folder / "pytorch_model.bin.index.json").write_text(text)


def _ema(folder, state):
    torch.save(state, folder / "pytorch_model.bin")
    for name in ("pytorch_model_ema.bin", "pytorch_model.fp16.bin", "pytorch_model_fsdp.bin", "pytorch_model-9.bin"):
        torch.save({key: value * 0.5 for key, value in state.items()}, folder / name)


def _stale(folder, state):
    _sharded(folder, state, 3, 0.5, index=False)
    _sharded(folder, state, 2)


def _single_beside_shards(folder, state):
    torch.save(state, folder / "pytorch_model.bin")
    _sharded(folder, state, 2, 0.5)


def _twice(folder, state):
    """A tensor in two files: the later one counts."""
    _sharded(folder, state, 2)
    second = folder / "pytorch_model-00002-of-00002.bin"
    name = sorted(state)[0]
    torch.save(torch.load(second) | {name: state[name] * 3}, second)


def _fp16_safetensors(folder, state):
    torch.save(state, folder / "pytorch_model.bin")
    from safetensors.torch import save_file

    save_file({key: value.half() for key, value in state.items()}, folder / "model.fp16.safetensors")


@pytest.mark.parametrize("arrange", [_ema, _stale, _single_beside_shards, _twice, _fp16_safetensors])
def test_what_transformers_loads_is_what_is_taken(arrange, folder, state):
    arrange(folder, state)
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    with resolved(str(folder)) as result:
        got = {}
        for path in result.path.glob("model*.safetensors"):
            held = load_file(path)
            assert not held.keys() & got.keys()
            got |= held
        loaded = AutoModelForCausalLM.from_pretrained(result.path).state_dict()
    assert all(torch.equal(got[name], value) for name, value in expected.items() if name in got)
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_weights_in_safetensors_come_first(folder, state):
    tiny_model("llama").save_pretrained(folder)
    torch.save({key: value * 0.5 for key, value in state.items()}, folder / "pytorch_model.bin")
    with resolved(str(folder)) as result:
        assert result.path == folder


# ------------------------------------------------------------------------------------------------------- hostile files


def _archive(path, table, storages=(), compress=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("archive/data.pkl", table)
        archive.writestr("archive/byteorder", "little")
        for key, data in storages:
            archive.writestr(f"archive/data/{key}", data)


def _tower(height):
    """Tuples of two, each holding the one before it twice: 2 ** height of them to whoever hashes or prints the last."""
    text = b")q\x00"
    for level in range(height):
        text += b"h%bh%b\x86q%b" % (bytes([level]), bytes([level]), bytes([level + 1]))
    return text


def _tensor(count, size, strides=b"K\x01", offset=b"K\x00"):
    """The pickle of {"w": a tensor} over a storage of `count` floats. size, strides, offset: as pickled."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + count + b"tQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + size + b"\x85" + strides + b"\x85\x89}tR"
    return b"\x80\x02}X\x01\x00\x00\x00w" + call + b"s."


def _many_names(path):
    base = torch.zeros(1 << 18)
    torch.save({f"t{number}": base for number in range(1000)}, path)


class _Evil:
    def __reduce__(self):
        return (io.open, ("owned", "w"))


HUGE = b"\x8a\x05" + (10**10).to_bytes(5, "little")
HOSTILE = {
    "tuple as a key": lambda p: _archive(p, b"\x80\x02}" + _tower(60) + b"K\x01s."),
    "tuple called": lambda p: _archive(p, b"\x80\x02" + _tower(60) + b")R."),
    "tuple set upon": lambda p: _archive(p, b"\x80\x02" + _tower(60) + b"}b."),
    "forty megabytes, deflated": lambda p: _archive(
        p, b"\x80\x02}" + b"N0" * 20_000_000 + b".", (), zipfile.ZIP_DEFLATED
    ),
    "steps": lambda p: _archive(p, b"\x80\x02" + b"N" * (bins.MOST_STEPS + 1) + b"."),
    "a long table": lambda p: _archive(p, b"\x80\x02" + b"X\xff\xff\xff\x7f" + b"x" * (bins.MOST_PICKLE + 9)),
    "names of one storage": _many_names,
    "one value for all": lambda p: torch.save({"w": torch.ones(1).expand(10**9)}, p),
    "one value for all, as before": lambda p: torch.save(
        {"w": torch.ones(1).expand(10**9)}, p, _use_new_zipfile_serialization=False
    ),
    "beyond its storage": lambda p: _archive(p, _tensor(b"K\x02", b"K\x03"), [("0", bytes(8))]),
    "beyond its storage by an offset": lambda p: _archive(
        p, _tensor(b"K\x02", b"K\x01", offset=b"K\x02"), [("0", bytes(8))]
    ),
    "a storage that is not there": lambda p: _archive(p, _tensor(b"K\x02", b"K\x02")),
    "a storage that is too short": lambda p: _archive(p, _tensor(b"K\x02", b"K\x02"), [("0", bytes(4))]),
    "a huge shape": lambda p: _archive(p, _tensor(b"K\x02", HUGE, b"K\x00"), [("0", bytes(8))]),
    "a negative stride": lambda p: _archive(p, _tensor(b"K\x02", b"K\x02", b"J\xff\xff\xff\xff"), [("0", bytes(8))]),
    "code": lambda p: p.write_bytes(pickle.dumps({"w": _Evil()})),
    "code in an archive": lambda p: _archive(p, pickle.dumps({"w": _Evil()}, 2)),
    "code in a module": lambda p: _archive(p, b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."),
    "a number without end": lambda p: _archive(p, b"\x80\x02\x8b\xff\xff\xff\x7f"),
    "nothing": lambda p: p.write_bytes(b""),
    "marks": lambda p: _archive(p, b"\x80\x02((tttt."),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_within_bounds(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    HOSTILE[case](path)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(SourceError, match="cannot be read as plain weights") as error:
        read_bin(path)
    assert time.process_time() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KB
    assert len(str(error.value)) < 400 and not (tmp_path / "owned").exists()


def test_a_sound_file_by_hand_is_read(tmp_path):
    """The files above are refused for what is wrong with them, and not for how they are made."""
    _archive(tmp_path / "x.bin", _tensor(b"K\x02", b"K\x02"), [("0", struct.pack("<2f", 1.5, -2.0))])
    (tensor,) = read_bin(tmp_path / "x.bin").values()
    assert struct.unpack("<2f", tensor.read(tmp_path / "x.bin")) == (1.5, -2.0)


def test_tied_weights_are_within_the_bounds(tmp_path):
    table = torch.randn(3000, 2000)
    torch.save({"embedding": table, "head": table, "norm": torch.ones(3)}, tmp_path / "x.bin")
    assert len(read_bin(tmp_path / "x.bin")) == 3


def test_a_truncated_file_is_refused_at_every_length(state, tmp_path):
    torch.save(
        {"w": torch.arange(40.0), "v": torch.ones(3).half()}, tmp_path / "x.bin", _use_new_zipfile_serialization=False
    )
    data = (tmp_path / "x.bin").read_bytes()
    for length in range(0, len(data), 7):
        (tmp_path / "y.bin").write_bytes(data[:length])
        with pytest.raises(SourceError):
            read_bin(tmp_path / "y.bin")
    shutil.copy(tmp_path / "x.bin", tmp_path / "y.bin")
    assert read_bin(tmp_path / "y.bin").keys() == {"w", "v"}
