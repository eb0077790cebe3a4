"""Names of quadratures in options and settings. Without torch, so that a wrong name is refused at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import InputError, shown
from ..families import Site

TOLERANCE = 0.01  # completeness residual of a layer, relative to the question's largest score


class QuadratureName(NamedTuple):
    """kind: "gauss" or "riemann"; nodes: None for "gauss", which is refined until completeness holds."""

    kind: str
    nodes: int | None


def quadrature_name(name: str) -> QuadratureName:
    """ "gauss", "gauss-N" or "riemann-N". Raises InputError."""
    kind, _, number = name.partition("-")
    if kind not in ("gauss", "riemann") or not (number.isdigit() and int(number) if number else name == "gauss"):
        raise InputError(f"quadrature {shown(name)} is unknown: use gauss, gauss-N or riemann-N")
    return QuadratureName(kind, int(number) if number else None)


@dataclass(frozen=True, kw_only=True)
class Integral:
    """What is integrated, where, and how.

    site: whose neurons are scaled. positions: how many of a prompt's last positions are scaled.
    other_ids: Q lists with the ids of the wrong answers' surface forms; with them the log-odds log P(a*) / P(others)
    are attributed instead of P(a*): they do not saturate.
    quadrature: "gauss" (Gauss-Lobatto, refined per layer until the completeness residual is below `tolerance`),
    "gauss-N" (Gauss-Legendre, N nodes), "riemann-N" (N nodes linspace(0, 1, N), sum / N; the published code uses
    N = 20).
    """

    site: Site = "down"
    positions: int = 1
    other_ids: Sequence[Sequence[int]] | None = None
    quadrature: str = "gauss"
    tolerance: float = TOLERANCE
