"""The record of a fit in its edit, for the report: written into `edit.found`, and validated when it is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..errors import EditError

_FORM = "the edit's record of its fit is not of the form that kbne-edit writes: run fit again"


@dataclass(frozen=True)
class Moved:
    """Change of a part on units that were not fitted, in nats per token, with a 95 % interval over units."""

    part: str
    units: int
    before: float
    change: float
    low: float
    high: float


@dataclass(frozen=True)
class ControlMoved:
    """Another edit of the same KL. changes: of the parts, in the order of `FitRecord.gains`."""

    name: str
    changes: tuple[float, ...]


@dataclass(frozen=True)
class FitRecord:
    """part: the setting; moved: the parts that fell beyond shuffled labels; set_aside: number of units not fitted.

    uses: number of edits that these units have judged.
    """

    part: str
    max_kl: float
    even: float
    seed: int
    facts: int
    contrasts: int
    public: int
    set_aside: int
    kl: float
    perplexity_base: float
    perplexity: float
    by_layer: tuple[float, ...]
    gains: tuple[Moved, ...]
    controls: tuple[ControlMoved, ...]
    moved: tuple[str, ...]
    uses: int = 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> FitRecord:
        """Raises EditError for a record of another form."""
        try:
            values: dict[str, Any] = dict(data)  # type: ignore[call-overload]
            gains = tuple(Moved(**_plain(row)) for row in values.pop("gains"))
            controls = tuple(
                ControlMoved(str(row["name"]), tuple(map(float, row["changes"]))) for row in values.pop("controls")
            )
            moved = tuple(map(str, values.pop("moved")))
            by_layer = tuple(map(float, values.pop("by_layer")))
            record = cls(**_plain(values), gains=gains, controls=controls, moved=moved, by_layer=by_layer)
        except (KeyError, TypeError, ValueError):
            raise EditError(_FORM) from None
        if any(len(control.changes) != len(gains) for control in controls):
            raise EditError(_FORM)
        return record


def _plain(row: object) -> dict[str, Any]:
    """Fields that are a string or a number, as their names say. Raises TypeError for anything else."""
    values: dict[str, Any] = dict(row)  # type: ignore[call-overload]
    for name, value in values.items():
        kinds: tuple[type, ...] = (str,) if name == "part" else (int, float)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise TypeError(name)
    return values
