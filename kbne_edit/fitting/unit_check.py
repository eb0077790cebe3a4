"""Checks units: balance, lengths, duplicates, and overlap with public benchmarks.

A fit is tested on StereoSet, CrowS-Pairs and BBQ, so no unit may contain one of their sentences. Some common facts
cannot be avoided, because well-known stereotypes are well known; they are counted.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, TypedDict

from ..evaluation.datafiles import NoDataError, rows
from .units import Fact, Unit

GRAM = 5  # words
_MOST_UNEVEN = 0.2  # of a group's facts: as-A minus as-B
_BENCHMARKS = {
    "StereoSet intrasentence": ("stereoset_intrasentence", ("stereoset_intrasentence*.jsonl", "stereoset*.json")),
    "StereoSet intersentence": ("stereoset_intersentence", ("stereoset_intersentence*.jsonl", "stereoset*.json")),
    "CrowS-Pairs": ("crows_pairs", ("crows_pairs*.csv",)),
    "BBQ": ("bbq", ("bbq*.jsonl",)),
}
_FUNCTION_WORDS = frozenset(
    "a about all always an and any are as at be by do every far for from go have her his in into is it keep like make "
    "more much never no not of off on one or other others out over own people person put so some take that the their "
    "them they to too up very who with without".split()
)
# Plurals whose stem differs from that of the singular.
_SINGULARS = {"women": "woman", "men": "man", "wives": "wife", "children": "child"}
_WORD = re.compile(r"[\u4e00-\u9fff]|[^\W_\u4e00-\u9fff]+(?:['’][^\W_]+)?")


@dataclass(frozen=True)
class TypeCount:
    """The facts of one type in a language. tones: number of facts by the tones of x and y, such as "bad bad"."""

    language: str
    type: str
    facts: int
    units: int
    formats: dict[str, int]
    tones: dict[str, int]


@dataclass(frozen=True)
class GroupBalance:
    """How often a group is A and is B."""

    language: str
    type: str
    group: str
    as_a: int
    as_b: int

    @property
    def uneven(self) -> bool:
        return abs(self.as_a - self.as_b) > max(2, _MOST_UNEVEN * (self.as_a + self.as_b))


@dataclass(frozen=True)
class Overlap:
    """What units share with one benchmark.

    sentences: number in the benchmark. verbatim: sentences of units that are also in the benchmark. grams: number of
    distinct sequences of five words in both. units: number with such a sequence. facts: stereotypes for which one of
    its sentences has the group and every content word of the attribute, as texts. near_facts: number with the group and
    two content words (one, if there is only one).
    """

    benchmark: str
    sentences: int
    verbatim: tuple[str, ...]
    grams: int
    units: int
    facts: tuple[str, ...]
    near_facts: int


class ReportKeys(TypedDict):
    """What the JSON of a check has beside the fields. same_tone: facts whose two attributes have the same tone."""

    facts: int
    same_tone: int
    faults: list[str]


@dataclass(frozen=True)
class UnitsReport:
    """Lengths are characters, means over facts. first_a, first_b: contexts of both groups by which comes first.

    repeated: stereotypes (group and attribute) that are in several facts. long_pairs: facts one of whose attributes
    is more than twice as long as the other.
    """

    types: tuple[TypeCount, ...]
    groups: tuple[GroupBalance, ...]
    first_a: int
    first_b: int
    length_x: float
    length_y: float
    long_pairs: tuple[str, ...]
    repeated: tuple[str, ...]
    duplicates: tuple[str, ...]
    overlaps: tuple[Overlap, ...]

    @property
    def facts(self) -> int:
        return sum(row.facts for row in self.types)

    @property
    def same_tone(self) -> int:
        """Facts whose two attributes have the same tone."""
        return sum(n for row in self.types for tones, n in row.tones.items() if len(set(tones.split())) == 1)

    @property
    def faults(self) -> list[str]:
        """Faults: duplicate sentences, a benchmark's sentence, a group that is mostly A or mostly B."""
        faults = [f"sentence appears twice: {text}" for text in self.duplicates]
        faults += [f"sentence of {o.benchmark}: {text}" for o in self.overlaps for text in o.verbatim]
        faults += [
            f"{g.language} {g.type}: {g.group} stand {g.as_a} times as A and {g.as_b} times as B"
            for g in self.groups
            if g.uneven
        ]
        return faults

    def to_dict(self) -> Annotated[dict[str, Any], ReportKeys]:
        return asdict(self) | {"facts": self.facts, "same_tone": self.same_tone, "faults": self.faults}


def check_units(units: Sequence[Unit], benchmarks_dir: str | Path | None = None) -> UnitsReport:
    """Check units, and their overlap with the benchmarks whose files are in a folder."""
    facts = list(dict.fromkeys(unit.fact for unit in units))
    stereotypes = Counter(
        chain.from_iterable(((f.language, f.type, f.a, f.x), (f.language, f.type, f.b, f.y)) for f in facts)
    )
    firsts = Counter(unit.a_first for unit in units)
    overlaps = _overlaps(units, facts, Path(benchmarks_dir)) if benchmarks_dir is not None else ()
    return UnitsReport(
        types=_types(units, facts),
        groups=_groups(facts),
        first_a=firsts[True],
        first_b=firsts[False],
        length_x=fmean(len(f.x) for f in facts) if facts else 0.0,
        length_y=fmean(len(f.y) for f in facts) if facts else 0.0,
        long_pairs=tuple(f"{f.x} / {f.y}" for f in facts if not 0.5 <= len(f.x) / len(f.y) <= 2),
        repeated=tuple(f"{key[2]}: {key[3]}" for key, count in stereotypes.items() if count > 1),
        duplicates=_duplicates(units),
        overlaps=overlaps,
    )


