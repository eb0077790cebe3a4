"""Locate: from a model and a recipe to scores, and from scores to a selection."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .disk.checkpoint import Checkpoint
from .distributed import LOCAL_SIZE, Processes, process_group
from .errors import InputError
from .families import family_of
from .files import forbid_overlap, parse_size
from .hub.source import Source, resolved, usual_recipe
from .models import memory
from .progress import progress, say
from .recipe import Question, Recipe, load_recipe
from .settings import Doubt, Doubtful, Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from .attribution.gradients import Attribution, Layers
    from .attribution.scores import Row, Scores
    from .models.prompts import Prompts
    from .rule import Rule
    from .selection.select import Selection


_EACH = 4  # questions for which each answer must be the right one before a constant answer is reported


def locate(
    source: str, out: str | Path, settings: Settings | None = None, *, doubtful: Doubtful | None = None
) -> Scores | None:
    """Attribute the recipe's questions and controls on a model, into the scores file `out`.

    source: a directory, ORG/NAME[@revision] on the Hub, or "demo". Of several processes (`torchrun`), each attributes
    its share and the first one writes; the others return None. Resumes where an interrupted run with the same settings
    stopped; a finished file is returned as it is. doubtful: called with each doubt about the result as soon as it is
    seen, after the first questions; it may raise to stop. Raises InputError or a subclass.
    """
    settings = settings or Settings()
    recipe = load_recipe(settings.recipe or usual_recipe(source))
    settings.check(recipe)
    with resolved(source, say) as base:
        forbid_overlap(out, base.origin)
        subject = Subject(base, Checkpoint.open(base.path), recipe)
        return locate_in(subject, Path(out), settings, doubtful=doubtful)


class Subject(NamedTuple):
    """An opened checkpoint and the recipe for it."""

    base: Source
    checkpoint: Checkpoint
    recipe: Recipe


def locate_in(
    subject: Subject, out: Path, settings: Settings, *, aside: bool = False, doubtful: Doubtful | None = None
) -> Scores | None:
    """`locate`. aside: as of `ScoresWriter`."""
    from .attribution.scores import ScoresWriter, load_scores
    from .models.prompts import ask

    base, checkpoint, recipe = subject
    questions = recipe.ask(settings.questions)
    sizes = checkpoint.layer_sizes(settings.site)
    prompts = ask(
        checkpoint.path,
        recipe,
        questions,
        plain=settings.prompt == "plain",
        before=settings.before,
        fixed=settings.answers,
    )
    about = {"model": base.id, "commit": base.commit, "base": checkpoint.fingerprint()}
    about |= _about(recipe, prompts, settings)
    with ExitStack() as stack:
        processes, writer = stack.enter_context(process_group()), None
        if processes.rank == 0:
            writer = stack.enter_context(closing(ScoresWriter(out, questions, len(sizes), max(sizes), about, aside)))
        todo: Any = processes.broadcast([q for q, done in enumerate(writer.done) if not done] if writer else None)
        if todo:
            if len(todo) < len(questions):
                say(f"{out}: {len(questions) - len(todo)} of {len(questions)} questions are done already")
            for answer, surfaces in prompts.answers.items():
                say(f"answer {answer!r}: {len(surfaces)} tokens ({', '.join(map(repr, list(surfaces)[:8]))})")
            job = _Job(questions, prompts, settings, checkpoint.path, doubtful)
            for q, row in job.rows(supplier(checkpoint, settings), todo, processes):
                writer.write(q, row)  # type: ignore[union-attr]  # only the first process gets rows
    return load_scores(out) if writer else None


def locate_in_memory(model: nn.Module, tokenizer: Any, recipe: Recipe, settings: Settings) -> Scores:
    """`locate` for a loaded model and tokenizer of transformers; nothing is written.

    settings: device, dtype and memory are the model's. Raises InputError.
    """
    from .attribution.gradients import Resident
    from .attribution.scores import gathered
    from .models.prompts import ask_with

    questions = recipe.ask(settings.questions)
    plain = settings.prompt == "plain"
    prompts = ask_with(tokenizer, recipe, questions, plain=plain, before=settings.before, fixed=settings.answers)
    about = {"model": str(getattr(model.config, "name_or_path", "") or "in memory"), "commit": None, "base": ""}
    job = _Job(questions, prompts, settings, None)
    rows = dict(job.rows(Resident(model), list(range(len(questions))), Processes(0, 1)))
    return gathered(questions, [rows[q] for q in range(len(questions))], about | _about(recipe, prompts, settings))


def _about(recipe: Recipe, prompts: Prompts, settings: Settings) -> dict:
    """The metadata of a scores file: what was asked, and how. A file with other metadata is not resumed."""
    about = {
        "recipe": recipe.name,
        "recipe_sha256": recipe.sha256,
        "site": settings.site,
        "quadrature": settings.quadrature,
        "dtype": settings.dtype,
        "objective": settings.objective,
        "prompt": settings.prompt,
        "before": settings.before,
        "answer_tokens": prompts.answers,
        "prompts_sha256": prompts.sha256,
    }
    return about if settings.positions == 1 else about | {"positions": settings.positions}


@dataclass(frozen=True)
class _Job:
    """Questions to attribute. path: of the checkpoint, None for a model in memory. doubtful: as of `locate`."""

    questions: tuple[Question, ...]
    prompts: Prompts
    settings: Settings
    path: Path | None
    doubtful: Doubtful | None = None

    def rows(self, layers: Layers, todo: list[int], processes: Processes) -> Iterator[tuple[int, Row]]:
        """(question, entry) of those to do, on the first process. Each of n processes computes every n-th pack."""
        from .attribution.gradients import attributions, packs
        from .attribution.names import Integral
        from .models.places import is_recurrent

        settings, total = self.settings, len(self.questions)
        ready = packs(layers.model, self.prompts.ids, settings.quadrature, settings.positions)
        wanted = [left for pack in ready if (left := [q for q in pack if q in todo])]
        shares = [sum(wanted[rank :: processes.size], []) for rank in range(processes.size)]
        share = set(shares[processes.rank])
        order = [q for pack in ready if not share.isdisjoint(pack) for q in pack]  # a pack is computed whole
        watch = _Watch(self, shares[0] if is_recurrent(layers.model) else order) if processes.rank == 0 else None
        stream = attributions(
            layers,
            self.prompts.ids,
            [list(self.prompts.answers[question.answer].values()) for question in self.questions],
            Integral(
                site=settings.site,
                positions=settings.positions,
                other_ids=self._others() if settings.objective == "log-odds" else None,
                quadrature=settings.quadrature,
            ),
            only=shares[processes.rank],
            on_next_token=watch,
        )
        with progress("attribution", total, "question", total - len(todo)) as update:
            for turn in zip_longest(*shares):
                for q, result in zip(turn, processes.gather(next(stream, None)) or (), strict=False):
                    if result is not None:
                        yield q, self._row(q, result)
                        update(1)

    def _others(self) -> list[list[int]]:
        """The tokens of each question's wrong answers."""
        by_answer = {answer: set(surfaces.values()) for answer, surfaces in self.prompts.answers.items()}
        return [
            sorted(set().union(*(ids for answer, ids in by_answer.items() if answer != question.answer)))
            for question in self.questions
        ]

    def _row(self, q: int, result: Attribution) -> Row:
        from .attribution.scores import Row

        answers, right = self.prompts.answers, self.questions[q].answer
        p = {answer: float(result.next_token[list(ids.values())].sum()) for answer, ids in answers.items()}
        return Row(
            result.scores.numpy(),
            result.p,
            max(value for answer, value in p.items() if answer != right),
            sum(p.values()),
            result.p_zero,
            result.residual,
            result.nodes,
        )


