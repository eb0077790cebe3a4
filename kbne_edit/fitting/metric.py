"""What a change of the factors costs: a metric P from Fisher rows, and its inverse by Woodbury's identity.

To second order KL(base || edited) per token is 1/2 d' P d, where P is the Fisher information of the factors: the mean
outer product of gradients of log-probabilities of tokens drawn from the model. A row is such a gradient, summed over a
text with random signs, so that the terms of unlike tokens cancel on average.

With fewer rows than factors the plain estimate has directions that seem to cost nothing. So

    P = a S + (1 - a) diag(S) + b mean(diag(S)) I,    S = R' R / tokens

which keeps the measured directions and charges every factor for what it does alone.

Legend: R rows, N other rows, P factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Shrinkage:
    """How far the measured metric is shrunk towards its diagonal (`share` = a) and towards a constant (`floor` = b)."""

    share: float = 0.5
    floor: float = 0.2


class Metric:
    """P and its inverse. rows: [R, P] float32; tokens: how many tokens all rows were summed over."""

    def __init__(self, rows: Tensor, tokens: int, shrinkage: Shrinkage = Shrinkage()):
        self._rows = rows
        self._scale = shrinkage.share / tokens
        diagonal = rows.square().sum(0) / tokens
        self.fisher = diagonal
        self.diagonal = (1 - shrinkage.share) * diagonal + shrinkage.floor * diagonal.mean()
        inner = (rows / self.diagonal) @ rows.T
        self._inner = torch.eye(len(rows), dtype=torch.float64) / self._scale + inner.double()

    def inverse(self, vectors: Tensor) -> Tensor:
        """P^-1 of each row. vectors: [N, P] float32 -> [N, P]."""
        scaled = vectors / self.diagonal
        inner = torch.linalg.solve(self._inner, (self._rows @ scaled.T).double()).float()
        return scaled - (inner.T @ self._rows) / self.diagonal

    def kernel(self, vectors: Tensor) -> np.ndarray:
        """vectors P^-1 vectors', [N, N] float64. vectors: [N, P] float32."""
        scaled = vectors / self.diagonal
        across = (self._rows @ scaled.T).double()
        found = (scaled @ vectors.T).double() - across.T @ torch.linalg.solve(self._inner, across)
        return ((found + found.T) / 2).numpy()

    def norms(self, vectors: Tensor) -> Tensor:
        """v' P v of each row, [N] float32. vectors: [N, P] float32."""
        return (vectors.square() * self.diagonal).sum(1) + self._scale * (vectors @ self._rows.T).square().sum(1)

    def weights(self) -> Tensor:
        """P_jj, [P] float32."""
        return self.diagonal + self._scale * self._rows.square().sum(0)
