"""Effect, cost and verdict in words."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import click

from ..progress import paused
from . import completing
from .config import converted
from .options import without

if TYPE_CHECKING:
    from ..evaluation.cost import Cost
    from ..evaluation.effect import Effect
    from ..evaluation.impact import Impact
    from ..evaluation.measures.quick import QuickMeasure
    from ..evaluation.verdict import Verdict
    from ..settings import Doubt, Doubtful
    from ..statistics import Interval

Command = TypeVar("Command", bound=Callable)

_ASKED = {
    "answers": "can it answer?",
    "specific": "specific to bias?",
    "effect": "less bias?",
    "cost": "side effects low?",
    "proofs": "proven?",
}


def _parts(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Names of parts of the verdict; unknown ones are refused at once."""
    if value is None:
        return ()
    from ..evaluation.verdict import parts_of

    return parts_of(value)


REQUIRE = click.option(
    "--require",
    metavar="PARTS",
    shell_complete=completing.parts,
    callback=_parts,
    help="Exit with status 4 unless these parts of the verdict pass, e.g. effect,specific,cost,answers,proofs.",
)


def doubts(force: bool) -> Doubtful:
    """What to do about an early doubt: on a terminal, ask the user whether to go on.

    Otherwise the run continues. The doubt has been printed, and the verdict includes it. Rejected: stopping if
    `--require` names the part. A pipeline needs the verdict as JSON in any case.
    """

    def decide(doubt: Doubt) -> None:
        if doubt.part == "answers" and not force and sys.stdin.isatty() and sys.stderr.isatty():
            with paused():
                click.confirm("Go on all the same?", default=False, abort=True, err=True)

    return decide


FORCE = click.option(
    "--force",
    "doubtful",
    is_flag=True,
    callback=converted(doubts),
    help="Do not stop to ask, on a terminal, where a model answers the same to everything.",
)


def measuring(command: Command) -> Command:
    """Options of commands that measure effect and cost."""
    help = "Do not measure effect and cost. The verdict then says so."
    return without("--no-measure", "measure", help)(REQUIRE(command))


def number(values: Interval) -> str:
    """A change with its interval."""
    value, low, high = values
    return f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"


def impact_lines(impact: Impact) -> list[str]:
    """Effect and cost of an edit, beside its controls."""
    lines = effect_lines(impact.effect) if impact.effect else []
    lines += cost_lines(impact.cost) if impact.cost else []
    return lines + measure_lines(impact.measures)


def effect_lines(effect: Effect) -> list[str]:
    """Scores of the probes before and after, beside the controls."""
    random, (before, after) = effect.random, effect.score
    what = "mean score of the unwanted side" if effect.avoids else "mean absolute score"
    lines = [
        f"effect on {effect.probes} probes ({effect.twins} twins; {what}, nats per token; 95 % intervals):",
        f"  this edit: {before:.4f} to {after:.4f}, change {number(effect.change)}"
        + ("" if effect.avoids else f"; signed {number(effect.change_signed)}"),
        f"  random neurons, same layers ({random.draws} draws): {number(effect.random_change)}",
    ]
    if random.as_low is not None:
        lines[-1] += f"; {random.as_low} of them as low as the edit"
    if flat := effect.flattening:
        how = "no temperature goes so far" if flat.temperature is None else f"temperature {flat.temperature:.4f}"
        lines.append(f"  the edit less a flattening of the same KL ({how}): {number(flat.versus)}")
    side = "unwanted side" if effect.avoids else "stereotype"
    return [*lines, f"  {side} preferred in {effect.preferred.before:.0%}, afterwards {effect.preferred.after:.0%}"]


def cost_lines(cost: Cost) -> list[str]:
    """Neutral text, questions, and continuations by base and edit."""
    lines = [
        f"cost on {cost.texts} neutral texts ({cost.origin}): KL {cost.kl.value:.2g} [{cost.kl.low:.2g}, "
        f"{cost.kl.high:.2g}] nats per token, perplexity {cost.before.value:.4g} to {cost.after.value:.4g} "
        f"(x{cost.rise.value:.3f} [{cost.rise.low:.3f}, {cost.rise.high:.3f}])"
    ]
    answered = [(name, part) for name, part in (("questions", cost.questions), ("controls", cost.controls)) if part]
    if answered:
        shown = ", ".join(f"{name} {part.before} to {part.after} of {part.total}" for name, part in answered)
        lines.append(f"  answered rightly: {shown}")
    changed = [item for item in cost.continuations if item.before != item.after]
    lines.append(f"  greedy continuations that change: {len(changed)} of {len(cost.continuations)}")
    for item in changed:
        lines.append(f"    {item.prompt} … base: {_flat(item.before)} | edit: {_flat(item.after)}")
    return lines


def measure_lines(measures: Sequence[QuickMeasure]) -> list[str]:
    """Decisions about people, and associations: the figures with an ideal, in the language of the recipe."""
    lines = []
    for measure in measures:
        counted = {"decisions": "scenarios", "associations": "twins"}.get(measure.name, "items")
        lines.append(f"{measure.name} ({measure.items} {counted}, {measure.language}):")
        for figure in measure.overall:
            if figure.unit == "percent":
                value, low, high = figure.change
                moved = f"{figure.before:.1f} to {figure.after:.1f} %, change {value:+.1f} [{low:+.1f}, {high:+.1f}]"
            else:
                moved = f"{figure.before:.4f} to {figure.after:.4f} nats, change {number(figure.change)}"
            lines.append(f"  {figure.name}: {moved}")
    return lines


def _flat(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"


def verdict_lines(verdict: Verdict) -> list[str]:
    """The parts with their states and reasons, and the conclusion."""
    lines = [f"  {_ASKED[name]:<18} {part.state:<13}  {part.reason}" for name, part in verdict]
    why = f" ({', '.join(verdict.open)}: see above)" if verdict.open else ""
    return [*lines, f"VERDICT: {verdict.ship}{why}"]
