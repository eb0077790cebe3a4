"""Names of quadratures in options and settings. Without torch, so that a wrong name is refused at once."""

from __future__ import annotations

from typing import NamedTuple

from ..errors import InputError, shown


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
