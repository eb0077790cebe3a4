"""Quadrature of the path integral (docs/method.md, section 2): which nodes to evaluate, and their weighted sum.

A quadrature requests nodes for each layer (`request`) and accepts the model's values there (`accept`), until `request`
returns {}. It does not know the model, so the caller may evaluate one question or many between two rounds.

The default is Gauss-Lobatto, whose nodes include both ends. The gradient at gamma = 1 is that of the unscaled prompt:
one row gives it for all layers. The value at gamma = 0, which completeness needs, comes with a gradient that the rule
uses as well. So a layer costs three rows at order 5, where Gauss-Legendre would cost four. Where a norm follows the
feed-forward block, the integrand changes fast near gamma = 0 and falls off as 1 / gamma beyond; there the nodes lie on
a `Path` in another variable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .names import quadrature_name

# Four nodes per interval are enough for all layers but the first, whose integrand bends sharply near gamma = 0. These
# intervals are dense near 0. The first layer starts with them, and they are the first refinement of any other layer;
# later refinements halve the intervals that need it. The first layer starts refined because a pass over few rows costs
# nearly as much as one over many.
_GRADED = [(0.0, 1 / 128), (1 / 128, 1 / 64), (1 / 64, 1 / 32), (1 / 32, 1 / 16), (1 / 16, 1 / 4), (1 / 4, 1.0)]
_ROUNDS = 8

Point = tuple[Tensor, float]  # at one s of the path: (factor times dP/dh [F], P(a* | gamma h))


class NodeValues(NamedTuple):
    """The objective at a layer's nodes. gradient: dP/dh, [n, F]; p: P(a* | gamma h), [n].

    P stands for the objective, a probability or log-odds. With N positions F stands for N * F.
    """

    gradient: Tensor
    p: Tensor


@dataclass(frozen=True)
class Path:
    """gamma as a function of s from 0 to 1, and the weight of a gradient at s.

    turn: None for gamma = s. Else an RMS norm follows the block's output y. Then turn = sqrt(eps / mean(y^2)), and with
    v = asinh(gamma / turn) the normed output is tanh(v) times its limit. The objective is as smooth in u = tanh(v) as
    it is in gamma elsewhere. So is dP/dh, once it is multiplied by dgamma/dv = sqrt(gamma^2 + turn^2), by which the
    norm divides. The remaining dv = du / (1 - u^2) is integrated exactly (`weights`). s is u over its largest value.
    Rejected: nodes in log gamma, which need as many nodes per interval as this path needs in total.
    """

    turn: float | None = None

    @property
    def _most(self) -> float:
        """u at gamma = 1."""
        return 1.0 if self.turn is None else 1 / math.hypot(1, self.turn)

    def gamma(self, s: float) -> float:
        """Rounded to float32, so that the model uses the number for which `factor` is computed."""
        if self.turn is None or s in (0, 1):
            return float(np.float32(s))
        u = s * self._most
        return float(np.float32(self.turn * u / math.sqrt(1 - u * u)))

    def factor(self, s: float) -> float:
        """The factor of the gradient at s."""
        return 1.0 if self.turn is None else math.hypot(self.gamma(s), self.turn)

    def weights(self, nodes: tuple[float, ...], a: float, b: float) -> np.ndarray:
        """The nodes' weights for the integral from a to b: exact for polynomials in s of degree < number of nodes."""
        return _weights(nodes, a, b, None if self.turn is None else self._most)


@cache
def _weights(nodes: tuple[float, ...], a: float, b: float, most: float | None) -> np.ndarray:
    """Interpolatory weights for dv = most ds / (1 - (most s)^2), or for ds."""
    x, w = np.polynomial.legendre.leggauss(48)
    if most is None:
        s, w = a + (b - a) * (x + 1) / 2, w * (b - a) / 2
    else:
        low, high = math.atanh(a * most), math.atanh(b * most)
        v, w = low + (high - low) * (x + 1) / 2, w * (high - low) / 2
        s = np.tanh(v) / most
    # In Chebyshev polynomials on [-1, 1] the system is well conditioned.
    at = np.polynomial.chebyshev.chebvander(2 * (np.array(nodes) - a) / (b - a) - 1, len(nodes) - 1)
    moments = np.polynomial.chebyshev.chebvander(2 * (s - a) / (b - a) - 1, len(nodes) - 1).T @ w
    return np.linalg.solve(at.T, moments)


STRAIGHT = Path()


def quadrature(name: str, layers: int, tolerance: float, positions: int = 1) -> Fixed | Adaptive:
    """The quadrature called "gauss" (refined), "gauss-N" or "riemann-N", for L layers. Raises InputError.

    positions: how many are scaled; h and gradients are concatenated over them, F values each.
    """
    kind, nodes = quadrature_name(name)
    return Adaptive(layers, tolerance, positions) if nodes is None else Fixed(kind, nodes, layers)


