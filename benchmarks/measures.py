"""A table of the package's measures for a base and an edit, in Markdown, with the seconds that each takes.

    python benchmarks/measures.py MODEL --edit edit.json [--limit N] [--tasks decisions,associations] [--keep DIR]

Each figure of base and edit is on the same items; the change is paired, with a 95 % bootstrap interval over what items
share (a scenario, a twin, a story, a request, a beginning). Random neurons are not in this table: `evaluate` has them.
With --keep, what was measured is written to a folder after every few items, and a run that was ended goes on there.
"""

import argparse
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from kbne_edit import Edit, hooked, load_recipe
from kbne_edit.evaluation.batched import margins_of_edits
from kbne_edit.evaluation.benchmark import Benchmark
from kbne_edit.evaluation.measures import measure
from kbne_edit.evaluation.scoring import Scorer
from kbne_edit.evaluation.tasks import ENGLISH_MEASURES
from kbne_edit.evaluation.twins import frequency_share, twin_scores
from kbne_edit.models.loading import load_model, load_tokenizer
from kbne_edit.statistics import change, interval

STEP = 4  # items between two writes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--edit", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--tasks", default=",".join(ENGLISH_MEASURES))
    parser.add_argument("--all", action="store_true", help="also the figures by group")
    parser.add_argument("--twins", action="store_true", help="only how the two margins of a twin hang together")
    parser.add_argument("--keep", type=Path, help="folder of what was measured already")
    arguments = parser.parse_args()
    scorer = Scorer(load_model(arguments.model, torch.float32), load_tokenizer(arguments.model))
    edit = Edit.load(arguments.edit) if arguments.edit else None
    if arguments.twins:
        print(twins(scorer, edit))
        return
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    print("| measure | items | s | figure | base | edit | change |\n|---|---|---|---|---|---|---|", flush=True)
    for name in arguments.tasks.split(","):
        mark = measure(name, scorer, scorer.tokenizer, arguments.limit)
        before, seconds = columns_of(mark, scorer, None, arguments.keep)
        after = columns_of(mark, scorer, edit, arguments.keep)[0] if edit else None
        print("\n".join(table(mark, before, after, seconds, arguments.all)), flush=True)


def twins(scorer: Scorer, edit: Edit | None) -> str:
    """Mean s, correlation of a twin's margins, and the share of frequency in their square, of base and edit."""
    twins = load_recipe("social-bias").twins
    probes = [probe for twin in twins for probe in twin.probes]
    lines = []
    edits = {"base": None} | ({"edit": edit} if edit else {})
    margins = margins_of_edits(scorer.model, scorer.tokenizer, probes, list(edits.values()))
    for name, row in zip(edits, margins, strict=True):
        value, low, high = interval(twin_scores(twins, row))
        lines.append(
            f"{name}: {len(twins)} twins, mean s {value:+.4f} [{low:+.4f}, {high:+.4f}], correlation of m1 and m2 "
            f"{np.corrcoef(row[::2], row[1::2])[0, 1]:.2f}, share of frequency in m^2 {frequency_share(twins, row):.2f}"
        )
    return "\n".join(lines)


def columns_of(mark: Benchmark, scorer: Scorer, edit: Edit | None, keep: Path | None) -> tuple[np.ndarray, float]:
    """Columns of a model, [n, k], and the seconds that they took, a few items at a time."""
    result, seconds = [], 0.0
    for start in range(0, len(mark.sizes), STEP):
        items = list(range(start, min(start + STEP, len(mark.sizes))))
        name = f"{mark.name}-{len(mark.sizes)}-{edit.sha256[:12] if edit else 'base'}-{start}.npy"
        file = keep / name if keep else None
        if file is None or not file.is_file():
            begun = time.monotonic()
            with hooked(scorer.model, edit) if edit else nullcontext():
                part = mark.take(items).measure(scorer)
            took = time.monotonic() - begun
            if file:
                np.save(file, np.concatenate([part, np.full((len(part), 1), took / len(part))], 1))
        else:
            part, took = np.split(np.load(file), [-1], 1)
            took = float(took.sum())
        result.append(part)
        seconds += took
    return np.concatenate(result), seconds


def table(
    mark: Benchmark, before: np.ndarray, after: np.ndarray | None, seconds: float, by_group: bool
) -> Sequence[str]:
    """Rows of one measure. seconds: of the base."""
    lines: list[str] = []
    for figure in mark.figures:
        if figure.ideal is None and not by_group:
            continue
        values = [
            f"{float(figure.of(columns.mean(0))):.{figure.digits}f}"
            for columns in (before, after)
            if columns is not None
        ]
        moved = "-"
        if after is not None:
            value, low, high = change([before], [after], figure.of, mark.drawn())
            moved = f"{value:+.{figure.digits}f} [{low:+.{figure.digits}f}, {high:+.{figure.digits}f}]"
        head = (mark.name, str(len(mark.sizes)), f"{seconds:.0f}") if not lines else ("", "", "")
        lines.append("| " + " | ".join([*head, figure.name, *values, *["-"] * (2 - len(values)), moved]) + " |")
    return lines


if __name__ == "__main__":
    main()
