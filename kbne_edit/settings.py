"""Settings of a search for neurons, and what can be refused of them before a model is read."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from .attribution.names import quadrature_name
from .errors import InputError, shown
from .families import Site
from .files import parse_size
from .models.devices import AUTO, check_device
from .recipe import Recipe
from .rule import Rule

_FOR_ANY_EDIT = {"recipe", "factor"}  # settings that an edit that is given leaves a use for: probes, another factor


@dataclass(frozen=True)
class Settings:
    """How to locate. None: as the recipe says. answers: {answer: [surface, …]} fixes the surface forms by hand.

    prompt: "chat" (through the template where there is one) or "plain"; before: text that comes before each question.
    dimensions: select by the questions of these alone (None: of all).
    objective: what is attributed, "probability" of the right answer (the paper's) or its "log-odds" against the others.
    positions: how many of a prompt's last positions are scaled (the paper's: 1).

    memory: what attribution may use, e.g. "8GB" (None: most of what is free); a model that does not fit is read layer
    by layer. device: of torch; "auto": the accelerator where there is one.
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
        """Refuse what does not fit the recipe or the machine; no model is read. Raises InputError."""
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
                f"--answers has {', '.join(map(shown, sorted(unknown)))}, which is no answer of the recipe "
                f"{recipe.name}: its answers are {', '.join(recipe.answers)}"
            )
        check_device(self.device)

    def check_dimensions(self, known: set[str]) -> None:
        """Raise InputError for a dimension of which no question is asked."""
        if unknown := set(self.dimensions or ()) - known:
            raise InputError(f"no question is of {', '.join(sorted(unknown))}: there are {', '.join(sorted(known))}")

    def check_beside_edit(self) -> None:
        """Raise InputError for what says how to find neurons: an edit that is given brings its own."""
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default and f.name not in _FOR_ANY_EDIT]
        if changed:
            names = ", ".join("--" + name.replace("_", "-") for name in changed)
            raise InputError(f"{names}: says how to find neurons, and --edit brings its own: leave one of them out")

    def rule_of(self, recipe: Recipe) -> Rule:
        """The rule that settings and recipe ask for. Raises InputError for thresholds that exclude each other."""
        given = {key: getattr(self, key) for key in ("tau", "beta", "top", "combine", "same_sign")}
        given = {key: value for key, value in given.items() if value is not None}
        if self.rule is not None:
            given["name"] = self.rule
        rule = replace(recipe.select, **({"top": None} if "tau" in given else {}) | given)
        if rule.name == "specific" and {"tau", "beta"} & set(given):
            raise InputError("the specific rule has neither --tau nor --beta: choose how many neurons with --top")
        return rule
