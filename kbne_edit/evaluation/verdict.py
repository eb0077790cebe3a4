"""The verdict on an edit: five parts, each with a state and a reason, and advice. Only this module makes verdicts."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypedDict

from ..errors import InputError, RequirementError
from ..proofs.outcome import Proofs
from ..selection.summary import SelectionSummary
from .cost import MOST_KL, MOST_RISE, Cost
from .effect import FEWEST_DRAWS, Effect

if TYPE_CHECKING:
    from ..attribution.answers import Answers

State = Literal["PASS", "FAIL", "NO EVIDENCE", "NOT MEASURED"]
Ship = Literal["ship", "do not ship", "try further"]
STATES: tuple[State, ...] = ("PASS", "FAIL", "NO EVIDENCE", "NOT MEASURED")
PARTS = ("answers", "specific", "effect", "cost", "proofs")
_MOSTLY, _HARDLY = (
    0.5,
    0.1,
)  # share of the neurons that controls use, too: not specific above, specific below


class Part(NamedTuple):
    """One part of a verdict. reason: one sentence without a full stop."""

    state: State
    reason: str


class ReasonsJSON(TypedDict):
    """Why each part has its state: one sentence."""

    answers: str
    specific: str
    effect: str
    cost: str
    proofs: str


class VerdictJSON(TypedDict):
    """The verdict on an edit, part by part, and advice. The parts are explained in docs/output.md."""

    ship: Ship
    answers: State
    specific: State
    effect: State
    cost: State
    proofs: State
    reasons: ReasonsJSON


@dataclass(frozen=True)
class Verdict:
    """The verdict on an edit, part by part.

    answers: can the base answer the questions at all? specific: are the neurons those of bias, or of any question?
    effect: is there less bias, beyond random neurons and beyond a flattening? cost: are side effects within the limits?
    proofs: is the output the base with the edit and nothing else?
    """

    answers: Part
    specific: Part
    effect: Part
    cost: Part
    proofs: Part

    def __repr__(self) -> str:
        return f"Verdict({self.ship}: " + ", ".join(f"{name} {part.state}" for name, part in self) + ")"

    def __iter__(self) -> Iterator[tuple[str, Part]]:
        return iter((name, getattr(self, name)) for name in PARTS)

    @property
    def ship(self) -> Ship:
        """ "do not ship" if a part fails; "ship" if effect, cost and proofs pass; else "try further"."""
        if any(part.state == "FAIL" for _, part in self):
            return "do not ship"
        if all(part.state == "PASS" for part in (self.effect, self.cost, self.proofs)):
            return "ship"
        return "try further"

    @property
    def open(self) -> tuple[str, ...]:
        """Names of the parts that do not pass."""
        return tuple(name for name, part in self if part.state != "PASS")

    def require(self, parts: Sequence[str]) -> None:
        """Raise RequirementError unless these parts pass."""
        if missing := [name for name in parts if getattr(self, name).state != "PASS"]:
            reasons = "; ".join(f"{name} {getattr(self, name).state}, {getattr(self, name).reason}" for name in missing)
            raise RequirementError(f"required, but not passed: {reasons}")

    def to_dict(self) -> VerdictJSON:
        return {
            "ship": self.ship,
            "answers": self.answers.state,
            "specific": self.specific.state,
            "effect": self.effect.state,
            "cost": self.cost.state,
            "proofs": self.proofs.state,
            "reasons": {
                "answers": self.answers.reason,
                "specific": self.specific.reason,
                "effect": self.effect.reason,
                "cost": self.cost.reason,
                "proofs": self.proofs.reason,
            },
        }

    @classmethod
    def from_dict(cls, record: dict) -> Verdict:
        """Inverse of `to_dict`. Raises KeyError, TypeError or ValueError."""
        if any(record[name] not in STATES for name in PARTS):
            raise ValueError("unknown state")
        return cls(*(Part(record[name], str(record["reasons"][name])) for name in PARTS))


def parts_of(text: str | Sequence[str]) -> tuple[str, ...]:
    """Names of parts, as `--require` takes them. Raises InputError."""
    names = tuple(name.strip() for name in (text.split(",") if isinstance(text, str) else text))
    if unknown := [name for name in names if name not in PARTS]:
        raise InputError(
            f"--require: {', '.join(map(repr, unknown))} is not a part of a verdict; the parts are {', '.join(PARTS)}"
        )
    return names


def verdict_of(
    *,
    answers: Answers | None = None,
    selection: SelectionSummary | None = None,
    effect: Effect | None = None,
    cost: Cost | None = None,
    proofs: Proofs | None = None,
) -> Verdict:
    """The verdict on what was measured; None: not measured."""
    return Verdict(
        answers_part(answers, cost), specific_part(selection), effect_part(effect), cost_part(cost), proofs_part(proofs)
    )


def answers_part(answers: Answers | None, cost: Cost | None = None) -> Part:
    """From the attribution's answers; for a given edit from the answers in its cost."""
    if answers is not None:
        (right, total), (value, low, high) = answers.questions, answers.balanced
        constant = repr(answers.constant) if answers.constant else ""
    elif cost is not None and cost.balanced is not None and cost.questions is not None:
        (value, low, high, _), (total, right) = cost.balanced, cost.questions[:2]
        constant = "the same answer" if cost.balanced.constant else ""
    else:
        return Part("NOT MEASURED", "the base was not asked the questions")
    shown = f"balanced accuracy {value:.0%} [{low:.0%}, {high:.0%}]"
    if answers and answers.mass and answers.mass.small:
        return Part("FAIL", f"the answers have {answers.mass.median:.1%} of the probability where one is due (median)")
    if constant:
        return Part("FAIL", f"no better than {constant} to everything: {right} of {total} right, {shown}")
    return Part("PASS", f"{right} of {total} questions answered rightly, {shown}")


