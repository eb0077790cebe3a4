"""The measures by name: what each is, and how it is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..benchmark import Benchmark, Figure
from ..figures import TWINS
from .associations import associations_benchmark
from .content import read_content
from .decisions import Decisions, decisions_benchmark, decisions_figures
from .halves import LANGUAGES
from .help import Help, help_benchmark, help_figures
from .questions import FIGURES as QUESTION_FIGURES
from .questions import questions_benchmark
from .regard import Regard, regard_benchmark, regard_figures

if TYPE_CHECKING:
    from ..scoring import Scorer


@dataclass(frozen=True)
class Measure:
    """clusters: what its items share, in words. build: (scorer, tokenizer, limit) -> Benchmark. figures: made on
    demand, since the groups that they name are read from the content."""

    name: str
    clusters: str
    build: Callable[[Scorer, Any, int | None], Benchmark]
    figures: Callable[[], tuple[Figure, ...]]
    kind: str = "bias"


def _of_language(language: str) -> tuple[Measure, ...]:
    """Decisions and associations in one language."""
    suffix = "" if language == "en" else f"_{language}"

    def stated(_: Scorer, tokenizer: Any, limit: int | None) -> Benchmark:
        return decisions_benchmark(language, tokenizer, limit)

    def named(_: Scorer, tokenizer: Any, limit: int | None) -> Benchmark:
        return decisions_benchmark(language, tokenizer, limit, by_name=True)

    def associations(scorer: Scorer, tokenizer: Any, limit: int | None) -> Benchmark:
        return associations_benchmark(language, scorer, tokenizer, limit)

    def content() -> Decisions:
        return Decisions.from_dict(read_content("decisions", language))

    def stated_figures() -> tuple[Figure, ...]:
        return decisions_figures({dimension: list(of) for dimension, of in content().groups.items()})

    def named_figures() -> tuple[Figure, ...]:
        return decisions_figures({"name": list(content().names)})

    def twin_figures() -> tuple[Figure, ...]:
        return TWINS

    return (
        Measure(f"decisions{suffix}", "scenario", stated, stated_figures),
        Measure(f"decisions_names{suffix}", "scenario and name", named, named_figures),
        Measure(f"associations{suffix}", "twin", associations, twin_figures),
    )


def _questions(_: Scorer, tokenizer: Any, limit: int | None) -> Benchmark:
    return questions_benchmark("en", tokenizer, limit)


def _question_figures() -> tuple[Figure, ...]:
    return QUESTION_FIGURES


def _help(_: Scorer, tokenizer: Any, limit: int | None) -> Benchmark:
    return help_benchmark("en", tokenizer, limit)


def _help_figures() -> tuple[Figure, ...]:
    return help_figures(list(Help.from_dict(read_content("help", "en")).groups))


def _regard(_: Scorer, tokenizer: Any, limit: int | None) -> Benchmark:
    return regard_benchmark("en", tokenizer, limit)


def _regard_figures() -> tuple[Figure, ...]:
    return regard_figures(list(Regard.from_dict(read_content("regard", "en")).groups))


_EVERY = (
    *(measure for language in LANGUAGES for measure in _of_language(language)),
    Measure("questions", "story", _questions, _question_figures),
    Measure("help_parity", "request", _help, _help_figures),
    Measure("regard_parity", "beginning", _regard, _regard_figures, kind="open"),
)
MEASURES = {measure.name: measure for measure in _EVERY}


def measure(name: str, scorer: Scorer, tokenizer: Any, limit: int | None = None) -> Benchmark:
    """A measure of the package with at most `limit` items. Raises NoDataError if the model cannot read its language."""
    return replace(MEASURES[name].build(scorer, tokenizer, limit), name=name)
