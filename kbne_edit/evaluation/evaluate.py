"""Evaluates an edit on benchmarks, beside its controls.

An effect is about bias only if it exceeds every other explanation: as many random neurons, neurons selected by control
questions, the same neurons with the inverse factor, and a flattened base (the base at a temperature with the same KL on
neutral text).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NotRequired, TypedDict

from ..attribution.answers import AttributionSummary
from ..disk.checkpoint import Checkpoint
from ..disk.manifest import TOOL, Manifest
from ..edit import Edit
from ..errors import InputError
from ..hub.source import resolved, usual_recipe
from ..progress import say
from ..proofs.outcome import EditJSON, Proofs, edit_json
from ..recipe import Recipe, load_recipe
from ..selection.summary import SelectionSummary
from ..statistics import Interval, IntervalJSON
from .controls import controls_of
from .cost import Cost
from .effect import Effect
from .impact import NOT_MEASURED, Impact, ImpactJSON, measure_impact, recipe_of
from .measures.halves import fitted_measures, reported_half
from .onrecord import KeptEvaluation, KeptTask, kept_evaluations
from .result import TaskJSON, TaskResult, neutral_of, results_of
from .runs import Bench
from .settings import Controls, Measurement
from .verdict import Verdict, VerdictJSON, benchmarked, verdict_of
from .workers import by_all

if TYPE_CHECKING:
    from .scoring import Scorer

VERSION = 1


class NeutralKeys(TypedDict):
    """Neutral texts. Other keys are the figures, with each run's value."""

    texts: int
    source: str


NeutralJSON = Annotated[dict[str, Any], NeutralKeys, dict[str, IntervalJSON]]


@dataclass(frozen=True)
class Neutral:
    """On texts that speak of no group. texts: how many; origin: of them; figures: {figure: {run: value}}."""

    texts: int
    origin: str
    figures: dict[str, dict[str, Interval]]

    def to_dict(self) -> NeutralJSON:
        figures = {name: {run: list(v) for run, v in values.items()} for name, values in self.figures.items()}
        return {"texts": self.texts, "source": self.origin, **figures}


class EvaluatedJSON(EditJSON):
    """The edit that was evaluated. how: "hooks", or the directory that holds the edited model."""

    how: str


class EvaluationJSON(ImpactJSON):
    """What `evaluate --json` prints. limit: items of each task, null for all; margin: points of accuracy.

    controls: {name: neurons}. comparisons: how many figures are tested. temperature: of the flattened base.
    """

    version: int
    model: str
    commit: str | None
    recipe: str
    limit: int | None
    margin: float
    edit: EvaluatedJSON | None
    controls: dict[str, int]
    temperature: float | None
    comparisons: int
    tasks: dict[str, TaskJSON]
    neutral: NeutralJSON
    verdict: NotRequired[VerdictJSON]


@dataclass(frozen=True)
class Evaluation:
    """Figures of a base, and of an edit beside its controls.

    edit: None if only the base was measured; how: "hooks", or the directory that holds the edited model.
    controls: {name: neurons}; temperature: of the flattened base, None if none has the edit's KL. tasks: by name.
    impact: effect and cost as every bake measures them. verdict: of these, of the tasks, and of what a directory's own
    run recorded; None without an edit.
    """

    model: str
    commit: str | None
    recipe: str
    limit: int | None
    margin: float
    edit: Edit | None
    how: str
    controls: dict[str, int]
    temperature: float | None
    tasks: dict[str, TaskResult]
    neutral: Neutral
    impact: Impact = NOT_MEASURED
    verdict: Verdict | None = None

    def __repr__(self) -> str:
        return f"Evaluation({self.model}, {', '.join(self.tasks)}{f', {self.verdict.ship}' if self.verdict else ''})"

    @property
    def comparisons(self) -> int:
        """How many figures were tested, which Holm's p accounts for."""
        return sum(figure.tested for task in self.tasks.values() for figure in task.figures.values())

    def kept(self) -> KeptEvaluation | None:
        """The part that an output keeps; None if only the base was measured."""
        if self.verdict is None:
            return None
        return KeptEvaluation(
            tool=TOOL,
            recipe=self.recipe,
            limit=self.limit,
            margin=self.margin,
            tasks=tuple(map(KeptTask.of, self.tasks.values())),
            neutral={name: (runs["base"], runs["edit"]) for name, runs in self.neutral.figures.items()},
            verdict=self.verdict,
        )

    def to_dict(self) -> EvaluationJSON:
        """JSON form: what `evaluate --json` prints."""
        record: EvaluationJSON = {
            "version": VERSION,
            "model": self.model,
            "commit": self.commit,
            "recipe": self.recipe,
            "limit": self.limit,
            "margin": self.margin,
            "edit": {**edit_json(self.edit), "how": self.how} if self.edit else None,
            "controls": self.controls,
            "temperature": self.temperature,
            "comparisons": self.comparisons,
            "tasks": {name: task.to_dict() for name, task in self.tasks.items()},
            "neutral": self.neutral.to_dict(),
            **self.impact.to_dict(),
        }
        if self.verdict:
            record["verdict"] = self.verdict.to_dict()
        return record


