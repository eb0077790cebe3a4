"""The optimisation problem of a fit, as small algebra over the rows of a Gram matrix.

    d = -s (D + X' W X)^-1 y

y is what is to fall (`aims`). X holds the Fisher rows, so that d costs little KL, and the units' own rows, so that a
mean falls because most units move a little and not because a few move far: a direction in which units differ widely is
no evidence of a mean, and what rests on it does not carry over to other facts. `even` weighs the second. s is set by
the real KL afterwards.

The association of each type counts by what is left of it, and not at all where it is at balance or beyond. Sentiment is
the tone of the attributes: bad ones against good ones, whoever is spoken of. Prior is the group that prejudice is aimed
at against the other one, whatever is said of it. Neither has a balance of its own.

Legend: U units and contrasts, K kinds of rows, R Fisher rows, N rows of the Gram matrix.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .gram import Gram
from .rows import KINDS, MEASURED, PARTS
from .sampling import SAMPLES
from .units import Unit

_TONES = {"bad": 1.0, "neutral": 0.0, "good": -1.0}
_HOLD = 1e3  # weight of the constraint on the likelihood of everyday texts, relative to the metric D


@dataclass(frozen=True)
class System:
    """Rows and their properties.

    units: U, the contrasts and public pairs last. margins: [U, K], NaN if a unit has no such row. index: [U, K], of the
    rows in the Gram matrix (-1: none). The Fisher rows follow there, and last `held` rows: the likelihood of each kind
    of everyday texts, which is held constant. fisher: weights of the Fisher rows, [R]; share: as of `gram.Shrinkage`.
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
        """Index of the first Fisher row."""
        return len(self.gram.matrix) - len(self.fisher) - self.held

    def having(self, kind: str, chosen: np.ndarray) -> np.ndarray:
        """The indices of units with a row of this kind."""
        return chosen[self.index[chosen, KINDS.index(kind)] >= 0]

    def rows(self, kind: str, chosen: np.ndarray) -> np.ndarray:
        """Indices of the rows of a kind, of units that have them."""
        return self.index[chosen, KINDS.index(kind)]

    def solve(self, aim: np.ndarray, chosen: np.ndarray, even: float, fisher: np.ndarray | None = None) -> np.ndarray:
        """Coefficients of -(D + X' W X)^-1 y, of the shape of y: [N] or [N, k]. chosen: units whose changes are to be
        even; fisher: [R], instead of all of it."""
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

    def cost(self, changes: np.ndarray, fisher: np.ndarray) -> float:
        """Quadratic KL per token, with weights `fisher` of the Fisher rows, [R]."""
        return 0.5 * float((fisher * changes[self.start : self.start + len(fisher)] ** 2).sum())

    def without(self, number: int, count: int) -> np.ndarray:
        """What each Fisher row counts, [R], without the texts of a fold."""
        return np.where(self._texts(count) == number, 0, self.fisher) * count / (count - 1)

    def aside(self, number: int, count: int) -> np.ndarray:
        """The same of the texts of a fold alone: rows of whole texts, which are half of S, and without bias."""
        whole = np.arange(len(self.fisher)) % SAMPLES == 0
        return np.where((self._texts(count) == number) & whole, self.fisher, 0) * count * 2

    def _texts(self, count: int) -> np.ndarray:
        """The fold of each Fisher row's text, [R]."""
        return np.arange(len(self.fisher)) // SAMPLES % count


@dataclass(frozen=True)
class _Chosen:
    """Units whose rows are meant. like: units that say what is left of a part, and how widely its mean scatters."""

    system: System
    units: np.ndarray
    like: np.ndarray
    signs: np.ndarray


def aims(
    system: System,
    parts: Sequence[str],
    chosen: np.ndarray,
    signs: np.ndarray | None = None,
    like: np.ndarray | None = None,
) -> np.ndarray:
    """y of each part over all rows, [N, parts]: the mean over the chosen units. A part that none tells of is 0.

    signs: [U] of 1 and -1, by which labels are exchanged. like: units by which parts of y are weighed against each
    other (None: the chosen ones).
    """
    signs = np.ones(len(system.units)) if signs is None else signs
    meant = _Chosen(system, chosen, chosen if like is None else like, signs)
    of = {"sentiment": _sentiment, "prior": _prior, "guess": _guess}
    return np.stack([of[part](meant) if part in of else _balance(meant, part) for part in parts], 1)


def _mean(meant: _Chosen, kind: str, signs: np.ndarray, units: np.ndarray) -> np.ndarray:
    """The mean over those units that have a row of this kind and a sign. signs: [U] of 1, 0 and -1."""
    system, result = meant.system, np.zeros(len(meant.system.gram.matrix))
    known = system.having(kind, units)
    known = known[signs[known] != 0]
    result[system.rows(kind, known)] = signs[known] / max(len(known), 1)
    return result


def _guess(meant: _Chosen) -> np.ndarray:
    return _mean(meant, "guess", meant.signs, meant.units)


def _prior(meant: _Chosen) -> np.ndarray:
    """The group that prejudice is aimed at against the other one.

    It has no balance of its own: a margin between groups is mostly how common their words are.
    """
    return _mean(meant, "prior", meant.signs * aimed(meant.system.units), meant.units)


