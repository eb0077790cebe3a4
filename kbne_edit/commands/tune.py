from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import completing, options
from .findings import REQUIRE, verdict_lines
from .kept import RUN, keep_run

if TYPE_CHECKING:
    from ..statistics import Interval
    from ..tuning.result import Tuning


class _Values(click.ParamType):
    """Values, separated by commas."""

    name = "LIST"

    def __init__(self, kind: type):
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return tuple(self._kind(part.strip()) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r}: give numbers separated by commas", param, ctx)


@click.command("tune")
@options.SOURCE
@click.argument("scores", nargs=-1, required=True, type=click.Path(path_type=Path))
@options.out("Folder for journal, tune.json, pareto.svg and edit.json. An interrupted run resumes from it.", "./tuned")
@click.option("--factors", type=_Values(float), help="Factors to try.  [default: 0.5,1.5,2,3,4]")
@click.option(
    "--taus",
    type=_Values(float),
    help="Values of tau to try.  [default: 0.05,0.1,0.2; none with --tops]",
)
@click.option("--tops", type=_Values(float), help="Values of top to try, each instead of a tau.")
@click.option("--betas", type=_Values(float), help="Values of beta to try.  [default: 0.1]")
@click.option("--rules", type=_Values(str), help="Selection rules to try.  [default: all that the scores allow]")
@click.option("--combines", type=_Values(str), help="Ways to combine dimensions.  [default: union]")
@click.option(
    "--per-dimension", is_flag=True, help="Try a separate factor for each dimension; 1 (no change) is one of them."
)
@click.option(
    "--trials",
    type=click.IntRange(1),
    default=60,
    show_default=True,
    help="Maximum number of edits to try. Optuna samples a larger space.",
)
@click.option(
    "--figure",
    help="Figure of the bias tasks to improve.  [default: absolute margin, or unwanted margin "
    "where a recipe's aim is `avoid`]",
)
@click.option(
    "--max-kl",
    type=click.FloatRange(0, min_open=True),
    help="Bound on the KL from the base on neutral text, nats per token.  [default: none]",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the split and of the sampler."
)
@click.option(
    "--dev-only", is_flag=True, help="Stop before the test half is scored, so that the space may still change."
)
@click.option(
    "--recipe",
    shell_complete=completing.recipe,
    help="Recipe that supplies questions and probes.  [default: the recipe of the scores]",
)
@options.evaluating
@options.MEMORY
@REQUIRE
@options.JSON
def command(
    source: str, scores: tuple[Path, ...], out: Path, require: tuple[str, ...], as_json: bool, **values: Any
) -> None:
    """Choose factor, thresholds, rule and site on one half of the items, and confirm the choice once on the other.

    SCORES are files of `locate` on the model, one for each site. Every edit is measured by hooks on the dev half.
    Candidates are the edits within bounds (--margin, --max-kl), on the Pareto front of bias and KL on neutral text,
    and better than each draw of random neurons. The one with the least bias is chosen. If there is none, the test half
    stays unused. Otherwise it is scored once, for the chosen edit, and OUT cannot confirm another choice. The number
    of uses of the same data is kept beside SCORES, and the threshold is corrected for it. A choice among k edits must
    exceed 20 k - 1 draws of random neurons there, so further draws are measured as long as it does.

    At least one bias task is needed. Without a capability task, the recipe's questions bound the loss.

    \b
    Needs lm-eval, and Optuna for spaces larger than --trials: pip install 'kbne-edit[tune]'.
    """
    from ..evaluation.settings import Measurement
    from ..tuning.search import Space
    from ..tuning.settings import Criteria, Search
    from ..tuning.tune import tune

    space = options.taken(Space, values)
    measurement = options.taken(Measurement, values)
    search = options.taken(Search, values, space=space)
    result = tune(source, scores, out, search=search, measurement=measurement, criteria=Criteria(**values))
    if result is None:  # one of several processes, and not the first
        return
    keep_run(out / RUN)
    options.show(result.to_dict(), as_json, _lines(result, out))
    result.verdict.require(require)


