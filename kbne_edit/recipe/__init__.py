"""Recipes: the questions and probes for a model. `recipes/social-bias.yaml` is the annotated example of the format."""

from .checking import RecipeCheck, check_recipe
from .loading import load_recipe, new_recipe, recipe_names
from .types import AIMS, Pairing, Probe, Question, Recipe, Twin

__all__ = [
    "AIMS",
    "Pairing",
    "Probe",
    "Question",
    "Recipe",
    "RecipeCheck",
    "Twin",
    "check_recipe",
    "load_recipe",
    "new_recipe",
    "recipe_names",
]
