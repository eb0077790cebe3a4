"""Everything that a fit needs of the model, into one file: one pass over the units, one over the Fisher texts."""

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

_GROUP = 24  # units between two writes: what a killed run loses at most


@dataclass(frozen=True)
class Reading:
    """What is read. units: rows of units, then of contrasts; texts: token ids of the Fisher texts; seed: of signs."""

    units: Sequence[UnitRows]
    texts: Sequence[Sequence[int]]
    seed: int

    def sizes(self, factors: int) -> Sizes:
        """Of the file."""
        return Sizes(len(self.units), len(KINDS), len(self.texts), sampling.SAMPLES, factors)


def collect(model: nn.Module, site: Site, reading: Reading, file: GradientFile) -> None:
    """Fill in what the file does not hold yet. Raises ScoresError where the model overflows, OutputError."""
    _units(model, site, reading, file)
    _fisher(model, site, reading, file)
    if not file.done[-1]:
        file.write_likelihood(_likelihood(model, site, reading.texts))


def _units(model: nn.Module, site: Site, reading: Reading, file: GradientFile) -> None:
    todo = [i for i in range(len(reading.units)) if not file.done[i]]
    with progress("fit: units", len(reading.units), "unit", len(reading.units) - len(todo)) as update:
        for group in _groups(todo):
            sentences = [sentence for i in group for sentence in reading.units[i].sentences]
            values, rows = _collected(model, sentences, site)
            start = 0
            for i in group:
                unit = reading.units[i]
                own = slice(start, start + len(unit.sentences))
                start = own.stop
                file.write_unit(i, *_mixed(unit.mixture, values[own], rows[own]))
            update(len(group))


def _mixed(mixture: np.ndarray, values: np.ndarray, rows: Tensor) -> tuple[Tensor, np.ndarray]:
    """(rows [K, P], values [K]); a kind that the unit does not have is a row of 0 with the value NaN."""
    return torch.from_numpy(np.nan_to_num(mixture)).float() @ rows, mixture @ values


def _fisher(model: nn.Module, site: Site, reading: Reading, file: GradientFile) -> None:
    scored = sampling.signed(reading.texts, reading.seed)
    todo = [i for i in range(len(scored)) if not file.done[len(reading.units) + i]]
    with progress("fit: Fisher rows", len(scored), "text", len(scored) - len(todo)) as update:
        for group in _groups(todo):
            # Seeded by the group, so that a run that was killed goes on with the same draws.
            draw = torch.Generator().manual_seed(reading.seed * 1_000_003 + group[0])
            for batch in gradients(model, [scored[i] for i in group], site, draw=draw, by_position=True):
                for own, found in zip(batch.index, batch.gradients, strict=True):
                    i = group[own]
                    file.write_fisher(i, sampling.samples(found, len(scored[i].weights), i, reading.seed))
            update(len(group))


def _likelihood(model: nn.Module, site: Site, texts: Sequence[Sequence[int]]) -> Tensor:
    """Gradient of the mean log-probability per token of the texts' own tokens, [P]."""
    total = sum(len(ids) - 1 for ids in texts)
    scored = [Scored(tuple(ids), (1 / total,) * (len(ids) - 1)) for ids in texts]
    with progress("fit: likelihood", len(texts), "text") as update:
        sums = []
        for batch in gradients(model, scored, site):
            sums.append(batch.gradients.sum(0))
            update(len(batch.index))
    return torch.stack(sums).sum(0)


def _collected(model: nn.Module, sentences: list[Scored], site: Site) -> tuple[np.ndarray, Tensor]:
    values, rows = np.zeros(len(sentences)), torch.zeros(len(sentences), sum(layer_sizes(model, site)))
    for batch in gradients(model, sentences, site):
        values[batch.index], rows[batch.index] = batch.values, batch.gradients
    return values, rows


def _groups(todo: list[int]) -> Iterator[list[int]]:
    """Runs of neighbours within fixed groups, so that a resumed run groups as an unbroken one."""
    by_group: dict[int, list[int]] = {}
    for i in todo:
        by_group.setdefault(i // _GROUP, []).append(i)
    yield from by_group.values()
