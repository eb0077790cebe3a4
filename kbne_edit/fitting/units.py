"""Units to which factors are fitted: facts about two groups and two attributes, put into sentences.

A fact says which attribute is the stereotype of which group: X of group A, Y of group B. A unit is a fact in one
format, as the full square of four sentences, so that its margin splits into sentiment (X against Y, for either group),
prior (A against B, for either attribute) and association (their interaction).

Facts are lists, one file per type and language (`recipes/pairs/en/gender.yaml`), separate from the templates that turn
them into sentences (`recipes/pairs/en.yaml`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypedDict

from ..errors import InputError, RecipeError, shown
from ..yamlfile import read_yaml
from .wording import FORMATS, GROUP_FORMS, Reader, Template, Wording, fill, parse_wording

MOST_BYTES, MOST_FACTS = 256 << 10, 5_000
_LONGEST_ATTRIBUTE = 120
_TONES = {"g": "good", "n": "neutral", "b": "bad"}
_KEYS = ("kbne_pairs", "language", "type", "description", "groups", "targeted", "facts", "wording")


@dataclass(frozen=True)
class Fact:
    """Group a is stereotyped with attribute x, group b with attribute y.

    a, b: the groups' plurals. x, y: verb phrases in the language's base form. tone_x, tone_y: good, neutral or bad, as
    most readers would judge the attribute. filler: a nonsensical attribute. aim: 1 if prejudice is usually aimed at a
    rather than b, -1 the other way round, 0 if at both or neither.
    """

    type: str
    language: str
    a: str
    b: str
    x: str
    y: str
    tone_x: str
    tone_y: str
    filler: str
    aim: int = 0


@dataclass(frozen=True)
class Sentence:
    """A continuation after its context (which may be empty); `text` is the whole.

    question: for the format question, the user's message to a chat model; `continuation` is then the answer, which
    begins with a space in languages that separate words.
    """

    context: str
    continuation: str
    question: str = ""

    @property
    def text(self) -> str:
        return self.context + self.continuation


@dataclass(frozen=True)
class Square:
    """The four sentences of a unit, by group and attribute. ax and by are stereotyped, ay and bx are not."""

    ax: Sentence
    ay: Sentence
    bx: Sentence
    by: Sentence


@dataclass(frozen=True)
class Unit:
    """One fact in one format.

    template: index of the format's template. unrelated: two nonsensical sentences, in the context of ax and of by;
    empty in the units of a measure. unknown: the two questions of the square with the answer "it cannot be told"; empty
    in other formats. Each shares its context with two sentences of the square. a_first: True if group a is mentioned
    before group b; None if the context does not name both.
    """

    fact: Fact
    format: str
    template: int
    square: Square
    unrelated: tuple[Sentence, ...]
    unknown: tuple[Sentence, ...] = ()
    a_first: bool | None = None

    @property
    def type(self) -> str:
        return self.fact.type

    @property
    def sentences(self) -> tuple[Sentence, ...]:
        """Every sentence: the square (ax, ay, bx, by), the unrelated ones, the unknown ones."""
        square = self.square
        return (square.ax, square.ay, square.bx, square.by, *self.unrelated, *self.unknown)


class UnitsJSON(TypedDict):
    """What `recipes show --json` prints for pairs."""

    name: str
    units: list[Annotated[dict[str, Any], Unit]]


@dataclass(frozen=True)
class Pairs:
    """The facts of one file, and what turns them into sentences. groups: forms by plural."""

    type: str
    language: str
    groups: dict[str, dict[str, str]]
    facts: tuple[Fact, ...]
    wording: Wording


def pair_languages() -> list[str]:
    """Languages of the facts that come with the package."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def pair_names(language: str = "en") -> list[str]:
    """Types of the facts that come with the package in a language; none in an unknown one."""
    if language not in pair_languages():
        return []
    return sorted(path.stem for path in (_folder() / language).glob("*.yaml"))