class _Watch:
    """Reports doubts about the answers before the attribution has cost time; each doubt once.

    order: the questions, in the order of the answers.
    """

    def __init__(self, job: _Job, order: list[int]):
        self._job, self._order, self._told = job, iter(order), set[str]()
        answers = job.prompts.answers
        self._tokens = {answer: list(surfaces.values()) for answer, surfaces in answers.items()}
        self._given: list[str] = []
        self._right: list[str] = []

    def __call__(self, next_token: Tensor) -> None:
        import torch

        by_answer = torch.stack([next_token[:, ids].sum(-1) for ids in self._tokens.values()])  # [answers, n]
        names = list(self._tokens)
        self._given += [names[index] for index in by_answer.argmax(0).tolist()]
        self._right += [self._job.questions[next(self._order)].answer for _ in range(len(next_token))]
        self._mass(next_token)
        self._constant()

    def _mass(self, next_token: Tensor) -> None:
        from .attribution.answers import Mass
        from .models.prompts import why_small

        if "mass" in self._told:  # the reason takes a child process
            return
        ids = sorted({index for tokens in self._tokens.values() for index in tokens})
        mass = Mass.of(next_token[:, ids].sum(-1).numpy())
        if mass.small:
            path, token = self._job.path, int(next_token.mean(0).argmax())
            why = why_small(path, self._job.prompts, token) if path else ""
            self._doubt(
                "mass",
                f"all answers together have a probability of {mass.median:.1%} (median of {len(next_token)} "
                "questions) at the position that is attributed" + (f": {why}" if why else ""),
            )

    def _constant(self) -> None:
        """Report a constant answer, once each answer has been the right one often enough."""
        often = all(self._right.count(answer) >= _EACH for answer in self._tokens)
        if often and len(set(self._given)) == 1:
            self._doubt(
                "constant",
                f"the model answers {self._given[0]!r} to each of the first {len(self._given)} questions, whichever "
                "answer is right: the attribution then says little about what it knows",
            )

    def _doubt(self, kind: str, reason: str) -> None:
        if kind in self._told:
            return
        self._told.add(kind)
        say(f"warning: {reason}")
        if self._job.doubtful:
            self._job.doubtful(Doubt("answers", reason))


