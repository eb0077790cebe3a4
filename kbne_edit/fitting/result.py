"""The result of a fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Annotated, Any, TypedDict

import numpy as np

from ..edit import Edit
from ..statistics import Interval
from .problem import Held
from .record import ControlMoved, FitRecord, Moved

VERSION = 1
_LEVEL = 0.05
FEWEST = 20  # units set aside that a part needs to be reported as moved


@dataclass(frozen=True)
class Factors:
    """How far the factors are from 1. counts: histogram over `edges`; by_layer: root mean square of f - 1, [L]."""

    total: int
    changed: int
    least: float
    largest: float
    rms: float
    by_layer: tuple[float, ...]
    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, factors: np.ndarray, sizes: Sequence[int]) -> Factors:
        """factors: [P]; sizes: neurons of each layer, [L]."""
        edges = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.01, 1.05, 1.1, 1.2, 1.5, 8.0)
        layers = np.split(factors - 1, np.cumsum(sizes)[:-1])
        return cls(
            total=len(factors),
            changed=int((factors != 1).sum()),
            least=float(factors.min()),
            largest=float(factors.max()),
            rms=float(np.sqrt(np.mean((factors - 1) ** 2))),
            by_layer=tuple(float(np.sqrt(np.mean(layer**2))) for layer in layers),
            edges=edges,
            counts=tuple(int(n) for n in np.histogram(factors, edges)[0]),
        )


@dataclass(frozen=True)
class Gain:
    """Measured margin of a part before, and its change with a 95 % interval over facts, in nats per token.

    of: "all", or the type or format of the units.
    """

    part: str
    of: str
    units: int
    before: float
    change: Interval


@dataclass(frozen=True)
class Control:
    """A control edit with the same measured KL. changes: by part, in the order of `Fit.gains` of "all"."""

    name: str
    kl: float
    changes: tuple[Interval, ...]


@dataclass(frozen=True)
class Cost:
    """On neutral texts that were not fitted: KL(base || edited) per token, and perplexities."""

    kl: float
    perplexity_base: float
    perplexity: float


class FitKeys(TypedDict):
    """What the JSON of a fit has beside the fields. sha256: of the edit's site and factors."""

    kbne_fit: int
    sha256: str
    moved: list[str]


@dataclass(frozen=True)
class Fit:
    """factors: summary; gains, controls: measured on facts set aside; fitted: how many units were fitted, contrasts,
    public: of contrasts and public pairs.

    even: chosen by cross-validation, whose figures `held` are. carried: for each of the parts, how much of its fall in
    facts that were fitted others show; it weighs them against each other. moved: the parts that moved towards less of
    them, and further than under shuffled labels. shuffled: the edits of shuffled labels, without a record. uses: number
    of edits that these facts have judged, this one included.
    """

    edit: Edit = field(metadata={"json": False})
    parts: tuple[str, ...]
    carried: tuple[float, ...]
    fitted: int
    contrasts: int
    public: int
    set_aside: int
    even: float
    held: tuple[Held, ...]
    factors: Factors
    cost: Cost
    gains: tuple[Gain, ...]
    controls: tuple[Control, ...]
    uses: int = 1
    shuffled: tuple[Edit, ...] = field(default=(), metadata={"json": False})

    @property
    def moved(self) -> tuple[str, ...]:
        """Parts that fell beyond every draw of shuffled labels, on enough units.

        The fall of one of them by chance has at most _LEVEL, over all parts and all edits that the units have judged.
        """
        overall = [gain for gain in self.gains if gain.of == "all"]
        draws = [control for control in self.controls if control.name.startswith("shuffled")]
        looks = max(1, len(overall) * self.uses)
        widths = NormalDist().inv_cdf(1 - _LEVEL / looks) / NormalDist().inv_cdf(0.975)  # of half a 95 % interval
        result = []
        for number, gain in enumerate(overall):
            fell = gain.change.value + widths * (gain.change.high - gain.change.value) < 0
            beyond = all(gain.change.value < control.changes[number].value for control in draws)
            if gain.units >= FEWEST and fell and draws and beyond:
                result.append(gain.part)
        return tuple(result)

    def record(self, part: str, max_kl: float, seed: int) -> FitRecord:
        """What the edit keeps of the fit."""
        overall = [gain for gain in self.gains if gain.of == "all"]
        return FitRecord(
            part=part,
            max_kl=max_kl,
            even=self.even,
            seed=seed,
            facts=self.fitted,
            contrasts=self.contrasts,
            public=self.public,
            set_aside=self.set_aside,
            kl=self.cost.kl,
            perplexity_base=self.cost.perplexity_base,
            perplexity=self.cost.perplexity,
            by_layer=self.factors.by_layer,
            gains=tuple(Moved(g.part, g.units, g.before, g.change.value, g.change.low, g.change.high) for g in overall),
            controls=tuple(ControlMoved(c.name, tuple(change.value for change in c.changes)) for c in self.controls),
            moved=self.moved,
            uses=self.uses,
        )

    def to_dict(self) -> Annotated[dict[str, Any], FitKeys]:
        """JSON form, without the factors themselves: those are the edit's."""
        result = {name: value for name, value in asdict(self).items() if name not in ("edit", "shuffled")}
        return {"kbne_fit": VERSION, "sha256": self.edit.sha256, "moved": list(self.moved)} | result
