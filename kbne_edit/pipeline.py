"""The whole line: locate (model and recipe to scores), bake (to a proven checkpoint)."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import Checkpoint, check_out, staged
from .edit import Edit
from .errors import ProofError
from .families import Site, slots
from .folding import Target, fold_into, forbid_overlap, plan, write_manifest
from .progress import progress, say
from .recipe import Question, Recipe, load_recipe
from .source import Source, resolved

if TYPE_CHECKING:
    from .scores import Scores


@dataclass(frozen=True)
class Settings:
    """How to locate. None: as the recipe says. answers: {answer: [surface, …]} fixes the surface forms by hand."""

    recipe: str | Path | None = None
    questions: int | None = None
    site: Site = "down"
    quadrature: str = "gauss"
    rule: str | None = None
    tau: float | None = None
    beta: float | None = None
    combine: str | None = None
    factor: float | None = None
    answers: dict[str, list[str]] | None = None
    drop_wrong: bool = False
    device: str = "cpu"
    dtype: str = "float32"


def locate(source: str, out: str | Path, settings: Settings | None = None) -> Scores:
    """Attribute the recipe's questions and controls on a model, into the scores file `out`.

    Resumes where an interrupted run with the same settings stopped; a finished file is returned as it is.
    Raises InputError and its kin.
    """
    settings = settings or Settings()
    with resolved(source, say) as found:
        recipe = load_recipe(settings.recipe or found.recipe)
        return _locate(found, Checkpoint.open(found.path), recipe, Path(out), settings)


def _locate(found: Source, checkpoint: Checkpoint, recipe: Recipe, out: Path, settings: Settings) -> Scores:
    from .prompts import answer_tokens, encode
    from .scores import ScoresWriter, load_scores
    from .verification import foreign, load_tokenizer

    asked = recipe.ask(settings.questions)
    places = slots(checkpoint.shapes, checkpoint.config, settings.site)
    tokenizer = load_tokenizer(checkpoint.path)
    with foreign(checkpoint.path):
        tokens = answer_tokens(tokenizer, recipe.answers, settings.answers)
    about = {
        "model": found.id, "commit": found.commit, "base": checkpoint.fingerprint(), "recipe": recipe.name,
        "recipe_sha256": recipe.sha256, "site": settings.site, "quadrature": settings.quadrature,
        "dtype": settings.dtype, "answer_tokens": tokens,
    }  # fmt: skip
    with closing(ScoresWriter(out, asked, len(places), places[0][0].neurons, about)) as writer:
        todo = [q for q, done in enumerate(writer.done) if not done]
        if todo:
            if len(todo) < len(asked):
                say(f"{out}: {len(asked) - len(todo)} of {len(asked)} questions are done already")
            for answer, surfaces in tokens.items():
                say(f"answer {answer!r}: {len(surfaces)} tokens ({', '.join(map(repr, list(surfaces)[:8]))})")
            with foreign(checkpoint.path):
                prompts = [encode(tokenizer, recipe, question) for question in asked]
            _attribute(checkpoint, asked, prompts, tokens, writer, todo, settings)
    return load_scores(out)


def _attribute(
    checkpoint, asked: tuple[Question, ...], prompts, tokens, writer, todo: list[int], settings: Settings
) -> None:
    import torch

    from .attribution import attributions
    from .verification import load_model

    say(f"loading {checkpoint.path} in {settings.dtype}")
    model = load_model(checkpoint.path, getattr(torch, settings.dtype), settings.device)
    answers = [list(tokens[question.answer].values()) for question in asked]
    others = [[list(ids.values()) for a, ids in tokens.items() if a != question.answer] for question in asked]
    stream = attributions(
        model, [prompts[q] for q in todo], [answers[q] for q in todo], settings.site, settings.quadrature
    )
    with progress("attribution", len(asked), "question", len(asked) - len(todo)) as update:
        for q, result in zip(todo, stream, strict=True):
            writer.write(q, {
                "scores": result.scores.numpy(), "p": result.p, "p_zero": result.p_zero, "residual": result.residual,
                "nodes": result.nodes, "p_best_wrong": max(float(result.next_token[ids].sum()) for ids in others[q]),
            })  # fmt: skip
            update(1)


def choose(scores: Scores, recipe: Recipe, settings: Settings):
    """The selection that recipe and settings ask for, from finished scores. Returns a `Selection`."""
    from .selection import selection

    chosen = {key: getattr(settings, key) for key in ("rule", "tau", "beta", "combine")}
    chosen = recipe.select | {key: value for key, value in chosen.items() if value is not None}
    factor = recipe.factor if settings.factor is None else settings.factor
    only = [bool(c) or not settings.drop_wrong for c in scores.correct]
    return selection(scores, **chosen, factor=factor, only=only)


def bake(
    source: str,
    out: str | Path,
    settings: Settings | None = None,
    *,
    edit: Edit | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    behaviour: bool = True,
    work: str | Path | None = None,
) -> dict:
    """Locate (unless `edit` is given), fold, prove; publish `out` only if both proofs hold. Returns the summary.

    work: folder that keeps scores.safetensors and edit.json (default: OUT.work beside the output, resumable).
    dry_run: stop before anything is written to `out`. behaviour: False leaves the second proof out.
    Raises InputError and its kin, ProofError (then nothing stands under `out`).
    """
    settings, out = settings or Settings(), Path(out)
    with resolved(source, say) as found:
        checkpoint = Checkpoint.open(found.path)
        forbid_overlap(checkpoint.path, out)
        check_out(out, overwrite)
        recipe = load_recipe(settings.recipe or found.recipe) if settings.recipe or not edit else None
        summary: dict = {"model": found.id, "commit": found.commit, "out": str(out)}
        if edit is None:
            folder = Path(work) if work else out.absolute().parent / f"{out.name}.work"
            edit = _found(found, checkpoint, recipe, folder, settings, summary)
        elif settings.factor is not None:
            edit = Edit(edit.site, {la: dict.fromkeys(ns, settings.factor) for la, ns in edit.factors.items()},
                        edit.base, edit.found)  # fmt: skip
        targets = plan(checkpoint, edit)
        summary |= _size(edit, checkpoint)
        if dry_run:
            return summary | {"dry_run": True, "plan": _plan(edit, targets, checkpoint)}
        _write(checkpoint, edit, targets, found, out, overwrite, behaviour, recipe, summary)
    return summary


def _found(found: Source, checkpoint, recipe: Recipe, folder: Path, settings: Settings, summary: dict) -> Edit:
    scores = _locate(found, checkpoint, recipe, folder / "scores.safetensors", settings)
    chosen = choose(scores, recipe, settings)
    edit = chosen.edit
    edit.found.update(recipe=recipe.name, recipe_sha256=recipe.sha256, model=found.id, commit=found.commit)
    edit.save(folder / "edit.json")
    summary["work"] = str(folder)
    summary["selection"] = chosen.summary()
    summary["attribution"] = attribution_summary(scores)
    return edit


def attribution_summary(scores: Scores) -> dict:
    """Answers and quadrature: accuracy beside constant answers, completeness, nodes."""
    asked = [i for i, q in enumerate(scores.questions) if not q.control]
    controls = [i for i, q in enumerate(scores.questions) if q.control]
    right = scores.correct
    said = [q.answer if ok else "another" for q, ok in zip(scores.questions, right, strict=True)]
    answers = sorted({q.answer for q in scores.questions})
    return {
        "questions": len(asked), "right": int(right[asked].sum()),
        "controls": len(controls), "controls_right": int(right[controls].sum()),
        "right_by_answer": {
            a: [sum(said[i] == a for i in asked if scores.questions[i].answer == a),
                sum(scores.questions[i].answer == a for i in asked)]
            for a in answers
        },
        "wrong": [scores.questions[i].text for i in asked if not right[i]],
        "largest_residual": float(scores.residual.max()), "nodes_per_layer": float(scores.nodes.mean()),
    }  # fmt: skip


def _size(edit: Edit, checkpoint: Checkpoint) -> dict:
    places = slots(checkpoint.shapes, checkpoint.config, edit.site)
    total = sum(found[0].neurons for found in places.values())
    return {
        "site": edit.site, "neurons": edit.num_neurons, "share": edit.num_neurons / total,
        "layers": {layer: len(neurons) for layer, neurons in edit.factors.items()}, "factors": edit.distinct_factors,
    }  # fmt: skip


def _plan(edit: Edit, targets: dict[str, Target], checkpoint: Checkpoint) -> list[dict]:
    return [
        {"tensor": name, "file": checkpoint.tensors[name][0].path.name, "axis": target.slot.axis,
         "neurons": target.index.tolist(), "factors": target.factors.tolist()}
        for name, target in targets.items()
    ]  # fmt: skip


def _write(checkpoint, edit, targets, found: Source, out: Path, overwrite, behaviour, recipe, summary: dict) -> None:
    """Fold into a temporary sibling, prove it there, and only then give it its name."""
    from .verification import behaviour_proof, file_proof

    total = sum((checkpoint.path / name).stat().st_size for name in checkpoint.other_files()[0])
    total += sum(shard.size for shard in checkpoint.shards)
    with staged(out, overwrite) as part:
        with progress("fold", total, "B") as update:
            manifest = fold_into(checkpoint, edit, targets, part, update)
        manifest["source"] = {"id": found.id, "commit": found.commit}
        with progress("proof 1: the file is the edit", 2 * total, "B") as update:
            report = file_proof(checkpoint, Checkpoint.open(part), manifest, None, update)
        if not report.faults and behaviour:
            say("proof 2: the model behaves as the hooks")
            report.behaviour = behaviour_proof(checkpoint, Checkpoint.open(part), edit)
        summary["proofs"] = report.to_dict()
        if not report.ok:
            raise ProofError(
                f"a proof failed, {out} was not written: {(report.faults or ['behaviour differs'])[0]}", report
            )
        if recipe and recipe.probes:
            say("effect: stereotype probes, with and without the edit")
            summary["effect"] = _effect(checkpoint, edit, recipe)
        manifest["proofs"] = summary["proofs"]
        manifest["summary"] = {key: summary[key] for key in ("selection", "attribution", "effect") if key in summary}
        write_manifest(part, manifest)


def _effect(checkpoint: Checkpoint, edit: Edit, recipe: Recipe) -> dict:
    import torch

    from .evaluation import effect
    from .verification import load_model, load_tokenizer

    neurons = slots(checkpoint.shapes, checkpoint.config, edit.site)[0][0].neurons
    model = load_model(checkpoint.path, torch.float32)
    return effect(model, load_tokenizer(checkpoint.path), recipe.probes, edit, neurons)
