"""`doctor` says what `bake` then does."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from printed import parsed

from kbne_edit import locating
from kbne_edit.disk.checkpoint import Checkpoint
from kbne_edit.errors import FamilyError, InputError
from kbne_edit.models import doctor, memory
from kbne_edit.models.streamed import Streamed
from tiny import tiny_model

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def checkpoint(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    return Checkpoint.open(tmp_path)


@pytest.fixture
def devices(monkeypatch):
    """One short measurement for all that need none."""
    monkeypatch.setattr(doctor, "SECONDS", 0.0)


@pytest.mark.parametrize("more, mode", [(1, "in memory"), (-1, "layer by layer")])
def test_the_mode_is_the_one_that_bake_takes(more, mode, checkpoint, devices, monkeypatch):
    """Memory for one byte more, or less, than the model takes."""
    count = sum(p.numel() for p in tiny_model("llama").parameters())
    taken = 4 * count + 3 * memory.activations(memory.ROWS / 2, 32) + memory.OVERHEAD
    monkeypatch.setattr(memory, "available", lambda: (taken + more) / memory.SHARE)
    model = doctor.examine(checkpoint).model
    assert model.attribution == mode and model.parameters == count
    assert isinstance(locating.supplier(checkpoint, locating.Settings()), Streamed) == (mode == "layer by layer")


@pytest.mark.parametrize("free", [2e9, 40e9])
def test_the_largest_model_fills_the_room_of_its_mode(free):
    """Against the sum that `bake` makes, for a model of 12 D^2 parameters in each of 80 layers."""
    result = doctor.largest_models(free, 1e12)
    size = (result["in memory"] / 12 / 80) ** 0.5
    graphs = min(80 * memory.activations(memory.ROWS / 2, size), memory.GRAPHS)
    taken = 4 * result["in memory"] + graphs + memory.OVERHEAD
    assert taken == pytest.approx(memory.SHARE * free, rel=1e-9)
    assert result["layer by layer"] > 5 * result["in memory"]


# One question takes a little less than these bytes here, and half a layer more than them.
@pytest.mark.parametrize("name, question", [("llama", 12e3), ("gpt2", 12e3), ("gemma3", 12e3), ("mixtral", 26e3)])
def test_layer_by_layer_takes_what_the_streamed_model_says(name, question, tmp_path, devices):
    """The budget that leaves nothing for a question is the one that `doctor` names."""
    tiny_model(name).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    need = doctor.examine(checkpoint).model.memory["layer by layer"]
    rows = [4] * 3
    with pytest.raises(InputError, match="at least"):
        Streamed(checkpoint, need).group([[4]], rows, 1)
    assert Streamed(checkpoint, need + question).group([[4]], rows, 1) == 1


def test_a_model_that_bake_refuses(tmp_path, devices):
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "newarch"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FamilyError, match="newarch"):
        doctor.examine(Checkpoint.open(tmp_path))


def test_on_the_command_line():
    command = [sys.executable, ROOT / "cli.py", "doctor", "--in", "demo", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    actual = parsed("doctor", result.stdout)
    assert actual["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert actual["versions"]["transformers"] == transformers.__version__
    assert actual["cores"] == len(os.sched_getaffinity(0))
    assert len(actual["devices"]) == 1 + torch.cuda.device_count() + torch.backends.mps.is_available()
    assert all(rate > 1e6 for about in actual["devices"].values() for rate in about["rates"].values())
    assert actual["model"]["attribution"] == "in memory" and actual["model"]["architecture"] == "llama"


def test_the_help_imports_nothing_large():
    code = (
        "import sys; from kbne_edit.commands import cli; cli(['doctor', '--help'], standalone_mode=False); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def test_memory_where_the_kernel_tells_nothing(monkeypatch):
    """As on macOS: the machine's own memory, whatever limit a process has."""
    total = memory.kilobytes("/proc/meminfo", "MemTotal")
    monkeypatch.setattr(memory, "kilobytes", lambda *_: math.inf)
    monkeypatch.setattr(memory.resource, "getrlimit", lambda _: (1000, 1000))
    assert memory.of_process() == math.inf and memory.of_machine() == pytest.approx(total, rel=0.01)