def specific_part(selection: SelectionSummary | None) -> Part:
    if selection is None:
        return Part("NOT MEASURED", "the neurons were not selected in this run")
    shares = []
    if selection.controls_share is not None:
        text = f"{selection.controls_overlap} of {selection.neurons} neurons are also selected by unrelated questions"
        shares.append((selection.controls_share, text))
    if unseen := selection.unseen_share:
        text = f"{unseen.value:.0%} [{unseen.low:.0%}, {unseen.high:.0%}] of the neurons are among those that unseen "
        shares.append((unseen.value, f"{text}unrelated questions use most"))
    if not shares:
        return Part("NOT MEASURED", "no unrelated question was asked")
    share, reason = max(shares)
    if share > _MOSTLY:
        return Part("FAIL", reason)
    return Part("PASS" if share <= _HARDLY else "NO EVIDENCE", reason)


def effect_part(effect: Effect | None) -> Part:
    if effect is None:
        return Part("NOT MEASURED", "no probes were measured")
    before, after = effect.score
    value, low, high = effect.change
    what = "mean score of what is unwanted" if effect.avoids else "mean absolute score"
    shown = f"{what} {before:.4f} -> {after:.4f} (95 % of change {low:+.4f} to {high:+.4f})"
    if effect.state == "less":
        flat = "" if effect.flattening is None else " and more than a flattening of the same KL"
        return Part("PASS", f"{shown}, further than all {effect.random.draws} draws of random neurons{flat}")
    if effect.state == "more":
        return Part("FAIL", f"{shown}: more, and more than all {effect.random.draws} draws of random neurons")
    return Part("NO EVIDENCE", f"{shown}{_why_not(effect)}")


def _why_not(effect: Effect) -> str:
    """Why a change is not evidence of an effect."""
    random = effect.random
    if not effect.change.side:
        return ": the interval holds 0"
    if random.as_low is None:
        return f": {random.draws} draws of random neurons, compared by an interval alone, cannot tell"
    reached = random.as_low if effect.change.side < 0 else random.as_high
    if reached:
        return f": {reached} of {random.draws} draws of random neurons do as much"
    if random.draws < FEWEST_DRAWS:
        return f": {random.draws} draws of random neurons cannot tell, {FEWEST_DRAWS} can"
    return ": a mere flattening of the same KL does as much"