def supplier(checkpoint: Checkpoint, settings: Settings) -> Layers:
    """The model in memory, or its layers one by one if it does not fit."""
    import torch

    from .attribution.gradients import Resident
    from .models.devices import SPREAD, chosen_device, device_memory
    from .models.loading import load_model
    from .models.on_demand import on_demand
    from .models.streamed import Streamed

    dtype = getattr(torch, settings.dtype)
    budget = parse_size(settings.memory) if settings.memory else memory.SHARE * memory.available() / LOCAL_SIZE
    need = memory.needed(checkpoint, dtype.itemsize)
    device = chosen_device(settings.device)
    if device not in ("cpu", SPREAD):
        on_device = memory.SHARE * device_memory(device)
        budget = min(budget, on_device) if settings.memory else on_device
    if device == SPREAD or need <= budget:
        say(f"loading {checkpoint.path} in {settings.dtype}")
        graphs = memory.GRAPHS
        if settings.memory:
            graphs = min(graphs, budget - memory.in_memory(checkpoint, dtype.itemsize) - memory.OVERHEAD)
        return Resident(load_model(checkpoint.path, dtype, device), max(graphs, 1.0))
    if not memory.can_stream(checkpoint):
        raise InputError(
            f"{checkpoint.path} takes {need / 1e9:.1f} GB, {budget / 1e9:.1f} GB are free, and it cannot be read layer "
            "by layer (layers that share a block, or a mixture of experts in GGUF): pass a larger --memory"
        )
    if settings.dtype != "float32":
        raise InputError(f"--dtype {settings.dtype} needs the model in memory ({need / 1e9:.1f} GB): use float32")
    say(f"{checkpoint.path} takes {need / 1e9:.1f} GB, {budget / 1e9:.1f} GB may be used: reading it layer by layer")
    if family_of(checkpoint.config).recurrent:  # runs whole, a pass over all layers for each
        return Resident(on_demand(checkpoint, dtype, device))
    return Streamed(checkpoint, budget, device)


class Choice(NamedTuple):
    """The rule, and which questions to use: False leaves one out."""

    rule: Rule
    only: list[bool]


def choosing(scores: Scores, recipe: Recipe, settings: Settings) -> Choice:
    """The arguments of `select` from recipe and settings."""
    known = {question.dimension for question in scores.questions if not question.control}
    settings.check_dimensions(known)
    wanted = set(settings.dimensions or known)
    only = [
        (question.control or question.dimension in wanted) and (bool(right) or not settings.drop_wrong)
        for question, right in zip(scores.questions, scores.correct, strict=True)
    ]
    return Choice(settings.rule_of(recipe), only)


def choose(scores: Scores, recipe: Recipe, settings: Settings) -> Selection:
    """The selection from finished scores, by recipe and settings."""
    from .selection.select import selection
    from .selection.stability import stability

    rule, only = choosing(scores, recipe, settings)
    factor = recipe.factor if settings.factor is None else settings.factor
    chosen = selection(scores, rule, factor=factor, only=only)
    if settings.min_stability is None:
        return chosen
    return chosen.stable(stability(scores, rule, only=only), settings.min_stability)
