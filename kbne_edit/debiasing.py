"""The whole search on a model that is in memory: no checkpoint, no files."""

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
    """What `debias` found. The model is as it was: `edit.hooks(model)` or `edit.apply_(model)` put the edit to work.

    answers: how the model answers the questions; selection: how many neurons, and how many of them unrelated questions
    select too; scores: all of the attribution, for `select` with other thresholds.
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
    """Locate know-bias neurons of a causal model of transformers in memory, and select those that the recipe asks for.

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
