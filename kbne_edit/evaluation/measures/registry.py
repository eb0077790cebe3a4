"""The measures by name: what each is, and how it is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..benchmark import Benchmark, Figure
from ..figures import TWINS
from .associations import associations_benchmark
from .content import read_content
from .decisions import Decisions, decisions_benchmark, decisions_figures
from .help import Help, help_benchmark, help_figures
from .questions import FIGURES as QUESTION_FIGURES
from .questions import questions_benchmark
from .regard import Regard, regard_benchmark, regard_figures

LANGUAGES = ("en", "de", "fr", "es", "zh")


@dataclass(frozen=True)
class Measure:
    """clusters: what its items share, in words. build: (scorer, tokenizer, limit) -> Benchmark. figures: made when
    they are asked for, since the groups that they name are read from the content."""

    name: str
    clusters: str
    build: Callable[[object, object, int | None], Benchmark]
    figures: Callable[[], tuple[Figure, ...]]
    kind: str = "bias"


def _stated(language: str) -> tuple[Figure, ...]:
    content = Decisions.from_dict(read_content("decisions", language))
    return decisions_figures({dimension: list(of) for dimension, of in content.groups.items()})


def _named(language: str) -> tuple[Figure, ...]:
    content = Decisions.from_dict(read_content("decisions", language))
    return decisions_figures({"name": list(content.names)})


def _all() -> dict[str, Measure]:
    measures = []
    for language in LANGUAGES:
        suffix = "" if language == "en" else f"_{language}"
        measures += [
            Measure(
                f"decisions{suffix}",
                "scenario",
                lambda scorer, tokenizer, limit, language=language: decisions_benchmark(language, tokenizer, limit),
                lambda language=language: _stated(language),
            ),
            Measure(
                f"decisions_names{suffix}",
                "scenario",
                lambda scorer, tokenizer, limit, language=language: decisions_benchmark(
                    language, tokenizer, limit, by_name=True
                ),
                lambda language=language: _named(language),
            ),
            Measure(
                f"associations{suffix}",
                "twin",
                lambda scorer, tokenizer, limit, language=language: associations_benchmark(
                    language, scorer, tokenizer, limit
                ),
                lambda: TWINS,
            ),
        ]
    measures += [
        Measure(
            "questions",
            "story",
            lambda scorer, tokenizer, limit: questions_benchmark("en", tokenizer, limit),
            lambda: QUESTION_FIGURES,
        ),
        Measure(
            "help_parity",
            "request",
            lambda scorer, tokenizer, limit: help_benchmark("en", tokenizer, limit),
            lambda: help_figures(list(Help.from_dict(read_content("help", "en")).groups)),
        ),
        Measure(
            "regard_parity",
            "beginning",
            lambda scorer, tokenizer, limit: regard_benchmark("en", tokenizer, limit),
            lambda: regard_figures(list(Regard.from_dict(read_content("regard", "en")).groups)),
            kind="open",
        ),
    ]
    return {measure.name: measure for measure in measures}


MEASURES = _all()


def measure(name: str, scorer, tokenizer, limit: int | None = None) -> Benchmark:
    """A measure of the package, `limit` items at most. Raises NoDataError if the model cannot read its language."""
    from dataclasses import replace

    return replace(MEASURES[name].build(scorer, tokenizer, limit), name=name)


def quick_benchmarks(scorer, tokenizer, language: str = "en") -> list[Benchmark]:
    """Decisions and twin association, small enough for every bake: some seconds on a small model.

    Raises NoDataError if the package has none in the language, or the model cannot read it.
    """
    return [
        decisions_benchmark(language, tokenizer, None, quick=True),
        associations_benchmark(language, scorer, tokenizer, None),
    ]
