"""Compares edits: which neurons they share, and with which factors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from .disk.manifest import Manifest
from .edit import Edit
from .errors import EditError, InputError
from .families import Site


@dataclass(frozen=True)
class Compared:
    """One of the edits. factors: the distinct ones; layers: {layer: edited neurons}; base: fingerprint of its model."""

    name: str
    site: Site
    neurons: int
    factors: tuple[float, ...]
    layers: dict[int, int]
    base: str | None


@dataclass(frozen=True)
class Differing:
    """A neuron that two edits share with different factors."""

    layer: int
    neuron: int
    a: float
    b: float


@dataclass(frozen=True)
class Pair:
    """Two of the edits. a, b: names; shared, only_a, only_b: numbers of neurons. jaccard: shared / all, 0 to 1."""

    a: str
    b: str
    shared: int
    only_a: int
    only_b: int
    jaccard: float
    differing: tuple[Differing, ...]

    @classmethod
    def of(cls, name_a: str, edit_a: Edit, name_b: str, edit_b: Edit) -> Pair:
        a, b = _factors(edit_a), _factors(edit_b)
        shared, either = sorted(a.keys() & b.keys()), a.keys() | b.keys()
        return cls(
            a=name_a,
            b=name_b,
            shared=len(shared),
            only_a=len(a) - len(shared),
            only_b=len(b) - len(shared),
            jaccard=len(shared) / len(either) if either else 1.0,
            differing=tuple(Differing(*place, a[place], b[place]) for place in shared if a[place] != b[place]),
        )


@dataclass(frozen=True)
class Comparison:
    """Edits, and all pairs of them. notes: what makes the comparison doubtful."""

    edits: tuple[Compared, ...]
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Comparison({', '.join(edit.name for edit in self.edits)})"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(*edits: str | Path | Edit) -> Comparison:
    """Edits side by side: edit files, or directories that kbne-edit wrote (checkpoints, adapters, deltas).

    Raises InputError for fewer than two edits, EditError for a file that is not an edit.
    """
    if len(edits) < 2:
        raise InputError("compare takes two edits or more")
    named = [_named(place, edit) for place, edit in enumerate(edits, 1)]
    notes = []
    if len({edit.base for _, edit in named if edit.base}) > 1:
        notes.append("note: made for different models, whose neurons have only their numbers in common")
    if len({edit.site for _, edit in named}) > 1:
        notes.append("note: at different sites, where the same factor does different things")
    return Comparison(
        edits=tuple(_compared(name, edit) for name, edit in named),
        pairs=tuple(Pair.of(*a, *b) for a, b in combinations(named, 2)),
        notes=tuple(notes),
    )


def _named(place: int, source: str | Path | Edit) -> tuple[str, Edit]:
    if isinstance(source, Edit):
        return f"edit {place}", source
    path = Path(source)
    if not path.is_dir():
        return str(source), Edit.load(path)
    manifest = Manifest.read(path)
    if manifest is None:
        raise EditError(f"{path} has no manifest: give an edit file, or a directory that kbne-edit wrote")
    return str(source), manifest.edit


def _compared(name: str, edit: Edit) -> Compared:
    layers = {layer: len(factors) for layer, factors in edit.factors.items()}
    return Compared(name, edit.site, edit.num_neurons, tuple(edit.distinct_factors), layers, edit.base)


def _factors(edit: Edit) -> dict[tuple[int, int], float]:
    return {(layer, n): factor for layer, factors in edit.factors.items() for n, factor in factors.items()}
