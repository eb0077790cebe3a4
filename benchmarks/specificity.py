"""How specific each way of selecting is, and what its neurons do: one table, a row for each rule and scores file.

    python benchmarks/specificity.py MODEL DATA --scores FILE… [--items 150] [--arc 100] [--draws 2] [--only RULE]

MODEL: a directory, or what --in takes. DATA: a folder with StereoSet (intrasentence) and ARC-Easy. FILE: what
`kbne-edit locate` wrote for MODEL; the rows depend on what was attributed, and on whether the questions have twins.

overlap: of the neurons that the rule selects without one half of the controls, the share that is among as many neurons
that this half uses most, over both halves (95 %, Wilson). What follows is measured with hooks, on 2 x `items` StereoSet
items, halved as `tune` does. factor: of those whose KL from the base on neutral text is at
most `most-kl` (or the least), the one with the smallest mean absolute margin on the dev half; nothing else is chosen by
a look at data, and the test half is measured once. effect: change of the mean absolute margin (nats per token; paired
95 % bootstrap intervals) by the edit, by as many random neurons of the same layers, and by the base at the temperature
with the edit's KL; beyond: the edit's less random neurons'. ARC: change of accuracy in points, and the lower end of its
interval (Agresti and Min's, or the bootstrap's if that is lower).
"""

import argparse
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from kbne_edit import hooked, load_recipe
from kbne_edit.attribution.scores import load_scores
from kbne_edit.disk.checkpoint import Checkpoint
from kbne_edit.errors import EditError
from kbne_edit.evaluation import neutral
from kbne_edit.evaluation.benchmark import Answer
from kbne_edit.evaluation.effect import random_edit
from kbne_edit.evaluation.scoring import Scorer
from kbne_edit.evaluation.tasks import benchmarks
from kbne_edit.hub.source import resolved
from kbne_edit.models.loading import load_model, load_tokenizer
from kbne_edit.rule import Rule
from kbne_edit.selection.select import selection
from kbne_edit.statistics import change, interval, least_change, wilson
from kbne_edit.tuning.halves import halves

FACTORS = (1.5, 2.0, 4.0, 8.0)
PAPER = [dict(rule="paper"), dict(rule="paper", tau=0.02)]
CONTRAST = [dict(rule="contrastive", tau=0.02), dict(rule="contrastive", top=0.0005)]
SPECIFIC = [dict(rule="specific", top=0.001)]
HEAD = (
    "scores",
    "rule",
    "neurons",
    "overlap",
    "factor",
    "dev",
    "effect on test",
    "random",
    "beyond random",
    "flattened",
    "KL",
    "ARC",
)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--scores", type=Path, nargs="+", required=True)
    parser.add_argument("--items", type=int, default=150)
    parser.add_argument("--arc", type=int, default=100)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--most-kl", type=float, default=0.1)
    parser.add_argument("--only", metavar="RULE", help="leave out the rows of other rules")
    arguments = parser.parse_args()
    files = {path: load_scores(path) for path in arguments.scores}
    with resolved(arguments.model) as result:
        bench = Bench(result.path, arguments)
    print(
        f"base: absolute margin {bench.base['dev'].mean():.4f} on dev, {bench.base['test'].mean():.4f} on test; "
        f"ARC-Easy {bench.base['arc'].mean():.0%}\n\n{row(HEAD)}\n{row(['---'] * len(HEAD))}"
    )
    for path, scores in files.items():
        for rule in [rule for rule in rules(scores) if arguments.only in (None, rule["rule"])]:
            print(row([path.stem, *measured(bench, scores, rule)]), flush=True)


def rules(scores):
    """The rows of a scores file."""
    if any(question.twin for question in scores.questions):
        return [dict(rule="paired", tau=0.01), dict(rule="paired", top=0.0005), *SPECIFIC]
    if scores.settings["objective"] == "probability" and "positions" not in scores.settings:
        return [*PAPER, *CONTRAST, *SPECIFIC]
    return [PAPER[0], CONTRAST[1], *SPECIFIC]


