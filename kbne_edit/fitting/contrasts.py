"""Contrasts: a bad against a good attribute of the same group, from which a fit learns tone.

In most facts both attributes are bad, or both are good, so tone cancels in the square. So each bad attribute of a file
is paired with a good one of another fact of that file, in the sentence of the group that is stereotyped with the bad
one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from .units import Fact, Pairs, Unit, unit_of

FORMATS = ("sentence", "continuation", "dialogue")  # formats whose continuation holds the attribute


def contrast_units(files: Sequence[Pairs], most: int | None = None) -> tuple[Unit, ...]:
    """Units with a bad x and a good y; at most `most` from each file, spread over its facts."""
    return tuple(unit for pairs in files for unit in _of_file(pairs, most))


def _of_file(pairs: Pairs, most: int | None) -> Iterator[Unit]:
    bad = [sides for fact in pairs.facts for sides in _sides(fact, "bad")]
    good = [attribute for fact in pairs.facts for _, _, attribute in _sides(fact, "good")]
    if not good:
        return
    count = len(bad) if most is None else min(most, len(bad))
    for number in range(count):
        a, b, x = bad[number * len(bad) // count]
        # A step coprime to most list lengths, so that neighbours are not paired with neighbours.
        y = good[number * 7 % len(good)]
        if x == y:
            continue
        fact = replace(pairs.facts[0], a=a, b=b, x=x, y=y, tone_x="bad", tone_y="good", aim=0)
        yield unit_of(pairs, fact, FORMATS[number % len(FORMATS)], number // len(FORMATS))


def _sides(fact: Fact, tone: str) -> Iterator[tuple[str, str, str]]:
    """(group, other group, attribute) of the fact's attributes of a tone."""
    if fact.tone_x == tone:
        yield fact.a, fact.b, fact.x
    if fact.tone_y == tone:
        yield fact.b, fact.a, fact.y
