"""What an edit does, beside its controls: `effect` on the recipe's probes (for `bake`), `evaluate` on benchmarks.

m = mean log-probability per token of a probe's first sentence (the stereotyped or the unwanted one) minus that of its
second. With the aim "balance" |m| should fall, neither sentence preferred; with "avoid", m itself. Items are paired
before and after; intervals are 95 % bootstrap intervals over items (percentile, seeded).

An effect is about bias only if it goes beyond what else could have made it: as many random neurons, neurons found with
questions that have nothing to do with bias, the same neurons turned down instead of up, and a mere flattening of the
model's distribution (a temperature with the same KL from the base on neutral text).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..disk.checkpoint import Checkpoint
from ..edit import Edit
from ..errors import InputError, ScoresError
from ..folding.plan import Plan
from ..hub.source import resolved
from ..models.hooks import hooked
from ..progress import progress, say
from ..recipe import load_recipe
from ..rule import Rule
from ..statistics import change, holm, interval, least_change, mcnemar, permutation
from .effect import random_edit

if TYPE_CHECKING:
    import torch

    from .benchmark import Benchmark, Figure
    from .scoring import Scorer

ABILITIES = ("capability", "knowledge")  # kinds of tasks in which an edit must not make a model worse
ALPHA = 0.05  # of the whole report, shared out by Holm


# -------------------------------------------------------------------------------------------------------- benchmarks


def evaluate(
    source: str,
    *,
    edit: Edit | None = None,
    baked: str | Path | None = None,
    tasks: Sequence[str] | None = None,
    data: str | Path | None = None,
    limit: int | None = None,
    recipe: str | Path | None = None,
    scores: str | Path | None = None,
    draws: int = 3,
    margin: float = 5.0,
    device: str = "cpu",
    dtype: str = "float32",
) -> dict:
    """Figures of the base, of the edit and of its controls on the same items, and what can be said about them.

    edit: by hooks; baked: a directory instead, from whose edit the controls are made; neither: the base alone.
    tasks: names (None: all that there are data for); data: a folder with their files (None: from the Hub); limit: items
    of each. recipe: of the questions. scores: a scores file, for the control neurons. draws: of random neurons.
    margin: in points of accuracy, the loss that a capability must exclude.
    Raises InputError and its kin, also where lm-eval is not installed.
    """
    import torch

    from ..models.loading import load_model, load_tokenizer
    from . import neutral
    from .scoring import Scorer
    from .tasks import benchmarks, check

    if edit and baked:
        raise InputError("evaluate takes an edit or a baked directory, not both")
    data = Path(data) if data else None
    check(tasks, data)
    with resolved(source, say) as found:
        checkpoint = Checkpoint.open(found.path)
        edit = _edit_in(Path(baked), checkpoint.path) if baked else edit
        others = controls(edit, checkpoint, draws, scores) if edit else {}
        asked, tokenizer = load_recipe(recipe or found.recipe), load_tokenizer(checkpoint.path)

        def scorer_of(path: Path) -> Scorer:
            return Scorer(load_model(path, getattr(torch, dtype), device), tokenizer)

        scorer = scorer_of(Path(baked) if baked else checkpoint.path)
        marks = benchmarks(tasks, data, limit, asked, scorer, tokenizer)
        text = neutral.neutral_text(tokenizer, asked)
        runs = Runs(marks, text.rows)
        edited = runs.measure(scorer, "evaluate: edit", None if baked else edit) if edit else None
        if baked:  # measured first, so that one model is in memory at a time
            scorer = None
            scorer = scorer_of(checkpoint.path)
        heat = runs.fill(scorer, edited, others)
    report = {
        "model": found.id,
        "commit": found.commit,
        "recipe": asked.name,
        "limit": limit,
        "margin": margin,
        "edit": edit
        and {
            "site": edit.site,
            "neurons": edit.num_neurons,
            "factors": edit.distinct_factors,
            "how": str(baked) if baked else "hooks",
        },
        "controls": {name: control.num_neurons for name, control in others.items()},
        "temperature": heat,
    }
    return report | runs.report(text.origin, margin)


def _edit_in(baked: Path, base: Path) -> Edit:
    """The edit of a baked directory, by the first proof: what is evaluated is `base` with it, and nothing else."""
    from ..proofs.verify import verify

    say(f"reading the edit of {baked}")
    proof = verify(base, baked, behaviour=False).files
    if not proof.holds:
        raise InputError(f"{baked} is not {base} with an edit alone ({proof.faults[0]}): `kbne-edit verify` lists all")
    return proof.edit


def controls(edit: Edit, checkpoint: Checkpoint, draws: int, scores: str | Path | None) -> dict[str, Edit]:
    """Edits that an edit about bias must outdo. Raises EditError if the edit does not fit the model."""
    Plan.of(checkpoint, edit, inexact="ignore")
    neurons = checkpoint.layer_sizes(edit.site)
    found = {f"random {seed + 1}": random_edit(edit, neurons, seed) for seed in range(draws)}
    if scores:
        found["control questions"] = _by_controls(edit, checkpoint, scores)
    inverse = {la: {n: 1 / f for n, f in ns.items() if f} for la, ns in edit.factors.items()}
    if any(inverse.values()):  # a factor of 0 has no inverse
        found["inverse factor"] = Edit(edit.site, inverse)
    return found


def _by_controls(edit: Edit, checkpoint: Checkpoint, path: str | Path) -> Edit:
    """Neurons that the controls select by the paper's rule, with the edit's thresholds and (most frequent) factor.

    The other rules select next to nothing from controls: there, as many neurons as the controls use most.
    """
    from ..attribution.scores import load_scores
    from ..selection.select import at_factor, selection

    scores = load_scores(path)
    if (scores.base, scores.site) != (checkpoint.fingerprint(), edit.site):
        raise ScoresError(f"{path} was made for another model or site than the edit: locate again")
    chosen = selection(scores, Rule.from_dict(edit.found.get("select", {})))
    mask = chosen.controls if chosen.rule.name == "paper" else chosen.used_by_controls()
    if mask is None or not mask.any():
        raise ScoresError(f"{path} has no control questions that select a neuron: leave --scores out")
    every = [factor for factors in edit.factors.values() for factor in factors.values()]
    return Edit(edit.site, at_factor(mask, max(edit.distinct_factors, key=every.count)))


class Runs:
    """Models measured on the same requests and texts.

    columns: {model: {task: [n, k]}}; neutral: {model: columns of the texts}.
    """

    def __init__(self, marks: list[Benchmark], texts: list[list[int]]):
        self.columns: dict[str, dict[str, np.ndarray]] = {}
        self.neutral: dict[str, np.ndarray] = {}
        self._marks, self._texts = marks, texts

    def measure(self, scorer: Scorer, label: str, edit: Edit | None = None) -> tuple[dict, torch.Tensor]:
        """(columns of each task, logits on the texts). Task by task: no figure depends on what else is asked."""
        from . import neutral

        with hooked(scorer.model, edit) if edit else nullcontext():
            with progress(label, sum(len(mark.pairs) for mark in self._marks), "request") as update:
                columns = {mark.name: mark.measure(scorer, update) for mark in self._marks}
            return columns, neutral.logits(scorer, self._texts)

    def fill(self, scorer: Scorer, edited: tuple | None, others: dict[str, Edit]) -> float | None:
        """Add the base, the edit as measured, the controls and the flattened base. Returns its temperature."""
        from . import neutral

        measured = self.measure(scorer, "evaluate: base")
        base = measured[1]

        def add(name: str, measured: tuple[dict, torch.Tensor]) -> None:
            self.columns[name] = measured[0]
            self.neutral[name] = neutral.columns(self._texts, measured[1], base)

        add("base", measured)
        if edited is None:
            return None
        add("edit", edited)
        for name, control in others.items():
            add(name, self.measure(scorer, f"evaluate: {name}", control))
        heat = neutral.temperature(base, float(neutral.KL.of(self.neutral["edit"].mean(0))))
        if heat:
            scorer.temperature = heat
            add("flattened", self.measure(scorer, "evaluate: flattened"))
            scorer.temperature = 1.0
        return heat

    def report(self, origin: str, margin: float, tested: str | None = None) -> dict:
        """Figures, tests and verdicts. origin: of the texts; tested: the one figure that is (None: all are)."""
        found = _report(self._marks, self.columns, margin, tested)
        return found | {"neutral": {"texts": len(self._texts), "source": origin} | _neutral_report(self.neutral)}


# ------------------------------------------------------------------------------------------------------------ report


def _report(
    marks: list[Benchmark], runs: dict[str, dict[str, np.ndarray]], margin: float, only: str | None = None
) -> dict:
    """Every figure for every model; for the edit also changes, tests and verdicts (of the figure `only`, if given)."""
    tasks = {}
    for mark in marks:
        tasks[mark.name] = _task_report(mark, {name: columns[mark.name] for name, columns in runs.items()}, margin)
        for name, entry in tasks[mark.name]["figures"].items():
            if only not in (None, name):
                entry.pop("p", None)
    known = [(figure, tasks[mark.name]["figures"].get(figure.name, {})) for mark in marks for figure in mark.figures]
    tested = [(figure, entry) for figure, entry in known if "p" in entry]
    for (figure, entry), p in zip(tested, holm([entry["p"] for _, entry in tested]), strict=True):
        entry["p_holm"] = p
        entry["verdict"] = _verdict(figure, entry)
    return {"comparisons": len(tested), "tasks": tasks}


def _neutral_report(runs: dict[str, np.ndarray]) -> dict:
    """[value, low, high] of each model's perplexity and KL."""
    from . import neutral

    return {f.name: {name: interval(run, f.of) for name, run in runs.items()} for f in (neutral.PERPLEXITY, neutral.KL)}


