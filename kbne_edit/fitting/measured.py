"""Measured effects of factors: margins of units, at factors scaled to a KL on texts set aside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..families import Site
from ..statistics import Interval, interval
from .passes import Neutral, objectives
from .problem import aimed, tones
from .result import Control, Gain
from .rows import KINDS, MEASURED, UnitRows
from .units import Unit

CLIP = (0.0, 8.0)
_STEPS, _CLOSE = 8, 0.05


@dataclass(frozen=True)
class Scaled:
    """Factors [P] = 1 + s d, and their real KL and perplexity."""

    factors: Tensor
    kl: float
    perplexity: float
    s: float = 1.0


def scaled(neutral: Neutral, d: Tensor, kl: float, first: float) -> Scaled:
    """1 + s d, clipped, with the largest s tried whose measured KL is at most `kl`. first: initial s.

    The KL grows about as s squared, so s is multiplied by the square root of the ratio of the KLs.
    """
    s, best = first, Scaled(torch.ones_like(d), 0.0, neutral.base.perplexity)
    for _ in range(_STEPS):
        factors = (1 + s * d).clamp(*CLIP)
        measured = neutral.measure(factors)
        if best.kl < measured.kl <= kl:
            best = Scaled(factors, measured.kl, measured.perplexity, s)
        if kl * (1 - _CLOSE) <= measured.kl <= kl:
            break
        s *= min(max(((1 - _CLOSE / 2) * kl / max(measured.kl, 1e-12)) ** 0.5, 0.1), 10.0)
    return best


class Matching:
    """Controls of an edit's KL. Their scale is found on part of the texts, `some`, and measured on all, `whole`."""

    def __init__(self, whole: Neutral, some: Neutral, edit: Scaled):
        self._whole, self._some, self._edit = whole, some, edit
        self._kl = some.measure(edit.factors).kl

    def scaled(self, d: Tensor, first: float = 1.0) -> Scaled:
        """1 + s d. first: where s begins."""
        s = scaled(self._some, d, self._kl, first).s
        for _ in range(3):  # the part's KL and the whole's are not in the same ratio for every direction
            factors = (1 + s * d).clamp(*CLIP)
            measured = self._whole.measure(factors)
            if abs(measured.kl - self._edit.kl) <= _CLOSE * self._edit.kl:
                break
            s *= (self._edit.kl / max(measured.kl, 1e-12)) ** 0.5
        return Scaled(factors, measured.kl, measured.perplexity, s)

    def flattening(self) -> tuple[float, float]:
        """(temperature above 1, KL) of a flattening of the base."""
        temperature = flattening(self._some, self._kl)
        return temperature, self._whole.measure(temperature=temperature).kl


def flattening(neutral: Neutral, kl: float) -> float:
    """The temperature T above 1 at which the flattened base has this KL from the base.

    The KL grows about as (T - 1) squared, so T - 1 is multiplied by the square root of the ratio of the KLs.
    """
    excess = 0.1
    for _ in range(_STEPS):
        measured = neutral.measure(temperature=1 + excess).kl
        if abs(measured - kl) <= _CLOSE / 5 * kl:
            break
        excess *= min(max((kl / max(measured, 1e-12)) ** 0.5, 0.1), 10.0)
    return 1 + excess


@dataclass(frozen=True)
class Held:
    """Units that were not fitted. rows: of units, then of contrasts."""

    units: Sequence[Unit]
    rows: Sequence[UnitRows]

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that at least one unit has."""
        there = np.array([~np.isnan(unit.mixture[:, 0]) for unit in self.rows]).any(0)
        present = {KINDS[i] for i in np.flatnonzero(there)} - (set() if aimed(self.units).any() else {"prior"})
        return tuple(part for part in MEASURED if part in present or (part == "sentiment" and "tone" in present))

    def margins(self, model: nn.Module, site: Site, at: Tensor | None = None, temperature: float = 1.0) -> np.ndarray:
        """[U, K], NaN if a unit has no such row."""
        sentences = [sentence for unit in self.rows for sentence in unit.sentences]
        values = np.split(
            objectives(model, sentences, site, at, temperature), np.cumsum([len(u.sentences) for u in self.rows])[:-1]
        )
        return np.array([unit.mixture @ row for unit, row in zip(self.rows, values, strict=True)])

    def of(self, part: str, margins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(which units tell of a part, their values): of sentiment the contrasts and units that differ in tone; of the
        prior those that prejudice is aimed at one group of, which stands first."""
        if part == "prior":
            known = np.flatnonzero(aimed(self.units) * ~np.isnan(margins[:, KINDS.index(part)]))
            return known, aimed(self.units)[known] * margins[known, KINDS.index(part)]
        if part != "sentiment":
            indices = np.flatnonzero(~np.isnan(margins[:, KINDS.index(part)]))
            return indices, margins[indices, KINDS.index(part)]
        signs, tone = tones(self.units), margins[:, KINDS.index("tone")]
        values = np.where(np.isnan(tone), signs * margins[:, KINDS.index("sentiment")], tone)
        indices = np.flatnonzero(~np.isnan(tone) | (signs != 0))
        return indices, values[indices]

    def changes(self, before: np.ndarray, after: np.ndarray) -> tuple[Interval, ...]:
        """By part, in the order of `parts`, over all units."""
        return tuple(interval(self.of(part, after)[1] - self.of(part, before)[1]) for part in self.parts)

    def gains(self, before: np.ndarray, after: np.ndarray) -> tuple[Gain, ...]:
        """For all units, then by type and by format if there are at least five."""
        result = []
        names = {"all": np.ones(len(self.units), bool)}
        for label in sorted({unit.type for unit in self.units}):
            names[label] = np.array([unit.type == label for unit in self.units])
        for label in sorted({unit.format for unit in self.units}):
            names[f"format {label}"] = np.array([unit.format == label for unit in self.units])
        for label, chosen in names.items():
            for part in self.parts:
                indices, first = self.of(part, before)
                kept = chosen[indices]
                if label == "all" or kept.sum() >= 5:
                    change = (self.of(part, after)[1] - first)[kept]
                    result.append(Gain(part, label, int(kept.sum()), float(first[kept].mean()), interval(change)))
        return tuple(result)


class Measure:
    """Measures the base, and compares others with it, on units that were not fitted."""

    def __init__(self, model: nn.Module, site: Site, held: Held):
        self._model, self._site, self._held = model, site, held
        self._base = held.margins(model, site)

    def control(self, name: str, edit: Scaled, temperature: float = 1.0) -> Control:
        after = self._held.margins(self._model, self._site, edit.factors, temperature)
        return Control(name, edit.kl, self._held.changes(self._base, after))

    def gains(self, edit: Scaled) -> tuple[Gain, ...]:
        return self._held.gains(self._base, self._held.margins(self._model, self._site, edit.factors))