@by_all
def evaluate(
    source: str,
    *,
    edit: Edit | None = None,
    baked: str | Path | None = None,
    measurement: Measurement | None = None,
    controls: Controls | None = None,
    margin: float = 5.0,
) -> Evaluation:
    """Figures of the base, of the edit and of its controls on the same items, with intervals and tests.

    source: directory, ORG/NAME[@REVISION] or demo.
    edit: by hooks; baked: a directory instead, from whose edit the controls are made (the edit of an adapter or a delta
    is applied by hooks); neither: the base alone.
    measurement: on what, and how (None: all tasks that there are data for).
    controls: what the edit is compared with (None: random neurons, the inverse factor, a flattened base).
    margin: the loss that a capability must exclude, in points of accuracy.

    Effect and cost are measured where the probes are among the tasks. Of several processes (`torchrun`) each scores its
    share; all but the first one return None.
    Raises InputError or a subclass, also if lm-eval is not installed.
    """
    from .neutral import neutral_text
    from .scoring import scorers

    if edit and baked:
        raise InputError("evaluate takes an edit or a baked directory, not both")
    measurement = measurement or Measurement()
    controls = controls or Controls()
    measurement.check()
    with resolved(source, say) as base:
        checkpoint = Checkpoint.open(base.path)
        known = _known(Path(baked), checkpoint) if baked else None
        edit = known.edit if known else edit
        folded = Path(baked) if baked and known and known.folded else None
        beside = controls_of(edit, checkpoint, controls.draws, controls.scores) if edit else []
        loaded = load_recipe(measurement.recipe or recipe_of(edit) or usual_recipe(source))
        scorer_of = scorers(checkpoint.path, measurement.device, measurement.dtype)
        scorer = scorer_of(folded or checkpoint.path)
        ready = measurement.benchmarks(loaded, scorer)
        ready = [reported_half(task, fitted_measures(edit)) for task in ready]
        text = neutral_text(scorer.tokenizer, loaded)
        bench = Bench(ready, text.rows)
        edited = bench.measure(scorer, "evaluate: edit", None if folded else edit) if edit else None
        if folded:  # measured first, so that one model is in memory at a time
            scorer = None  # type: ignore[assignment]
            scorer = scorer_of(checkpoint.path)
        runs = bench.complete(scorer, edited, beside)
        impact = NOT_MEASURED
        if edit and (measurement.tasks is None or "probes" in measurement.tasks):
            impact = _impact(scorer, loaded, edit, checkpoint)
    results = results_of(ready, runs, margin)
    return Evaluation(
        model=base.id,
        commit=base.commit,
        recipe=loaded.name,
        limit=measurement.limit,
        margin=margin,
        edit=edit,
        how=str(folded) if folded else "hooks",
        controls={control.name: control.edit.num_neurons for control in beside},
        temperature=runs.temperature,
        tasks=results,
        neutral=Neutral(len(text.texts), text.origin, neutral_of(runs)),
        impact=impact,
        verdict=_verdict(known, impact, results) if edit else None,
    )


def _impact(scorer: Scorer, recipe: Recipe, edit: Edit, checkpoint: Checkpoint) -> Impact:
    try:
        return measure_impact(scorer.model, scorer.tokenizer, recipe, edit, checkpoint.layer_sizes(edit.site))
    except InputError as error:
        say(f"effect and cost: not measured: {error}")
        return NOT_MEASURED


@dataclass(frozen=True)
class Known:
    """What a directory records about its own run. folded: True for a checkpoint, False for an adapter or a delta.

    proofs: as recorded, the first one checked again. effect, cost, evaluations: as recorded.
    """

    edit: Edit
    folded: bool
    proofs: Proofs | None = None
    selection: SelectionSummary | None = None
    attribution: AttributionSummary | None = None
    effect: Effect | None = None
    cost: Cost | None = None
    evaluations: tuple[KeptEvaluation, ...] = ()


def _known(baked: Path, base: Checkpoint) -> Known:
    """The edit of a directory, by the first proof: the directory is `base` with it, and nothing else."""
    from ..proofs.verify import verify

    manifest = Manifest.read(baked)
    if manifest and not manifest.is_checkpoint:
        if manifest.edit.base != base.fingerprint():
            raise InputError(f"{baked} was made for another model than {base.path}: pass its base with --in")
        return _recorded(baked, manifest, manifest.edit)
    say(f"reading the edit of {baked}")
    proof = verify(base, baked, behaviour=False).files
    if not proof.holds:
        fault = proof.faults[0]
        raise InputError(f"{baked} is not {base.path} with an edit alone ({fault}): `kbne-edit verify` lists all")
    return _recorded(baked, manifest, proof.edit)


def _recorded(baked: Path, manifest: Manifest | None, edit: Edit) -> Known:
    """What the run of a directory recorded. Raises InputError."""
    if manifest is None:
        return Known(edit, True)
    summary = manifest.summary or {}

    def read(name: str, kind: Any) -> Any:
        return kind.from_dict(summary[name]) if name in summary else None

    try:
        return Known(
            edit,
            manifest.is_checkpoint,
            Proofs.from_dict(manifest.proofs, edit) if manifest.proofs else None,
            read("selection", SelectionSummary),
            read("attribution", AttributionSummary),
            read("effect", Effect),
            read("cost", Cost),
            kept_evaluations(summary),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{baked}: its manifest has figures that kbne-edit did not write") from None


def _verdict(known: Known | None, impact: Impact, results: dict[str, TaskResult]) -> Verdict:
    """The verdict from what was measured here and, for the rest, from the directory's record."""
    verdict = verdict_of(
        answers=known.attribution.answers if known and known.attribution else None,
        selection=known.selection if known else None,
        effect=impact.effect or (known.effect if known else None),
        cost=impact.cost or (known.cost if known else None),
        proofs=known.proofs if known else None,
    )
    for earlier in known.evaluations if known else ():
        verdict = benchmarked(verdict, earlier.tasks)
    return benchmarked(verdict, list(results.values()))
