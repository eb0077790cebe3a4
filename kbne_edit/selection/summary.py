"""The summary of a selection: how many neurons, where, and how many of them controls select, too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple, NotRequired, TypedDict

from ..statistics import Interval, wilson


class Shared(NamedTuple):
    """How many of the selected neurons are shared. In JSON the list [shared, selected]."""

    shared: int
    selected: int


class DimensionJSON(TypedDict):
    """One dimension's selection. controls_overlap: how many of its neurons controls select, too."""

    neurons: int
    layers: list[int]
    controls_overlap: NotRequired[int]


@dataclass(frozen=True)
class DimensionSummary:
    """One dimension's selection. controls_overlap: how many of its neurons controls select, None without controls."""

    neurons: int
    layers: tuple[int, ...]
    controls_overlap: int | None = None

    def to_dict(self) -> DimensionJSON:
        record: DimensionJSON = {"neurons": self.neurons, "layers": list(self.layers)}
        if self.controls_overlap is not None:
            record["controls_overlap"] = self.controls_overlap
        return record


class SelectionJSON(TypedDict):
    """A selection in numbers. share: of all neurons, 0 to 1. overlap: {"a & b": neurons in common}.

    controls_neurons: number that the controls select; controls_overlap: number of those in the selection. unseen: for
    each half of the controls, how many of the neurons selected without it are among those that it uses most.
    """

    rule: str
    neurons: int
    share: float
    layers: list[int]
    dimensions: dict[str, DimensionJSON]
    overlap: dict[str, int]
    controls_neurons: NotRequired[int]
    controls_overlap: NotRequired[int | None]
    unseen: NotRequired[list[Annotated[list[int], Shared]]]


@dataclass(frozen=True)
class SelectionSummary:
    """A selection in numbers.

    rule: its name. share: of all neurons, 0 to 1. dimensions: by name. overlap: {"a & b": neurons in common}.
    controls_neurons, controls_overlap: number of neurons that the controls select, and of those in the selection; None
    without controls. unseen: for each held-out half of the controls (see `Selection.unseen`).
    """

    rule: str
    neurons: int
    share: float
    layers: tuple[int, ...]
    dimensions: dict[str, DimensionSummary]
    overlap: dict[str, int]
    controls_neurons: int | None = None
    controls_overlap: int | None = None
    unseen: tuple[Shared, ...] = ()

    @property
    def controls_share(self) -> float | None:
        """Share of the selected neurons that the controls select, too, 0 to 1."""
        return None if self.controls_overlap is None else self.controls_overlap / max(self.neurons, 1)

    @property
    def unseen_share(self) -> Interval | None:
        """Mean share of the selected neurons that a held-out half of the controls uses most (Wilson interval)."""
        count = max(len(self.unseen), 1)
        shared, selected = (sum(s.shared for s in self.unseen), sum(s.selected for s in self.unseen))
        return Interval(shared / selected, *wilson(shared / count, selected / count)) if selected else None

    def to_dict(self) -> SelectionJSON:
        record: SelectionJSON = {
            "rule": self.rule,
            "neurons": self.neurons,
            "share": self.share,
            "layers": list(self.layers),
            "dimensions": {name: summary.to_dict() for name, summary in self.dimensions.items()},
            "overlap": self.overlap,
        }
        if self.controls_neurons is not None:
            record["controls_neurons"] = self.controls_neurons
            record["controls_overlap"] = self.controls_overlap
        if self.unseen:
            record["unseen"] = [list(shared) for shared in self.unseen]
        return record

    @classmethod
    def from_dict(cls, record: dict) -> SelectionSummary:
        """Inverse of `to_dict`. Raises KeyError, TypeError or ValueError for a record of another form."""
        dimensions = {
            str(name): DimensionSummary(int(d["neurons"]), tuple(map(int, d["layers"])), _whole(d, "controls_overlap"))
            for name, d in record["dimensions"].items()
        }
        return cls(
            str(record["rule"]),
            int(record["neurons"]),
            float(record["share"]),
            tuple(map(int, record["layers"])),
            dimensions,
            {str(pair): int(count) for pair, count in record["overlap"].items()},
            _whole(record, "controls_neurons"),
            _whole(record, "controls_overlap"),
            tuple(Shared(int(shared), int(selected)) for shared, selected in record.get("unseen", [])),
        )


def _whole(record: dict, key: str) -> int | None:
    return None if record.get(key) is None else int(record[key])
