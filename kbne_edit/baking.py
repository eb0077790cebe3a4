"""Bake: the whole pipeline from a model and a recipe to a proven checkpoint."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NotRequired

from .attribution.answers import AttributionJSON, AttributionSummary
from .disk.checkpoint import Checkpoint, private_files
from .disk.manifest import Manifest, Origin, RecipeRecord
from .disk.publishing import check_out, staged
from .disk.slots import layers_beyond
from .distributed import RANK
from .edit import Edit
from .errors import CheckpointError, EditError, ProofError, shown
from .evaluation.impact import NOT_MEASURED, Impact, ImpactJSON, impact_of, recipe_of
from .evaluation.verdict import Verdict, VerdictJSON, specific_part, verdict_of
from .families import Site, auto_class, family_of
from .files import forbid_links_out, forbid_overlap, work_folder
from .folding.adapter import check_form, load_edit, write_adapter
from .folding.delta import manifest_of, write_delta
from .folding.fold import fold_into
from .folding.plan import Plan, StepJSON
from .hub.licences import metadata_in
from .hub.source import Source, local_path, resolved, usual_recipe
from .locating import Subject, choose, locate_in
from .models import memory
from .progress import progress, say
from .proofs.outcome import Proofs, ProofsJSON
from .recipe import Recipe, load_recipe
from .reporting.card import add_card
from .selection.summary import SelectionJSON, SelectionSummary
from .settings import Checks, Doubt, Doubtful, Output, Settings

VERSION = 1


@dataclass(frozen=True)
class Located:
    """How an edit was located. selection, attribution: their summaries; work: the folder with scores and edit."""

    selection: SelectionSummary
    attribution: AttributionSummary
    work: Path


class BakeJSON(ImpactJSON):
    """What `bake --json` prints. out: the output directory (for a dry run: not written); form: checkpoint, peft or
    delta.

    work, selection, attribution: if neurons were located. share: of all neurons, 0 to 1; layers: {layer: number of
    edited neurons}; factors: the distinct ones; shards: [files of the base, files of the output], if resharded. plan:
    of a dry run. proofs: of a checkpoint; bytes: of an adapter or a delta.
    """

    version: int
    model: str
    commit: str | None
    out: str
    form: str
    auto_class: str
    work: NotRequired[str]
    selection: NotRequired[SelectionJSON]
    attribution: NotRequired[AttributionJSON]
    site: Site
    neurons: int
    share: float
    layers: dict[int, int]
    factors: list[float]
    shards: NotRequired[tuple[int, int]]
    dry_run: NotRequired[bool]
    plan: NotRequired[list[StepJSON]]
    proofs: NotRequired[ProofsJSON]
    bytes: NotRequired[int]
    verdict: NotRequired[VerdictJSON]


@dataclass(frozen=True)
class BakeResult:
    """What `bake` did.

    source: the base; out: the output directory (for a dry run: not written); form: "checkpoint", "peft" or "delta";
    auto_class: the class of transformers that loads the model. plan: what was folded. located: None if the edit was
    given. dry_run: nothing was written. proofs: of a checkpoint; bytes: of an adapter or a delta. impact: effect and
    cost, None where they were not measured.
    """

    source: Origin
    out: Path
    form: str
    auto_class: str
    plan: Plan
    located: Located | None = None
    dry_run: bool = False
    proofs: Proofs | None = None
    bytes: int | None = None
    impact: Impact = NOT_MEASURED

    def __repr__(self) -> str:
        return f"BakeResult({self.out}, {self.plan.edit.num_neurons} neurons, {self.form})"

    @property
    def edit(self) -> Edit:
        return self.plan.edit

    @property
    def verdict(self) -> Verdict:
        """The verdict on the edit, part by part."""
        located, impact = self.located, self.impact
        return verdict_of(
            answers=located.attribution.answers if located else None,
            selection=located.selection if located else None,
            effect=impact.effect,
            cost=impact.cost,
            proofs=self.proofs,
        )

    def to_dict(self) -> BakeJSON:
        """JSON form: what `bake --json` prints."""
        edit, checkpoint = self.edit, self.plan.checkpoint
        data: BakeJSON = {
            "version": VERSION,
            "model": self.source.id,
            "commit": self.source.commit,
            "out": str(self.out),
            "form": self.form,
            "auto_class": self.auto_class,
            "site": edit.site,
            "neurons": edit.num_neurons,
            "share": edit.num_neurons / sum(checkpoint.layer_sizes(edit.site)),
            "layers": {layer: len(neurons) for layer, neurons in edit.factors.items()},
            "factors": edit.distinct_factors,
        }
        if self.located:
            data["work"] = str(self.located.work)
            data["selection"] = self.located.selection.to_dict()
            data["attribution"] = self.located.attribution.to_dict()
        if self.plan.files:
            data["shards"] = (len(checkpoint.shards), len(self.plan.files))
        if self.dry_run:
            return {**data, "dry_run": True, "plan": [step.to_dict() for step in self.plan.steps]}
        if self.proofs:
            data["proofs"] = self.proofs.to_dict()
        if self.bytes is not None:
            data["bytes"] = self.bytes
        return {**data, **self.impact.to_dict(), "verdict": self.verdict.to_dict()}


@dataclass(frozen=True)
class _Job:
    """The arguments that the steps of a bake share."""

    source: Source
    out: Path
    recipe: Recipe
    overwrite: bool
    checks: Checks

    @property
    def origin(self) -> Origin:
        """The base, as it may be published."""
        return Origin(self.source.label, self.source.commit)


def bake(
    source: str,
    out: str | Path,
    settings: Settings | None = None,
    *,
    edit: Edit | str | Path | None = None,
    output: Output | None = None,
    checks: Checks | None = None,
) -> BakeResult | None:
    """Locate (unless `edit` is given), fold, prove; publish `out` only if both proofs hold.

    edit: an Edit, an edit.json, or the folder of an IA3 adapter. output: what is written, and how. checks: what is
    proven and measured of it.
    Of several processes (`torchrun`) the first one folds; the others return None once the questions are done.
    Raises InputError or a subclass; ProofError, and then nothing is written to `out`.
    """
    settings = settings or Settings()
    output = output or Output()
    checks = checks or Checks()
    out = Path(out)
    known = _check_settings(source, settings, edit)
    _check_output(source, out, output)
    if edit is not None and RANK != 0:
        return None
    with memory.limited(settings.memory), resolved(source, say) as base:
        checkpoint = Checkpoint.open(base.path)
        _say_notes(checkpoint)
        _check_form(output.form, checkpoint)
        folder = Path(output.work) if output.work else work_folder(out)
        forbid_overlap(out, base.origin)
        forbid_overlap(folder / "scores.safetensors", base.origin, option="--work")  # it may hold the model
        if isinstance(edit, (str, Path)):
            forbid_overlap(out, edit)
            edit = load_edit(edit, checkpoint)
        check_out(out, output.overwrite)
        recipe = known or load_recipe(recipe_of(edit) or usual_recipe(source))
        located = None
        if edit is None:
            choice = _locate(Subject(base, checkpoint, recipe), folder, settings, checks.doubtful)
            if choice is None:
                return None
            edit, located = choice
        elif settings.factor is not None:
            edit = edit.with_factor(settings.factor)
        plan = Plan.of(checkpoint, edit, output.shard_size, "skip" if output.skip_inexact else "refuse")
        if skipped := edit.num_neurons - plan.edit.num_neurons:
            say(f"left out: {skipped} neurons of {edit.num_neurons} cannot take their factor in this format exactly")
        origin = Origin(base.id, base.commit)
        result = BakeResult(origin, out, output.form, auto_class(checkpoint.config), plan, located, output.dry_run)
        if output.dry_run:
            return result
        job = _Job(base, out, recipe, output.overwrite, checks)
        return _write(job, result) if output.form == "checkpoint" else _write_alone(job, result)


def _say_notes(checkpoint: Checkpoint) -> None:
    """Print notes about the base before the fold."""
    if family_of(checkpoint.config).inferred:
        kind = shown(checkpoint.config["model_type"])
        say(f"note: {kind} is not in the table of architectures; its neurons were inferred from its modules")
    for note in checkpoint.notes:
        say(f"note: {note}")
    if beyond := [] if checkpoint.quantised else layers_beyond(checkpoint.shapes, checkpoint.config):
        say(
            f"note: the weights have layers {', '.join(map(str, beyond[:3]))}{' …' if len(beyond) > 3 else ''}, beyond "
            "those that config.json counts: transformers does not load them (is config.json of this model?), and they "
            "are copied as they are"
        )
    if left := private_files(checkpoint.path):
        say(f"note: not carried over, since it is not part of the model: {', '.join(left[:8])}")


def _check_settings(source: str, settings: Settings, edit: Edit | str | Path | None) -> Recipe | None:
    """Refuse settings that do not fit the recipe or the edit, before anything is downloaded or loaded.

    Returns the recipe; None if the edit may name its own.
    """
    if edit is None:
        recipe = load_recipe(settings.recipe or usual_recipe(source))
        settings.check(recipe)
        return recipe
    settings.check_beside_edit()
    loaded = None if settings.recipe is None else load_recipe(settings.recipe)
    if isinstance(edit, (str, Path)) and not Path(edit).exists():
        raise EditError(f"cannot read {edit}: No such file or directory")
    return loaded


def _check_output(source: str, out: Path, output: Output) -> None:
    """Refuse an output that cannot be written, before anything is downloaded or loaded."""
    output.check()
    if out.parent.is_dir() and source != "demo" and local_path(source) is None:
        # For a local base later, when it is known which folders must not be overwritten.
        check_out(out, output.overwrite)


def _check_form(form: str, checkpoint: Checkpoint) -> None:
    check_form(form, checkpoint)
    if form == "checkpoint":
        forbid_links_out(checkpoint.path, checkpoint.other_files()[0])


def _locate(
    subject: Subject, folder: Path, settings: Settings, doubtful: Doubtful | None
) -> tuple[Edit, Located] | None:
    """The edit that the recipe's questions select; None in all processes but the first."""
    source, recipe = subject.base, subject.recipe
    scores = locate_in(subject, folder / "scores.safetensors", settings, aside=True, doubtful=doubtful)
    if scores is None:
        return None
    chosen = choose(scores, recipe, settings)
    _say_selection(chosen.summary(), doubtful)
    edit = chosen.edit
    edit.found.update(recipe=recipe.name, recipe_sha256=recipe.sha256, model=source.label, commit=source.commit)
    edit.save(folder / "edit.json")
    return edit, Located(chosen.summary(), AttributionSummary.of(scores), folder)


