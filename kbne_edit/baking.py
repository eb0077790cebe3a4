"""Bake: the whole line from a model and a recipe to a proven checkpoint."""

from __future__ import annotations

from pathlib import Path

from .attribution.answers import attribution_summary
from .disk.checkpoint import Checkpoint, check_out, staged
from .disk.manifest import write_manifest
from .disk.sharding import Cut, cut
from .distributed import RANK
from .edit import Edit
from .errors import InputError, ProofError
from .families import layer_sizes, slots
from .files import forbid_links_out, forbid_overlap, work_folder
from .folding.adapter import check_form, load_edit, write_adapter
from .folding.delta import manifest_of, write_delta
from .folding.fold import Target, fold_into, plan
from .hub.licences import metadata_in
from .hub.source import Source, resolved
from .locating import Settings, choose, locate_in
from .models.loading import auto_class
from .progress import progress, say
from .recipe import Recipe, load_recipe
from .reporting.card import add_card


def bake(
    source: str,
    out: str | Path,
    settings: Settings | None = None,
    *,
    edit: Edit | str | Path | None = None,
    form: str = "checkpoint",
    shard_size: int | str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    behaviour: bool = True,
    work: str | Path | None = None,
) -> dict:
    """Locate (unless `edit` is given), fold, prove; publish `out` only if both proofs hold. Returns the summary.

    edit: an Edit, an edit.json, or the folder of an IA3 adapter. form: "checkpoint"; "peft", the edit as an IA3
    adapter; "delta", the edited columns alone. The latter two are read back instead of proven.
    shard_size: cut the checkpoint's weights into files of at most so many bytes, or "5GB" (default: those of the base).
    work: folder that keeps scores.safetensors and edit.json (default: OUT.work beside the output, resumable).
    Of several processes (`torchrun`) the first one folds; the others return {} once the questions are done.
    dry_run: stop before anything is written to `out`. behaviour: False leaves the second proof out.
    Raises InputError and its kin, ProofError (then nothing stands under `out`).
    """
    settings, out = settings or Settings(), Path(out)
    if edit is not None and RANK != 0:
        return {}
    with resolved(source, say) as found:
        checkpoint = Checkpoint.open(found.path)
        check_form(form, checkpoint)
        cuts = cut(checkpoint, shard_size)
        if form == "checkpoint":
            forbid_links_out(checkpoint.path, checkpoint.other_files()[0])
        elif shard_size is not None:
            raise InputError(f"--shard-size cuts a checkpoint's weights, and --as {form} writes none: leave it out")
        folder = Path(work) if work else work_folder(out)
        forbid_overlap(out, found.origin)
        forbid_overlap(folder / "scores.safetensors", found.origin, option="--work")  # it may hold the model
        if isinstance(edit, (str, Path)):
            forbid_overlap(out, edit)
            edit = load_edit(edit, checkpoint)
        check_out(out, overwrite)
        recipe = load_recipe(settings.recipe or found.recipe) if settings.recipe or not edit else None
        summary: dict = {
            "model": found.id,
            "commit": found.commit,
            "out": str(out),
            "form": form,
            "auto_class": auto_class(checkpoint.config),
        }
        if edit is None:
            edit = _found(found, checkpoint, recipe, folder, settings, summary)
            if edit is None:
                return {}
        elif settings.factor is not None:
            edit = edit.with_factor(settings.factor)
        targets = plan(checkpoint, edit)
        summary |= _size(edit, checkpoint) | ({"shards": [len(checkpoint.shards), len(cuts)]} if cuts else {})
        if dry_run:
            return summary | {"dry_run": True, "plan": _plan(targets, checkpoint, cuts)}
        if form == "checkpoint":
            _write(checkpoint, edit, targets, cuts, found, out, overwrite, behaviour, recipe, summary)
        else:
            _write_alone(form, checkpoint, edit, targets, found, out, overwrite, recipe, summary)
    return summary


def _found(found: Source, checkpoint, recipe: Recipe, folder: Path, settings: Settings, summary: dict) -> Edit | None:
    scores = locate_in(found, checkpoint, recipe, folder / "scores.safetensors", settings, aside=True)
    if scores is None:
        return None
    chosen = choose(scores, recipe, settings)
    edit = chosen.edit
    edit.found.update(recipe=recipe.name, recipe_sha256=recipe.sha256, model=found.label, commit=found.commit)
    edit.save(folder / "edit.json")
    summary["work"] = str(folder)
    summary["selection"] = chosen.summary().to_dict()
    summary["attribution"] = attribution_summary(scores)
    return edit


