"""Factors and thresholds chosen on one half of the items (dev), and confirmed once on the other (test).

Every edit of the space is measured by hooks on the dev half alone. The choice: of the edits within bounds (a loss of
capability excluded), and there on the Pareto front (bias against KL on neutral text), the one with the least bias that
goes beyond random neurons. Only then is the test half scored: the chosen edit beside the controls of `evaluate`, once.
OUT keeps a journal (a killed run goes on, and ends with the same bytes), the result, and a mark that the test half was
used.

The scores come from the recipe's questions: their tasks, `knowledge` and `knowledge_controls`, are not new to the
neurons in either half. They bound the loss where no capability task is given, and never steer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .. import __version__, plots
from ..attribution.scores import Scores, load_scores
from ..disk.checkpoint import Checkpoint
from ..disk.hashing import file_hash
from ..disk.names import MANIFEST
from ..edit import Edit
from ..errors import InputError, OutputError, ScoresError
from ..evaluation.evaluate import Runs, controls, random_edit
from ..files import forbid_overlap, read_json, write_json, write_text
from ..hub.source import resolved
from ..progress import say
from ..recipe import Recipe, load_recipe
from .journal import Journal
from .objective import Goal, Run, goal_of
from .search import Space, Sweep, front, sweep

if TYPE_CHECKING:
    import torch

    from ..evaluation.scoring import Scorer
    from .halves import Half

VERSION = 1
JOURNAL, USED, RESULT, PLOT, EDIT = "journal.jsonl", "test-used.json", "tune.json", "pareto.svg", "edit.json"
RULE = "the least {} on dev, of the front's edits that go beyond random neurons"  # bias, or what else is to fall
_KEYS = {
    "base",
    "split",
    "figure",
    "margin",
    "max_kl",
    "steered_by",
    "bounded_by",
    "points",
    "chosen",
    "test",
    "verdict",
}


def tune(
    source: str,
    scores: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    space: Space | None = None,
    tasks: Sequence[str] | None = None,
    data: str | Path | None = None,
    limit: int | None = None,
    recipe: str | Path | None = None,
    figure: str | None = None,
    margin: float = 5.0,
    max_kl: float | None = None,
    trials: int = 60,
    draws: int = 3,
    seed: int = 0,
    dev_only: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
) -> dict:
    """Choose an edit on dev, confirm it once on test; returns what OUT/tune.json holds.

    scores: scores files of the model, one per site. out: the folder that keeps everything; a run with the same settings
    goes on there, or returns the result that is there. space: what is tried, `trials` edits of it at most.
    tasks, data, limit, recipe (None: that of the scores), device, dtype: as of `evaluate`. figure: of the bias tasks,
    what is to come nearer to its ideal (None: the absolute margin; where only probes that are to be avoided have data,
    the unwanted margin). margin: points of accuracy whose loss must be excluded; max_kl: bound of the KL from the base
    on neutral text, nats per token (None: none). draws: of random neurons. seed: of the split and of the sampler.
    dev_only: stop before the test half is scored.
    Raises InputError and its kin.
    """
    import torch

    from ..evaluation import neutral
    from ..evaluation.scoring import Scorer
    from ..evaluation.tasks import benchmarks, check
    from ..models.loading import load_model, load_tokenizer
    from .halves import halves

    space, out, data = space or Space(), Path(out), Path(data) if data else None
    check(tasks, data)
    if any((out / name).exists() for name in ("config.json", MANIFEST)):
        raise OutputError(f"{out} holds a model, whose files are not to be mixed with others: choose another --out")
    files = {Path(path): load_scores(path) for path in ([scores] if isinstance(scores, (str, Path)) else scores)}
    with resolved(source, say) as found:
        forbid_overlap(out / RESULT, found.origin)
        checkpoint = Checkpoint.open(found.path)
        sites = _sites(files, checkpoint)
        asked = load_recipe(recipe or next(iter(files.values())).settings["recipe"])
        tokenizer = load_tokenizer(checkpoint.path)
        scorer = Scorer(load_model(checkpoint.path, getattr(torch, dtype), device), tokenizer)
        text = neutral.neutral_text(tokenizer, asked)
        dev, test = halves(benchmarks(tasks, data, limit, asked, scorer, tokenizer), text.texts, text.rows, seed)
        goal = goal_of((dev, test), figure, margin, max_kl)
        measured = _measured(checkpoint, asked, dev, test, dtype)
        choice = {
            "scores": {site: file_hash(path) for site, path in sites.items()},
            "space": space.record(),
            "trials": trials,
            "seed": seed,
            "draws": draws,
            "figure": goal.figure.name,
            "margin": margin,
            "max_kl": max_kl,
        }
        with closing(Journal(out / JOURNAL, measured)) as journal:
            if (stored := _stored(out, choice)) is not None:
                return stored
            tuner = _Tuner(checkpoint, _Bench(scorer, dev, journal), goal, draws)
            chosen, result = tuner.choose(space, {site: files[path] for site, path in sites.items()}, trials, seed)
            result = measured | {"model": found.id, "commit": found.commit, "recipe": asked.name} | choice | result
            if chosen and not dev_only:
                _use_test(out, choice, measured, chosen)
                others = _controls(chosen, checkpoint, draws, sites[chosen.site])
                result["test"] = _confirm(scorer, test, text.origin, chosen, others, goal)
                result["verdict"] = goal.verdict(result["test"])
            _write(out, result, chosen)
    return load_tuning(out / RESULT)


def _sites(files: dict[Path, Scores], checkpoint: Checkpoint) -> dict[str, Path]:
    """{site: its scores file}. Raises InputError if a file is of another model, or a site has two."""
    found: dict[str, Path] = {}
    for path, scores in files.items():
        if scores.base != checkpoint.fingerprint():
            raise ScoresError(f"{path} was made for another model: locate again")
        if scores.site in found:
            raise InputError(f"{path} is the second scores file of the site {scores.site}: tune takes one of each site")
        found[scores.site] = path
    return found


def _measured(checkpoint: Checkpoint, recipe: Recipe, dev: Half, test: Half, dtype: str) -> dict:
    """What a measurement depends on, and the split."""
    sides = {"dev": dev.digests(), "test": test.digests()}
    split = {
        name: {side: dict(zip(("items", "sha256"), of[name], strict=True)) for side, of in sides.items()}
        for name in sides["dev"]
    }
    return {
        "kbne_tune": VERSION,
        "tool": f"kbne-edit {__version__}",
        "base": checkpoint.fingerprint(),
        "recipe_sha256": recipe.sha256,
        "dtype": dtype,
        "split": split,
    }


# ------------------------------------------------------------------------------------------------------------- on dev


class _Bench:
    """Measures edits on the dev half, each once; what the journal holds is not measured again."""

    def __init__(self, scorer: Scorer, half: Half, journal: Journal):
        self._scorer, self._half, self._journal = scorer, half, journal
        self._runs = Runs(half.marks, half.texts)
        if len(journal):
            say(f"{len(journal)} measurements are done already")

    @cached_property
    def base(self) -> Run:
        return self._run("base", None)

    def run(self, edit: Edit) -> Run:
        return self._run(edit.sha256, edit)

    def _run(self, key: str, edit: Edit | None) -> Run:
        if (record := self._journal.get(key)) is None:
            run = self._measure(f"tune: measurement {len(self._journal) + 1} on dev", edit)
            record = {
                "tasks": {name: rows.tolist() for name, rows in run.tasks.items()},
                "neutral": run.neutral.tolist(),
            }
            self._journal.put(key, record)
        return Run({name: np.array(rows) for name, rows in record["tasks"].items()}, np.array(record["neutral"]))

    def _measure(self, label: str, edit: Edit | None) -> Run:
        from ..evaluation import neutral

        tasks, logits = self._runs.measure(self._scorer, label, edit)
        run = Run(tasks, neutral.columns(self._half.texts, logits, self._logits))
        if not all(np.isfinite(columns).all() for columns in (*run.tasks.values(), run.neutral)):
            what = f"with {edit.num_neurons} neurons times {edit.distinct_factors}" if edit else "as it is"
            raise InputError(f"the model {what} gives no numbers: leave such factors out, or try --dtype float32")
        return run

    @cached_property
    def _logits(self) -> torch.Tensor:
        """The base's, on the texts."""
        from ..evaluation import neutral

        return neutral.logits(self._scorer, self._half.texts)


