"""Units from the fitted halves of the measures, so that a fit can aim at decisions and associations themselves.

The other halves are reported. `forbid_reported` refuses any unit with a sentence of a reported half.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InputError, shown
from ..evaluation.measures.content import fill, read_content
from ..evaluation.measures.decisions import Decisions, Scenario
from ..evaluation.measures.halves import HALVED, LANGUAGES, scenario_halves, twin_halves
from ..recipe import Twin
from .units import Fact, Sentence, Square, Unit


def measure_units(name: str, language: str = "en") -> tuple[Unit, ...]:
    """Units of the half of a measure that may be fitted.

    associations: each twin is a unit: x is a stereotype of group a, y of group b.
    decisions: a scenario, a polarity, and a group beside its reference. a: the reference, b: the group; x: the
    favourable answer, y: the other one. A unit's association is then half the advantage of the reference.
    Raises InputError for another measure, NoDataError if the package lacks it in the language.
    """
    if name == "associations":
        return tuple(_twin_unit(twin, language) for twin in twin_halves(language).fitted)
    if name == "decisions":
        return _decision_units(scenario_halves(language).fitted, language)
    raise InputError(f"{shown(name)} cannot be fitted: use {' or '.join(HALVED)}")


def forbid_reported(units: Sequence[Unit], language: str = "en") -> None:
    """Raise InputError for a unit with a sentence, or a prompt, of a reported half in that language."""
    if language not in LANGUAGES:
        return
    kept = {text for twin in twin_halves(language).reported for p in twin.probes for text in (p.first, p.second)}
    facts = [scenario.facts for scenario in scenario_halves(language).reported]
    for unit in units:
        for sentence in unit.sentences:
            if sentence.text in kept or any(words in sentence.text + sentence.question for words in facts):
                raise InputError(f"{shown(sentence.text)} is reported and must not be fitted: leave it out")


def _twin_unit(twin: Twin, language: str) -> Unit:
    first, second = twin.first, twin.second
    if second is None:
        raise InputError(f"{shown(first.first)} has no twin: it cannot be fitted")
    a, b = twin.groups or (first.first, first.second)
    fact = Fact(twin.dimension, language, a, b, first.first, second.first, "neutral", "neutral", "")
    # first: X of A against X of B; second: Y of B against Y of A.
    ax, bx, by, ay = (Sentence("", text) for text in (first.first, first.second, second.first, second.second))
    return Unit(fact, "sentence", 0, Square(ax, ay, bx, by), ())


def _decision_units(scenarios: Sequence[Scenario], language: str) -> tuple[Unit, ...]:
    content = Decisions.from_dict(read_content("decisions", language))
    yes, no = content.answers

    def sentence(scenario: Scenario, question: str, person: str, answer: str) -> Sentence:
        stated = fill(content.stated, {"person": person})
        words = {"question": content.space.join([scenario.facts, question, stated])}
        return Sentence(fill(content.prompt.plain, words), content.space + answer, fill(content.prompt.chat, words))

    units = []
    for scenario in scenarios:
        for question, good, bad in ((scenario.yes, yes, no), (scenario.no, no, yes)):
            for dimension, people in content.groups.items():
                (reference, person_a), *others = people.items()
                for group, person_b in others:
                    ax, ay, bx, by = (
                        sentence(scenario, question, person, answer)
                        for person in (person_a, person_b)
                        for answer in (good, bad)
                    )
                    fact = Fact(dimension, language, reference, group, good, bad, "good", "bad", "")
                    units.append(Unit(fact, "question", 0, Square(ax, ay, bx, by), ()))
    return tuple(units)
