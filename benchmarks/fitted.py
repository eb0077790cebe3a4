"""What fitted edits do on public benchmarks, in Markdown: each figure of the base and its change, by group.

    python benchmarks/fitted.py MODEL DATA edit.json [shuffled.json …] --tasks NAME,… --keep DIR [--limit N]

Of StereoSet only the test split is read (a fit may read the dev split). Changes are paired, with 95 % bootstrap
intervals over what items share. With several edits, the last rows compare the first with each other one, on the same
items. --flattened adds the base at a temperature: of an edit's own KL, `evaluate` and `fit` print it. With --keep, what
was measured is kept in a folder, and a run that was ended goes on there.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kbne_edit import Edit, hooked
from kbne_edit.evaluation.benchmark import Benchmark
from kbne_edit.evaluation.public import public_benchmark
from kbne_edit.evaluation.scoring import Scorer
from kbne_edit.models.loading import load_model, load_tokenizer
from kbne_edit.statistics import Interval, change

STEREOSET = "stereoset_intrasentence"
TASKS = f"{STEREOSET},crows_pairs"


@dataclass(frozen=True)
class Model:
    """One of the compared models: an edit by hooks, or the base at a temperature."""

    name: str
    edit: Edit | None = None
    temperature: float = 1.0

    @property
    def key(self) -> str:
        return f"{self.edit.sha256[:16] if self.edit else 'base'}-{self.temperature:.6f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("edits", type=Path, nargs="+")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--flattened", type=float, metavar="T", help="temperature of a flattening to compare with")
    parser.add_argument("--keep", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.keep.mkdir(parents=True, exist_ok=True)
    scorer = Scorer(load_model(arguments.model, torch.bfloat16), load_tokenizer(arguments.model))
    models = [Model("base"), *(Model(path.stem, Edit.load(path)) for path in arguments.edits)]
    if arguments.flattened:
        models.append(Model(f"flattened, T {arguments.flattened:g}", None, arguments.flattened))
    for name in arguments.tasks.split(","):
        with tempfile.TemporaryDirectory() as folder:
            data = tested_half(arguments.data, Path(folder)) if name == STEREOSET else arguments.data
            task = public_benchmark(name, data, arguments.limit, scorer)
        columns = [columns_of(task, scorer, model, arguments.keep) for model in models]
        print("\n".join(table(task, models, columns)), flush=True)


def tested_half(data: Path, folder: Path) -> Path:
    """A folder with StereoSet's test split alone."""
    for file in data.glob(f"{STEREOSET}*.jsonl"):
        rows = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        kept = [row for row in rows if json.loads(row).get("split", "dev") == "test"]
        (folder / file.name).write_text("\n".join(kept), encoding="utf-8")
    return folder


def columns_of(task: Benchmark, scorer: Scorer, model: Model, keep: Path) -> np.ndarray:
    """[n, k], measured once."""
    file = keep / f"{task.name}-{len(task.sizes)}-{model.key}.npy"
    if not file.is_file():
        scorer.temperature = model.temperature
        with hooked(scorer.model, model.edit) if model.edit else nullcontext():
            np.save(file, task.measure(scorer))
    return np.load(file)


def table(task: Benchmark, models: Sequence[Model], columns: Sequence[np.ndarray]) -> list[str]:
    groups = np.array(task.groups)
    chosen = {"all": np.arange(len(groups))} | {g: np.flatnonzero(groups == g) for g in sorted(set(groups.tolist()))}
    lines = [
        f"| {task.name} | base | {' | '.join(m.name for m in models[1:])} |",
        "|---" * (len(models) + 1) + "|",
    ]
    for group, items in chosen.items():
        if len(items) < 20:
            continue
        for figure in task.figures:
            values = {figure.name: figure.of}
            if figure.ideal not in (None, -np.inf, 100):
                values[f"{figure.name}, distance from {figure.ideal:g}"] = figure.distance
            for label, value in values.items():
                base = value(columns[0][items].mean(0))
                cells = [shown(change([columns[0][items]], [c[items]], value, task.drawn(items))) for c in columns[1:]]
                lines.append(f"| {group} ({len(items)}), {label} | {base:.3f} | {' | '.join(cells)} |")
    for other, column in zip(models[2:], columns[2:], strict=True):
        for figure in task.figures:
            apart = change([column], [columns[1]], figure.of, task.drawn())
            lines.append(f"| {figure.name}, {models[1].name} less {other.name} | | {shown(apart)} |")
    return lines


def shown(values: Interval) -> str:
    return f"{values.value:+.3f} [{values.low:+.3f}, {values.high:+.3f}]"


if __name__ == "__main__":
    main()
