"""What is asked of the factors, as small algebra over the rows of a Gram matrix.

    d = -s (D + X' W X)^-1 y

y is what is to fall: the mean of rows of units (`Aim`). X holds the Fisher rows, so that d costs little KL, and the
units' own rows, so that the mean falls because most units move a little, not because a few move far: a direction in
which units differ widely is no evidence of a mean, and what rests on it does not carry over to other facts. `even`
weighs the second. s is set by the real KL afterwards.

Association falls by type towards balance and never beyond it. Sentiment is what the tone of the attributes gives: bad
ones against good ones, whoever is spoken of.

Legend: U units, K kinds of rows, R Fisher rows, N = U K + R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .gram import Gram
from .rows import KINDS, PARTS
from .units import Unit

_TONES = {"bad": 1.0, "neutral": 0.0, "good": -1.0}


@dataclass(frozen=True)
class System:
    """units: U; margins: [U, K], NaN where a unit has no such row; gram: units' rows, then Fisher rows.

    fisher: what each Fisher row counts, [R]; 0: it is set aside. share: how much of it is taken as measured.
    """

    units: tuple[Unit, ...]
    margins: np.ndarray
    gram: Gram
    fisher: np.ndarray
    share: float

    def rows(self, kind: str, chosen: np.ndarray) -> np.ndarray:
        """Indices of the rows of a kind."""
        return chosen * len(KINDS) + KINDS.index(kind)

    def solve(self, aim: np.ndarray, chosen: np.ndarray, even: float) -> np.ndarray:
        """Coefficients [N] of -(D + X' W X)^-1 y. chosen: the units whose changes are to be even."""
        start = len(self.units) * len(KINDS)
        known = np.flatnonzero(self.fisher) + start
        among, weights = [known], [self.share * self.fisher[known - start]]
        for part in PARTS:
            among.append(self.rows(part, chosen))
            weights.append(np.full(len(chosen), even / len(chosen)))
        return -self.gram.solve(aim, np.concatenate(among), np.concatenate(weights))

    def cost(self, coefficients: np.ndarray, fisher: np.ndarray) -> float:
        """Quadratic KL per token, by Fisher rows that count `fisher`, [R]."""
        changes = self.gram.changes(coefficients)[len(self.units) * len(KINDS) :]
        return 0.5 * float((fisher * changes**2).sum())


def aim(system: System, parts: Sequence[str], chosen: np.ndarray, margins: np.ndarray | None = None) -> np.ndarray:
    """y over all rows, [N]. chosen: units that are fitted. margins: [U, K] where they are not those at factors of 1.

    Association weighs a type by what is left of its margin, and prior likewise; a type at balance or beyond does not
    count. The parts are brought to one scale by the spread of their units' rows.
    """
    margins = system.margins if margins is None else margins
    result = np.zeros(len(system.gram.matrix))
    for part in parts:
        own = _sentiment(system, chosen) if part == "sentiment" else _balance(system, part, chosen, margins)
        size = np.sqrt(max(float(own @ system.gram.matrix @ own), 1e-30))
        result += own / size if own.any() else 0
    return result


def _balance(system: System, part: str, chosen: np.ndarray, margins: np.ndarray) -> np.ndarray:
    """Mean rows of the types, each times what is left of its mean margin."""
    result = np.zeros(len(system.gram.matrix))
    kind = KINDS.index(part)
    types = np.array([unit.type for unit in system.units])
    for name in sorted({*types[chosen]}):
        own = chosen[types[chosen] == name]
        left = float(margins[own, kind].mean())
        if part == "association":
            left = max(left, 0.0)
        result[system.rows(part, own)] += left / len(chosen)
    return result


def _sentiment(system: System, chosen: np.ndarray) -> np.ndarray:
    """Bad attributes against good ones: within units whose two attributes differ in tone, and between units."""
    result = np.zeros(len(system.gram.matrix))
    x, y = (
        np.array([_TONES[tone] for tone in tones])
        for tones in zip(*((u.fact.tone_x, u.fact.tone_y) for u in (system.units[i] for i in chosen)), strict=True)
    )
    within = (x - y) / max(np.abs(x - y).sum(), 1)
    result[system.rows("sentiment", chosen)] = within
    for sign in (1, -1):
        own = chosen[(x + y) * sign > 1]
        if len(own):
            result[system.rows("level", own)] += sign / len(own)
    return result


def tone(unit: Unit) -> float:
    """Of a unit's attributes: 1 if X is bad and Y is not, -1 the other way round, 0 if they are alike."""
    return float(np.sign(_TONES[unit.fact.tone_x] - _TONES[unit.fact.tone_y]))
