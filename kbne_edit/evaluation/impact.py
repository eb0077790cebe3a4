"""Effect and cost of an edit on a model in memory: what every bake and every apply measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..edit import Edit
from ..errors import InputError
from ..progress import say
from ..recipe import Recipe
from .cost import Cost, NeutralRun, measure_cost
from .effect import Effect, margins_in, measure_effect

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Impact:
    """effect: None where the recipe has too few probes to tell one."""

    effect: Effect | None
    cost: Cost


def measure_impact(model: nn.Module, tokenizer, recipe: Recipe, edit: Edit, neurons: Sequence[int]) -> Impact:
    """Effect and cost of an edit, by run-time hooks, which the fold equals. neurons: how many each layer has, [L].

    Raises EditError if the edit does not fit the model, InputError where it leaves no numbers.
    """
    from .neutral import neutral_text

    text = neutral_text(tokenizer, recipe)
    say(f"cost: {len(text.texts)} neutral texts, questions and continuations, with and without the edit")
    run = NeutralRun.of(model, text, edit)
    cost = measure_cost(run, tokenizer, recipe, edit)
    if not recipe.twins:
        return Impact(None, cost)
    say(f"effect: {len(recipe.twins)} probes and their twins, beside random neurons")
    heat = run.temperature(cost.kl.value) if cost.kl.value > 0 else None
    try:
        effect = measure_effect(
            margins_in(model, tokenizer), recipe.twins, edit, neurons, aim=recipe.aim, temperature=heat
        )
    except InputError as error:
        say(f"effect: not measured: {error}")
        return Impact(None, cost)
    return Impact(effect, cost)