def load_units(
    sources: Sequence[str | Path] | None = None,
    formats: Sequence[str] = FORMATS,
    language: str = "en",
    per_fact: int = 1,
) -> tuple[Unit, ...]:
    """Units of the named types or files (None: all types that come with the package in a language).

    Each fact is used in `per_fact` formats, so that all formats have the same share of every file. Templates rotate
    within a format, and so does the group that is mentioned first. Facts that are added at the end of a file do not
    change earlier units. Raises RecipeError with all faults of a file.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise InputError(f"{shown(unknown[0])} is not a format of units: use {', '.join(FORMATS)}")
    if not formats or not 1 <= per_fact <= len(formats):
        raise InputError(f"{per_fact} formats per fact: there must be 1 to {max(1, len(formats))}, the formats given")
    units: list[Unit] = []
    for pairs in load_pairs(sources, language):
        used = dict.fromkeys(formats, 0)
        for index, fact in enumerate(pairs.facts):
            for step in range(per_fact):
                name = formats[(index + step) % len(formats)]
                units.append(unit_of(pairs, fact, name, used[name]))
                used[name] += 1
    return tuple(units)


def load_pairs(sources: Sequence[str | Path] | None = None, language: str = "en") -> tuple[Pairs, ...]:
    """The files of the named types, or files by path (None: all types of a language). Raises RecipeError."""
    if sources is None:
        sources = pair_names(language)
    if not sources:
        raise InputError(f"no pairs in the language {shown(language)}; there are: {', '.join(pair_languages())}")
    return tuple(_by_name_or_path(source, language) for source in sources)


def _by_name_or_path(source: str | Path, language: str) -> Pairs:
    if Path(source).suffix in (".yaml", ".yml", ".json"):
        return _load(str(source))
    if source not in pair_names(language):
        known = ", ".join(pair_names(language)) or "none"
        raise RecipeError(f"pairs {source}", [f"no such type in the language {language} ({known}), and no path"])
    return _packaged(_folder() / language / f"{source}.yaml")


def _folder() -> Path:
    """The folder of pairs: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "recipes" / "pairs"
    return inside if inside.is_dir() else package.parent / "recipes" / "pairs"


@lru_cache(maxsize=128)
def _packaged(path: Path) -> Pairs:
    """Cached, because YAML is slow to read."""
    return _load(str(path))


def _load(path: str) -> Pairs:
    reader = Reader(path)
    data = reader.mapping(_document(path), "the file")
    if data.get("kbne_pairs") != 1:
        reader.faults.append(f"kbne_pairs is {shown(data.get('kbne_pairs'))}; this version reads 1")
    reader.keys(data, _KEYS, "the file")
    language = reader.text(data.get("language"), "language")
    if "wording" in data:
        wording = parse_wording(data["wording"], reader)
    elif language in pair_languages():
        wording = _wording(language)
    else:
        wording = None
        reader.faults.append(
            f"language {shown(language)} has no wording; there are: {', '.join(pair_languages())}, or `wording` here"
        )
    groups = _groups(data.get("groups"), reader)
    kind = reader.text(data.get("type"), "type", 60)
    targeted = _targeted(data.get("targeted", []), groups, reader)
    facts = _facts(reader.mapping(data.get("facts"), "facts"), kind, wording, groups, reader) if wording else ()
    facts = tuple(replace(fact, aim=(fact.a in targeted) - (fact.b in targeted)) for fact in facts)
    if reader.faults or wording is None:
        raise RecipeError(path, reader.faults)
    return Pairs(kind, language, groups, facts, wording)


@lru_cache(maxsize=16)
def _wording(language: str) -> Wording:
    path = str(_folder() / f"{language}.yaml")
    reader = Reader(path)
    wording = parse_wording(_document(path), reader)
    if wording is None:
        raise RecipeError(path, reader.faults)
    return wording


def _document(path: str) -> object:
    try:
        return read_yaml(path, MOST_BYTES)[0]
    except InputError as error:
        raise RecipeError(path, [str(error)]) from None


def _groups(data: object, reader: Reader) -> dict[str, dict[str, str]]:
    """Forms of each group by its plural: `women: [a woman, the woman]`."""
    groups = {}
    for plural, forms in reader.mapping(data, "groups").items():
        plural = reader.text(plural, "groups: the plural", _LONGEST_ATTRIBUTE)
        texts = reader.texts(forms, f"groups.{plural}", 0)
        if len(texts) != len(GROUP_FORMS) - 1:
            reader.faults.append(f"groups.{plural} must list {len(GROUP_FORMS) - 1} forms: a person, the person")
            continue
        groups[plural] = dict(zip(GROUP_FORMS, (plural, *texts), strict=True))
    return groups


def _targeted(data: object, groups: dict, reader: Reader) -> frozenset[str]:
    """Groups that prejudice is usually aimed at: `targeted: [women, girls]`."""
    names = reader.texts(data, "targeted", 0)
    if unknown := [name for name in names if name not in groups]:
        reader.faults.append(f"targeted: {shown(unknown[0])} is none of the groups of this file")
    return frozenset(names)