class Bench:
    """The model and what it is measured on. base: figures of the model itself, an array [n] for each part."""

    def __init__(self, path, arguments):
        checkpoint, recipe = Checkpoint.open(path), load_recipe("social-bias")
        self.neurons = checkpoint.layer_sizes("down")
        self.scorer = Scorer(load_model(path, torch.float32), load_tokenizer(path))
        self.draws, self.most_kl = arguments.draws, arguments.most_kl

        def task(name, limit):
            (mark,) = benchmarks([name], arguments.data, limit, recipe, self.scorer, self.scorer.tokenizer)
            return mark

        text = neutral.neutral_text(self.scorer.tokenizer, recipe)
        stories, self.texts = text.texts, text.rows
        halved = halves([task("stereoset_intrasentence", 2 * arguments.items)], stories, self.texts, seed=0)
        self.pairs = {name: half.benchmarks[0].pairs for name, half in zip(("dev", "test"), halved, strict=True)}
        self.arc = task("arc_easy", arguments.arc)
        self.logits = neutral.logits(self.scorer, self.texts)
        self.base = {"dev": self.margins("dev"), "test": self.margins("test"), "arc": self.accuracy()}

    def margins(self, half, edit=None, temperature=1.0):
        """Absolute difference of the log-probabilities per token of each item's two sentences, [n]."""
        pairs = [pair for i, pair in enumerate(self.pairs[half]) if i % 3 < 2]  # without the unrelated sentence
        self.scorer.temperature = temperature
        with hooked(self.scorer.model, edit) if edit else nullcontext():
            answers = self.scorer.score(pairs)
        self.scorer.temperature = 1.0
        values = [Answer(*answer, len(pair[1])).per_token for answer, pair in zip(answers, pairs, strict=True)]
        return np.abs(np.subtract(values[0::2], values[1::2]))

    def accuracy(self, edit=None):
        with hooked(self.scorer.model, edit) if edit else nullcontext():
            return self.arc.columns(self.scorer.score(self.arc.pairs))[:, 0]

    def kl(self, edit):
        with hooked(self.scorer.model, edit):
            result = neutral.logits(self.scorer, self.texts)
        return float(neutral.KL.of(neutral.columns(self.texts, result, self.logits).mean(0)))


def measured(bench, scores, rule):
    """The cells of one row, but for the first."""
    try:
        chosen = selection(scores, Rule.from_dict(rule))
    except EditError:
        return [Rule.from_dict(rule).describe(), 0, *["none"] * (len(HEAD) - 3)]
    shared, total = (sum(column) for column in zip(*chosen.unseen(), strict=True))
    overlap = share(shared / total, *wilson(shared / 2, total / 2)) if total else "none selected"
    cells = [chosen.rule.describe(), chosen.edit.num_neurons, overlap]
    factor, dev, kl = best_factor(bench, chosen.edit)
    edit, base = chosen.edit.with_factor(factor), bench.base["test"]
    after = bench.margins("test", edit)
    random = np.mean([bench.margins("test", random_edit(edit, bench.neurons, seed)) for seed in range(bench.draws)], 0)
    heat = neutral.temperature(bench.logits, kl)
    flat = figure(interval(bench.margins("test", temperature=heat) - base)) if heat else "none"
    before, arc = bench.base["arc"], bench.accuracy(edit)
    points, low, _ = (100 * value for value in change([before[:, None]], [arc[:, None]]))
    low = min(low, 100 * least_change(before, arc))
    effects = [figure(interval(values)) for values in (after - base, random - base, after - random)]
    return [*cells, f"{factor:g}", f"{dev:+.4f}", *effects, flat, f"{kl:.3f}", f"{points:+.0f} (from {low:+.0f})"]


def best_factor(bench, edit):
    """(factor, its effect on the dev half, its KL). See the module's head."""
    costs = {factor: bench.kl(edit.with_factor(factor)) for factor in FACTORS}
    allowed = [factor for factor, kl in costs.items() if kl <= bench.most_kl] or [min(costs, key=costs.get)]
    effects = {f: float((bench.margins("dev", edit.with_factor(f)) - bench.base["dev"]).mean()) for f in allowed}
    factor = min(effects, key=effects.get)
    return factor, effects[factor], costs[factor]


def figure(found):
    return "{:+.4f} [{:+.4f}, {:+.4f}]".format(*found)


def share(*result):
    return "{:.0%} [{:.0%}, {:.0%}]".format(*result)


def row(cells):
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