def _say_selection(summary: SelectionSummary, doubtful: Doubtful | None) -> None:
    """Print what was selected, before the long steps: fold, proofs and measurements."""
    part = specific_part(summary)
    say(f"selected: {summary.neurons:,} neurons ({summary.share:.3%}) in {len(summary.layers)} layers; {part.reason}")
    if doubtful and part.state != "PASS":
        doubtful(Doubt("specific", f"{part.state}, {part.reason}"))


def _write(job: _Job, result: BakeResult) -> BakeResult:
    """Fold into a temporary folder, prove it there, and only then publish it."""
    plan, checkpoint = result.plan, result.plan.checkpoint
    _check_activations(plan, job.recipe)
    total = sum((checkpoint.path / name).stat().st_size for name in checkpoint.other_files()[0])
    total += sum(shard.size for shard in checkpoint.shards)
    with staged(job.out, job.overwrite, job.source.origin) as part:
        with progress("fold", total, "B") as update:
            manifest = fold_into(plan, part, update)
        manifest = replace(manifest, source=job.origin)
        result = replace(result, proofs=_prove(job, plan, manifest, part, 2 * total))
        if job.checks.measure:
            result = replace(result, impact=impact_of(checkpoint, plan.edit, job.recipe))
        _publish(job, result, manifest, part)
    return result


