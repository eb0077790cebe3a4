"""What is asked of the factors, as small algebra over the rows of a Gram matrix.

    d = -s (D + X' W X)^-1 y

y is what is to fall (`aim`). X holds the Fisher rows, so that d costs little KL, and the units' own rows, so that a
mean falls because most units move a little and not because a few move far: a direction in which units differ widely is
no evidence of a mean, and what rests on it does not carry over to other facts. `even` weighs the second. s is set by
the real KL afterwards.

The association of each type counts by what is left of it, and not at all where it is at balance or beyond. Sentiment is
the tone of the attributes: bad ones against good ones, whoever is spoken of. It has no balance of its own.

Legend: U units and contrasts, K kinds of rows, R Fisher rows, N rows of the Gram matrix.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .gram import Gram
from .rows import KINDS, MEASURED, PARTS
from .sampling import SAMPLES
from .units import Unit

_TONES = {"bad": 1.0, "neutral": 0.0, "good": -1.0}
_HOLD = 1e3  # how firmly the likelihood of everyday texts is held, against the metric D


@dataclass(frozen=True)
class System:
    """Rows and what is known of them.

    units: U, the contrasts and public pairs last. margins: [U, K], NaN where a unit has no such row. index: [U, K], a
    row's place in the Gram matrix (-1: none), where the Fisher rows follow, and last `held` rows: the likelihood of
    each kind of everyday texts, which is held. fisher: what each Fisher row counts, [R]; share: how much of the Fisher
    information is taken as measured.
    """

    units: tuple[Unit, ...]
    margins: np.ndarray
    index: np.ndarray
    gram: Gram
    fisher: np.ndarray
    share: float
    held: int = 1

    @property
    def start(self) -> int:
        """Where the Fisher rows begin."""
        return len(self.gram.matrix) - len(self.fisher) - self.held

    def having(self, kind: str, chosen: np.ndarray) -> np.ndarray:
        """Those of the units that have a row of this kind."""
        return chosen[self.index[chosen, KINDS.index(kind)] >= 0]

    def rows(self, kind: str, chosen: np.ndarray) -> np.ndarray:
        """Places of the rows of a kind, of units that have them."""
        return self.index[chosen, KINDS.index(kind)]

    def solve(self, aim: np.ndarray, chosen: np.ndarray, even: float, fisher: np.ndarray | None = None) -> np.ndarray:
        """Coefficients [N] of -(D + X' W X)^-1 y. chosen: units whose changes are to be even; fisher: [R], instead of
        all of it."""
        counts = self.fisher if fisher is None else fisher
        known = np.flatnonzero(counts)
        among, weights = [known + self.start], [self.share * counts[known]]
        for part in (*PARTS, "pair"):
            indices = self.having(part, chosen)
            among.append(self.rows(part, indices))
            weights.append(np.full(len(indices), even / max(len(indices), 1)))
        last = np.arange(len(self.gram.matrix) - self.held, len(self.gram.matrix))
        among.append(last)
        weights.append(_HOLD / np.maximum(np.diag(self.gram.matrix)[last], 1e-30))
        return -self.gram.solve(aim, np.concatenate(among), np.concatenate(weights))

    def cost(self, coefficients: np.ndarray, fisher: np.ndarray) -> float:
        """Quadratic KL per token, by Fisher rows that count `fisher`, [R]."""
        changes = self.gram.changes(coefficients)[self.start : self.start + len(fisher)]
        return 0.5 * float((fisher * changes**2).sum())


def aim(system: System, parts: Sequence[str], chosen: np.ndarray, signs: np.ndarray | None = None) -> np.ndarray:
    """y over all rows, [N]. chosen: units that are fitted. signs: [U] of 1 and -1, by which labels are exchanged.

    Each part is divided by the standard error of its mean in the metric D, so that none drowns the others. A part that
    no unit tells of adds nothing.
    """
    signs = np.ones(len(system.units)) if signs is None else signs
    result = np.zeros(len(system.gram.matrix))
    for part in parts:
        if part == "sentiment":
            directions = _sentiment(system, chosen, signs)
        elif part == "guess":
            directions = (_mean(system, part, chosen, signs),)
        else:
            directions = (_balance(system, part, chosen, signs),)
        for direction in directions:
            spread = np.sqrt(float(direction**2 @ np.diag(system.gram.matrix)))
            result += direction / spread if spread else 0
    return result


def _mean(system: System, part: str, chosen: np.ndarray, signs: np.ndarray) -> np.ndarray:
    result = np.zeros(len(system.gram.matrix))
    indices = system.having(part, chosen)
    result[system.rows(part, indices)] = signs[indices] / max(len(indices), 1)
    return result


def _balance(system: System, part: str, chosen: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Rows of a part, each type's mean times what is left of its mean margin."""
    result, kind = np.zeros(len(system.gram.matrix)), KINDS.index(part)
    chosen = system.having(part, chosen)
    types = np.array([system.units[i].type for i in chosen])
    for name in sorted(set(types.tolist())):
        indices = chosen[types == name]
        left = float(system.margins[indices, kind].mean())
        if part != "prior":
            left = max(left, 0.0)
        result[system.rows(part, indices)] = left * signs[indices] / len(chosen)
    return result


def _sentiment(system: System, chosen: np.ndarray, signs: np.ndarray) -> tuple[np.ndarray, ...]:
    """Bad attributes against good ones: in contrasts, in units whose attributes differ in tone, and between units."""
    contrast, within, between = (np.zeros(len(system.gram.matrix)) for _ in range(3))
    indices = system.having("tone", chosen)
    contrast[system.rows("tone", indices)] = signs[indices] / max(len(indices), 1)
    indices = system.having("sentiment", chosen)
    within[system.rows("sentiment", indices)] = tones(system.units)[indices] * signs[indices] / max(len(indices), 1)
    levels = np.array([_TONES[u.fact.tone_x] + _TONES[u.fact.tone_y] for u in system.units])
    for sign in (1, -1):
        alike = indices[levels[indices] * signs[indices] * sign > 1]
        between[system.rows("level", alike)] = sign / max(len(alike), 1)
    return contrast, within, between


def tones(units: Sequence[Unit]) -> np.ndarray:
    """1 where X is worse than Y, -1 the other way round, 0 if they are alike, [U]."""
    return np.array([np.sign(_TONES[u.fact.tone_x] - _TONES[u.fact.tone_y]) for u in units])


def folds(units: Sequence[Unit], count: int) -> np.ndarray:
    """A fold of each unit, [U]: all units of a fact, and the contrasts of its bad attributes, have the same."""
    facts = {attribute: u.fact.x for u in reversed(units) for attribute in (u.fact.y, u.fact.x)}
    return np.array([zlib.crc32(facts[u.fact.x].encode()) % count for u in units])


def shuffled(units: Sequence[Unit], seed: int) -> np.ndarray:
    """Signs [U], by which half of the units of each type exchange their labels."""
    rng, signs = np.random.default_rng(seed), np.ones(len(units))
    types = np.array([unit.type for unit in units])
    for name in sorted(set(types.tolist())):
        indices = np.flatnonzero(types == name)
        signs[rng.permutation(indices)[: len(indices) // 2]] = -1
    return signs


@dataclass(frozen=True)
class Held:
    """Change of a part on facts that were not fitted, predicted at quadratic KL `kl` by Fisher rows set aside."""

    even: float
    part: str
    change: float
    error: float


def cross_validate(
    system: System, parts: Sequence[str], fitted: np.ndarray, evens: Sequence[float], kl: float, count: int = 4
) -> tuple[Held, ...]:
    """Each fold's facts by the others', at each `even`; a text's Fisher rows are set aside with a fold."""
    fold = folds(system.units, count)
    rows = np.arange(len(system.fisher))
    texts, whole = rows // SAMPLES % count, rows % SAMPLES == 0
    measured = [part for part in MEASURED if len(_telling(system, part, fitted))]
    result = []
    for even in evens:
        moved: dict[str, list[np.ndarray]] = {part: [] for part in measured}
        for number in range(count):
            train, test = fitted[fold[fitted] != number], fitted[fold[fitted] == number]
            kept = np.where(texts == number, 0, system.fisher) * count / (count - 1)
            # The rows of whole texts are half of S, and without bias.
            aside = np.where((texts == number) & whole, system.fisher, 0) * count * 2
            coefficients = system.solve(aim(system, parts, train), train, even, kept)
            changes = system.gram.changes(coefficients)
            changes *= np.sqrt(kl / max(system.cost(coefficients, aside), 1e-30))
            for part, values in moved.items():
                values.append(part_changes(system, part, test, changes))
        for part, values in moved.items():
            every = np.concatenate(values)
            result.append(Held(even, part, float(every.mean()), float(every.std() / np.sqrt(max(len(every), 1)))))
    return tuple(result)


def part_changes(system: System, part: str, chosen: np.ndarray, changes: np.ndarray) -> np.ndarray:
    """Of each unit that tells of a part; of sentiment the contrasts. changes: of every row, [N]."""
    return changes[_telling(system, part, chosen)]


def _telling(system: System, part: str, chosen: np.ndarray) -> np.ndarray:
    """Places of the rows that tell of a part."""
    kind = "tone" if part == "sentiment" and len(system.having("tone", chosen)) else part
    return system.rows(kind, system.having(kind, chosen))


def best_even(held: Sequence[Held], parts: Sequence[str]) -> float:
    """The one whose fall of all parts together, each in standard errors, is largest on facts not fitted."""

    def fall(even: float) -> float:
        return sum(h.change / max(h.error, 1e-12) for h in held if h.even == even and h.part in parts)

    return min(sorted({h.even for h in held}), key=fall)
