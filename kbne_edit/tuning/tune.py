"""Factors and thresholds chosen on one half of the items (dev), and confirmed once on the other (test).

Every edit of the space is measured by hooks on the dev half only. Candidates are the edits within bounds (a loss of
capability is excluded), on the Pareto front of bias and KL on neutral text, and beyond random neurons. The candidate
with the least bias is chosen. Then the test half is scored once: the chosen edit beside the controls of `evaluate`. OUT
keeps a journal (a killed run resumes and ends with the same bytes), the result, and a record that the test half was
used.

The scores come from the recipe's questions, so the tasks `knowledge` and `knowledge_controls` are not unseen data in
either half. They bound the loss where no capability task is given; they never decide the choice.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .. import __version__, plots
from ..attribution.scores import Scores, load_scores
from ..disk.checkpoint import Checkpoint
from ..disk.hashing import file_hash
from ..disk.names import MANIFEST
from ..edit import Edit
from ..errors import InputError, OutputError, ScoresError
from ..evaluation.controls import Control, controls_of
from ..evaluation.effect import FEWEST_DRAWS, random_edit
from ..evaluation.result import RANDOM, neutral_of, results_of
from ..evaluation.runs import Bench, Run, Runs
from ..evaluation.settings import Measurement
from ..evaluation.workers import by_all
from ..files import forbid_overlap, read_json, write_json, write_text
from ..hub.source import resolved
from ..progress import say
from ..recipe import Recipe, load_recipe
from ..used import count_use
from .bench import DevBench
from .choose import Choice, Chooser
from .journal import Journal
from .objective import Looks, Objective, objective_of
from .result import VERSION, Tuning, load_tuning
from .settings import Criteria, Search

if TYPE_CHECKING:
    from ..evaluation.scoring import Scorer
    from .halves import Half

JOURNAL, USED, RESULT, PLOT, EDIT = "journal.jsonl", "test-used.json", "tune.json", "pareto.svg", "edit.json"
_BLOCK = 40  # draws at once on the test half
RULE = "the least {} on dev, of the front's edits that do better than each draw of random neurons"


@by_all
def tune(
    source: str,
    scores: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    search: Search | None = None,
    measurement: Measurement | None = None,
    criteria: Criteria | None = None,
) -> Tuning:
    """Choose an edit on dev, and confirm it once on test. Returns the content of OUT/tune.json.

    source: directory, ORG/NAME[@REVISION] or demo.
    scores: scores files of the model, one per site.
    out: the folder of the run; a run with the same settings is resumed there, or returns the result in it.
    search: what to try. measurement: as of `evaluate`. criteria: of the choice and the confirmation.

    Of several processes (`torchrun`) each scores its share; all but the first one return None.
    Raises InputError or a subclass.
    """
    from ..evaluation.neutral import neutral_text
    from ..evaluation.scoring import scorers
    from .halves import halves, whole_data

    search = search or Search()
    measurement = measurement or Measurement()
    criteria = criteria or Criteria()
    out = Path(out)
    measurement.check()
    if any((out / name).exists() for name in ("config.json", MANIFEST)):
        raise OutputError(f"{out} holds a model, whose files are not to be mixed with others: choose another --out")
    files = {Path(path): load_scores(path) for path in ([scores] if isinstance(scores, (str, Path)) else scores)}
    with resolved(source, say) as base:
        forbid_overlap(out / RESULT, base.origin)
        checkpoint = Checkpoint.open(base.path)
        sites = _sites(files, checkpoint)
        loaded = load_recipe(measurement.recipe or next(iter(files.values())).settings["recipe"])
        scorer = scorers(checkpoint.path, measurement.device, measurement.dtype)(checkpoint.path)
        text = neutral_text(scorer.tokenizer, loaded)
        ready = measurement.benchmarks(loaded, scorer)
        dev, test = halves(ready, text.texts, text.rows, search.seed)
        objective = objective_of((dev, test), criteria)
        measured = _measured(checkpoint, loaded, dev, test, measurement.dtype)
        choice = _choice(sites, search, objective) | {"draws": criteria.draws}
        with closing(Journal(out / JOURNAL, measured)) as journal:
            if (stored := _stored(out, choice)) is not None:
                return stored
            bench = DevBench(scorer, dev, journal)
            chooser = Chooser(checkpoint, bench, objective, criteria.draws)
            chosen = chooser.choose(search, {site: files[path] for site, path in sites.items()})
            record = measured | {"model": base.id, "commit": base.commit, "recipe": loaded.name} | choice
            record |= _on_dev(chosen, bench, objective)
            if chosen.edit and not search.dev_only:
                _use_test(out, choice, measured, chosen.edit)
                uses = count_use(list(sites.values()), whole_data(ready, list(objective.steering)), chosen.edit.sha256)
                test_half = _TestHalf(scorer, test, text.origin, objective, Looks(uses, len(chosen.points)))
                controls = _controls(chosen.edit, checkpoint, criteria.draws, sites[chosen.edit.site])
                record |= test_half.confirm(chosen.edit, controls, checkpoint.layer_sizes(chosen.edit.site))
            record["verdict"] = Tuning.from_dict(record).verdict.to_dict()
            _write(out, record, chosen.edit)
    return load_tuning(out / RESULT)


def _sites(files: dict[Path, Scores], checkpoint: Checkpoint) -> dict[str, Path]:
    """{site: its scores file}. Raises InputError if a file is of another model, or a site has two."""
    result: dict[str, Path] = {}
    for path, scores in files.items():
        if scores.base != checkpoint.fingerprint():
            raise ScoresError(f"{path} was made for another model: locate again")
        if scores.site in result:
            raise InputError(f"{path} is the second scores file of the site {scores.site}: tune takes one of each site")
        result[scores.site] = path
    return result


def _measured(checkpoint: Checkpoint, recipe: Recipe, dev: Half, test: Half, dtype: str) -> dict:
    """What the measurements depend on, and the split."""
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


def _choice(sites: dict[str, Path], search: Search, objective: Objective) -> dict[str, Any]:
    """What the choice depends on: the scores, the space and the objective."""
    return {
        "scores": {site: file_hash(path) for site, path in sites.items()},
        "space": search.space.to_dict(),
        "figure": objective.figure.name,
        "margin": objective.margin,
        "max_kl": objective.max_kl,
        "trials": search.trials,
        "seed": search.seed,
    }


def _on_dev(choice: Choice, bench: DevBench, objective: Objective) -> dict:
    """The measurements and the choice on dev, as the result records them."""
    base = bench.base
    return {
        "digits": objective.figure.digits,
        "steered_by": list(objective.steering),
        "bounded_by": objective.abilities,
        "base_bias": {name: float(f.distance(base.tasks[name].mean(0))) for name, f in objective.steering.items()},
        "search": {"how": choice.sweep.how, "size": choice.sweep.size, "empty": choice.sweep.empty},
        "points": [point.to_dict() for point in choice.points],
        "chosen": choice.edit and choice.edit.sha256,
        "chosen_by": RULE.format(objective.figure.excess),
        "test": None,
        "confirmation": None,
    }


# ------------------------------------------------------------------------------------------------------------ on test


def _stored(out: Path, choice: dict) -> Tuning | None:
    """The finished result, if the test half was used for these settings. Raises InputError if it was for others."""
    if not (out / USED).exists():
        return None
    used = read_json(out / USED, InputError, "choose another --out")
    wanted = json.loads(json.dumps(choice))
    before = used.get("choice") if isinstance(used, dict) else None
    if not isinstance(before, dict):
        raise InputError(f"{out / USED} is not a file of kbne-edit: choose another --out")
    if other := [key for key in wanted if before.get(key) != wanted[key]]:
        raise InputError(
            f"{out}: its test split was used for what another {', '.join(other)} chose, and cannot confirm another "
            "choice: use the same settings to see the result, or another --out and --seed for another split"
        )
    if not (out / RESULT).exists() or (stored := load_tuning(out / RESULT)).confirmation is None:
        return None  # killed during scoring: the same choice may be scored again
    say(f"{out}: the result of an earlier run with these settings; its test split is not scored again")
    return stored


def _use_test(out: Path, choice: dict, measured: dict, edit: Edit) -> None:
    """Record, before the first test item is scored, for which edit the test half is used."""
    if (out / USED).exists():
        if read_json(out / USED, InputError, "choose another --out").get("edit") != edit.sha256:
            raise InputError(f"{out / USED}: the test split was used for another edit: choose another --out")
        return
    split = {name: sides["test"] for name, sides in measured["split"].items()}
    write_json(out / USED, {"kbne_tune": VERSION, "edit": edit.sha256, "choice": choice, "split": split})


def _controls(edit: Edit, checkpoint: Checkpoint, draws: int, scores: Path) -> list[Control]:
    try:
        return controls_of(edit, checkpoint, draws, scores)
    except ScoresError as error:
        say(f"control questions left out: {error}")
        return controls_of(edit, checkpoint, draws)


@dataclass(frozen=True)
class _TestHalf:
    """The test half. origin: of the neutral texts; looks: the multiple looks that the draws correct for."""

    scorer: Scorer
    half: Half
    origin: str
    objective: Objective
    looks: Looks

    def confirm(self, edit: Edit, controls: list[Control], sizes: list[int]) -> dict:
        """Evaluate the edit and its controls as `evaluate` does; test only the steering figure. sizes: of layers."""
        objective, bench = self.objective, Bench(self.half.benchmarks, self.half.texts)
        runs = bench.complete(self.scorer, bench.measure(self.scorer, "confirm on test: edit", edit), controls)
        runs = self._outdone(bench, runs, edit, sizes)
        results = results_of(self.half.benchmarks, runs, objective.margin, objective.figure.name)
        figures = neutral_of(runs)
        confirmation = objective.confirmed(results, figures["KL from the base"]["edit"].value, self.looks)
        return {
            "test": {
                "controls": {control.name: control.edit.num_neurons for control in controls},
                "temperature": runs.temperature,
                "comparisons": sum(f.tested for result in results.values() for f in result.figures.values()),
                "tasks": {name: result.to_dict() for name, result in results.items()},
                "neutral": {"texts": len(self.half.texts), "source": self.origin} | figures,
            },
            "confirmation": confirmation.to_dict(),
        }

    def _outdone(self, bench: Bench, runs: Runs, edit: Edit, sizes: list[int]) -> Runs:
        """With more draws, until one does as well as the edit or the looks need no more."""
        drawn = [run for run in runs if run.kind == RANDOM]
        distance = self.objective.distance(cast("Run", runs.edit).tasks)
        while FEWEST_DRAWS <= len(drawn) < self.looks.draws and all(
            self.objective.distance(run.tasks) > distance for run in drawn
        ):
            seeds = range(len(drawn), min(len(drawn) + _BLOCK, self.looks.draws))
            columns = bench.measure_draws(self.scorer, [random_edit(edit, sizes, seed) for seed in seeds])
            drawn += [Run(RANDOM, f"random {seed + 1}", tasks) for seed, tasks in zip(seeds, columns, strict=True)]
        known = {run.name for run in runs}
        return Runs((*runs, *(run for run in drawn if run.name not in known)), runs.temperature)


# ------------------------------------------------------------------------------------------------------------- files


def _write(out: Path, result: dict, edit: Edit | None) -> None:
    """Plot, edit (once it was confirmed or not), and last the result."""
    chosen = result["chosen"]
    points = [(p["kl"], p["bias"][0], p["within"], p["front"], p["edit"] == chosen) for p in result["points"]]
    write_text(out / PLOT, plots.standalone(plots.pareto(points, result["figure"])))
    if result["confirmation"]:
        edit = cast("Edit", edit)
        record = {"figure": result["figure"], "chosen_by": result["chosen_by"], **result["confirmation"]}
        history = {
            **edit.found,
            "recipe": result["recipe"],
            "recipe_sha256": result["recipe_sha256"],
            "model": result["model"],
            "commit": result["commit"],
            "tune": record,
        }
        Edit(edit.site, edit.factors, edit.base, history).save(out / EDIT)
    write_json(out / RESULT, result)
