"""Settings of `tune`, besides those of the measurement (`evaluation.settings.Measurement`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..evaluation.effect import DRAWS
from .search import Space


@dataclass(frozen=True, kw_only=True)
class Search:
    """What to try on the dev half.

    space: rules, thresholds and factors, of which at most `trials` edits are measured. seed: of the split into halves
    and of the sampler. dev_only: stop before the test half is scored, so that the space may still change.
    """

    space: Space = field(default_factory=Space)
    trials: int = 60
    seed: int = 0
    dev_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Criteria:
    """The criteria by which an edit is chosen on dev and confirmed on test.

    figure: the figure of the bias tasks to bring nearer to its ideal. None: the absolute margin, or the unwanted margin
    where only probes of recipes with the aim "avoid" have data.
    margin: the loss of capability that must be excluded, in points of accuracy.
    max_kl: bound on the KL from the base on neutral text, nats per token; None: no bound.
    draws: of random neurons; the choice must exceed each. Fewer than 19 confirm nothing. A choice among k edits must
    exceed 20 k - 1 on the test half; those beyond `draws` are measured as long as it does.
    """

    figure: str | None = None
    margin: float = 5.0
    max_kl: float | None = None
    draws: int = DRAWS
