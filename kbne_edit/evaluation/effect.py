"""What a record of an edit's effect on the probes says: which change counts, and which ones there are."""

from __future__ import annotations


def avoids(effect: dict) -> bool:
    """True if the first sentence of a probe is to become less probable; else neither should be preferred."""
    return effect.get("aim") == "avoid"


def own_change(effect: dict) -> list[float]:
    """The edit's change of the margin that counts, [mean, low, high]."""
    return effect["change_signed" if avoids(effect) else "change_abs"]


def margin_changes(effect: dict) -> tuple[list[float], dict[str, list[float]]]:
    """(the margin that counts, [before, after]; its changes, {what: [mean, low, high]}), of edit and control."""
    kind, mean = ("signed", "mean_margin") if avoids(effect) else ("abs", "mean_abs_margin")
    return effect[mean], {
        "this edit": own_change(effect),
        f"control: random neurons of the same layers, {effect['random_draws']} draws": effect[f"random_change_{kind}"],
        "this edit less the control": effect["versus_random"],
        "this edit, margin with its sign": effect["change_signed"],
    }
