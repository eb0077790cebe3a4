"""From stored gradients to directions: the Gram matrix of all rows, or of some of the factors' columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import sampling
from .gram import Shrinkage, diagonal, direction, gram, scale
from .problem import System, Validation, aims
from .store import Gradients
from .units import Unit

_SHRINKAGE = Shrinkage(0.5, 0.5)


@dataclass(frozen=True)
class Direction:
    """d, [P] float32, and its quadratic cost, which underestimates the cost outside the span of the Fisher rows."""

    d: Tensor
    cost: float


class Directions:
    """Solves for directions. system: of all factors; fisher: diag(S), [P]."""

    def __init__(self, units: Sequence[Unit], stored: Gradients, tokens: Sequence[int]):
        """tokens: predictions made on each Fisher text."""
        self._units, self._stored = tuple(units), stored
        self._counts = sampling.weights(tokens)
        self._rows = stored.fisher.flatten(0, 1)
        self.fisher = diagonal(self._rows, self._counts)
        self._columns: Tensor | None = None
        self.system = self._system()

    def _blocks(self) -> list[Tensor]:
        """Unit rows, Fisher rows and the likelihood's, of the columns in use."""
        blocks = [self._stored.rows, self._rows, self._stored.likelihood]
        return blocks if self._columns is None else [block[:, self._columns] for block in blocks]

    def _scale(self) -> Tensor:
        d = scale(self.fisher, _SHRINKAGE)
        return d if self._columns is None else d[self._columns]

    def _system(self) -> System:
        stored = self._stored
        matrix = gram(self._blocks(), self._scale())
        held = len(stored.likelihood)
        return System(self._units, stored.values, stored.place, matrix, self._counts, _SHRINKAGE.share, held)

    def solve(
        self, parts: Sequence[str], chosen: np.ndarray, by: Validation, signs: np.ndarray | None = None
    ) -> Direction:
        """chosen: the units that are fitted; by: what each part counts; signs: as of `aims`."""
        towards = aims(self.system, parts, chosen, signs) @ np.array(by.weights)
        coefficients = self.system.solve(towards, chosen, by.even)
        d = direction(self._blocks(), self._scale(), coefficients)
        if self._columns is not None:
            d = torch.zeros(len(self.fisher)).index_copy(0, self._columns, d)
        return Direction(d, self.system.cost(self.system.gram.changes(coefficients), self._counts))

    def restrict(self, d: Tensor, count: int) -> None:
        """Restrict later solutions to the factors that cost most in `d`, which are the ones it uses most."""
        weight = d.square() * scale(self.fisher, Shrinkage(0.0, _SHRINKAGE.floor))
        self._columns = weight.topk(min(count, len(d))).indices.sort().values
        self.system = self._system()


def matched(d: Tensor, fisher: Tensor, sizes: Sequence[int], seed: int) -> Tensor:
    """The changes `d`, moved to other neurons of the same layer with similar Fisher information."""
    generator, result, start = torch.Generator().manual_seed(seed), d.clone(), 0
    for size in sizes:
        part = slice(start, start + size)
        order = fisher[part].argsort() + start
        for near in order.split(16):
            result[near] = d[near[torch.randperm(len(near), generator=generator)]]
        start += size
    return result
