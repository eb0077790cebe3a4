"""Collects in one file everything that a fit needs of the model: one pass over the units, one over the Fisher texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..families import Site
from ..progress import progress
from . import sampling
from .passes import Scored, gradients, layer_sizes
from .rows import KINDS, UnitRows
from .store import GradientFile, Sizes

_GROUP = 24  # units between two writes: the most that a killed run loses


@dataclass(frozen=True)
class Reading:
    """The input. units: rows of units, then of contrasts and public pairs; texts: token ids of the Fisher texts; kinds:
    of each text, [R]; seed: of signs and draws."""

    units: Sequence[UnitRows]
    texts: Sequence[Sequence[int]]
    kinds: Sequence[str]
    seed: int

    @property
    def held(self) -> list[str]:
        """The kinds of texts; there is one likelihood row for each."""
        return sorted(set(self.kinds))

    @property
    def place(self) -> np.ndarray:
        """Index of each unit's row of each kind, [U, K]; -1: none."""
        there = np.array([~np.isnan(unit.mixture[:, 0]) for unit in self.units])
        return np.where(there, there.ravel().cumsum().reshape(there.shape) - 1, -1)

    def sizes(self, factors: int) -> Sizes:
        """The sizes of the file."""
        rows = int(self.place.max()) + 1
        return Sizes(len(self.units), len(KINDS), rows, len(self.texts), sampling.SAMPLES, len(self.held), factors)


def collect(model: nn.Module, site: Site, reading: Reading, file: GradientFile) -> None:
    """Compute the missing entries of the file. Raises ScoresError if the model overflows, OutputError."""
    _units(model, site, reading, file)
    _fisher(model, site, reading, file)
    for index, kind in enumerate(reading.held):
        if not file.done[len(reading.units) + len(reading.texts) + index]:
            texts = [ids for ids, known in zip(reading.texts, reading.kinds, strict=True) if known == kind]
            file.write_likelihood(index, _likelihood(model, site, texts))


def _units(model: nn.Module, site: Site, reading: Reading, file: GradientFile) -> None:
    todo = [i for i in range(len(reading.units)) if not file.done[i]]
    with progress("fit: units", len(reading.units), "unit", len(reading.units) - len(todo)) as update:
        for group in _groups(todo):
            sentences = [sentence for i in group for sentence in reading.units[i].sentences]
            values, rows = _collected(model, sentences, site)
            start = 0
            for i in group:
                unit = reading.units[i]
                part = slice(start, start + len(unit.sentences))
                start = part.stop
                file.write_unit(i, *_mixed(unit.mixture, values[part], rows[part]))
            update(len(group))


def _mixed(mixture: np.ndarray, values: np.ndarray, rows: Tensor) -> tuple[Tensor, np.ndarray]:
    """(rows [n, P] of the kinds that the unit has, values [K], NaN for a kind that it does not have)."""
    there = ~np.isnan(mixture[:, 0])
    return torch.from_numpy(mixture[there]).float() @ rows, mixture @ values


def _fisher(model: nn.Module, site: Site, reading: Reading, file: GradientFile) -> None:
    scored = sampling.signed(reading.texts, reading.seed)
    todo = [i for i in range(len(scored)) if not file.done[len(reading.units) + i]]
    with progress("fit: Fisher rows", len(scored), "text", len(scored) - len(todo)) as update:
        for group in _groups(todo):
            # Seeded by the group, so that a resumed run makes the same draws.
            draw = torch.Generator().manual_seed(reading.seed * 1_000_003 + group[0])
            for batch in gradients(model, [scored[i] for i in group], site, draw=draw, by_position=True):
                for index, gradient in zip(batch.index, batch.gradients, strict=True):
                    i = group[index]
                    file.write_fisher(i, sampling.samples(gradient, len(scored[i].weights), i, reading.seed))
            update(len(group))


def _likelihood(model: nn.Module, site: Site, texts: Sequence[Sequence[int]]) -> Tensor:
    """Gradient of the mean log-probability per token of the texts' own tokens, [P]."""
    total = sum(len(ids) - 1 for ids in texts)
    scored = [Scored(tuple(ids), (1 / total,) * (len(ids) - 1)) for ids in texts]
    return torch.stack([batch.gradients.sum(0) for batch in gradients(model, scored, site)]).sum(0)


def _collected(model: nn.Module, sentences: list[Scored], site: Site) -> tuple[np.ndarray, Tensor]:
    values, rows = np.zeros(len(sentences)), torch.zeros(len(sentences), sum(layer_sizes(model, site)))
    for batch in gradients(model, sentences, site):
        values[batch.index], rows[batch.index] = batch.values, batch.gradients
    return values, rows


def _groups(todo: list[int]) -> Iterator[list[int]]:
    """Runs of neighbours within fixed groups, so that a resumed run forms the same groups."""
    by_group: dict[int, list[int]] = {}
    for i in todo:
        by_group.setdefault(i // _GROUP, []).append(i)
    yield from by_group.values()