class Fixed:
    """The same nodes in gamma for every layer. After `accept`: gradients [L, F], p_zero [L], nodes [L]."""

    def __init__(self, kind: str, n: int, layers: int):
        x, w = np.polynomial.legendre.leggauss(n) if kind == "gauss" else (np.linspace(-1, 1, n), np.full(n, 2 / n))
        self._x = torch.tensor([*(x + 1) / 2, 0.0], dtype=torch.float32)  # the node at 0 is for the value only
        self._w = torch.tensor([*w / 2, 0.0], dtype=torch.float32)
        self.gradients: Any  # a Tensor after `accept`
        self._layers, self.nodes, self.gradients = layers, np.full(layers, n), None

    def request(self) -> dict[int, Tensor]:
        """The gammas to evaluate next, {layer: gammas}; {} when no more are needed."""
        return dict.fromkeys(range(self._layers), self._x) if self.gradients is None else {}

    def accept(self, h: Tensor, at_one: Tensor, p: float, results: dict[int, NodeValues]) -> None:
        """h: [L, F]; at_one: dP/dh at gamma = 1, [L, F]; p: P(a* | h); results: the values at the requested nodes."""
        self.gradients = torch.stack([self._w @ results[layer].gradient for layer in range(self._layers)])
        self.p_zero = np.array([results[layer].p[-1].item() for layer in range(self._layers)])


class Adaptive:
    """Composite Gauss-Lobatto; intervals are split where completeness fails. Attributes as of `Fixed`; paths, [L]:
    straight, unless they are set before the first request.

    Completeness holds on each interval: integral_a^b = P(b) - P(a). A layer's residual is the sum of its intervals'
    absolute residuals, so that errors of opposite sign do not cancel. It must not exceed `tolerance` times the
    question's largest score.
    """

    def __init__(self, layers: int, tolerance: float, positions: int):
        self._tolerance, self._positions, self._rounds = tolerance, positions, 0
        self._todo = {layer: _GRADED if layer == 0 else [(0.0, 1.0)] for layer in range(layers)}
        self._parts: list[list[_Part]] = [[] for _ in range(layers)]
        self._starts: list[dict[float, Point]] = [{} for _ in range(layers)]
        self.paths = [STRAIGHT] * layers
        self.nodes = np.zeros(layers, int)

    def request(self) -> dict[int, Tensor]:
        """The gammas to evaluate next, {layer: gammas}; {} when no more are needed."""
        return {layer: torch.tensor([self.paths[layer].gamma(s) for s in self._wanted(layer)]) for layer in self._todo}

    def _wanted(self, layer: int) -> list[float]:
        starts = [a for a, _ in self._todo[layer] if a not in self._starts[layer]]
        return starts + [x for a, b in self._todo[layer] for x in _inner(a, b)]

    def accept(self, h: Tensor, at_one: Tensor, p: float, results: dict[int, NodeValues]) -> None:
        """h: [L, F]; at_one: dP/dh at gamma = 1, [L, F]; p: P(a* | h); results: the values at the requested nodes."""
        for layer, rows in results.items():
            path, wanted = self.paths[layer], self._wanted(layer)
            points = {1.0: (path.factor(1.0) * at_one[layer], p)} | self._starts[layer]
            for s, gradient, value in zip(wanted, rows.gradient, rows.p.tolist(), strict=True):
                points[s] = (path.factor(s) * gradient, value)
            new = self._todo[layer]
            kept = [q for q in self._parts[layer] if not any(a >= q.start and b <= q.end for a, b in new)]
            parts = [*kept, *(_part(h[layer], path, a, b, points) for a, b in new)]
            self._parts[layer] = sorted(parts, key=lambda part: part.start)
            self._starts[layer] = {part.start: points[part.start] for part in parts}
            self.nodes[layer] += len(rows.p)
        self.gradients = torch.stack([sum(part.gradient for part in parts) for parts in self._parts])  # type: ignore[misc]
        self.p_zero = np.array([starts[0.0][1] for starts in self._starts])
        scores = (h * self.gradients).view(len(h), self._positions, -1).sum(1)
        allowed = self._tolerance * max(scores.abs().max().item(), 1e-30)
        bad = [i for i, parts in enumerate(self._parts) if sum(part.residual for part in parts) > allowed]
        self._rounds += 1
        self._todo = {i: _finer(self._parts[i], allowed) for i in bad} if self._rounds <= _ROUNDS else {}


class _Part(NamedTuple):
    """One interval's part of a layer's integral. gradient: [F]."""

    start: float
    end: float
    gradient: Tensor
    residual: float


def _inner(a: float, b: float) -> list[float]:
    """The nodes of Gauss-Lobatto within [a, b], its ends left out."""
    middle, half = (a + b) / 2, (b - a) / 2
    return [middle - half / 5**0.5, middle + half / 5**0.5]


def _part(h: Tensor, path: Path, a: float, b: float, points: dict[float, Point]) -> _Part:
    nodes = (a, *_inner(a, b), b)
    gradient = sum(weight * points[s][0] for weight, s in zip(path.weights(nodes, a, b).tolist(), nodes, strict=True))
    return _Part(a, b, gradient, abs((h * gradient).sum().item() - (points[b][1] - points[a][1])))


def _finer(parts: list[_Part], allowed: float) -> list[tuple[float, float]]:
    """New intervals in place of those with too large a residual."""
    if len(parts) == 1:
        return _GRADED
    bad = [part for part in parts if part.residual > allowed / len(parts)]
    return [half for a, b, *_ in bad for half in ((a, (a + b) / 2), ((a + b) / 2, b))]