def _size(edit: Edit, checkpoint: Checkpoint) -> dict:
    places = slots(checkpoint.shapes, checkpoint.config, edit.site)
    total = sum(layer_sizes(places))
    return {
        "site": edit.site,
        "neurons": edit.num_neurons,
        "share": edit.num_neurons / total,
        "layers": {layer: len(neurons) for layer, neurons in edit.factors.items()},
        "factors": edit.distinct_factors,
    }


def _plan(targets: dict[str, Target], checkpoint: Checkpoint, cuts: list[Cut]) -> list[dict]:
    files = {name: shard.path.name for name, (shard, _) in checkpoint.tensors.items()}
    files |= {name: new.name for new in cuts for name in new.tensors}
    return [
        {
            "tensor": name,
            "file": files[name],
            "axis": target.slot.axis,
            "neurons": (target.slot.offset + target.neurons).tolist(),
            "factors": target.factors.tolist(),
        }
        for name, target in targets.items()
    ]


def _write(
    checkpoint, edit, targets, cuts, found: Source, out: Path, overwrite, behaviour, recipe, summary: dict
) -> None:
    """Fold into a temporary sibling, prove it there, and only then give it its name."""
    from .proofs.verification import behaviour_proof, file_proof

    total = sum((checkpoint.path / name).stat().st_size for name in checkpoint.other_files()[0])
    total += sum(shard.size for shard in checkpoint.shards)
    with staged(out, overwrite) as part:
        with progress("fold", total, "B") as update:
            manifest = fold_into(checkpoint, edit, targets, part, update, cuts)
        manifest["source"] = {"id": found.label, "commit": found.commit}
        with progress("proof 1: the file is the edit", 2 * total, "B") as update:
            report = file_proof(checkpoint, Checkpoint.open(part), manifest, None, update, rehash=False)
        if not report.faults and behaviour:
            say("proof 2: the model behaves as the hooks")
            report.behaviour = behaviour_proof(checkpoint, Checkpoint.open(part), edit)
        summary["proofs"] = report.to_dict()
        if not report.ok:
            raise ProofError(
                f"a proof failed, {out} was not written: {(report.faults or ['behaviour differs'])[0]}", report
            )
        _add_effect(checkpoint, edit, recipe, summary)
        _add_run(manifest, recipe, summary)
        add_card(part, manifest)
        write_manifest(part, manifest)


def _write_alone(form: str, checkpoint, edit, targets, found: Source, out: Path, overwrite, recipe, summary) -> None:
    """The edit without the model: as an adapter or as a delta, read back before it appears."""
    source = {"id": found.label, "commit": found.commit}
    with staged(out, overwrite) as part:
        if form == "peft":
            write_adapter(checkpoint, edit, part, source)
        else:
            with progress("delta", 2 * sum(shard.size for shard in checkpoint.shards), "B") as update:
                write_delta(checkpoint, edit, targets, part, source, update)
        summary["bytes"] = sum(file.stat().st_size for file in part.iterdir())
        manifest = manifest_of(form, checkpoint, edit, part, source)
        _add_effect(checkpoint, edit, recipe, summary)
        _add_run(manifest, recipe, summary)
        add_card(part, manifest, metadata_in(checkpoint.path))
        write_manifest(part, manifest)


def _add_run(manifest: dict, recipe: Recipe | None, summary: dict) -> None:
    """What the run did and measured, for the manifest and for the card that is made from it."""
    if recipe:
        manifest["recipe"] = {"name": recipe.name, "sha256": recipe.sha256}
    if "proofs" in summary:
        manifest["proofs"] = summary["proofs"]
    manifest["summary"] = {key: summary[key] for key in ("selection", "attribution", "effect") if key in summary}


def _add_effect(checkpoint: Checkpoint, edit: Edit, recipe: Recipe | None, summary: dict) -> None:
    """What the edit does to the recipe's probes, if there are enough of them to tell."""
    if not recipe or not recipe.probes:
        return
    from .evaluation.evaluate import FEWEST

    count = len(recipe.probes)
    if count < FEWEST:
        say(f"effect: not measured, since {count} probes cannot tell it from chance: {FEWEST} at least are needed")
        return
    say(f"effect: {count} probes, with and without the edit")
    summary["effect"] = _effect(checkpoint, edit, recipe)


def _effect(checkpoint: Checkpoint, edit: Edit, recipe: Recipe) -> dict:
    import torch

    from .evaluation.evaluate import effect
    from .models.loading import load_model, load_tokenizer

    neurons = layer_sizes(slots(checkpoint.shapes, checkpoint.config, edit.site))
    model = load_model(checkpoint.path, torch.float32)
    return effect(model, load_tokenizer(checkpoint.path), recipe.probes, edit, neurons, recipe.aim)
