"""Effect and cost of an edit on a model in memory, as every bake and apply measures them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from ..disk.checkpoint import Checkpoint
from ..edit import Edit
from ..errors import InputError
from ..progress import say
from ..recipe import Recipe, recipe_names
from .cost import Cost, CostJSON, NeutralRun, measure_cost
from .effect import Effect, EffectJSON, Margins, margins_in, measure_effect
from .measures.halves import unfitted_twins
from .measures.quick import QuickMeasure, QuickMeasureJSON, Remembered, measure_quick

if TYPE_CHECKING:
    from torch import nn

# Tokens of neutral text that every bake predicts; `evaluate` takes all. The interval of the KL is then some 10 % wide.
_TARGETS = 1200


class ImpactJSON(TypedDict, total=False):
    """Effect and cost; keys that were not measured are left out."""

    effect: EffectJSON
    cost: CostJSON
    measures: list[QuickMeasureJSON]


@dataclass(frozen=True)
class Impact:
    """Effect and cost of an edit; None: not measured. effect is None, too, if a recipe has too few probes.

    measures: decisions and associations in the recipe's language; () if the model cannot read them. They have no part
    in the verdict: they are small, and show the effect on people if the recipe is about something else.
    """

    effect: Effect | None = None
    cost: Cost | None = None
    measures: tuple[QuickMeasure, ...] = ()

    def to_dict(self) -> ImpactJSON:
        record: ImpactJSON = {}
        if self.effect:
            record["effect"] = self.effect.to_dict()
        if self.cost:
            record["cost"] = self.cost.to_dict()
        if self.measures:
            record["measures"] = [measure.to_dict() for measure in self.measures]
        return record


NOT_MEASURED = Impact()


def recipe_of(edit: Edit | None) -> str | None:
    """The recipe with which an edit was located, if the package has it: its probes are the ones to measure."""
    name = edit.found.get("recipe") if edit else None
    return name if isinstance(name, str) and name in recipe_names() else None


def impact_of(checkpoint: Checkpoint, edit: Edit, recipe: Recipe) -> Impact:
    """`measure_impact` on a checkpoint's model. Reports what cannot be measured, and leaves it None."""
    from ..models.loading import load_tokenizer
    from ..models.widening import float32_model

    try:
        tokenizer = load_tokenizer(checkpoint.path)
        with float32_model(checkpoint) as model:
            return measure_impact(model, tokenizer, recipe, edit, checkpoint.layer_sizes(edit.site))
    except InputError as error:
        say(f"effect and cost: not measured: {error}")
        return NOT_MEASURED


def measure_impact(model: nn.Module, tokenizer: Any, recipe: Recipe, edit: Edit, neurons: Sequence[int]) -> Impact:
    """Effect and cost of an edit, by run-time hooks, which the fold equals. neurons: how many each layer has, [L].

    Raises EditError if the edit does not fit the model, InputError if it gives NaN or inf.
    """
    from .neutral import neutral_text

    text = neutral_text(tokenizer, recipe).within(_TARGETS)
    say(f"cost: {len(text.texts)} neutral texts, questions and continuations, with and without the edit")
    run = NeutralRun.of(model, text, edit)
    cost = measure_cost(run, tokenizer, recipe, edit)
    margins = Remembered(margins_in(model, tokenizer))
    temperature = (run.temperature(cost.kl.value) or math.inf) if cost.kl.value > 0 else None
    effect = _effect(margins, recipe, edit, neurons, temperature) if recipe.twins else None
    return Impact(effect, cost, measure_quick(model, tokenizer, edit, recipe.language, margins, say))


def _effect(
    margins: Margins, recipe: Recipe, edit: Edit, neurons: Sequence[int], temperature: float | None
) -> Effect | None:
    twins = unfitted_twins(recipe.twins, edit)
    say(f"effect: {len(twins)} probes and their twins, beside random neurons")
    try:
        return measure_effect(margins, twins, edit, neurons, aim=recipe.aim, temperature=temperature)
    except InputError as error:
        say(f"effect: not measured: {error}")
        return None
