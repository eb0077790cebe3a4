"""The whole job beside its parts: wall time and peak memory of each command, as ratios to loading the model once.

    python benchmarks/job.py MODEL [--questions N] [--runs N]

Every step is a process of its own, timed from outside; peak memory is that of its largest process. "load" imports
transformers, loads the model in its own dtype and runs one forward pass. "copy" copies the directory and has the disk
hold it. Figures of one run; a busy machine shows in the spread of the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from kbne_edit import Edit
from kbne_edit.disk.checkpoint import Checkpoint
from kbne_edit.hub.source import resolved

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
with torch.inference_mode():
    model(torch.tensor([[1, 2, 3, 4]]))
"""


class Cost(NamedTuple):
    """Seconds of wall time, and bytes of memory at the peak."""

    wall: float
    memory: float


def measured(arguments: list[str]) -> Cost:
    """Run a process to its end. Raises CalledProcessError."""
    start = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    message = process.stderr.read() if process.stderr else b""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), arguments, stderr=message)
    return Cost(time.perf_counter() - start, usage.ru_maxrss * 1024)


def steps(model: Path, folder: Path, questions: int | None) -> dict[str, list[str]]:
    """{step: its command line}, in the order in which they must run."""
    kbne = [sys.executable, "-m", "kbne_edit"]
    edit, baked = folder / "edit.json", folder / "baked"
    asked = ["--questions", str(questions)] if questions else []
    name = "demo" if model.name == "demo" else str(model)
    given = [*kbne, "bake", "--in", name, "--edit", str(edit), "--overwrite"]
    return {
        "load": [sys.executable, "-c", LOAD, str(model)],
        "copy": ["sh", "-c", 'rm -rf "$1" && cp -r "$0" "$1" && sync "$1"/*', str(model), str(folder / "copy")],
        "fold and first proof": [*given, "--no-behaviour", "--no-measure", "--out", str(baked)],
        "fold and both proofs": [*given, "--no-measure", "--out", str(baked)],
        "fold, proofs, effect, cost": [*given, "--out", str(baked)],
        "verify": [*kbne, "verify", "--in", name, "--baked", str(baked)],
        "whole bake": [*kbne, "bake", "--in", name, *asked, "--out", str(folder / "whole"), "--overwrite"],
    }


def an_edit(model: Path) -> Edit:
    """Ten neurons in each of three layers, doubled."""
    sizes = Checkpoint.open(model).layer_sizes("down")
    layers = sorted({0, len(sizes) // 2, len(sizes) - 1})
    return Edit("down", {layer: {n: 2.0 for n in range(0, sizes[layer], sizes[layer] // 10)} for layer in layers})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--questions", type=int)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        with resolved(given.model, print) as source:
            an_edit(source.path).save(folder / "edit.json")
            rows: dict[str, list[Cost]] = {}
            for _ in range(given.runs):
                shutil.rmtree(folder / "whole.work", ignore_errors=True)
                for step, command in steps(source.path, folder, given.questions).items():
                    rows.setdefault(step, []).append(measured(command))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    load = statistics.median(cost.wall for cost in rows["load"])
    table = {
        step: {
            "seconds": round(statistics.median(cost.wall for cost in costs), 2),
            "loads": round(statistics.median(cost.wall for cost in costs) / load, 2),
            "gigabytes": round(max(cost.memory for cost in costs) / 1e9, 2),
        }
        for step, costs in rows.items()
    }
    if given.json:
        print(json.dumps(table, indent=1))
        return
    print(f"{'step':<28} {'wall, s':>9} {'in loads':>9} {'peak, GB':>9}")
    for step, row in table.items():
        print(f"{step:<28} {row['seconds']:>9} {row['loads']:>9} {row['gigabytes']:>9}")


if __name__ == "__main__":
    main()