class _Tuner:
    """The sweep and the choice."""

    def __init__(self, checkpoint: Checkpoint, bench: _Bench, goal: Goal, draws: int):
        self._checkpoint, self._bench, self._goal, self._draws = checkpoint, bench, goal, draws
        self._points: dict[str, dict] = {}

    def choose(self, space: Space, scores: dict[str, Scores], trials: int, seed: int) -> tuple[Edit | None, dict]:
        """(the chosen edit, part of the result)."""
        found = sweep(space, scores, trials, seed, self._values)
        points = [
            {"edit": key, "neurons": candidate.edit.num_neurons, "settings": candidate.settings} | self._points[key]
            for key, candidate in found.candidates.items()
        ]
        # The base is on every front, at no change and no cost: what does not lower the bias is beaten by it.
        held = [point for point in points if point["within"] and point["bias"][0] < 0]
        base = self._bench.base
        best = [held[i] for i in front([(point["bias"][0], point["kl"]) for point in held])]
        for point in best:
            point["front"] = True
        chosen = self._beyond_random(best, found)
        return chosen, {
            "steered_by": list(self._goal.steering),
            "bounded_by": self._goal.abilities,
            "base_bias": {name: float(f.distance(base.tasks[name].mean(0))) for name, f in self._goal.steering.items()},
            "search": {"how": found.how, "size": found.size, "empty": found.empty},
            "points": points,
            "chosen": chosen and chosen.sha256,
            "chosen_by": RULE.format(self._goal.figure.excess),
            "test": None,
            "verdict": None,
        }

    def _values(self, edit: Edit) -> tuple[float, float, float]:
        """(bias, KL, by how much the bounds are broken), for the sampler."""
        if edit.sha256 not in self._points:
            base, run = self._bench.base, self._bench.run(edit)
            lowest, kl = self._goal.lowest(base, run), _kl(run)
            self._points[edit.sha256] = {
                "bias": self._goal.moved(run, [base]),
                "kl": kl,
                "lowest": lowest,
                "within": self._goal.breach(lowest, kl) < 0,
                "front": False,
                "beyond_random": None,
            }
        point = self._points[edit.sha256]
        return point["bias"][0], point["kl"], self._goal.breach(point["lowest"], point["kl"])

    def _beyond_random(self, best: list[dict], found: Sweep) -> Edit | None:
        """The first of the front, the least bias first, that goes beyond random neurons of the same layers."""
        for point in best:
            edit = found.candidates[point["edit"]].edit
            sizes = self._checkpoint.layer_sizes(edit.site)
            draws = [self._bench.run(random_edit(edit, sizes, seed)) for seed in range(self._draws)]
            point["beyond_random"] = self._goal.moved(self._bench.run(edit), draws)
            if point["beyond_random"][2] < 0:
                return edit
        return None