def cost_part(cost: Cost | None) -> Part:
    if cost is None:
        return Part("NOT MEASURED", "neither neutral text nor questions were measured")
    shown = (
        f"KL {cost.kl.value:.2g} [{cost.kl.low:.2g}, {cost.kl.high:.2g}], perplexity {cost.before.value:.4g} -> "
        f"{cost.after.value:.4g}"
    )
    if cost.lost:
        lost = [
            f"{part.before} -> {part.after} of {part.total} {name} right"
            for name, part in (("questions", cost.questions), ("controls", cost.controls))
            if part and part.lost
        ]
        return Part("FAIL", f"{', '.join(lost)}; {shown}")
    limits = f"limits: KL {MOST_KL:g}, perplexity x{MOST_RISE:g}"
    if cost.state == "low":
        return Part("PASS", shown)
    if cost.state == "high":
        return Part("FAIL", f"{shown} ({limits})")
    return Part("NO EVIDENCE", f"{shown}: an interval reaches beyond the limits ({limits})")


def proofs_part(proofs: Proofs | None) -> Part:
    if proofs is None:
        return Part("NOT MEASURED", "there is no checkpoint to put to the proof")
    if not proofs.ok:
        return Part("FAIL", f"the {proofs.failed} proof fails: {proofs.fault}")
    if not proofs.behaviour:
        return Part("NOT MEASURED", "the first proof holds, the second was left out")
    equal = all(entry.bit_equal for entry in proofs.behaviour)
    return Part("PASS", "both proofs hold" + (", bit for bit" if equal else " up to rounding"))


def next_command(verdict: Verdict, model: str, out: str) -> tuple[str, str]:
    """(what to do next, as a command). model: as --in takes it; out: the directory that was written."""
    model, out = shlex.quote(model), shlex.quote(out)
    if verdict.proofs.state == "FAIL":
        return "see what differs", f"kbne-edit verify {out} --in {model}"
    if verdict.ship == "ship":
        return "show it to those who must judge it", f"kbne-edit report {out} --out {out}.html"
    if verdict.answers.state == "FAIL":
        return "see whether this model can answer at all", f"kbne-edit doctor --in {model}"
    if verdict.cost.state == "FAIL":
        return "fewer neurons cost less", f"kbne-edit bake --in {model} --rule specific --out {out}-specific"
    if verdict.specific.state == "FAIL":
        return "select what is specific to bias", f"kbne-edit bake --in {model} --rule specific --out {out}-specific"
    return "measure on benchmarks, beside controls", f"kbne-edit evaluate {out} --in {model}"


class JudgedFigure(Protocol):
    """A figure of an evaluation, measured or recorded."""

    @property
    def tested(self) -> bool: ...
    @property
    def state(self) -> str: ...
    def beyond_every_control(self, state: Literal["better", "worse", "none"]) -> bool: ...


class JudgedTask(Protocol):
    """A task of an evaluation. loss: of an ability, or something that is false."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def figures(self) -> Mapping[str, Any]: ...  # of JudgedFigure
    @property
    def loss(self) -> object: ...


def benchmarked(verdict: Verdict, tasks: Sequence[JudgedTask]) -> Verdict:
    """A verdict that includes benchmarks. They show an effect if the probes were not measured; more bias beyond every
    control, or a worse capability, is a failure in any case.

    Of several evaluations only the first can show an effect. A later one can only show a failure: after many looks some
    figure is better by chance.
    """
    figures: list[tuple[str, str, JudgedFigure]] = [
        (task.name, name, figure)
        for task in tasks
        if task.kind == "bias"
        for name, figure in task.figures.items()
        if figure.tested
    ]
    worse = [f"{task}: {name}" for task, name, figure in figures if figure.beyond_every_control("worse")]
    better = [f"{task}: {name}" for task, name, figure in figures if figure.beyond_every_control("better")]
    effect, cost = verdict.effect, verdict.cost
    if worse:
        effect = Part("FAIL", f"more bias, beyond every control ({', '.join(worse)})")
    elif figures and effect.state == "NOT MEASURED":
        if better:
            effect = Part("PASS", f"less bias, beyond every control ({', '.join(better)})")
        else:
            effect = Part("NO EVIDENCE", f"none of {len(figures)} figures of bias is better beyond every control")
    lost = [
        task.name for task in tasks if task.loss and any(f.tested and f.state == "worse" for f in task.figures.values())
    ]
    if lost:
        cost = Part("FAIL", f"worse beyond chance: {', '.join(lost)}")
    return replace(verdict, effect=effect, cost=cost)