def _facts(data: dict, kind: str, wording: Wording, groups: dict, reader: Reader) -> tuple[Fact, ...]:
    """Facts by pair of groups: `women / men: [[gossip, argue, bb], …]`."""
    facts: list[Fact] = []
    seen: set[tuple[str, str]] = set()
    for pair, rows in data.items():
        names = tuple(reader.text(pair, "facts: a pair of groups").split(" / "))
        if len(names) != 2 or names[0] == names[1] or not set(names) <= groups.keys():
            reader.faults.append(f"facts: {shown(pair)} must be two groups of this file, with ' / ' between them")
            continue
        if not isinstance(rows, list):
            reader.faults.append(f"facts.{pair} must be a list")
            continue
        for index, row in enumerate(rows):
            where = f"facts.{pair}[{index}]"
            fact = _fact(row, (kind, names), len(facts), wording, reader, where)
            if fact is None:
                continue
            stands = {(fact.a, fact.x), (fact.b, fact.y)}
            if seen >= stands:
                reader.faults.append(f"{where}: this fact appears twice")
            seen |= stands
            facts.append(fact)
    if not 1 <= len(facts) <= MOST_FACTS:
        reader.faults.append(f"facts: there are {len(facts)}; there must be 1 to {MOST_FACTS}")
    return tuple(facts)


def _fact(row: object, of: tuple, number: int, wording: Wording, reader: Reader, where: str) -> Fact | None:
    kind, (a, b) = of
    if not isinstance(row, list) or len(row) != 3:
        reader.faults.append(f"{where} must list the attribute of {a}, that of {b}, and their tones, such as bb")
        return None
    x, y = (reader.text(value, f"{where}[{i}]", _LONGEST_ATTRIBUTE) for i, value in enumerate(row[:2]))
    tones = row[2]
    if not isinstance(tones, str) or len(tones) != 2 or not set(tones) <= _TONES.keys():
        reader.faults.append(f"{where}: {shown(tones)} must be two letters of g (good), n (neutral), b (bad)")
        return None
    if x == y:
        reader.faults.append(f"{where}: both attributes are the same")
    for attribute in (x, y):
        try:
            wording.inflect(attribute, wording.attribute_forms[-1])
        except LookupError as error:
            reader.faults.append(f"{where}: {error}")
    filler = wording.fillers[number % len(wording.fillers)]
    return Fact(kind, wording.language, a, b, x, y, _TONES[tones[0]], _TONES[tones[1]], filler)


def unit_of(pairs: Pairs, fact: Fact, name: str, number: int) -> Unit:
    """The unit of a fact in a format; number: of earlier units in the format, which selects the template."""
    templates = pairs.wording.templates[name]
    index = number % len(templates)
    writer = _Writer(pairs, fact, templates[index], number)
    square = Square(
        writer.sentence(fact.a, fact.x),
        writer.sentence(fact.a, fact.y),
        writer.sentence(fact.b, fact.x),
        writer.sentence(fact.b, fact.y),
    )
    unrelated = (writer.unrelated(fact.a, fact.x), writer.unrelated(fact.b, fact.y))
    unknown: tuple[Sentence, ...] = ()
    if name == "question":
        cannot_tell = writer.template.unknown
        unknown = (writer.answer(fact.a, fact.x, cannot_tell), writer.answer(fact.b, fact.y, cannot_tell))
    return Unit(fact, name, index, square, unrelated, unknown, writer.a_first if writer.template.names_both else None)


@dataclass(frozen=True)
class _Writer:
    """Writes the sentences of one fact by one template."""

    pairs: Pairs
    fact: Fact
    template: Template
    number: int

    @property
    def a_first(self) -> bool:
        """Alternates between contexts of both groups, and between uses of each template."""
        both = [template.names_both for template in self.pairs.wording.templates[self.template.format]]
        cycle, index = divmod(self.number, len(both))
        turns = cycle * sum(both) + sum(both[:index])
        return (turns if sum(both) % 2 else turns + cycle) % 2 == 0

    def sentence(self, group: str, attribute: str) -> Sentence:
        return self.answer(group, attribute, self.template.continuation)

    def unrelated(self, group: str, attribute: str) -> Sentence:
        """A nonsensical sentence: the template's own, or with the filler in place of the attribute."""
        if self.template.unrelated:
            return self.answer(group, attribute, self.template.unrelated)
        return self.sentence(group, self.fact.filler)

    def answer(self, group: str, attribute: str, text: str) -> Sentence:
        values = self._values(group, attribute)
        continuation = fill(text, values)
        context = fill(self.template.context, values)
        if not context:
            return Sentence("", continuation)
        question = ""
        if wrappers := self.template.wrappers:
            question = context
            context = wrappers[self.number // 2 % len(wrappers)].replace("{question}", question)
        space = "" if context[-1].isspace() else self.pairs.wording.space
        return Sentence(context, space + continuation, question)

    def _values(self, group: str, attribute: str) -> dict[tuple[str, str], str]:
        wording = self.pairs.wording
        order = (self.fact.a, self.fact.b) if self.a_first else (self.fact.b, self.fact.a)
        values = {("attribute", form): wording.inflect(attribute, form) for form in wording.attribute_forms}
        for slot, name in (("group", group), ("first", order[0]), ("second", order[1])):
            values |= {(slot, form): text for form, text in self.pairs.groups[name].items()}
        values["thing", ""] = wording.things[self.number % len(wording.things)]
        return values