def _kl(run: Run) -> float:
    from ..evaluation import neutral

    return float(neutral.KL.of(run.neutral.mean(0)))


# ------------------------------------------------------------------------------------------------------------ on test


def _stored(out: Path, choice: dict) -> dict | None:
    """The finished result, if the test half was used for these settings. Raises InputError if it was for others."""
    if not (out / USED).exists():
        return None
    used = read_json(out / USED, InputError, "choose another --out")
    wanted = json.loads(json.dumps(choice))
    before = used.get("choice") if isinstance(used, dict) else None
    if not isinstance(before, dict):
        raise InputError(f"{out / USED} is no file of kbne-edit: choose another --out")
    if other := [key for key in wanted if before.get(key) != wanted[key]]:
        raise InputError(
            f"{out}: its test split was used to confirm what another {', '.join(other)} chose, and confirms no second "
            "choice: use the same settings to see the result, or another --out and --seed for another split"
        )
    if not (out / RESULT).exists() or (stored := load_tuning(out / RESULT))["test"] is None:
        return None  # killed while it was scored: the same choice may be scored again
    say(f"{out}: the result of an earlier run with these settings; its test split is not scored again")
    return stored


def _use_test(out: Path, choice: dict, measured: dict, edit: Edit) -> None:
    """Mark, before the first test item is scored, for which edit the test half is used."""
    if (out / USED).exists():
        if read_json(out / USED, InputError, "choose another --out").get("edit") != edit.sha256:
            raise InputError(f"{out / USED}: the test split was used for another edit: choose another --out")
        return
    split = {name: sides["test"] for name, sides in measured["split"].items()}
    write_json(out / USED, {"kbne_tune": VERSION, "edit": edit.sha256, "choice": choice, "split": split})


def _controls(edit: Edit, checkpoint: Checkpoint, draws: int, scores: str | Path) -> dict[str, Edit]:
    try:
        return controls(edit, checkpoint, draws, scores)
    except ScoresError as error:
        say(f"control questions left out: {error}")
        return controls(edit, checkpoint, draws, None)


def _confirm(scorer: Scorer, test: Half, origin: str, edit: Edit, others: dict[str, Edit], goal: Goal) -> dict:
    """The chosen edit and its controls on the test half, by `evaluate`'s code; the steering figure alone is tested."""
    runs = Runs(test.marks, test.texts)
    edited = runs.measure(scorer, "confirm on test: edit", edit)
    heat = runs.fill(scorer, edited, others)
    sizes = {name: control.num_neurons for name, control in others.items()}
    return {"controls": sizes, "temperature": heat} | runs.report(origin, goal.margin, goal.figure.name)


# ------------------------------------------------------------------------------------------------------------- files


def _write(out: Path, result: dict, edit: Edit | None) -> None:
    """Plot, edit (once it was confirmed or not), and last the result."""
    chosen = result["chosen"]
    marks = [(p["kl"], p["bias"][0], p["within"], p["front"], p["edit"] == chosen) for p in result["points"]]
    write_text(out / PLOT, plots.standalone(plots.pareto(marks, result["figure"])))
    if result["verdict"]:
        record = {"figure": result["figure"], "chosen_by": result["chosen_by"], **result["verdict"]}
        found = {
            **edit.found,
            "recipe": result["recipe"],
            "recipe_sha256": result["recipe_sha256"],
            "model": result["model"],
            "commit": result["commit"],
            "tune": record,
        }
        Edit(edit.site, edit.factors, edit.base, found).save(out / EDIT)
    write_json(out / RESULT, result)


def load_tuning(path: str | Path) -> dict:
    """A result of `tune`. Raises InputError."""
    found = read_json(path, InputError, "run tune again")
    if not isinstance(found, dict) or found.get("kbne_tune") != VERSION or not _KEYS <= set(found):
        raise InputError(f"{path} is no result of `kbne-edit tune`")
    return found
