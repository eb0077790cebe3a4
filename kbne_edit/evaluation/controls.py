"""Control edits, each with its kind. An effect on bias must exceed theirs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..disk.checkpoint import Checkpoint
from ..edit import Edit
from ..errors import ScoresError
from ..folding.plan import Plan
from ..rule import Rule
from .effect import DRAWS, random_edit

# "flattened" is not an edit but a temperature, see `runs`.
Kind = Literal["random neurons", "control questions", "inverse factor", "flattened"]


@dataclass(frozen=True)
class Control:
    """One control. name: of its figures; for random neurons "random 1", "random 2", …"""

    kind: Kind
    name: str
    edit: Edit


def controls_of(
    edit: Edit, checkpoint: Checkpoint, draws: int = DRAWS, scores: str | Path | None = None
) -> list[Control]:
    """`draws` times as many random neurons of the same layers; the neurons of control questions, if there are scores;
    the same neurons with the inverse factor, unless the factor is 0.

    Raises EditError if the edit does not fit the model, ScoresError for scores of another one or without controls.
    """
    Plan.of(checkpoint, edit, inexact="ignore")
    neurons = checkpoint.layer_sizes(edit.site)
    result = [
        Control("random neurons", f"random {seed + 1}", random_edit(edit, neurons, seed)) for seed in range(draws)
    ]
    if scores:
        result.append(Control("control questions", "control questions", _by_controls(edit, checkpoint, scores)))
    inverse = {la: {n: 1 / f for n, f in ns.items() if f} for la, ns in edit.factors.items()}
    if any(inverse.values()):
        result.append(Control("inverse factor", "inverse factor", Edit(edit.site, inverse)))
    return result


def _by_controls(edit: Edit, checkpoint: Checkpoint, path: str | Path) -> Edit:
    """Neurons that the controls select by the paper's rule, with the edit's thresholds and (most frequent) factor.

    The other rules select almost nothing from controls: for them, as many neurons as the edit has, those that the
    controls use most.
    """
    from ..attribution.scores import load_scores
    from ..selection.select import at_factor, selection

    scores = load_scores(path)
    if (scores.base, scores.site) != (checkpoint.fingerprint(), edit.site):
        raise ScoresError(f"{path} was made for another model or site than the edit: locate again")
    chosen = selection(scores, Rule.from_dict(edit.found.get("select", {})))
    mask = chosen.controls if chosen.rule.name == "paper" else chosen.used_by_controls()
    if mask is None or not mask.any():
        raise ScoresError(f"{path} has no control questions that select a neuron: leave --scores out")
    every = [factor for factors in edit.factors.values() for factor in factors.values()]
    return Edit(edit.site, at_factor(mask, max(edit.distinct_factors, key=every.count)))
