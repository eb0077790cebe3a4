"""Least squares under a bound on the cost, solved in the dual.

    minimise  sum_i w_i (c_i + a_i d - t_i)^2    subject to  1/2 d' P d <= kappa

With residuals r = c - t and the kernel K = A P^-1 A', the minimum for a multiplier m is d = -P^-1 A' u with
(K + m W^-1) u = r. One eigendecomposition of W^1/2 K W^1/2 serves every m; d' P d = u' K u falls as m grows, so the
multiplier that meets the bound is found by bisection.

Legend: N rows, P factors.
"""

from __future__ import annotations

import math

import numpy as np

_STEPS = 80


def solve(kernel: np.ndarray, residuals: np.ndarray, weights: np.ndarray, kappa: float) -> np.ndarray:
    """u [N], where d = -P^-1 A' u. kernel: [N, N]; residuals: c - t, [N]; weights: [N], positive."""
    root = np.sqrt(weights)
    values, vectors = np.linalg.eigh(root[:, None] * kernel * root)
    values = np.maximum(values, 0)
    projected = vectors.T @ (root * residuals)

    def cost(multiplier: float) -> float:
        return 0.5 * float((values * (projected / (values + multiplier)) ** 2).sum())

    least = 1e-9 * max(float(values.max()), 1e-30)
    low, high = least, least
    if cost(least) > kappa:
        while cost(high) > kappa:
            high *= 10
        for _ in range(_STEPS):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if cost(middle) > kappa else (low, middle)
    return root * (vectors @ (projected / (values + high)))
