"""Two real processes, started as a user would start them, against one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kbne_edit import load_scores

ROOT = Path(__file__).resolve().parent.parent
LOCATE = ["locate", "--in", "demo", "--questions", "9"]


def _run(*command, cwd):
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one = _run("-m", "kbne_edit", *LOCATE, "--out", "one.safetensors", cwd=tmp_path)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", 0, "--standalone"]
    two = _run(*launch, "-m", "kbne_edit", *LOCATE, "--out", "two.safetensors", cwd=tmp_path)
    assert one.returncode == two.returncode == 0, two.stderr
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert two.stdout.replace("two", "one") == one.stdout  # said once, by the first process
    scores = load_scores(tmp_path / "two.safetensors")
    assert torch.tensor(scores.values).abs().amax((1, 2)).min() > 0
