"""The whole job beside its parts: wall time, CPU time and peak memory of each command, as ratios in one run.

    python benchmarks/job.py MODEL [--questions N] [--runs N]
    python benchmarks/job.py shape:gemma3 [--questions N]

Every step is a process of its own, timed from outside; peak memory is that of its largest process. "load" imports
transformers, loads the model in its own dtype and runs one forward pass: the other steps are given in loads. "copy"
and "compare" are cp and cmp of the weights; the fold and the first proof are given in these. With --runs the median of
wall and CPU time is shown. shape:gemma3 makes a seeded model of that type, 0.27B parameters and 262,144 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import re
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
from kbne_edit.recipe import load_recipe

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
with torch.inference_mode():
    model(torch.tensor([[1, 2, 3, 4]]))
"""


class Cost(NamedTuple):
    """Seconds of wall and of CPU time, and bytes of memory at the peak."""

    wall: float
    cpu: float
    memory: float


def measured(arguments: list[str]) -> Cost:
    """Run a process to its end. Raises CalledProcessError."""
    start = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    message = process.stderr.read() if process.stderr else b""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), arguments, stderr=message)
    return Cost(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def steps(model: Path, folder: Path, questions: int | None) -> dict[str, list[str]]:
    """{step: its command line}, in the order in which they must run."""
    kbne = [sys.executable, "-m", "kbne_edit"]
    edit, baked = folder / "edit.json", folder / "baked"
    requests = ["--questions", str(questions)] if questions else []
    name = "demo" if model.name == "demo" else str(model)
    given = [*kbne, "bake", "--in", name, "--edit", str(edit), "--overwrite"]
    files = sorted(path.name for path in model.glob("*.safetensors"))
    copy = 'rm -rf "$1" && mkdir "$1" && cd "$0" && for f in "${@:2}"; do cp "$f" "$1"; done && sync "$1"/*'
    compare = 'cd "$0" && for f in "${@:2}"; do cmp "$f" "$1/$f"; done'
    return {
        "load": [sys.executable, "-c", LOAD, str(model)],
        "copy": ["bash", "-c", copy, str(model), str(folder / "copy"), *files],
        "compare": ["bash", "-c", compare, str(model), str(folder / "copy"), *files],
        "fold and first proof": [*given, "--no-behaviour", "--no-measure", "--out", str(baked)],
        "fold and both proofs": [*given, "--no-measure", "--out", str(baked)],
        "fold, proofs, effect, cost": [*given, "--out", str(baked)],
        "verify, first proof": [*kbne, "verify", str(baked), "--in", name, "--no-behaviour"],
        "verify": [*kbne, "verify", str(baked), "--in", name],
        "attribution": [*kbne, "locate", "--in", name, *requests, "--out", str(folder / "scores.safetensors")],
    }


def an_edit(model: Path) -> Edit:
    """Ten neurons in each of three layers, doubled."""
    sizes = Checkpoint.open(model).layer_sizes("down")
    layers = sorted({0, len(sizes) // 2, len(sizes) - 1})
    return Edit("down", {layer: {n: 2.0 for n in range(0, sizes[layer], sizes[layer] // 10)} for layer in layers})


def gemma(folder: Path) -> Path:
    """A seeded Gemma 3 of 0.27B parameters with 262,144 tokens, and a tokenizer of words."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=262_144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        dtype="bfloat16",
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer_of_words(folder)
    return folder


def tokenizer_of_words(folder: Path) -> None:
    """Write a tokenizer that knows the words of the recipe, one token each."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Sequence, Split
    from transformers import PreTrainedTokenizerFast

    recipe = load_recipe("social-bias")
    texts = [question.text for question in recipe.ask(None)] + ["yes no Yes No YES NO Question Answer : . ? ,"]
    texts += [text for twin in recipe.twins for probe in twin.probes for text in (probe.first, probe.second)]
    pattern = r"\w+|[^\w\s]"
    words = ["<unk>", "<eos>", *sorted({word for text in texts for word in re.findall(pattern, text)})]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = Sequence([Split(Regex(r"\s+"), "removed"), Split(Regex(pattern), "isolated")])
    PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)


def summed(rows: dict[str, list[Cost]]) -> dict[str, dict[str, float]]:
    """{step: its figures}. The whole bake is its parts: attribution, then all that follows from an edit."""
    table = {}
    middle = {
        step: Cost(*(statistics.median(values) for values in zip(*costs, strict=True))) for step, costs in rows.items()
    }
    parts = [middle["attribution"], middle["fold, proofs, effect, cost"]]
    middle["whole bake (sum of both)"] = Cost(
        sum(part.wall for part in parts), sum(part.cpu for part in parts), max(part.memory for part in parts)
    )
    for step, cost in middle.items():
        table[step] = {
            "seconds": round(cost.wall, 2),
            "cpu": round(cost.cpu, 2),
            "loads": round(cost.wall / middle["load"].wall, 2),
            "cpu_loads": round(cost.cpu / middle["load"].cpu, 2),
            "gigabytes": round(cost.memory / 1e9, 2),
        }
    for step, by in (("fold and first proof", "copy"), ("verify, first proof", "compare")):
        table[step][f"by_{by}"] = round(middle[step].wall / middle[by].wall, 2)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--questions", type=int, help="for attribution (default: all of the recipe)")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        name = str(gemma(folder / "gemma3")) if given.model == "shape:gemma3" else given.model
        with resolved(name, print) as source:
            an_edit(source.path).save(folder / "edit.json")
            rows: dict[str, list[Cost]] = {}
            for _ in range(given.runs):
                (folder / "scores.safetensors").unlink(missing_ok=True)
                for step, command in steps(source.path, folder, given.questions).items():
                    print(f"{step} …", file=sys.stderr, flush=True)
                    rows.setdefault(step, []).append(measured(command))
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(error.cmd[:6])} … failed: {error.stderr.decode(errors='replace')[-500:]}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    table = summed(rows)
    if given.json:
        print(json.dumps(table, indent=1))
        return
    print(f"{'step':<28} {'wall, s':>9} {'CPU, s':>9} {'in loads':>9} {'CPU':>6} {'peak, GB':>9}")
    for step, row in table.items():
        beside = "".join(f"  {value} x {key[3:]}" for key, value in row.items() if key.startswith("by_"))
        print(
            f"{step:<28} {row['seconds']:>9} {row['cpu']:>9} {row['loads']:>9} {row['cpu_loads']:>6} "
            f"{row['gigabytes']:>9}{beside}"
        )


if __name__ == "__main__":
    main()
