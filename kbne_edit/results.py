"""What was measured of an edit, as rows that other runs' rows can be put beside. Form of results.json.

A results file names the base by its fingerprint, so that runs of several people can be told apart from runs on several
models. It holds no path and no time: the same run gives the same bytes, whoever runs it with the same versions.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict, cast

from .disk.manifest import TOOL, Manifest, Origin, RecipeRecord
from .disk.names import MANIFEST
from .edit import Edit
from .errors import InputError
from .evaluation.cost import Cost
from .evaluation.effect import Effect
from .evaluation.evaluate import Evaluation
from .evaluation.measures.quick import QuickMeasure
from .evaluation.onrecord import KeptTask
from .evaluation.result import RANDOM
from .evaluation.verdict import Verdict, VerdictJSON
from .files import read_json
from .recipe import load_recipe
from .reporting.record import Measured
from .statistics import Interval, IntervalJSON

VERSION = 1
FILE = "results.json"
_LIBRARIES = ("torch", "transformers", "lm-eval")
_EFFECTS = {
    "less": "less, beyond random neurons and a flattening",
    "more": "more, beyond random neurons",
    "none": "no evidence",
}


class Row(NamedTuple):
    """One figure. change: of the edit; random: of random neurons, None where none was drawn; text: what can be said."""

    task: str
    figure: str
    unit: str
    items: int
    base: float
    edit: float
    change: Interval
    random: Interval | None
    text: str

    def to_dict(self) -> RowJSON:
        record = self._asdict() | {"change": list(self.change), "random": self.random and list(self.random)}
        return cast(RowJSON, record)

    @classmethod
    def from_dict(cls, record: dict) -> Row:
        """Raises KeyError, TypeError or ValueError."""
        random = record["random"]
        return cls(
            str(record["task"]),
            str(record["figure"]),
            str(record["unit"]),
            int(record["items"]),
            float(record["base"]),
            float(record["edit"]),
            Interval.from_list(record["change"]),
            None if random is None else Interval.from_list(random),
            str(record["text"]),
        )


class RowJSON(TypedDict):
    """One figure of base and edit, its change with a 95 % interval, and the change under random neurons."""

    task: str
    figure: str
    unit: str
    items: int
    base: float
    edit: float
    change: IntervalJSON
    random: IntervalJSON | None
    text: str


class EditedJSON(TypedDict):
    """The edit. sha256: of its neurons and factors."""

    site: str
    neurons: int
    factors: list[float]
    sha256: str


class ResultsJSON(TypedDict):
    """A results file. base: fingerprint of the model; versions: of python and libraries; machine: kind of processor.

    recipe: its probes and questions were measured, null for none.
    """

    kbne_results: int
    tool: str
    versions: dict[str, str]
    machine: str
    model: str | None
    commit: str | None
    base: str | None
    recipe: Annotated[dict[str, Any], RecipeRecord] | None
    edit: EditedJSON
    verdict: VerdictJSON
    figures: list[RowJSON]


@dataclass(frozen=True)
class Results:
    """What was measured of an edit. model: as it may be published; base: fingerprint. rows: the figures."""

    tool: str
    versions: dict[str, str]
    machine: str
    model: Origin | None
    base: str | None
    recipe: RecipeRecord | None
    edit: EditedJSON
    verdict: Verdict
    rows: tuple[Row, ...]

    def __repr__(self) -> str:
        return f"Results({self.model}, {len(self.rows)} figures, {self.verdict.ship})"

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> Results:
        """What a directory has on record. Raises KeyError, TypeError or ValueError for figures of another form."""
        measured = Measured.of(manifest.summary)
        tasks = [task for one in measured.evaluations for task in one.tasks]
        return cls(
            manifest.tool,
            _versions(),
            platform.machine(),
            manifest.source,
            manifest.edit.base,
            manifest.recipe,
            _edited(manifest.edit),
            measured.verdict,
            (*_own_rows(measured.effect, measured.cost, measured.measures), *_task_rows(tasks)),
        )

    @classmethod
    def of_evaluation(cls, evaluation: Evaluation, recipe: str | Path | None = None) -> Results:
        """Of an evaluation of an edit. recipe: that it was given. Raises InputError where there was no edit."""
        kept = evaluation.kept()
        if kept is None or evaluation.edit is None:
            raise InputError("the base alone was evaluated: there are no results of an edit")
        loaded, impact = load_recipe(recipe or evaluation.recipe), evaluation.impact
        return cls(
            TOOL,
            _versions(),
            platform.machine(),
            Origin(evaluation.model, evaluation.commit),
            evaluation.edit.base,
            RecipeRecord(loaded.name, loaded.sha256),
            _edited(evaluation.edit),
            kept.verdict,
            (*_own_rows(impact.effect, impact.cost, impact.measures), *_task_rows(kept.tasks)),
        )

    def to_dict(self) -> ResultsJSON:
        return {
            "kbne_results": VERSION,
            "tool": self.tool,
            "versions": self.versions,
            "machine": self.machine,
            "model": self.model.id if self.model else None,
            "commit": self.model.commit if self.model else None,
            "base": self.base,
            "recipe": self.recipe.to_dict() if self.recipe else None,
            "edit": self.edit,
            "verdict": self.verdict.to_dict(),
            "figures": [row.to_dict() for row in self.rows],
        }

    @classmethod
    def from_dict(cls, record: object, where: str = FILE) -> Results:
        """Inverse of `to_dict`. Raises InputError that names `where`."""
        if not isinstance(record, dict) or record.get("kbne_results") != VERSION:
            raise InputError(f"{where} is no results file: give results.json of a run, or a directory that bake wrote")
        try:
            return cls._parsed(record)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(f"{where} has figures of another form than kbne-edit writes") from None

    @classmethod
    def _parsed(cls, record: dict) -> Results:
        model, base, recipe, edit = (record[key] for key in ("model", "base", "recipe", "edit"))
        commit = record["commit"]
        return cls(
            str(record["tool"]),
            {str(name): str(version) for name, version in record["versions"].items()},
            str(record["machine"]),
            None if model is None else Origin(str(model), None if commit is None else str(commit)),
            None if base is None else str(base),
            None if recipe is None else RecipeRecord(str(recipe["name"]), str(recipe["sha256"])),
            {
                "site": str(edit["site"]),
                "neurons": int(edit["neurons"]),
                "factors": [float(factor) for factor in edit["factors"]],
                "sha256": str(edit["sha256"]),
            },
            Verdict.from_dict(record["verdict"]),
            tuple(map(Row.from_dict, record["figures"])),
        )


def load_results(path: str | Path) -> Results:
    """Of a results file, or of a directory that kbne-edit wrote. Raises InputError."""
    path = Path(path)
    if not path.is_dir():
        return Results.from_dict(read_json(path, InputError, "run the command that wrote it again"), str(path))
    manifest = Manifest.read(path)
    if manifest is None:
        raise InputError(f"{path} has no {MANIFEST}: give results.json of a run, or a directory that bake wrote")
    try:
        return Results.of_manifest(manifest)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{path / MANIFEST} has figures of another form than kbne-edit writes") from None


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _edited(edit: Edit) -> EditedJSON:
    return {
        "site": edit.site,
        "neurons": edit.num_neurons,
        "factors": list(edit.distinct_factors),
        "sha256": edit.sha256,
    }


def _own_rows(effect: Effect | None, cost: Cost | None, measures: Sequence[QuickMeasure]) -> list[Row]:
    """What every bake measures."""
    rows = []
    if effect:
        name, (before, after) = "unwanted score" if effect.avoids else "absolute score", effect.score
        text = _EFFECTS[effect.state]
        rows.append(Row("twins", name, "nats", effect.twins, before, after, effect.change, effect.random_change, text))
    if cost:
        kl, rise = cost.kl, Interval(*(value - 1 for value in cost.rise))
        rows.append(Row("neutral text", "KL from the base", "nats", cost.texts, 0.0, kl.value, kl, None, cost.state))
        rows.append(Row("neutral text", "perplexity ratio", "", cost.texts, 1.0, rise.value + 1, rise, None, ""))
    for measure in measures:
        name = f"{measure.name} ({measure.language})"
        rows += [
            Row(name, f.name, f.unit, measure.items, f.before, f.after, f.change, None, "") for f in measure.overall
        ]
    return rows


def _task_rows(tasks: Sequence[KeptTask]) -> list[Row]:
    """What `evaluate` measured."""
    return [
        Row(
            task.name,
            figure.name,
            figure.unit,
            task.items,
            figure.base,
            figure.edit,
            figure.change,
            figure.controls.get(RANDOM),
            figure.text,
        )
        for task in tasks
        for figure in task.figures.values()
    ]


# ------------------------------------------------------------------------------------------------------- side by side


class RunJSON(TypedDict):
    """One of several results. figures: those of all runs stand in `rows`."""

    name: str
    model: str | None
    commit: str | None
    base: str | None
    neurons: int
    tool: str
    ship: str


class FigureRowJSON(RowJSON):
    """A figure of one of the runs."""

    run: str


class CollectedJSON(TypedDict):
    """What `compare --results --json` prints. notes: what makes a comparison doubtful."""

    runs: list[RunJSON]
    rows: list[FigureRowJSON]
    notes: list[str]


@dataclass(frozen=True)
class Collected:
    """Results of several runs, by name."""

    runs: dict[str, Results]

    @property
    def notes(self) -> tuple[str, ...]:
        runs = self.runs.values()
        notes = []
        if len({run.base for run in runs if run.base}) > 1:
            notes.append("note: of different models: compare changes, not values")
        if len({run.recipe.sha256 for run in runs if run.recipe}) > 1:
            notes.append("note: with different recipes: the rows of twins are not of the same sentences")
        if len({run.tool for run in runs}) > 1:
            notes.append("note: by different versions of kbne-edit")
        return tuple(notes)

    def figures(self) -> dict[tuple[str, str, str], dict[str, Row]]:
        """{(task, figure, unit): {run: row}}, in the order in which they come; of a figure twice in a run, the last."""
        result: dict[tuple[str, str, str], dict[str, Row]] = {}
        for name, run in self.runs.items():
            for row in run.rows:
                result.setdefault((row.task, row.figure, row.unit), {})[name] = row
        return result

    def to_dict(self) -> CollectedJSON:
        return {
            "runs": [
                {
                    "name": name,
                    "model": run.model.id if run.model else None,
                    "commit": run.model.commit if run.model else None,
                    "base": run.base,
                    "neurons": run.edit["neurons"],
                    "tool": run.tool,
                    "ship": run.verdict.ship,
                }
                for name, run in self.runs.items()
            ],
            "rows": [{**row.to_dict(), "run": name} for rows in self.figures().values() for name, row in rows.items()],
            "notes": list(self.notes),
        }


def collect_results(*paths: str | Path) -> Collected:
    """Results files, or directories that kbne-edit wrote, side by side. Raises InputError for one given twice."""
    runs = {str(path): load_results(path) for path in paths}
    if len(runs) < len(paths):
        raise InputError("one of the results is given twice: leave it out")
    return Collected(runs)
