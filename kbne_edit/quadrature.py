"""Quadrature of the path integral (method, section 2): which nodes to evaluate, and what they add up to.

A quadrature asks for nodes layer by layer (`request`), takes what the model gave for them (`accept`), and asks again
until it is content. It knows nothing of models, so one question or all of them can be evaluated between two rounds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import InputError

GAUSS_NODES = 4  # per interval: enough for all layers but the first, whose integrand turns sharply near gamma = 0
# Intervals that are dense near 0: where the first layer starts, and the first refinement of any other layer; later
# refinements halve the intervals that need it. A pass over few rows costs nearly what one over many does, so the
# layer that is known to be hard does not wait for one.
_GRADED = (0.0, 1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 4, 1.0)
_ROUNDS = 8


class Nodes(NamedTuple):
    """Where one layer is to be evaluated. values: gammas whose gradient is wanted; edges: gammas of which only P is."""

    values: Tensor
    edges: Tensor

    @property
    def count(self) -> int:
        return len(self.values) + len(self.edges)


class Found(NamedTuple):
    """What one layer gave. gradient: dP/dh at `values`, [n, F]; p_values [n], p_edges [m]: P(a* | gamma h).

    P stands for whatever is attributed: a probability, or log-odds.
    """

    gradient: Tensor
    p_values: Tensor
    p_edges: Tensor


def quadrature(name: str, layers: int, tolerance: float) -> Fixed | Adaptive:
    """The quadrature called "gauss" (refined), "gauss-N" or "riemann-N", for L layers. Raises InputError."""
    kind, _, number = name.partition("-")
    if kind not in ("gauss", "riemann") or not (number.isdigit() and int(number) if number else name == "gauss"):
        raise InputError(f"quadrature {name!r} is unknown: use gauss, gauss-N or riemann-N")
    return Fixed(kind, int(number), layers) if number else Adaptive(layers, tolerance)


def _rule(kind: str, n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1]."""
    if kind == "riemann":
        return torch.linspace(0, 1, n), torch.full((n,), 1 / n)
    x, w = np.polynomial.legendre.leggauss(n)
    return torch.tensor((x + 1) / 2, dtype=torch.float32), torch.tensor(w / 2, dtype=torch.float32)


class Fixed:
    """The same nodes for every layer. After `accept`: gradients [L, F], p_zero [L], nodes [L]."""

    def __init__(self, kind: str, n: int, layers: int):
        self._layers, (self._x, self._w) = layers, _rule(kind, n)
        self.nodes, self.gradients = np.full(layers, n), None

    def request(self) -> dict[int, Nodes]:
        if self.gradients is not None:
            return {}
        return {layer: Nodes(self._x, torch.zeros(1)) for layer in range(self._layers)}

    def accept(self, h: Tensor, p: float, found: dict[int, Found]) -> None:
        """h: [L, F]; p: P(a* | h); found: the answer to `request`."""
        self.gradients = torch.stack([self._w @ found[layer].gradient for layer in range(self._layers)])
        self.p_zero = np.array([found[layer].p_edges[0].item() for layer in range(self._layers)])


class Adaptive:
    """Composite Gauss-Legendre on intervals that are split where completeness fails. Attributes as of `Fixed`.

    Completeness holds on each interval alone: integral_a^b = P(b) - P(a). The residuals of a layer's intervals are
    added without sign, so that errors of opposite sign cannot hide each other; their sum must not exceed `tolerance`
    of the question's largest score.
    """

    def __init__(self, layers: int, tolerance: float):
        self._tolerance = tolerance
        graded = list(zip(_GRADED, _GRADED[1:], strict=False))
        self._todo = {layer: graded if layer == 0 else [(0.0, 1.0)] for layer in range(layers)}
        self._graded, self._rounds = graded, 0
        self._parts: dict[int, list[_Part]] = {layer: [] for layer in range(layers)}
        self.nodes = np.zeros(layers, int)

    def request(self) -> dict[int, Nodes]:
        x, _ = _rule("gauss", GAUSS_NODES)
        return {
            layer: Nodes(torch.cat([a + (b - a) * x for a, b in todo]), torch.tensor([a for a, _ in todo]))
            for layer, todo in self._todo.items()
        }

    def accept(self, h: Tensor, p: float, found: dict[int, Found]) -> None:
        """h: [L, F]; p: P(a* | h); found: the answer to `request`."""
        for layer, rows in found.items():
            self._parts[layer] = _merge(h[layer], self._parts[layer], self._todo[layer], rows, p)
            self.nodes[layer] += len(rows.gradient)
        self.gradients = torch.stack([sum(part.gradient for part in parts) for parts in self._parts.values()])
        self.p_zero = np.array([parts[0].p_start for parts in self._parts.values()])
        allowed = self._tolerance * max((h * self.gradients).abs().max().item(), 1e-30)
        bad = [layer for layer, parts in self._parts.items() if sum(part.residual for part in parts) > allowed]
        self._rounds += 1
        if self._rounds > _ROUNDS:
            bad = []
        self._todo = {
            layer: self._graded if len(self._parts[layer]) == 1 else _split(self._parts[layer], allowed)
            for layer in bad
        }


class _Part(NamedTuple):
    """One interval's share of a layer's integral. gradient: [F]."""

    start: float
    end: float
    p_start: float
    p_end: float
    gradient: Tensor
    residual: float


def _part(h: Tensor, start: float, end: float, p_start: float, p_end: float, gradient: Tensor) -> _Part:
    _, w = _rule("gauss", GAUSS_NODES)
    integral = (end - start) * (w.to(gradient) @ gradient)
    return _Part(start, end, p_start, p_end, integral, abs((h * integral).sum().item() - (p_end - p_start)))


def _split(parts: list[_Part], allowed: float) -> list[tuple[float, float]]:
    """New intervals in place of those that are not good enough yet."""
    share = allowed / len(parts)
    bad = [part for part in parts if part.residual > share]
    return [half for a, b, *_ in bad for half in ((a, (a + b) / 2), ((a + b) / 2, b))]


def _merge(h: Tensor, old: list[_Part], intervals: list[tuple[float, float]], found: Found, p: float) -> list[_Part]:
    """Put the new intervals in the place of the old ones that they divide. p: P at gamma = 1."""
    p_at = {1.0: p} | {part.end: part.p_end for part in old} | {part.start: part.p_start for part in old}
    p_at |= {a: value.item() for (a, _), value in zip(intervals, found.p_edges, strict=True)}
    gradients = found.gradient.split(GAUSS_NODES)
    new = [_part(h, a, b, p_at[a], p_at[b], g) for (a, b), g in zip(intervals, gradients, strict=True)]
    kept = [part for part in old if not any(a >= part.start and b <= part.end for a, b in intervals)]
    return sorted(kept + new, key=lambda part: part.start)