def _lines(result: Tuning, out: Path) -> list[str]:
    model, commit = result.record["model"], result.record["commit"]
    split = (f"{name} {of['dev']['items']} dev, {of['test']['items']} test" for name, of in result.split.items())
    return [
        f"model: {model}" + (f" at {commit}" if commit else ""),
        "split: " + ", ".join(split),
        *_dev_lines(result),
        *_test_lines(result),
        *_end_lines(result, out),
    ]


def _dev_lines(result: Tuning) -> list[str]:
    from ..tuning.search import in_words

    search, points = result.record["search"], result.points
    every = [setting for point in points for setting in point.settings]
    common = {name for name in every[0] if name != "factor" and len({setting.get(name) for setting in every}) == 1}
    bound = "" if result.max_kl is None else f", KL below {result.max_kl:g}"
    best = sorted((point for point in points if point.front), key=lambda point: point.bias.value)
    lines = [
        f"space: {len(every) + search['empty']} of {search['size']} settings tried ({search['how']}), "
        f"{search['empty']} select nothing; {len(points)} different edits",
        f"  in common: {in_words(every[:1], set(every[0]) - common)}",
        f"dev: {sum(point.within for point in points)} edits within bounds (a loss of {result.margin:g} points of "
        f"{', '.join(result.bounded_by)} excluded{bound})",
        f"dev, Pareto front of {len(best)}: change of the {result.figure} of {', '.join(result.steered_by)}, KL on "
        "neutral text, lower end of the capability's change",
    ]
    for point in best:
        lines.append(
            f" {'*' if point.edit == result.chosen else ' '}{_interval(result, point.bias)}  {point.kl:.1e}  "
            f"{min(point.lowest.values()):+.1f}  {point.neurons} neurons, {in_words(point.settings, common)}"
        )
        if point.beyond_random:
            lines.append(
                f"    less the mean of {point.draws} draws of random neurons: "
                f"{_interval(result, point.beyond_random)}; {point.as_good} of them do as well"
            )
    if result.chosen:
        return [*lines, f"chosen (*): {result.chosen_by}"]
    why = "does better than each draw of random neurons" if best else f"improves the {result.figure}"
    return [*lines, f"nothing to choose: on dev no edit within bounds {why}; the test split was not scored"]


def _test_lines(result: Tuning) -> list[str]:
    if result.confirmation is None:
        return []
    often = "once" if result.confirmation.uses == 1 else f"as look {result.confirmation.uses} at this data"
    lines = [f"test, scored {often}:"]
    for entry in result.tested:
        lines.append(f"  {entry.task}: change {_interval(result, entry.change)}, p {entry.p:.2g}: {entry.text}")
    confirmed = "confirmed" if result.confirmation.confirmed else "not confirmed"
    lines.append(f"verdict: {confirmed} ({result.confirmation.text})")
    return [*lines, *verdict_lines(result.verdict)]


def _end_lines(result: Tuning, out: Path) -> list[str]:
    confirmation = result.confirmation
    lines = [f"written: {out} (tune.json, pareto.svg{', edit.json' if confirmation else ''})"]
    if confirmation:
        model, commit = result.record["model"], result.record["commit"]
        where = model + (f"@{commit}" if commit else "")
        bake = options.shell("kbne-edit", "bake", "--in", where, "--edit", out / "edit.json", "--out", "./debiased")
        lines.append(f"next{'' if confirmation.confirmed else ' (not confirmed)'}: {bake}")
    elif result.chosen:
        lines.append("next: the same without --dev-only confirms the choice on the test split")
    return lines


def _interval(result: Tuning, values: Interval) -> str:
    value, low, high = (f"{round(v, 6) + 0.0:+.{result.digits}f}" for v in values)  # + 0.0: no "-0.0"
    return f"{value} [{low}, {high}]"
