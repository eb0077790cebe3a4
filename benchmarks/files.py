"""Folding against `cp -r`, the first proof against `cmp`, and `--help`: paired wall times and peak memory.

    python benchmarks/files.py MODEL_DIR [--runs 5]

Each pair is run in turn after one warm-up; printed are medians and the median of the ratios, pair by pair.
"""

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


def run(*command):
    """(seconds, peak memory in MB) of a child process."""
    start = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(map(str, command))}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    model, tool = arguments.model.resolve(), [sys.executable, "-m", "kbne_edit"]
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    with tempfile.TemporaryDirectory(dir=".") as folder:
        folder = Path(folder).resolve()
        edit, copy, baked, kept = (folder / name for name in ("edit.json", "copy", "baked", "kept"))
        factors = {str(layer): {str(7 * n): 2.0 for n in range(8)} for layer in range(layers)}
        edit.write_text(json.dumps({"kbne_edit": 1, "site": "down", "factors": factors}))
        fold = [*tool, "bake", "--in", model, "--edit", edit, "--no-behaviour", "--no-measure"]
        pairs = {"bake --edit with its first proof / cp -r": (fold + ["--out", baked], ["cp", "-r", model, copy])}
        code = f"from kbne_edit import Edit, fold; fold({str(model)!r}, Edit.load({str(edit)!r}), {str(baked)!r})"
        pairs["fold() / cp -r"] = ([sys.executable, "-c", code], ["cp", "-r", model, copy])
        run(*fold, "--out", kept)
        names = [p.name for p in model.iterdir()]
        compare = "; ".join(f"cmp {model / n} {copy / n}" for n in names)
        pairs["verify, first proof / cmp of equal directories"] = (
            [*tool, "verify", kept, "--in", model, "--no-behaviour"],
            ["sh", "-c", compare],
        )
        for name, (ours, theirs) in pairs.items():
            measure(name, ours, theirs, [baked, copy], arguments.runs, model)
    times = [run(*tool, "--help")[0] for _ in range(arguments.runs)]
    print(f"--help: {statistics.median(times):.3f} s")


def measure(name, ours, theirs, outputs, runs, model):
    rows = []
    for _ in range(runs + 1):
        clean(outputs)
        if "cmp" in name:
            shutil.copytree(model, outputs[1])
        rows.append((*run(*ours), *run(*theirs)))
    clean(outputs)
    rows = rows[1:]
    median = statistics.median
    print(
        f"{name}: {median(r[0] for r in rows):.2f} s / {median(r[2] for r in rows):.2f} s, ratio "
        f"{median(r[0] / r[2] for r in rows):.2f}, peak memory {max(r[1] for r in rows):.0f} MB"
    )


def clean(outputs):
    for output in outputs:
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(output.with_name(output.name + ".work"), ignore_errors=True)


if __name__ == "__main__":
    main()
