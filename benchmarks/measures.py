"""A table of the package's measures for a base and an edit, in Markdown, with the seconds that each takes.

    python benchmarks/measures.py MODEL --edit edit.json [--limit N] [--tasks decisions,associations]

Each figure of base and edit is on the same items; the change is paired, with a 95 % bootstrap interval over what items
share (a scenario, a twin, a story, a request, a beginning). Random neurons are not in this table: `evaluate` has them.
"""

import argparse
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from kbne_edit import Edit, hooked
from kbne_edit.evaluation.measures import measure
from kbne_edit.evaluation.scoring import Scorer
from kbne_edit.evaluation.tasks import ENGLISH_MEASURES
from kbne_edit.models.loading import load_model, load_tokenizer
from kbne_edit.statistics import change


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--edit", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--tasks", default=",".join(ENGLISH_MEASURES))
    parser.add_argument("--all", action="store_true", help="also the figures by group")
    arguments = parser.parse_args()
    scorer = Scorer(load_model(arguments.model, torch.float32), load_tokenizer(arguments.model))
    edit = Edit.load(arguments.edit) if arguments.edit else None
    print("| measure | items | s | figure | base | edit | change |\n|---|---|---|---|---|---|---|", flush=True)
    for name in arguments.tasks.split(","):
        for line in table(scorer, edit, name, arguments.limit, arguments.all):
            print(line, flush=True)


def table(scorer: Scorer, edit: Edit | None, name: str, limit: int | None, by_group: bool) -> list[str]:
    mark = measure(name, scorer, scorer.tokenizer, limit)
    start = time.monotonic()
    before = mark.measure(scorer)
    seconds = time.monotonic() - start
    with hooked(scorer.model, edit) if edit else nullcontext():
        after = mark.measure(scorer) if edit else before
    lines = []
    for figure in mark.figures:
        if figure.ideal is None and not by_group:
            continue
        value, low, high = change([before], [after], figure.of, mark.clusters)
        values = [f"{float(figure.of(columns.mean(0))):.{figure.digits}f}" for columns in (before, after)]
        moved = f"{value:+.{figure.digits}f} [{low:+.{figure.digits}f}, {high:+.{figure.digits}f}]" if edit else "-"
        head = (name, str(len(mark.sizes)), f"{seconds:.0f}") if not lines else ("", "", "")
        lines.append("| " + " | ".join([*head, figure.name, values[0], values[1] if edit else "-", moved]) + " |")
    return lines


if __name__ == "__main__":
    main()
