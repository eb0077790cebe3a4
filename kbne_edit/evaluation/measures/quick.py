"""Decisions and twin association in every bake: small versions of the measures, of base and edit together.

They do not need lm-eval. Base and edit are two entries of one batch, so layers below the first edited one are computed
once. Margins of twins that the effect has measured are reused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from ...edit import Edit
from ...errors import InputError
from ...recipe import Probe, Twin, load_recipe
from ...statistics import Clusters, Interval, change
from ..benchmark import Figure
from ..effect import DRAWS_AT_ONCE, Margins
from ..figures import TWINS, twin_columns
from ..twins import twin_scores
from .associations import recipe_name
from .content import require_readable
from .decisions import decisions_benchmark
from .halves import fitted_measures, reported_half, unfitted_twins

if TYPE_CHECKING:
    from torch import nn


class FigureChangeJSON(TypedDict):
    """change: value, low and high."""

    name: str
    unit: str
    before: float
    after: float
    change: list[float]


class QuickMeasureJSON(TypedDict):
    name: str
    language: str
    items: int
    figures: list[FigureChangeJSON]


@dataclass(frozen=True)
class FigureChange:
    """One figure before and after. unit: "percent" or "nats"; change: after minus before, 95 % over clusters."""

    name: str
    unit: str
    before: float
    after: float
    change: Interval

    def to_dict(self) -> FigureChangeJSON:
        return {
            "name": self.name,
            "unit": self.unit,
            "before": self.before,
            "after": self.after,
            "change": list(self.change),
        }

    @classmethod
    def from_dict(cls, record: dict) -> FigureChange:
        """Raises KeyError, TypeError or ValueError."""
        return cls(
            str(record["name"]),
            str(record["unit"]),
            float(record["before"]),
            float(record["after"]),
            Interval.from_list(record["change"]),
        )


@dataclass(frozen=True)
class QuickMeasure:
    """A measure of the package in a bake. items: number of scenarios or twins, which are resampled."""

    name: str
    language: str
    items: int
    figures: tuple[FigureChange, ...]

    @property
    def overall(self) -> tuple[FigureChange, ...]:
        """The figures over all dimensions and groups."""
        return tuple(f for f in self.figures if self.name != "decisions" or f.name in ("largest gap", "flips"))

    def __getitem__(self, name: str) -> FigureChange:
        """The figure of that name. Raises KeyError."""
        for figure in self.figures:
            if figure.name == name:
                return figure
        raise KeyError(name)

    def to_dict(self) -> QuickMeasureJSON:
        figures = [figure.to_dict() for figure in self.figures]
        return {"name": self.name, "language": self.language, "items": self.items, "figures": figures}

    @classmethod
    def from_dict(cls, record: dict) -> QuickMeasure:
        """Inverse of `to_dict`. Raises KeyError, TypeError or ValueError."""
        figures = tuple(FigureChange.from_dict(figure) for figure in record["figures"])
        return cls(str(record["name"]), str(record["language"]), int(record["items"]), figures)


class Remembered:
    """Caches margins of the model itself and one edit, at temperature 1."""

    def __init__(self, margins: Margins):
        self._margins = margins
        self.ahead = getattr(margins, "ahead", DRAWS_AT_ONCE)
        self._known: dict[tuple[str, str, str], float] = {}

    def __call__(self, probes: Sequence[Probe], edits: Sequence[Edit | None], temperature: float) -> np.ndarray:
        """[E, probes], from the cache where possible."""
        if temperature != 1 or len(edits) > 2:  # random draws: not needed again
            return self._margins(probes, edits, temperature)
        names = [edit.sha256 if edit else "" for edit in edits]
        keys = [[(name, probe.first, probe.second) for probe in probes] for name in names]
        if not all(key in self._known for row in keys for key in row):
            margins = self._margins(probes, edits, temperature)
            self._known.update(zip(chain(*keys), margins.ravel().tolist(), strict=True))
        return np.array([[self._known[key] for key in row] for row in keys])


def measure_quick(
    model: nn.Module, tokenizer: Any, edit: Edit, language: str, margins: Margins, say: Callable[[str], None]
) -> tuple[QuickMeasure, ...]:
    """Decisions and associations under base and edit; () if the package has none in the language, or if the model's
    tokenizer cannot read them. Scenarios and twins that the edit was fitted to are left out.

    margins: of probes; say: called with a line on the time that they took.
    """
    from ..batched import score_edits

    start = time.monotonic()
    try:
        decisions = reported_half(decisions_benchmark(language, tokenizer, None, quick=True), fitted_measures(edit))
        twins = unfitted_twins(_twins(language, tokenizer), edit)
    except InputError as error:  # also if an answer is not a token of this model
        say(f"decisions and associations: not measured: {error}")
        return ()
    scored = score_edits(model, decisions.pairs, [None, edit])
    before, after = (
        decisions.columns(list(zip(logp.tolist(), greedy.tolist(), strict=True)))
        for logp, greedy in zip(scored.logprobs, scored.greedy, strict=True)
    )
    scores = twin_scores(twins, margins([probe for twin in twins for probe in twin.probes], [None, edit], 1.0))
    if not all(np.isfinite(values).all() for values in (after, scores)):
        say("decisions and associations: not measured: the edited model gives no numbers")
        return ()
    base, edited = (np.array([twin_columns(score) for score in row]) for row in scores.tolist())
    decided = _changes(decisions.figures, before, after, decisions.drawn())
    result = (
        QuickMeasure("decisions", language, len(decisions.sizes), decided),
        QuickMeasure("associations", language, len(twins), _changes(TWINS, base, edited)),
    )
    say(f"decisions and associations ({language}): {time.monotonic() - start:.1f} s")
    return result


def _twins(language: str, tokenizer: Any) -> tuple[Twin, ...]:
    recipe = load_recipe(recipe_name(language))
    require_readable("associations", tokenizer, [probe.first for probe in recipe.probes])
    return recipe.twins


def _changes(
    figures: Sequence[Figure], before: np.ndarray, after: np.ndarray, clusters: Clusters = None
) -> tuple[FigureChange, ...]:
    return tuple(
        FigureChange(
            figure.name,
            figure.unit,
            float(figure.of(before.mean(0))),
            float(figure.of(after.mean(0))),
            change([before], [after], figure.of, clusters),
        )
        for figure in figures
    )
