"""Settings of an evaluation. Imports no torch, so that invalid ones are refused at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..models.devices import AUTO, check_device
from ..recipe import Recipe, load_recipe
from .effect import DRAWS

if TYPE_CHECKING:
    from .benchmark import Benchmark
    from .scoring import Scorer


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What models are measured on, and how they run.

    tasks: their names (None: all that there are data for); data: a folder with their files (None: from the Hub);
    limit: items of each task (None: all). recipe: of the questions and probes (None: that of the edit or the scores).
    device: of torch, "auto" for the accelerator where there is one; dtype: of the computation.
    """

    tasks: Sequence[str] | None = None
    data: str | Path | None = None
    limit: int | None = None
    recipe: str | Path | None = None
    device: str = AUTO
    dtype: str = "float32"

    @property
    def folder(self) -> Path | None:
        """`data` as a path."""
        return Path(self.data) if self.data else None

    def check(self) -> None:
        """Raise InputError for invalid settings, before anything is downloaded or loaded."""
        from .tasks import check

        check(self.tasks, self.folder)
        check_device(self.device)
        if self.recipe is not None:
            load_recipe(self.recipe)

    def benchmarks(self, recipe: Recipe, scorer: Scorer) -> list[Benchmark]:
        """The tasks, ready to be measured. Raises InputError for one that was named and has no data."""
        from .tasks import benchmarks

        return benchmarks(self.tasks, self.folder, self.limit, recipe, scorer, scorer.tokenizer)


@dataclass(frozen=True, kw_only=True)
class Controls:
    """What an edit is compared with.

    draws: of random neurons; with fewer than 19 no effect can exceed them. scores: a scores file of the model, for
    the neurons of its control questions (None: without these).
    """

    draws: int = DRAWS
    scores: str | Path | None = None
