"""Settings for locating neurons, checked before a model is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

from .attribution.names import quadrature_name
from .errors import InputError, shown
from .families import Site
from .files import parse_size
from .models.devices import AUTO, check_device
from .recipe import Recipe
from .rule import Rule

# Settings that still apply if an edit is given: the probes, another factor, the memory of proofs and measures.
_FOR_ANY_EDIT = {"recipe", "factor", "memory"}


@dataclass(frozen=True)
class Settings:
    """How to locate. None: as the recipe says. answers: {answer: [surface, …]} sets the surface forms by hand.

    prompt: "chat" (with the chat template, if there is one) or "plain"; before: text before each question.
    dimensions: use only the questions of these (None: all).
    objective: "probability" of the right answer (as in the paper) or its "log-odds" against the others.
    positions: how many of a prompt's last positions are scaled (in the paper 1).

    memory: limit for attribution, proofs and measures, e.g. "8GB" (None: most of the free memory); a model that does
    not fit is read layer by layer. device: of torch; "auto": the accelerator if there is one.
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
    device: str = AUTO
    objective: str = "probability"
    positions: int = 1
    dtype: str = "float32"
    memory: str | None = None

    def check(self, recipe: Recipe) -> None:
        """Raise InputError for settings that do not fit the recipe or the machine. Reads no model."""
        quadrature_name(self.quadrature)
        if self.memory is not None:
            parse_size(self.memory, "--memory")
        if self.tau is not None and self.top is not None:
            raise InputError("--tau and --top are two ways to say how many neurons are kept: leave one of them out")
        questions = recipe.ask(self.questions)
        self.check_dimensions({question.dimension for question in questions if not question.control})
        rule = self.rule_of(recipe)
        if rule.name == "paired" and (bare := sum(not (q.control or q.twin) for q in questions)):
            raise InputError(
                f"--rule paired compares each question with its twin, and {bare} questions of the recipe {recipe.name} "
                "have none: choose another rule, or a recipe with twins"
            )
        if rule.name in ("contrastive", "specific") and not any(question.control for question in questions):
            raise InputError(
                f"--rule {rule.name} compares questions with controls, and the recipe {recipe.name} has none: choose "
                "another rule, or a recipe with controls"
            )
        if unknown := set(self.answers or ()) - set(recipe.answers):
            raise InputError(
                f"--answers has {', '.join(map(shown, sorted(unknown)))}, which are not answers of the recipe "
                f"{recipe.name}: its answers are {', '.join(recipe.answers)}"
            )
        check_device(self.device)

    def check_dimensions(self, known: set[str]) -> None:
        """Raise InputError for a dimension without questions."""
        if unknown := set(self.dimensions or ()) - known:
            raise InputError(f"no question is of {', '.join(sorted(unknown))}: there are {', '.join(sorted(known))}")

    def check_beside_edit(self) -> None:
        """Raise InputError for settings that locate neurons: a given edit already has its neurons."""
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default and f.name not in _FOR_ANY_EDIT]
        if changed:
            names = ", ".join("--" + name.replace("_", "-") for name in changed)
            raise InputError(f"{names}: says how to locate neurons, and --edit gives them: leave one of them out")

    def rule_of(self, recipe: Recipe) -> Rule:
        """The rule from settings and recipe. Raises InputError for thresholds that exclude each other."""
        given = {key: getattr(self, key) for key in ("tau", "beta", "top", "combine", "same_sign")}
        given = {key: value for key, value in given.items() if value is not None}
        if self.rule is not None:
            given["name"] = self.rule
        rule = replace(recipe.select, **({"top": None} if "tau" in given else {}) | given)
        if rule.name == "specific" and {"tau", "beta"} & set(given):
            raise InputError("the specific rule has neither --tau nor --beta: choose how many neurons with --top")
        return rule


class Doubt(NamedTuple):
    """What makes a result doubtful, seen while there is time to stop. part: of the verdict that fails; reason: why."""

    part: str
    reason: str


Doubtful = Callable[[Doubt], None]


@dataclass(frozen=True, kw_only=True)
class Output:
    """What is written, and where.

    form: "checkpoint"; "peft", the edit as an IA3 adapter; "delta", only the edited columns. The latter two are read
    back instead of proven.
    shard_size: reshard the weights into files of at most so many bytes, or "5GB" (None: the base's sharding).
    overwrite: replace an existing output. dry_run: stop before anything is written.
    work: folder that keeps scores.safetensors and edit.json, to resume from (None: OUT.work beside the output).
    skip_inexact: leave out neurons of a quantised checkpoint that cannot take their factor exactly.
    """

    form: str = "checkpoint"
    shard_size: int | str | None = None
    overwrite: bool = False
    dry_run: bool = False
    work: str | Path | None = None
    skip_inexact: bool = False

    def check(self) -> None:
        """Raise InputError for a size that is none, or that would have no use."""
        if self.shard_size is not None and self.form != "checkpoint":
            raise InputError(
                f"--shard-size cuts a checkpoint's weights, and --as {self.form} writes none: leave it out"
            )
        if isinstance(self.shard_size, str):
            parse_size(self.shard_size, "--shard-size")


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What is checked and measured of an edit.

    behaviour: False skips the second proof. measure: False skips effect and cost; the verdict then says that they were
    not measured. doubtful: called with each doubt as soon as it arises (about the answers after the first questions,
    about the selection before the fold); it may raise to stop.
    """

    behaviour: bool = True
    measure: bool = True
    doubtful: Doubtful | None = None
