"""Which items of a measure a fit may use, and which are reported: no figure is of items that were fitted.

Scenarios and twins are split by their position in the package, so the halves do not depend on the model, a seed or a
limit. A scenario is in the same half in every language, because its translation is the same scenario.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ...edit import Edit
from ...errors import InputError
from ...recipe import Twin, load_recipe
from ..benchmark import Benchmark
from ..twins import twin_cluster
from .associations import recipe_name
from .content import read_content
from .decisions import Decisions, Scenario

LANGUAGES = ("en", "de", "fr", "es", "zh")
HALVED = ("decisions", "associations")  # measures that can be fitted


@dataclass(frozen=True)
class ScenarioHalves:
    """Scenarios of the decisions in a language."""

    fitted: tuple[Scenario, ...]
    reported: tuple[Scenario, ...]


@dataclass(frozen=True)
class TwinHalves:
    """Twins of the associations in a language."""

    fitted: tuple[Twin, ...]
    reported: tuple[Twin, ...]


def fitted_measures(edit: Edit | None) -> tuple[str, ...]:
    """The measures to whose fitted half an edit was fitted: only their other half is reported."""
    named = edit.found.get("measures") if edit else None
    return tuple(name for name in HALVED if isinstance(named, list) and name in named)


def scenario_halves(language: str) -> ScenarioHalves:
    """Every other scenario. Raises NoDataError if the package has none in the language."""
    scenarios = Decisions.from_dict(read_content("decisions", language)).scenarios
    return ScenarioHalves(scenarios[::2], scenarios[1::2])


def twin_halves(language: str) -> TwinHalves:
    """Every other twin of each dimension; an odd twin goes to either half in turn. Raises NoDataError."""
    twins = load_recipe(recipe_name(language)).twins
    fitted = _alternating([twin.dimension for twin in twins])
    return TwinHalves(
        tuple(twin for twin, first in zip(twins, fitted, strict=True) if first),
        tuple(twin for twin, first in zip(twins, fitted, strict=True) if not first),
    )


def _alternating(groups: Sequence[str]) -> list[bool]:
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    places: Counter[str] = Counter()
    result = []
    for group in groups:
        result.append((numbers[group] + places[group]) % 2 == 0)
        places[group] += 1
    return result


def reported_half(task: Benchmark, measures: Sequence[str] = HALVED) -> Benchmark:
    """The task without the items that may be fitted in these measures, in any task and language.

    Raises InputError if none is left.
    """
    fitted = _fitted_clusters(tuple(measures))
    items = [i for i, cluster in enumerate(task.clusters) if cluster not in fitted]
    if len(items) == len(task.clusters):
        return task
    if not items:
        raise InputError(f"{task.name}: none of its items is in the half that is reported: use a larger --limit")
    return task.take(items)


def unfitted_twins(twins: Sequence[Twin], edit: Edit) -> tuple[Twin, ...]:
    """The twins that the edit was not fitted to."""
    fitted = _fitted_clusters(fitted_measures(edit))
    return tuple(twin for twin in twins if twin_cluster(twin) not in fitted)


@lru_cache(maxsize=4)
def _fitted_clusters(measures: tuple[str, ...]) -> frozenset[str]:
    clusters: set[str] = set()
    for language in LANGUAGES if measures else ():
        if "decisions" in measures:
            clusters |= {scenario.cluster for scenario in scenario_halves(language).fitted}
        if "associations" in measures:
            clusters |= {twin_cluster(twin) for twin in twin_halves(language).fitted}
    return frozenset(clusters)
