from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from . import options


@click.command("stability")
@click.argument("scores", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--recipe", help="Whose thresholds are the defaults.  [default: the recipe of the first scores]")
@click.option("--draws", type=click.IntRange(1), default=200, show_default=True, help="Resamples of the questions.")
@options.selecting
@options.JSON
def command(scores, recipe, draws, as_json, **values) -> None:
    """How far the selection depends on which questions were asked; of several SCORES also how they agree.

    Other wordings, prompts, languages and contexts are other scores files of the same model: see `locate`.
    """
    from ..attribution.scores import load_scores
    from ..locating import choosing
    from ..recipe import load_recipe
    from ..selection.stability import agreements, resample, stability

    files = {str(path): load_scores(path) for path in scores}
    first, settings = next(iter(files.values())), options.settings(**values)
    named = load_recipe(recipe or first.settings["recipe"])
    found = {name: resample(s, draws=draws, **choosing(s, named, settings)) for name, s in files.items()}
    one = len(found) == 1  # that nothing is selected is an error for one, and a finding beside others
    result = {
        "files": {name: stability(own) for name, own in found.items() if one or len(own.whole)},
        "nothing": [name for name, own in found.items() if not len(own.whole)],
        "pairs": [] if one else agreements(found),
    }
    if len(found) > 2:
        result["in_files"] = _in_files(list(found.values()))
    options.show(result, as_json, _lines(result))


def _in_files(found: list) -> dict:
    """{layer: {neuron: [share of the files that select it, low, high]}}, intervals by Wilson."""
    from ..selection.select import by_layer
    from ..statistics import wilson

    counted, files = sorted(Counter(place for own in found for place in own.whole.tolist()).items()), len(found)
    shares = {place: [count / files, *wilson(count, files)] for place, count in counted}
    return by_layer(shares, found[0].scores.values.shape[2])


def _lines(result: dict) -> list[str]:
    lines = []
    for name, found in result["files"].items():
        shares = [share for neurons in found["neurons"].values() for share in neurons.values()]
        lines.append(f"{name}: {len(shares)} neurons, {found['draws']} resamples of the questions")
        lines.append("  a resample's selection: {:.0f} neurons [{:.0f}, {:.0f}]".format(*found["size"]))
        lines.append("  its Jaccard overlap with the whole: {:.2f} [{:.2f}, {:.2f}]".format(*found["jaccard"]))
        lines.append("  neurons in at least 80 % of the resamples: " + str(sum(share >= 0.8 for share in shares)))
    lines += [f"{name}: nothing is selected" for name in result["nothing"]]
    for pair in result["pairs"]:
        a, b, both = pair["neurons"]
        lines.append(
            f"{pair['a']} and {pair['b']}: {both} neurons in common of {a} and {b}, "
            "Jaccard {:.2f} [{:.2f}, {:.2f}], ".format(*pair["jaccard"])
            + "rank correlation {:.2f} [{:.2f}, {:.2f}]".format(*pair["rank"])
        )
    if "in_files" in result:
        shares = [share for neurons in result["in_files"].values() for share, *_ in neurons.values()]
        count = len(result["files"]) + len(result["nothing"])
        lines.append(
            f"of {len(shares)} neurons that any of the {count} files selects, {sum(s == 1 for s in shares)} are in all "
            f"of them and {sum(s >= 0.8 for s in shares)} in at least 80 %"
        )
    if result["pairs"]:
        lines.append("intervals: 95 % of the draws; the same questions are drawn where files have as many of each kind")
    return lines
