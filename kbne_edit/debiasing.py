"""Locates and selects neurons of a model in memory, without a checkpoint or files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .edit import Edit
from .locating import choose, locate_in_memory
from .recipe import Recipe, load_recipe
from .settings import Settings

if TYPE_CHECKING:
    from torch import nn

    from .attribution.answers import Answers
    from .attribution.scores import Scores
    from .selection.summary import SelectionSummary


@dataclass(frozen=True)
class Debiased:
    """The result of `debias`. The model is unchanged: apply the edit with `edit.hooks(model)` or `edit.apply_(model)`.

    answers: how the model answers the questions; selection: how many neurons, and how many of them controls select,
    too; scores: the whole attribution, for `select` with other thresholds.
    """

    edit: Edit
    answers: Answers
    selection: SelectionSummary
    scores: Scores

    def __repr__(self) -> str:
        return f"Debiased({self.edit.num_neurons} neurons, {self.answers!r})"


def debias(
    model: nn.Module, tokenizer: Any, recipe: str | Path | Recipe = "social-bias", settings: Settings | None = None
) -> Debiased:
    """Locate know-bias neurons of a causal model of transformers in memory, and select neurons as the recipe says.

    tokenizer: of transformers, with its chat template if it has one. recipe: a name, a path, or a loaded `Recipe`.
    settings: as of `locate`; device, dtype and memory are the model's own. Raises InputError, EditError if nothing is
    selected.
    """
    from .attribution.answers import Answers

    settings = settings or Settings()
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    scores = locate_in_memory(model, tokenizer, recipe, settings)
    chosen = choose(scores, recipe, settings)
    edit = replace(chosen.edit, base=None)
    edit.check([scores.values.shape[2]] * scores.values.shape[1])
    return Debiased(edit, Answers.of(scores), chosen.summary(), scores)
