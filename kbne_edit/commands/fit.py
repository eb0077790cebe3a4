from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..families import SITES
from . import options
from .kept import keep_run

if TYPE_CHECKING:
    from ..fitting.result import Control, Fit, Gain
    from ..statistics import Interval

PART = click.Choice(["association", "sentiment", "prior", "guess", "all"])


@click.command("fit")
@options.SOURCE
@options.out("Edit to write. The gradients are kept beside it.", "edit.json")
@click.option(
    "--pairs",
    multiple=True,
    metavar="NAME|FILE",
    help="What to fit: a type, a file, own, stereoset, crows_pairs, or half of decisions or associations; repeatable."
    "  [default: own]",
)
@click.option("--data", metavar="DIR", help="Folder with the files of stereoset and crows_pairs.")
@click.option("--language", default="en", show_default=True, help="Language of the package's pairs.")
@click.option("--part", type=PART, default="all", show_default=True, help="Which part of the margin to lower.")
@click.option(
    "--max-kl", type=float, default=0.01, show_default=True, help="Bound on the KL from the base, in nats per token."
)
@click.option("--neurons", type=int, help="Number of neurons that may change.  [default: all]")
@click.option("--facts", type=int, default=600, show_default=True, help="Number of facts to read.")
@click.option(
    "--contrasts", type=int, default=600, show_default=True, help="Number of contrasts of bad and good attributes."
)
@click.option(
    "--texts",
    type=int,
    default=300,
    show_default=True,
    help="Number of everyday texts that measure the cost of factors.",
)
@click.option(
    "--gradients",
    type=click.Path(path_type=Path),
    help="File for the gradients, to resume and reuse.  [default: beside --out]",
)
@click.option("--draws", type=int, default=3, show_default=True, help="Number of draws of shuffled labels.")
@click.option(
    "--keep-shuffled",
    is_flag=True,
    help="Also write the edits of shuffled labels, e.g. edit.shuffled1.json, to evaluate them as well.",
)
@click.option("--site", type=click.Choice(SITES), default="down", show_default=True, help="Where to scale.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Data type of the model.",
)
@options.MEMORY
@click.option("--device", default="cpu", show_default=True, help="Torch device.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of every draw.")
@options.OVERWRITE
@options.JSON
def command(
    source: str, out: Path, pairs: tuple[str, ...], gradients: Path | None, as_json: bool, **values: Any
) -> None:
    """Fit a separate factor for every neuron, to lower the preference for stereotyped sentences.

    \b
    association: group and attribute together, the stereotype itself
    sentiment:   bad attributes against good ones, whichever the group
    prior:       the group that prejudice is aimed at against the other, whatever the attribute
    guess:       an answer to a question that cannot be told, against "it cannot be told"
    all:         association, sentiment and prior, each by how much of it carries over to other facts

    Of the public pairs, StereoSet's dev split and half of CrowS-Pairs are read. One fact in ten is not fitted but
    measured. `evaluate --edit` measures the edit on public benchmarks.
    """
    from ..fitting.fit import FitSettings, fit

    options.check_free(out, values.pop("overwrite"))
    result = fit(source, out, FitSettings(pairs=pairs or None, **values), gradients)
    keep_run(out.with_suffix(".run.yaml"))
    shell = options.shell
    steps = [
        f"written: {out}",
        "next: " + shell("kbne-edit", "evaluate", "--in", source, "--edit", out),
        "      " + shell("kbne-edit", "bake", "--in", source, "--edit", out, "--out", "DIR"),
    ]
    options.show(result.to_dict(), as_json, [*lines(result), *steps])


def lines(result: Fit) -> list[str]:
    """The result, for a reader."""
    factors, cost = result.factors, result.cost
    return [
        f"fitted to {result.fitted} facts, {result.contrasts} contrasts and {result.public} public pairs; "
        f"{result.set_aside} units set aside" + (f", which have judged {result.uses} edits" if result.uses > 1 else ""),
        f"factors: {factors.changed} of {factors.total} changed, {factors.least:.3f} to {factors.largest:.3f}, "
        f"root mean square change {factors.rms:.4f}",
        f"cost on neutral text: KL {cost.kl:.4f}, perplexity {cost.perplexity_base:.2f} to {cost.perplexity:.2f}",
        f"carries over to facts not fitted: {_carried(result)}",
        f"cross-validation (facts not fitted, predicted): {_held(result)}",
        "measured on the units set aside (nats per token, 95 % over units):",
        *(_gain(gain) for gain in result.gains if gain.of == "all"),
        *(_control(control, result.gains) for control in result.controls),
        "by type and format:",
        *(_gain(gain) for gain in result.gains if gain.of != "all" and gain.part in result.parts),
        verdict(result),
    ]


def verdict(result: Fit) -> str:
    """The parts that moved, by name: a shift of sentiment only is not less stereotyping."""
    if not result.moved:
        return "result: no part moved beyond shuffled labels on units that were not fitted"
    moved = " and ".join(result.moved)
    if "association" in result.moved:
        return f"result: less {moved}, beyond shuffled labels, on units that were not fitted"
    return f"result: less {moved}, beyond shuffled labels; the association of groups and attributes did not move"


def _carried(result: Fit) -> str:
    return ", ".join(f"{part} {100 * share:.0f} %" for part, share in zip(result.parts, result.carried, strict=True))


def _held(result: Fit) -> str:
    shown = (f"even {h.even:g} {h.part} {h.change:+.4f} ± {h.error:.4f}" for h in result.held if h.part in result.parts)
    return "; ".join(shown)


def _gain(gain: Gain) -> str:
    return f"  {gain.of}: {gain.part} {gain.before:+.4f}, change {_interval(gain.change)} ({gain.units} units)"


def _control(control: Control, gains: tuple[Gain, ...]) -> str:
    parts = [gain.part for gain in gains if gain.of == "all"]
    changes = (f"{part} {_interval(change)}" for part, change in zip(parts, control.changes, strict=True))
    return f"  control, {control.name} (KL {control.kl:.4f}): " + ", ".join(changes)


def _interval(values: Interval) -> str:
    return f"{values.value:+.4f} [{values.low:+.4f}, {values.high:+.4f}]"
