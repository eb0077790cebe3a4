"""Inner products of all rows in a cheap metric, from which every fit is small algebra.

To second order KL(base || edited) per token is 1/2 d' S d, where S is the Fisher information of the factors d = f - 1.
With fewer rows than factors some directions seem to cost nothing, so S is mixed with its diagonal:

    D = (1 - a) diag(S) + b mean(diag(S)) I

Rows are divided by sqrt(D), and only their Gram matrix G is kept. Any metric D + X' W X, with X some of the rows
(Fisher rows, and rows of units whose change is to be even), is inverted by Woodbury's identity within G:

    (D + X' W X)^-1 y = D^-1 (y - X' (W^-1 + G_XX)^-1 G_Xy)

so that a direction d is a vector c of coefficients over the rows, and its effect on row i is (G c)_i.

Legend: N rows, P factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_COLUMNS = 8192  # of one block: bounds memory


@dataclass(frozen=True)
class Shrinkage:
    """share a: weight of the measured Fisher information, 1 - a of its diagonal; floor b: of the constant term."""

    share: float = 0.5
    floor: float = 0.5


def diagonal(fisher: Tensor, weights: np.ndarray) -> Tensor:
    """diag(S), [P] float32. fisher: [R, P]; weights: [R], what each row counts in S = sum_r w_r row_r row_r'."""
    result = torch.zeros(fisher.shape[1], dtype=torch.float64)
    for row, weight in zip(fisher, weights.tolist(), strict=True):
        result += weight * row.double().square()
    return result.float()


def scale(fisher_diagonal: Tensor, shrinkage: Shrinkage) -> Tensor:
    """D, [P] float32."""
    return (1 - shrinkage.share) * fisher_diagonal + shrinkage.floor * fisher_diagonal.mean()


@dataclass(frozen=True)
class Gram:
    """matrix: rows divided by sqrt(D), [N, N] float64."""

    matrix: np.ndarray

    def solve(self, target: np.ndarray, among: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Coefficients [N] of (D + X' W X)^-1 y. target: y over the rows, [N]; among: the rows X; weights: W > 0."""
        result = target.astype(float).copy()
        if len(among):
            inner = self.matrix[np.ix_(among, among)] + np.diag(1 / weights)
            result[among] -= np.linalg.solve(inner, self.matrix[among] @ target)
        return result

    def changes(self, coefficients: np.ndarray) -> np.ndarray:
        """The effect of the direction on every row, [N]."""
        return self.matrix @ coefficients


def gram(blocks: Sequence[Tensor], d: Tensor) -> Gram:
    """blocks: groups of rows [n, P] in any dtype; d: D. N is the sum of their sizes."""
    count = sum(len(block) for block in blocks)
    matrix = torch.zeros(count, count)
    for columns in torch.arange(blocks[0].shape[1]).split(_COLUMNS):
        part = slice(int(columns[0]), int(columns[-1]) + 1)
        rows = torch.cat([block[:, part].float() for block in blocks]) / d[part].sqrt()
        matrix.addmm_(rows, rows.T)
    full = matrix.double().numpy()
    return Gram((full + full.T) / 2)


def direction(blocks: Sequence[Tensor], d: Tensor, coefficients: np.ndarray) -> Tensor:
    """d = D^-1 sum_i c_i row_i, [P] float32."""
    result, start = torch.zeros(blocks[0].shape[1]), 0
    for block in blocks:
        part = torch.from_numpy(coefficients[start : start + len(block)]).float()
        for rows, c in zip(block.split(64), part.split(64), strict=True):
            result += c @ rows.float()
        start += len(block)
    return result / d