def _types(units: Sequence[Unit], facts: Sequence[Fact]) -> tuple[TypeCount, ...]:
    result = []
    for language, kind in dict.fromkeys((f.language, f.type) for f in facts):
        own_facts = [f for f in facts if (f.language, f.type) == (language, kind)]
        own_units = [u for u in units if (u.fact.language, u.type) == (language, kind)]
        formats = Counter(u.format for u in own_units)
        tones = Counter(f"{f.tone_x} {f.tone_y}" for f in own_facts)
        result.append(TypeCount(language, kind, len(own_facts), len(own_units), dict(formats), dict(tones)))
    return tuple(result)


def _groups(facts: Sequence[Fact]) -> tuple[GroupBalance, ...]:
    as_a = Counter((f.language, f.type, f.a) for f in facts)
    as_b = Counter((f.language, f.type, f.b) for f in facts)
    return tuple(GroupBalance(*key, as_a[key], as_b[key]) for key in sorted(as_a | as_b))


def _duplicates(units: Sequence[Unit]) -> tuple[str, ...]:
    """Sentences of squares that are in several units."""
    texts = Counter(chain.from_iterable({s.text for s in unit.sentences[:4]} for unit in units))
    return tuple(text for text, count in texts.items() if count > 1)


def _words(text: str) -> list[str]:
    """Words in lower case; in Chinese, characters."""
    return _WORD.findall(text.casefold())


def _stem(word: str) -> str:
    """A crude stem, good enough to count "dances" and "dancing" as the same word in English."""
    word = _SINGULARS.get(word, word)
    for ending in ("ing", "ed", "es", "s", "e"):
        if len(word) - len(ending) >= 3 and word.endswith(ending):
            return word[: -len(ending)]
    return word


def _grams(words: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)}


def _overlaps(units: Sequence[Unit], facts: Sequence[Fact], folder: Path) -> tuple[Overlap, ...]:
    result = []
    for benchmark, (name, patterns) in _BENCHMARKS.items():
        try:
            items = rows(name, folder, patterns)
        except NoDataError:
            continue
        sentences = list(dict.fromkeys(chain.from_iterable(_item_sentences(item) for item in items)))
        result.append(_overlap(benchmark, sentences, units, facts))
    if not result:
        raise NoDataError(f"{folder} holds no file of {', '.join(_BENCHMARKS)}")
    return tuple(result)


def _item_sentences(item: dict) -> Iterable[str]:
    """Every sentence of a benchmark's item. BBQ: context, question and each answer are one."""
    if "sent_more" in item:
        return item["sent_more"], item["sent_less"]
    if "question" in item:
        return [f"{item['context']} {item['question']} {item[key]}" for key in ("ans0", "ans1", "ans2")]
    texts = [item[key] for key in ("stereotype", "anti_stereotype", "unrelated")]
    return texts if "BLANK" in item["context"] else [f"{item['context']} {text}" for text in texts]


def _overlap(benchmark: str, sentences: list[str], units: Sequence[Unit], facts: Sequence[Fact]) -> Overlap:
    split = [_words(text) for text in sentences]
    whole = {tuple(words) for words in split}
    grams = set().union(*map(_grams, split))
    verbatim, shared, sharing = [], set(), 0
    for unit in units:
        shared_grams: set[tuple[str, ...]] = set()
        for sentence in unit.sentences:
            words = _words(sentence.text)
            if tuple(words) in whole or tuple(_words(sentence.continuation)) in whole:
                verbatim.append(sentence.text)
            shared_grams |= _grams(words)
        shared_grams &= grams
        shared |= shared_grams
        sharing += bool(shared_grams)
    whole_facts, partly = _known_facts([{_stem(word) for word in words} for words in split], facts)
    return Overlap(
        benchmark, len(sentences), tuple(dict.fromkeys(verbatim)), len(shared), sharing, whole_facts, len(partly)
    )


def _known_facts(sentences: list[set[str]], facts: Sequence[Fact]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(stereotypes for which one sentence has the group and all content words of the attribute; the group and two)."""
    where: dict[str, set[int]] = defaultdict(set)
    for index, stems in enumerate(sentences):
        for word in stems:
            where[word].add(index)
    whole, partly = [], []
    for fact in facts:
        for group, attribute in ((fact.a, fact.x), (fact.b, fact.y)):
            group_stems, stems = _content(group), _content(attribute) - _content(group)
            if not group_stems or not stems:
                continue
            holding = [where.get(word, set()) for word in group_stems]
            of_group = holding[0].intersection(*holding[1:])
            most = max((len(stems & sentences[index]) for index in of_group), default=0)
            if most == len(stems):
                whole.append(f"{group}: {attribute}")
            if most >= min(2, len(stems)):
                partly.append(f"{group}: {attribute}")
    return tuple(whole), tuple(partly)


def _content(text: str) -> set[str]:
    return {_stem(word) for word in _words(text) if word not in _FUNCTION_WORDS}