def _check_activations(plan: Plan, recipe: Recipe) -> None:
    """Refuse factors that a static activation quantiser would clip, on the proof's texts and the probes."""
    from .proofs.saturation import check_activations, limits

    if not limits(plan.checkpoint):
        return
    from .models.loading import load_tokenizer
    from .proofs.passes import proof_texts

    texts = proof_texts(plan.checkpoint)
    with suppress(CheckpointError):  # without a tokenizer there are no probes
        tokenizer = load_tokenizer(plan.checkpoint.path)
        sentences = {text for twin in recipe.twins for probe in twin.probes for text in (probe.first, probe.second)}
        texts += [ids for text in sorted(sentences) if (ids := tokenizer(text)["input_ids"])]
    check_activations(plan, texts)


def _prove(job: _Job, plan: Plan, manifest: Manifest, part: Path, total: int) -> Proofs:
    """Both proofs of what was folded into `part`. Raises ProofError."""
    from .proofs.behaviour import behaviour_proof
    from .proofs.files import file_proof

    baked = Checkpoint.open(part)
    with progress("proof 1: the files hold the edit", total, "B") as update:
        proofs = Proofs(file_proof(plan, baked, manifest, "manifest", update, rehash=False))
    if proofs.ok and job.checks.behaviour:
        say("proof 2: the model behaves as the hooks")
        proofs = replace(proofs, behaviour=behaviour_proof(plan, baked))
    if not proofs.ok:
        raise ProofError(f"a proof failed, {job.out} was not written: {proofs.fault}", proofs)
    return proofs


def _write_alone(job: _Job, result: BakeResult) -> BakeResult:
    """Write the edit without the model, as an adapter or a delta; read it back before it is published."""
    plan, checkpoint = result.plan, result.plan.checkpoint
    with staged(job.out, job.overwrite, job.source.origin) as part:
        if result.form == "peft":
            write_adapter(checkpoint, plan.edit, part, job.origin)
        else:
            with progress("delta", 2 * sum(shard.size for shard in checkpoint.shards), "B") as update:
                write_delta(plan, part, job.origin, update)
        result = replace(result, bytes=sum(file.stat().st_size for file in part.iterdir()))
        manifest = manifest_of(result.form, plan, part, job.origin)
        if job.checks.measure:
            result = replace(result, impact=impact_of(checkpoint, plan.edit, job.recipe))
        _publish(job, result, manifest, part, metadata_in(checkpoint.path))
    return result


def _publish(job: _Job, result: BakeResult, manifest: Manifest, part: Path, metadata: dict | None = None) -> None:
    """Write the card and the manifest, with what the run did and measured. metadata: of the base's card."""
    summary: dict = {}
    if result.located:
        summary |= {
            "selection": result.located.selection.to_dict(),
            "attribution": result.located.attribution.to_dict(),
        }
    summary |= {**result.impact.to_dict(), "verdict": result.verdict.to_dict()}
    manifest = replace(
        manifest,
        recipe=RecipeRecord(job.recipe.name, job.recipe.sha256),
        proofs=result.proofs.to_dict() if result.proofs else None,
        summary=summary,
    )
    add_card(part, manifest, metadata).write(part)
