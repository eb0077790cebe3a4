"""Twin association: s = 1/2 [(log p(A, X) - log p(B, X)) - (log p(A, Y) - log p(B, Y))] per token, of twins.

A and B are two groups, X a stereotype of A, Y one of B. The frequency of the words for A and B, and the probability of
X and Y by themselves, cancel. The twins are those of the package's social-bias recipes, independent of the edit's
recipe.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...recipe import load_recipe, recipe_names
from ..benchmark import Benchmark
from ..datafiles import NoDataError
from ..own import probes_benchmark
from .content import require_readable

if TYPE_CHECKING:
    from ..scoring import Scorer


def recipe_name(language: str) -> str:
    """The recipe that holds a language's twins. Raises NoDataError if the package has none."""
    name = "social-bias" if language == "en" else f"social-bias-{language}"
    if name not in recipe_names():
        raise NoDataError(f"associations: there are none in the language {language}")
    return name


def associations_benchmark(language: str, scorer: Scorer, tokenizer: Any, limit: int | None) -> Benchmark:
    """The twins of a language. Raises NoDataError."""
    recipe = load_recipe(recipe_name(language))
    require_readable("associations", tokenizer, [probe.first for probe in recipe.probes])
    return replace(probes_benchmark(recipe, scorer, limit), name="associations")
