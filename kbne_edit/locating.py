"""Locate: a model and a recipe to scores, and scores to a selection."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .disk.checkpoint import Checkpoint
from .distributed import LOCAL_RANK, LOCAL_SIZE, Team, team
from .errors import InputError
from .families import Site
from .files import forbid_overlap, parse_size
from .hub.source import Source, resolved
from .models import memory
from .progress import progress, say
from .recipe import Question, Recipe, load_recipe
from .rule import Rule

if TYPE_CHECKING:
    from torch import Tensor

    from .attribution.gradients import Attribution
    from .attribution.scores import Row, Scores
    from .models.prompts import Prompts
    from .selection.select import Selection


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
    same_sign: bool | None = None
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
        return locate_in(found, Checkpoint.open(found.path), recipe, Path(out), settings)


def locate_in(
    found: Source, checkpoint: Checkpoint, recipe: Recipe, out: Path, settings: Settings, aside: bool = False
) -> Scores | None:
    """`locate`. aside: as of `ScoresWriter`."""
    from .attribution.scores import ScoresWriter, load_scores
    from .models.prompts import ask

    asked = recipe.ask(settings.questions)
    sizes = checkpoint.layer_sizes(settings.site)
    prompts = ask(
        checkpoint.path,
        recipe,
        asked,
        plain=settings.prompt == "plain",
        before=settings.before,
        fixed=settings.answers,
    )
    tokens = prompts.answers
    about = {
        "model": found.id,
        "commit": found.commit,
        "base": checkpoint.fingerprint(),
        "recipe": recipe.name,
        "recipe_sha256": recipe.sha256,
        "site": settings.site,
        "quadrature": settings.quadrature,
        "dtype": settings.dtype,
        "objective": settings.objective,
        "prompt": settings.prompt,
        "before": settings.before,
        "answer_tokens": tokens,
        "prompts_sha256": prompts.sha256,
    } | ({"positions": settings.positions} if settings.positions != 1 else {})
    with ExitStack() as stack:
        processes, writer = stack.enter_context(team()), None
        if processes.rank == 0:
            width = max(sizes)
            writer = stack.enter_context(closing(ScoresWriter(out, asked, len(sizes), width, about, aside)))
        todo = processes.share([q for q, done in enumerate(writer.done) if not done] if writer else None)
        if todo:
            if len(todo) < len(asked):
                say(f"{out}: {len(asked) - len(todo)} of {len(asked)} questions are done already")
            for answer, surfaces in tokens.items():
                say(f"answer {answer!r}: {len(surfaces)} tokens ({', '.join(map(repr, list(surfaces)[:8]))})")
            _attribute(checkpoint, asked, prompts, writer, todo, settings, processes)
    return load_scores(out) if writer else None


def _attribute(
    checkpoint, asked: tuple[Question, ...], prompts: Prompts, writer, todo, settings: Settings, processes: Team
) -> None:
    """Each process takes every n-th pack of questions; the first one writes what all of them found."""
    from .attribution.gradients import attributions, packs

    tokens = prompts.answers
    answers = [list(tokens[question.answer].values()) for question in asked]
    others = [sorted({i for a, ids in tokens.items() if a != q.answer for i in ids.values()}) for q in asked]
    layers = _supplier(checkpoint, settings)
    ready = packs(layers.model, prompts.ids, settings.quadrature, settings.positions)
    wanted = [left for pack in ready if (left := [q for q in pack if q in todo])]
    shares = [sum(wanted[rank :: processes.size], []) for rank in range(processes.size)]
    stream = attributions(
        layers,
        prompts.ids,
        answers,
        settings.site,
        settings.quadrature,
        only=shares[processes.rank],
        other_ids=others if settings.objective == "log-odds" else None,
        positions=settings.positions,
        arrived=_Watch(prompts, checkpoint.path) if processes.rank == 0 else None,
    )
    with progress("attribution", len(asked), "question", len(asked) - len(todo)) as update:
        for turn in zip_longest(*shares):
            for q, result in zip(turn, processes.gather(next(stream, None)) or (), strict=False):
                if result is not None:
                    writer.write(q, _row(asked[q], tokens, result))
                    update(1)


class _Watch:
    """Says once, before the attribution has cost anything, that answers are hardly what the model says next."""

    def __init__(self, prompts: Prompts, path: Path):
        self._prompts, self._path, self._said = prompts, path, False
        self._ids = sorted({index for ids in prompts.answers.values() for index in ids.values()})

    def __call__(self, next_token: Tensor) -> None:
        from .attribution.answers import Mass
        from .models.prompts import why_small

        mass = Mass.of(next_token[:, self._ids].sum(-1).numpy())
        if mass.small and not self._said:
            self._said = True
            likeliest = int(next_token.mean(0).argmax())
            say(
                f"warning: all answers together have a probability of {mass.median:.1%} (median of "
                f"{len(next_token)} questions) at the position that is attributed: "
                + why_small(self._path, self._prompts, likeliest)
            )


def _row(question: Question, tokens: dict[str, dict[str, int]], result: Attribution) -> Row:
    from .attribution.scores import Row

    by_answer = {answer: float(result.next_token[list(ids.values())].sum()) for answer, ids in tokens.items()}
    return Row(
        result.scores.numpy(),
        result.p,
        max(p for answer, p in by_answer.items() if answer != question.answer),
        sum(by_answer.values()),
        result.p_zero,
        result.residual,
        result.nodes,
    )


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
    if checkpoint.gguf is not None:
        raise InputError(
            f"{checkpoint.path} takes {need / 1e9:.1f} GB dequantised, {budget / 1e9:.1f} GB are free, and GGUF files "
            "are not read layer by layer: pass a larger --memory, or locate on the safetensors checkpoint"
        )
    if settings.dtype != "float32":
        raise InputError(f"--dtype {settings.dtype} needs the model in memory ({need / 1e9:.1f} GB): use float32")
    say(f"{checkpoint.path} takes {need / 1e9:.1f} GB, {budget / 1e9:.1f} GB may be used: going layer by layer")
    return Streamed(checkpoint, budget)


class Choice(NamedTuple):
    """The rule, and which questions take part: False leaves one out."""

    rule: Rule
    only: list[bool]


def choosing(scores: Scores, recipe: Recipe, settings: Settings) -> Choice:
    """What recipe and settings ask for, as arguments of `select`."""
    known = {question.dimension for question in scores.questions if not question.control}
    if unknown := set(settings.dimensions or ()) - known:
        raise InputError(f"no question is of {', '.join(sorted(unknown))}: there are {', '.join(sorted(known))}")
    wanted = set(settings.dimensions or known)
    only = [
        (question.control or question.dimension in wanted) and (bool(right) or not settings.drop_wrong)
        for question, right in zip(scores.questions, scores.correct, strict=True)
    ]
    given = {key: getattr(settings, key) for key in ("tau", "beta", "top", "combine", "same_sign")}
    given = {key: value for key, value in given.items() if value is not None}
    if settings.rule is not None:
        given["name"] = settings.rule
    rule = replace(recipe.select, **({"top": None} if "tau" in given else {}) | given)
    if rule.name == "specific" and {"tau", "beta"} & set(given):
        raise InputError("the specific rule has neither --tau nor --beta: choose how many neurons with --top")
    return Choice(rule, only)


def choose(scores: Scores, recipe: Recipe, settings: Settings) -> Selection:
    """The selection that recipe and settings ask for, from finished scores. Returns a `Selection`."""
    from .selection.select import selection
    from .selection.stability import stability

    rule, only = choosing(scores, recipe, settings)
    factor = recipe.factor if settings.factor is None else settings.factor
    chosen = selection(scores, rule, factor=factor, only=only)
    if settings.min_stability is None:
        return chosen
    return chosen.stable(stability(scores, rule, only=only), settings.min_stability)