def _task_report(mark: Benchmark, columns: dict[str, np.ndarray], margin: float) -> dict:
    figures = {figure.name: _figure_report(figure, columns) for figure in _defined(mark.figures, columns)}
    groups = {}
    for group in sorted({*mark.groups} - {""}) if len({*mark.groups}) > 1 else []:
        chosen = np.array([g == group for g in mark.groups])
        of_group = {name: columns[name][chosen] for name in ("base", "edit") if name in columns}
        groups[group] = {"items": int(chosen.sum())} | {
            figure.name: _values(figure, of_group) for figure in _defined(mark.figures, of_group)
        }
    if mark.kind in ABILITIES and "edit" in columns:
        lowest = least(columns["base"], columns["edit"])
        figures["accuracy"]["non_inferior"] = {"margin": margin, "lowest": lowest, "shown": lowest > -margin}
    return {"kind": mark.kind, "items": len(mark.sizes), "figures": figures, "groups": groups}


def least(before: np.ndarray, after: np.ndarray) -> float:
    """Lower end, in points, of a change of accuracy (column 0 of [n, k]): of the bootstrap's interval and Agresti's."""
    return 100 * min(least_change(before[:, 0], after[:, 0]), change([before], [after])[1])


def _defined(figures: Sequence[Figure], columns: dict[str, np.ndarray]) -> list[Figure]:
    """Figures that these items can give: a few items of BBQ may hold none that is ambiguous."""
    return [f for f in figures if all(np.isfinite(f.of(values.mean(0))) for values in columns.values())]


