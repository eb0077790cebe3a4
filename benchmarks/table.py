"""What edits of one model do, side by side: the table of the README.

    python benchmarks/table.py MODEL_DIR DATA_DIR --scores scores.safetensors [--limit 150] [--out table.json]

Columns: the base; the paper's rule at factors 2 and 3.5, and without the questions of each dimension in turn (does it
carry over?); the contrastive rule; as many random neurons in the same layers as the paper's rule has; the neurons that
the control questions select. All are measured once, by hooks, on the same
items. Each cell is the figure and its paired change from the base with a 95 % bootstrap interval; overlap is the share
of neurons that the same rule selects from the control questions. Printed as Markdown.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from kbne_edit.attribution.scores import load_scores
from kbne_edit.disk.checkpoint import Checkpoint
from kbne_edit.errors import EditError
from kbne_edit.evaluation import neutral
from kbne_edit.evaluation.controls import controls_of
from kbne_edit.evaluation.runs import Bench
from kbne_edit.evaluation.scoring import Scorer
from kbne_edit.evaluation.tasks import benchmarks
from kbne_edit.models.loading import load_model, load_tokenizer
from kbne_edit.recipe import load_recipe
from kbne_edit.rule import Rule
from kbne_edit.selection.select import selection
from kbne_edit.statistics import change, interval

TASKS = ("stereoset_intrasentence", "crows_pairs", "bbq", "arc_easy")
SHOWN = {
    "stereoset_intrasentence": ("StereoSet", ("SS", "LMS", "ICAT", "absolute margin")),
    "crows_pairs": ("CrowS-Pairs", ("SS",)),
    "bbq": ("BBQ", ("accuracy, ambiguous", "bias, ambiguous", "accuracy, disambiguated", "bias, disambiguated")),
    "arc_easy": ("ARC-Easy", ("accuracy",)),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--scores", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=150)
    parser.add_argument("--contrastive-tau", type=float, default=0.02)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    checkpoint, recipe = Checkpoint.open(arguments.model), load_recipe("social-bias")
    rows = edits(checkpoint, arguments.scores, arguments.contrastive_tau)
    tokenizer = load_tokenizer(arguments.model)
    scorer = Scorer(load_model(arguments.model, torch.float32), tokenizer)
    marks = benchmarks(TASKS, arguments.data, arguments.limit, recipe, scorer, tokenizer)
    texts = neutral.neutral_text(scorer.tokenizer, recipe).rows
    bench, columns, logits, minutes = Bench(marks, texts), {}, {}, {}
    for name, (edit, _) in rows.items():
        start = time.perf_counter()
        columns[name], logits[name] = bench.measure(scorer, name, edit)
        minutes[name] = (time.perf_counter() - start) / 60
    result = {
        name: {
            "neurons": edit.num_neurons if edit else 0,
            "overlap": overlap,
            "minutes": minutes[name],
            "figures": figures(marks, columns["base"], columns[name]),
            "KL": interval(neutral.columns(texts, logits[name], logits["base"]), neutral.KL.of),
        }
        for name, (edit, overlap) in rows.items()
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    show(result, {mark.name: len(mark.sizes) for mark in marks})


def edits(checkpoint, path, contrastive_tau):
    """{row: (edit or None, share of its neurons that the controls select too)}."""
    scores, result = load_scores(path), {"base": (None, None)}
    rules = {
        "paper's rule, factor 2": dict(rule="paper", factor=2.0),
        "paper's rule, factor 3.5": dict(rule="paper", factor=3.5),
        f"contrastive, tau {contrastive_tau:g}, factor 2": dict(rule="contrastive", tau=contrastive_tau, factor=2.0),
    }
    for left_out in dict.fromkeys(q.dimension for q in scores.questions if not q.control):
        only = [q.control or q.dimension != left_out for q in scores.questions]
        rules[f"paper's rule without {left_out}, factor 2"] = dict(rule="paper", factor=2.0, only=only)
    for name, rule in rules.items():
        try:
            chosen = selection(scores, Rule.from_dict(rule), factor=rule["factor"], only=rule.get("only"))
        except EditError:
            print(f"{name}: selects nothing")
            continue
        if twin := next((n for n, (e, _) in result.items() if e and e.factors == chosen.edit.factors), None):
            print(f"{name}: the same edit as {twin}")
            continue
        summary = chosen.summary()
        result[name] = chosen.edit, summary.controls_share
    controls = controls_of(result["paper's rule, factor 2"][0], checkpoint, 1, path)
    others = {control.name: control.edit for control in controls}
    result["random neurons, factor 2"] = others["random 1"], None
    result["control questions' neurons, factor 2"] = others["control questions"], None
    return result


def figures(marks, base, columns):
    """{task: {group or "": {figure: [value, change, low, high]}}}."""
    result = {}
    for mark in marks:
        groups = [""] + (sorted({*mark.groups}) if mark.name.startswith("stereoset") else [])
        for group in groups:
            chosen = [i for i, g in enumerate(mark.groups) if group in ("", g)]
            before, after = base[mark.name][chosen], columns[mark.name][chosen]
            result.setdefault(mark.name, {})[group] = {
                figure.name: [float(figure.of(after.mean(0))), *change([before], [after], figure.of)]
                for figure in mark.figures
                if figure.name in SHOWN[mark.name][1]
            }
    return result


def show(result, items):
    """A column per edit; then the same per type of bias."""
    print(f"items: {items}\n")
    head(result)
    line("neurons", [row["neurons"] or "" for row in result.values()])
    line("shared with the controls'", ["" if r["overlap"] is None else f"{r['overlap']:.0%}" for r in result.values()])
    for task, (title, names) in SHOWN.items():
        for name in names:
            line(f"{title} {name}", [cell(name, row["figures"][task][""][name]) for row in result.values()])
    line("KL from the base, nats", ["{:.1e} [{:.1e}, {:.1e}]".format(*row["KL"]) for row in result.values()])
    line("minutes", [f"{row['minutes']:.1f}" for row in result.values()])
    print("\nStereoSet by type\n")
    head(result)
    for group, actual in result["base"]["figures"]["stereoset_intrasentence"].items():
        for name in actual if group else ():
            cells = [row["figures"]["stereoset_intrasentence"][group][name] for row in result.values()]
            line(f"{group}, {name}", [cell(name, values) for values in cells])


def head(result):
    line("", result)
    print("|---" * (1 + len(result)) + "|")


def line(title, cells):
    print(f"| {title} | " + " | ".join(map(str, cells)) + " |")


def cell(figure, values):
    digits = 4 if "margin" in figure else 1
    value, moved, low, high = values
    if not (low or high):
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} ({moved:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}])"


if __name__ == "__main__":
    main()
