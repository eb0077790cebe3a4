from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import completing, options

if TYPE_CHECKING:
    from ..selection.stability import Agreement, Resamples, Stability, StabilityJSON
    from ..statistics import Interval


@click.command("stability")
@click.argument("scores", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--recipe",
    shell_complete=completing.recipe,
    help="Recipe that supplies the default thresholds.  [default: the recipe of the first scores]",
)
@click.option(
    "--resamples", type=click.IntRange(1), default=200, show_default=True, help="Number of resamples of the questions."
)
@options.selecting
@options.JSON
def command(scores: tuple[Path, ...], recipe: str | None, resamples: int, as_json: bool, **values: Any) -> None:
    """Show how far a selection depends on which questions are asked. Of several SCORES, also show how far they agree.

    To compare wordings, prompts, languages or contexts, make one scores file of each with `locate`.
    """
    from ..attribution.scores import load_scores
    from ..locating import choosing
    from ..recipe import load_recipe
    from ..selection.stability import agreements, resample, stability
    from ..settings import Settings

    files = {str(path): load_scores(path) for path in scores}
    first, settings = next(iter(files.values())), Settings(**values)
    named = load_recipe(recipe or first.settings["recipe"])
    drawn = {}
    for name, sample in files.items():
        rule, only = choosing(sample, named, settings)
        drawn[name] = resample(sample, rule, draws=resamples, only=only)
    one = len(drawn) == 1  # an empty selection is an error for one file, and a result among several
    results = {name: stability(sample) for name, sample in drawn.items() if one or len(sample.whole)}
    pairs = [] if one else agreements(drawn)
    result: StabilityJSON = {
        "files": {name: sample.to_dict() for name, sample in results.items()},
        "nothing": [name for name, sample in drawn.items() if not len(sample.whole)],
        "pairs": [pair.to_dict() for pair in pairs],
    }
    lines = [line for name, sample in results.items() for line in _file_lines(name, sample)]
    lines += [f"{name}: nothing is selected" for name in result["nothing"]]
    lines += [_pair_line(pair) for pair in pairs]
    if len(drawn) > 2:
        result["in_files"] = _in_files(list(drawn.values()))
        lines.append(_in_files_line(result["in_files"], len(drawn)))
    if pairs:
        lines.append("intervals: 95 % of the draws; the same questions are drawn where files have as many of each kind")
    options.show(result, as_json, lines)


def _in_files(resamples: list[Resamples]) -> dict[int, dict[int, Interval]]:
    """{layer: {neuron: share of the files that select it}}, intervals by Wilson."""
    from ..selection.questions import by_layer
    from ..statistics import Interval, wilson

    counted = sorted(Counter(place for resample in resamples for place in resample.whole.tolist()).items())
    files = len(resamples)
    shares = {place: Interval(count / files, *wilson(count, files)) for place, count in counted}
    return by_layer(shares, resamples[0].neurons_per_layer)


def _file_lines(name: str, result: Stability) -> list[str]:
    neurons = sum(map(len, result.neurons.values()))
    return [
        f"{name}: {neurons} neurons, {result.draws} resamples of the questions",
        "  a resample's selection: {:.0f} neurons [{:.0f}, {:.0f}]".format(*result.size),
        "  its Jaccard overlap with the whole: {:.2f} [{:.2f}, {:.2f}]".format(*result.jaccard),
        f"  neurons in at least 80 % of the resamples: {result.at_least(0.8)}",
    ]


def _pair_line(pair: Agreement) -> str:
    a, b, both = pair.neurons
    jaccard = "Jaccard {:.2f} [{:.2f}, {:.2f}]".format(*pair.jaccard)
    rank = "rank correlation {:.2f} [{:.2f}, {:.2f}]".format(*pair.rank)
    return f"{pair.a} and {pair.b}: {both} neurons in common of {a} and {b}, {jaccard}, {rank}"


def _in_files_line(in_files: dict[int, dict[int, Interval]], count: int) -> str:
    shares = [share.value for neurons in in_files.values() for share in neurons.values()]
    return (
        f"of {len(shares)} neurons that any of the {count} files selects, {sum(s == 1 for s in shares)} are in all "
        f"of them and {sum(s >= 0.8 for s in shares)} in at least 80 %"
    )