def _values(figure: Figure, columns: dict[str, np.ndarray]) -> dict:
    """Value of each run, and the change from base to edit with its interval."""
    found: dict = {name: float(figure.of(values.mean(0))) for name, values in columns.items()}
    if "edit" in columns:
        found["change"] = change([columns["base"]], [columns["edit"]], figure.of)
    return found


def _figure_report(figure: Figure, columns: dict[str, np.ndarray]) -> dict:
    """`_values`, the changes by the controls, how far the edit goes beyond each, and the p of the edit's change.

    beyond: [d, low, high], d = the edit's distance from the ideal less the control's: below 0, the edit is nearer.
    """
    found = _values(figure, columns)
    if "edit" not in columns or figure.ideal is None:
        return found
    before, after = columns["base"], columns["edit"]
    draws = [values for name, values in columns.items() if name.startswith("random ")]
    others = {"random neurons": draws} if draws else {}
    others |= {n: [v] for n, v in columns.items() if n not in ("base", "edit") and not n.startswith("random ")}
    found["ideal"] = "lowest" if figure.ideal == -math.inf else figure.ideal  # JSON has no infinity
    found["controls"] = {name: change([before], values, figure.of) for name, values in others.items()}
    found["beyond"] = {name: change(values, [after], figure.distance) for name, values in others.items()}
    if figure.binary is not None:
        found["p"] = mcnemar(before[:, figure.binary], after[:, figure.binary])
    else:
        found["p"] = permutation(before, after, figure.of)
    return found


def _verdict(figure: Figure, entry: dict) -> str:
    """One line on a tested figure."""
    if entry["p_holm"] >= ALPHA:
        return "no effect found"
    nearer = figure.away(entry["edit"]) < figure.away(entry["base"])
    better, worse = ("better", "worse") if figure.ideal == 100 else (f"less {figure.excess}", f"more {figure.excess}")
    same = [name for name, (_, low, high) in entry["beyond"].items() if (high >= 0 if nearer else low <= 0)]
    if same:
        return f"{better if nearer else worse}, but not beyond {', '.join(same)}"
    return f"{better if nearer else worse}, beyond every control"
