"""The report on an edit of the size that a 7B model has: 400 neurons, 32 layers of 11008, 45 questions and 45 controls.

    python benchmarks/report.py FOLDER

Makes in FOLDER a baked directory of Llama-2-7B's shape whose unedited weights are holes in the file (they take no
space, and the report reads none of them), and random scores; prints wall time, peak memory and the page's size; and
deletes what it made.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from kbne_edit import Edit
from kbne_edit.disk.checkpoint import Checkpoint
from kbne_edit.disk.hashing import file_hash
from kbne_edit.disk.manifest import Manifest
from kbne_edit.disk.names import UNDO

# Its own peak: what wait4 reports would hold the peak of this process, from which the other one is forked.
_RUN = """
from kbne_edit.commands import cli
cli(standalone_mode=False)
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""
LAYERS, NEURONS, HIDDEN, VOCABULARY, EDITED, QUESTIONS = 32, 11008, 4096, 32000, 400, 90


def main():
    folder = Path(sys.argv[1]) / "report-benchmark"
    folder.mkdir(parents=True)
    try:
        baked, rng = folder / "baked", np.random.default_rng(0)
        factors = _baked(baked, rng)
        _scores(folder / "baked.work", json.loads((baked / "kbne_edit.json").read_text())["edit"]["base"], rng)
        page = folder / "report.html"
        start = time.perf_counter()
        command = [sys.executable, "-c", _RUN, "report", str(baked), "--out", str(page), "--overwrite"]
        memory = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1]
        seconds, size = time.perf_counter() - start, page.stat().st_size
        print(
            f"report on {sum(map(len, factors.values()))} neurons in {len(factors)} layers: {seconds:.2f} s, "
            f"peak {int(memory) / 1024:.0f} MB, page of {size / 1e6:.2f} MB"
        )
    finally:
        shutil.rmtree(folder)


def _baked(folder, rng):
    """A directory with its manifest and undo file, as `bake` would leave it."""
    folder.mkdir()
    config = dict(model_type="llama", num_hidden_layers=LAYERS, hidden_size=HIDDEN, intermediate_size=NEURONS)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {}
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}"
        shapes |= {f"{stem}.self_attn.{kind}_proj.weight": (HIDDEN, HIDDEN) for kind in "qkvo"}
        shapes |= {f"{stem}.mlp.{kind}_proj.weight": (NEURONS, HIDDEN) for kind in ("gate", "up")}
        shapes |= {f"{stem}.mlp.down_proj.weight": (HIDDEN, NEURONS)}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    header, position = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
        for name in ("model.norm.weight", "lm_head.weight"):
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(_bfloat16(rng, shapes[name]).tobytes())
    chosen = sorted(rng.choice(LAYERS * NEURONS, EDITED, False).tolist())
    factors = {layer: {n % NEURONS: 2.0 for n in chosen if n // NEURONS == layer} for layer in range(LAYERS)}
    edit = Edit("down", factors, Checkpoint.open(folder).fingerprint())
    _undo(folder / UNDO, edit, rng)
    tensors = tuple(sorted(f"model.layers.{layer}.mlp.down_proj.weight" for layer in edit.factors))
    Manifest(edit, {}, "benchmark", tensors=tensors, undo=file_hash(folder / UNDO)).write(folder)
    return edit.factors


def _bfloat16(rng, shape):
    return (rng.standard_normal(shape, np.float32).view(np.uint32) >> 16).astype("<u2")


def _undo(path, edit, rng):
    header, blobs, position = {}, [], 0
    for layer, neurons in edit.factors.items():
        blobs.append(_bfloat16(rng, (HIDDEN, len(neurons))).tobytes())
        header[f"kbne.weight.model.layers.{layer}.mlp.down_proj.weight"] = {
            "dtype": "BF16",
            "shape": [HIDDEN, len(neurons)],
            "data_offsets": [position, position + len(blobs[-1])],
        }
        position += len(blobs[-1])
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def _scores(folder, base, rng):
    folder.mkdir()
    questions = [
        {
            "text": f"Is question number {q} of this benchmark as long as a question about bias usually is?",
            "form": "f",
            "answer": "yes" if q % 3 else "no",
            "dimension": ("gender", "race", "religion")[q % 3],
            "control": q >= 45,
        }
        for q in range(QUESTIONS)
    ]
    rows = np.zeros((QUESTIONS, LAYERS), np.float32)
    tensors = {
        "scores": rng.standard_normal((QUESTIONS, LAYERS, NEURONS), np.float32) ** 5,
        "p": rows[:, 0] + 1,
        "p_best_wrong": rows[:, 0],
        "p_zero": rows,
        "residual": rows,
        "nodes": rows.astype(np.int32),
        "done": np.ones(QUESTIONS, np.uint8),
    }
    about = {"site": "down", "base": base, "model": "benchmark", "recipe": "benchmark", "questions": questions}
    save_file(tensors, folder / "scores.safetensors", metadata={"kbne": json.dumps(about)})


if __name__ == "__main__":
    main()
