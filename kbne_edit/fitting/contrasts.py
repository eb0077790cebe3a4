"""Bad attributes against good ones, of the same group: what a fit learns tone from.

A fact says X of group A and Y of group B, and mostly both are bad, or both are good: in its square, tone cancels. So
each bad attribute of a file is set against a good one of another fact of that file, in the sentence of the group that
is stereotyped with the bad one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from .units import Fact, Pairs, Unit, unit_of

FORMATS = ("sentence", "continuation", "dialogue")  # in which the continuation holds the attribute


def contrast_units(files: Sequence[Pairs], most: int | None = None) -> tuple[Unit, ...]:
    """Units whose x is bad and whose y is good; of each file at most `most`, spread over its facts."""
    return tuple(unit for pairs in files for unit in _of_file(pairs, most))


def _of_file(pairs: Pairs, most: int | None) -> Iterator[Unit]:
    bad = [sides for fact in pairs.facts for sides in _sides(fact, "bad")]
    good = [attribute for fact in pairs.facts for _, _, attribute in _sides(fact, "good")]
    if not good:
        return
    count = len(bad) if most is None else min(most, len(bad))
    for number in range(count):
        a, b, x = bad[number * len(bad) // count]
        # A step that shares no divisor with most list lengths, so that neighbours are not set against neighbours.
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
