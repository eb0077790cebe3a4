"""The whole line: locate (model and recipe to scores), bake (to a proven checkpoint)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .disk.checkpoint import Checkpoint, check_out, staged
from .disk.manifest import write_manifest
from .disk.sharding import Cut, cut
from .distributed import LOCAL_RANK, LOCAL_SIZE, RANK, Team, team
from .edit import Edit
from .errors import InputError, ProofError
from .families import Site, layer_sizes, slots
from .files import forbid_links_out, forbid_overlap, parse_size
from .folding.fold import Target, fold_into, plan
from .folding.formats import check_form, load_edit, manifest_of, write_adapter, write_delta
from .hub.source import Source, resolved
from .models import memory
from .models.loading import auto_class
from .progress import progress, say
from .recipe import Question, Recipe, load_recipe
from .reporting.card import add_card, metadata_in
from .statistics import wilson

if TYPE_CHECKING:
    from .attribution.gradients import Attribution
    from .attribution.scores import Scores


@dataclass(frozen=True)
class Settings:
    """How to locate. None: as the recipe says. answers: {answer: [surface, …]} fixes the surface forms by hand.

    prompt: "chat" (through the template where there is one) or "plain"; before: text that comes before each question.
    dimensions: select by the questions of these alone (None: of all).
    objective: what is attributed, "probability" of the right answer (the paper's) or its "log-odds" against the others.
    positions: how many of a prompt's last positions are scaled (the paper's: 1).

    memory: what attribution may use, e.g. "8GB" (None: most of what is free); a model that does not fit is read layer
    by layer.
    """

    recipe: str | Path | None = None
    questions: int | None = None
    site: Site = "down"
    quadrature: str = "gauss"
    rule: str | None = None
    tau: float | None = None
    beta: float | None = None
    top: float | None = None
    combine: str | None = None
    dimensions: tuple[str, ...] | None = None
    factor: float | None = None
    answers: dict[str, list[str]] | None = None
    prompt: str = "chat"
    before: str = ""
    drop_wrong: bool = False
    min_stability: float | None = None
    device: str = "cpu"
    objective: str = "probability"
    positions: int = 1
    dtype: str = "float32"
    memory: str | None = None


def locate(source: str, out: str | Path, settings: Settings | None = None) -> Scores | None:
    """Attribute the recipe's questions and controls on a model, into the scores file `out`.

    Of several processes (`torchrun`), each attributes its share and the first one writes; the others return None.
    Resumes where an interrupted run with the same settings stopped; a finished file is returned as it is.
    Raises InputError and its kin.
    """
    settings = settings or Settings()
    with resolved(source, say) as found:
        forbid_overlap(out, found.origin)
        recipe = load_recipe(settings.recipe or found.recipe)
        return _locate(found, Checkpoint.open(found.path), recipe, Path(out), settings)


def _locate(
    found: Source, checkpoint: Checkpoint, recipe: Recipe, out: Path, settings: Settings, aside: bool = False
) -> Scores | None:
    """`locate`. aside: as of `ScoresWriter`."""
    from .attribution.scores import ScoresWriter, load_scores
    from .models.loading import foreign, load_tokenizer
    from .models.prompts import answer_tokens, encode

    asked = recipe.ask(settings.questions)
    places = slots(checkpoint.shapes, checkpoint.config, settings.site)
    tokenizer = load_tokenizer(checkpoint.path)
    with foreign(checkpoint.path):
        tokens = answer_tokens(tokenizer, recipe.answers, settings.answers)
        plain = settings.prompt == "plain"
        prompts = [encode(tokenizer, recipe, question, plain, settings.before) for question in asked]
    about = {
        "model": found.id, "commit": found.commit, "base": checkpoint.fingerprint(), "recipe": recipe.name,
        "recipe_sha256": recipe.sha256, "site": settings.site, "quadrature": settings.quadrature,
        "dtype": settings.dtype, "objective": settings.objective, "prompt": settings.prompt, "before": settings.before,
        "answer_tokens": tokens,
    } | ({"positions": settings.positions} if settings.positions != 1 else {})  # fmt: skip
    with ExitStack() as stack:
        processes, writer = stack.enter_context(team()), None
        if processes.rank == 0:
            width = max(layer_sizes(places))
            writer = stack.enter_context(closing(ScoresWriter(out, asked, len(places), width, about, aside)))
        todo = processes.share([q for q, done in enumerate(writer.done) if not done] if writer else None)
        if todo:
            if len(todo) < len(asked):
                say(f"{out}: {len(asked) - len(todo)} of {len(asked)} questions are done already")
            for answer, surfaces in tokens.items():
                say(f"answer {answer!r}: {len(surfaces)} tokens ({', '.join(map(repr, list(surfaces)[:8]))})")
            _attribute(checkpoint, asked, prompts, tokens, writer, todo, settings, processes)
    return load_scores(out) if writer else None


def _attribute(
    checkpoint, asked: tuple[Question, ...], prompts, tokens, writer, todo, settings: Settings, processes: Team
) -> None:
    """Each process takes every n-th pack of questions; the first one writes what all of them found."""
    from .attribution.gradients import attributions, packs

    answers = [list(tokens[question.answer].values()) for question in asked]
    others = [sorted({i for a, ids in tokens.items() if a != q.answer for i in ids.values()}) for q in asked]
    layers = _supplier(checkpoint, settings)
    ready = packs(layers.model, prompts, settings.quadrature, settings.positions)
    wanted = [left for pack in ready if (left := [q for q in pack if q in todo])]
    shares = [sum(wanted[rank :: processes.size], []) for rank in range(processes.size)]
    stream = attributions(
        layers,
        prompts,
        answers,
        settings.site,
        settings.quadrature,
        only=shares[processes.rank],
        other_ids=others if settings.objective == "log-odds" else None,
        positions=settings.positions,
    )
    with progress("attribution", len(asked), "question", len(asked) - len(todo)) as update:
        for turn in zip_longest(*shares):
            for q, result in zip(turn, processes.gather(next(stream, None)) or (), strict=False):
                if result is not None:
                    writer.write(q, _row(asked[q], tokens, result))
                    update(1)


def _row(question: Question, tokens: dict[str, dict[str, int]], result: Attribution) -> dict:
    others = [list(ids.values()) for answer, ids in tokens.items() if answer != question.answer]
    return {
        "scores": result.scores.numpy(), "p": result.p, "p_zero": result.p_zero, "residual": result.residual,
        "nodes": result.nodes, "p_best_wrong": max(float(result.next_token[ids].sum()) for ids in others),
    }  # fmt: skip


def _supplier(checkpoint: Checkpoint, settings: Settings):
    """The model in memory, or its layers one by one where it does not fit."""
    import torch

    from .attribution.gradients import Resident
    from .attribution.streamed import Streamed
    from .models.loading import load_model

    dtype = getattr(torch, settings.dtype)
    budget = parse_size(settings.memory) if settings.memory else memory.SHARE * memory.available() / LOCAL_SIZE
    need = memory.needed(checkpoint, dtype.itemsize)
    if settings.device != "cpu" or need <= budget:
        say(f"loading {checkpoint.path} in {settings.dtype}")
        device = f"cuda:{LOCAL_RANK}" if settings.device == "cuda" and LOCAL_SIZE > 1 else settings.device
        return Resident(load_model(checkpoint.path, dtype, device))
    if settings.dtype != "float32":
        raise InputError(f"--dtype {settings.dtype} needs the model in memory ({need / 1e9:.1f} GB): use float32")
    say(f"{checkpoint.path} takes {need / 1e9:.1f} GB, {budget / 1e9:.1f} GB may be used: going layer by layer")
    return Streamed(checkpoint, budget)


def choosing(scores: Scores, recipe: Recipe, settings: Settings) -> dict:
    """Rule and thresholds that recipe and settings ask for, as arguments of `select`."""
    known = {question.dimension for question in scores.questions if not question.control}
    if unknown := set(settings.dimensions or ()) - known:
        raise InputError(f"no question is of {', '.join(sorted(unknown))}: there are {', '.join(sorted(known))}")
    wanted = set(settings.dimensions or known)
    only = [
        (question.control or question.dimension in wanted) and (bool(right) or not settings.drop_wrong)
        for question, right in zip(scores.questions, scores.correct, strict=True)
    ]
    given = {key: getattr(settings, key) for key in ("rule", "tau", "beta", "top", "combine")}
    given = {key: value for key, value in given.items() if value is not None}
    rule = recipe.select | ({"top": None} if "tau" in given else {}) | given
    if rule["rule"] == "specific" and {"tau", "beta"} & set(given):
        raise InputError("the specific rule has neither --tau nor --beta: choose how many neurons with --top")
    return rule | {"only": only}


def choose(scores: Scores, recipe: Recipe, settings: Settings):
    """The selection that recipe and settings ask for, from finished scores. Returns a `Selection`."""
    from .selection.select import selection
    from .selection.stability import stability

    rule = choosing(scores, recipe, settings)
    chosen = selection(scores, **rule, factor=recipe.factor if settings.factor is None else settings.factor)
    if settings.min_stability is None:
        return chosen
    return chosen.stable(stability(scores, **rule)["neurons"], settings.min_stability)


def work_of(out: Path) -> Path:
    """Where `bake` keeps scores and edit of an output, if nobody says otherwise."""
    return out.absolute().parent / f"{out.name}.work"


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
        folder = Path(work) if work else work_of(out)
        forbid_overlap(out, found.origin)
        forbid_overlap(folder / "scores.safetensors", found.origin, option="--work")  # it may hold the model
        if isinstance(edit, (str, Path)):
            forbid_overlap(out, edit)
            edit = load_edit(edit, checkpoint)
        check_out(out, overwrite)
        recipe = load_recipe(settings.recipe or found.recipe) if settings.recipe or not edit else None
        summary: dict = {
            "model": found.id, "commit": found.commit, "out": str(out), "form": form,
            "auto_class": auto_class(checkpoint.config),
        }  # fmt: skip
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
    scores = _locate(found, checkpoint, recipe, folder / "scores.safetensors", settings, aside=True)
    if scores is None:
        return None
    chosen = choose(scores, recipe, settings)
    edit = chosen.edit
    edit.found.update(recipe=recipe.name, recipe_sha256=recipe.sha256, model=found.label, commit=found.commit)
    edit.save(folder / "edit.json")
    summary["work"] = str(folder)
    summary["selection"] = chosen.summary()
    summary["attribution"] = attribution_summary(scores)
    return edit


def attribution_summary(scores: Scores) -> dict:
    """Answers and quadrature: how many are right, by answer and by form; completeness, nodes.

    balanced: mean share of right answers over the answers, [value, low, high] (95 %, Wilson); a model that says the
    same to everything has 1 / number of answers. constant: True if the interval holds that value.
    """
    questions, right = scores.questions, scores.correct
    asked = [i for i, q in enumerate(questions) if not q.control]
    controls = [i for i, q in enumerate(questions) if q.control]

    def tally(key: Callable[[Question], str], among: list[int]) -> dict[str, list[int]]:
        keys = [key(questions[i]) for i in among]
        return {k: [int(sum(right[i] for i, own in zip(among, keys, strict=True) if own == k)), keys.count(k)]
                for k in sorted(set(keys))}  # fmt: skip

    everywhere = tally(lambda q: q.answer, asked + controls)
    bounds = np.mean([wilson(*counts) for counts in everywhere.values()], 0)
    balanced = [float(np.mean([k / n for k, n in everywhere.values()])), *map(float, bounds)]
    return {
        "questions": len(asked), "right": int(right[asked].sum()),
        "controls": len(controls), "controls_right": int(right[controls].sum()),
        "right_by_answer": tally(lambda q: q.answer, asked), "right_by_form": tally(lambda q: q.form, asked),
        "balanced": balanced, "constant": balanced[1] <= 1 / len(everywhere) <= balanced[2],
        "wrong": [questions[i].text for i in asked if not right[i]],
        "largest_residual": float(scores.residual.max()), "nodes_per_layer": float(scores.nodes.mean()),
    }  # fmt: skip


def _size(edit: Edit, checkpoint: Checkpoint) -> dict:
    places = slots(checkpoint.shapes, checkpoint.config, edit.site)
    total = sum(layer_sizes(places))
    return {
        "site": edit.site, "neurons": edit.num_neurons, "share": edit.num_neurons / total,
        "layers": {layer: len(neurons) for layer, neurons in edit.factors.items()}, "factors": edit.distinct_factors,
    }  # fmt: skip


def _plan(targets: dict[str, Target], checkpoint: Checkpoint, cuts: list[Cut]) -> list[dict]:
    files = {name: shard.path.name for name, (shard, _) in checkpoint.tensors.items()}
    files |= {name: new.name for new in cuts for name in new.tensors}
    return [
        {"tensor": name, "file": files[name], "axis": target.slot.axis,
         "neurons": (target.slot.offset + target.neurons).tolist(), "factors": target.factors.tolist()}
        for name, target in targets.items()
    ]  # fmt: skip


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