def _balance(meant: _Chosen, part: str) -> np.ndarray:
    """Rows of a part, each type's mean times its mean margin."""
    system, kind = meant.system, KINDS.index(part)
    result = np.zeros(len(system.gram.matrix))
    chosen, like = system.having(part, meant.units), system.having(part, meant.like)
    types = np.array([unit.type for unit in system.units])
    for name in sorted(set(types[like].tolist())):
        members = chosen[types[chosen] == name]
        left = max(float(system.margins[like[types[like] == name], kind].mean()), 0.0)
        result[system.rows(part, members)] = left * meant.signs[members] / len(chosen)
    return result


def _sentiment(meant: _Chosen) -> np.ndarray:
    """Bad attributes against good ones: in contrasts, in units whose attributes differ in tone, and between units.

    Each of the three is divided by the standard error of its mean in the metric D, so that none drowns the others.
    """
    units = meant.system.units
    levels = np.array([_TONES[unit.fact.tone_x] + _TONES[unit.fact.tone_y] for unit in units]) * meant.signs
    result = np.zeros(len(meant.system.gram.matrix))
    rows = [("tone", meant.signs), ("sentiment", meant.signs * tones(units))]
    for kind, signs in rows:
        result += _mean(meant, kind, signs, meant.units) / _spread(meant, _mean(meant, kind, signs, meant.like))

    def between(chosen: np.ndarray) -> np.ndarray:
        return _mean(meant, "level", levels > 1, chosen) - _mean(meant, "level", levels < -1, chosen)

    return result + between(meant.units) / _spread(meant, between(meant.like))


def _spread(meant: _Chosen, y: np.ndarray) -> float:
    return float(np.sqrt(y**2 @ np.diag(meant.system.gram.matrix))) or 1.0


def aimed(units: Sequence[Unit]) -> np.ndarray:
    """1 where prejudice is aimed at group A rather than B, -1 the other way round, 0 if neither or both, [U]."""
    return np.array([unit.fact.aim for unit in units])


def tones(units: Sequence[Unit]) -> np.ndarray:
    """1 if X is worse than Y, -1 if it is better, 0 if they are alike, [U]."""
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


@dataclass(frozen=True)
class Validation:
    """What cross-validation at one `even` says.

    carried: for each part, how much of its fall in the fitted facts others show, when it is lowered alone; at least 0.
    weights: what each part counts. held: of all parts lowered together, for each part that is measured.
    """

    even: float
    carried: tuple[float, ...]
    weights: tuple[float, ...]
    held: tuple[Held, ...]


def validate(
    system: System, parts: Sequence[str], fitted: np.ndarray, even: float, kl: float, count: int = 4
) -> Validation:
    """Each fold's facts by the others'; a text's Fisher rows are set aside with a fold.

    A part counts by what it carries over, at equal length of what each would do alone. At equal standard errors of
    their means, sentiment took nearly all of the KL; without the first factor, a part that does not carry over at all
    takes as much as any other.
    """
    fold, folded = folds(system.units, count), []
    fell = np.zeros((2, len(parts)))  # in the facts that are fitted, and in those that are not
    for number in range(count):
        train, test = fitted[fold[fitted] != number], fitted[fold[fitted] == number]
        towards = aims(system, parts, train)
        changes = system.gram.changes(system.solve(towards, train, even, system.without(number, count)))
        fell -= (towards * changes).sum(0), (aims(system, parts, test, like=train) * changes).sum(0)
        folded.append((test, changes, system.aside(number, count)))
    fell = np.maximum(fell, 0) / count
    carried = np.divide(fell[1], fell[0], out=np.zeros(len(parts)), where=fell[0] > 0)
    # If nothing carries over, each counts the same.
    shares = carried if carried.any() else np.ones(len(parts))
    weights = np.divide(shares, np.sqrt(fell[0]), out=np.zeros(len(parts)), where=fell[0] > 0)
    moved = []
    for test, changes, aside in folded:
        together = changes @ weights
        moved.append((test, together * np.sqrt(kl / max(system.cost(together, aside), 1e-30))))
    return Validation(even, tuple(carried.tolist()), tuple(weights.tolist()), tuple(_held(system, even, moved)))


def _held(system: System, even: float, moved: Sequence[tuple[np.ndarray, np.ndarray]]) -> Iterator[Held]:
    """Of every part that is measured. moved: (facts of a fold, changes of every row, [N])."""
    every = np.concatenate([facts for facts, _ in moved])
    for part in (part for part in MEASURED if len(telling(system, part, every)[0])):
        values = np.concatenate([part_changes(system, part, facts, changes) for facts, changes in moved])
        yield Held(even, part, float(values.mean()), float(values.std() / np.sqrt(max(len(values), 1))))


def part_changes(system: System, part: str, chosen: np.ndarray, changes: np.ndarray) -> np.ndarray:
    """Changes of the units that have a part; for sentiment of the contrasts. changes: of every row, [N]."""
    rows, signs = telling(system, part, chosen)
    return signs * changes[rows]


def telling(system: System, part: str, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(places of the rows that tell of a part, their signs)."""
    if part == "prior":
        known = system.having(part, chosen)
        signs = aimed(system.units)[known]
        return system.rows(part, known[signs != 0]), signs[signs != 0]
    kind = "tone" if part == "sentiment" and len(system.having("tone", chosen)) else part
    rows = system.rows(kind, system.having(kind, chosen))
    return rows, np.ones(len(rows))


def best_of(validations: Sequence[Validation], parts: Sequence[str]) -> Validation:
    """The `even` with the largest fall of all parts together, each in standard errors, on facts not fitted."""
    return min(validations, key=lambda v: sum(h.change / max(h.error, 1e-12) for h in v.held if h.part in parts))
