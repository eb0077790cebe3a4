"""Two real processes, started as a user would start them, against one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kbne_edit import Edit, load_scores

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", 0, "--standalone"]
LOCATE = ["locate", "--in", "demo", "--questions", "9"]


def _run(*command, cwd):
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one = _run("-m", "kbne_edit", *LOCATE, "--out", "one.safetensors", cwd=tmp_path)
    two = _run(*LAUNCH, "-m", "kbne_edit", *LOCATE, "--out", "two.safetensors", cwd=tmp_path)
    assert one.returncode == two.returncode == 0, two.stderr
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert two.stdout.replace("two", "one") == one.stdout  # said once, by the first process
    scores = load_scores(tmp_path / "two.safetensors")
    assert torch.tensor(scores.values).abs().amax((1, 2)).min() > 0


@pytest.mark.slow
def test_two_processes_evaluate_as_one(tmp_path, monkeypatch):
    """Items, random draws and probes are shared; figures, effect and verdict are those of one process."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Edit("down", {1: {3: 2.0, 7: 2.0}, 2: {5: 2.0}}).save(tmp_path / "edit.json")
    tasks = ["--edit", "edit.json", "--tasks", "probes,knowledge", "--draws", "19", "--json"]
    command = ["-m", "kbne_edit", "evaluate", "--in", "demo", *tasks]
    one = _run(*command, cwd=tmp_path)
    two = _run(*LAUNCH, *command, cwd=tmp_path)
    assert one.returncode == two.returncode == 0, two.stderr
    assert json.loads(two.stdout) == json.loads(one.stdout)
