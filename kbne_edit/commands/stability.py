from __future__ import annotations

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
    from ..pipeline import choosing
    from ..recipe import load_recipe
    from ..scores import load_scores
    from ..stability import agreement, stability

    found = {str(path): load_scores(path) for path in scores}
    first = next(iter(found.values()))
    settings = options.settings(**values)
    rules = {name: choosing(s, load_recipe(recipe or first.settings["recipe"]), settings) for name, s in found.items()}
    result = {"files": {name: stability(s, draws=draws, **rules[name]) for name, s in found.items()}, "pairs": []}
    names = list(found)
    shared = {key: value for key, value in rules[names[0]].items() if key != "only"}
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            result["pairs"].append({"a": a, "b": b, **agreement(found[a], found[b], **shared)})
    options.show(result, as_json, _lines(result))


def _lines(result: dict) -> list[str]:
    lines = []
    for name, found in result["files"].items():
        shares = [share for neurons in found["neurons"].values() for share in neurons.values()]
        lines.append(f"{name}: {len(shares)} neurons, {found['draws']} resamples of the questions")
        lines.append("  a resample's selection: {:.0f} neurons [{:.0f}, {:.0f}]".format(*found["size"]))
        lines.append("  its Jaccard overlap with the whole: {:.2f} [{:.2f}, {:.2f}]".format(*found["jaccard"]))
        lines.append("  neurons in at least 80 % of the resamples: " + str(sum(share >= 0.8 for share in shares)))
    for pair in result["pairs"]:
        a, b, both = pair["neurons"]
        lines.append(
            f"{pair['a']} and {pair['b']}: {both} neurons in common of {a} and {b}, "
            f"Jaccard {pair['jaccard']:.2f}, rank correlation {pair['rank']:.2f}"
        )
    return lines
