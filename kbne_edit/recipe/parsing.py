"""Parses and validates a recipe, and reports all faults at once."""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..errors import RecipeError, shown
from ..rule import COMBINE, RULES, Rule
from ..yamlfile import has_lone_surrogate
from .types import AIMS, TEMPLATES, Pairing, Probe, Question, Recipe, Twin, question_twins

KEYS = {
    "kbne_recipe",
    "name",
    "language",
    "description",
    "prompt",
    "answers",
    "also",
    "factor",
    "select",
    "subsets",
    "questions",
    "controls",
    "probes",
}
# A grid multiplies: without bounds 46 KB of YAML would describe 80 MB of questions.
_MOST_QUESTIONS = 10_000
_MOST_CHARACTERS = 4_000  # of one question or probe
_MOST_TEXT = 4_000_000  # characters of all of them
_MOST_FAULTS = 200  # further faults are dropped


@dataclass
class Parser:
    """Parses a recipe and collects all faults. where: prefix of the message."""

    where: str
    faults: list[str] = field(default_factory=list)
    pairings: list[Pairing] = field(default_factory=list)
    characters: int = 0

    def recipe(self, data: object, digest: str) -> Recipe:
        """The recipe. digest: SHA-256 of its file. Raises RecipeError with all faults."""
        if not isinstance(data, dict):
            raise RecipeError(self.where, ["not a mapping of keys; `kbne-edit recipes show social-bias` prints one"])
        self.unknown(data, KEYS, "recipe")
        if data.get("kbne_recipe") != 1:
            self.fault(f"kbne_recipe is {shown(data.get('kbne_recipe'))}; this version reads 1")
        answers = tuple(self.strings(data.get("answers"), "answers"))
        if len(answers) < 2 or len({a.strip().casefold() for a in answers}) != len(answers):
            self.fault("answers must list two or more different answers")
        prompt = self.prompt(data.get("prompt"))
        questions = self.section(data.get("questions"), "questions", answers, False)
        pairings = tuple(self.pairings)
        controls = self.section(data.get("controls") or {}, "controls", answers, True)
        if not questions:
            self.fault("questions: there are none")
        self.duplicates((q.text for q in questions + question_twins(questions) + controls), "question")
        aim, twins = self.probes(data.get("probes") or {})
        result = Recipe(
            name=self.string(data.get("name"), "name"),
            description=self.string(data.get("description", ""), "description"),
            language=self.string(data.get("language", "en"), "language"),
            prompt=prompt,
            answers=answers,
            also=self.also(data.get("also", {}), answers),
            factor=self.number(data.get("factor", 2), "factor"),
            select=self.select(data.get("select", {})),
            subsets=self.subsets(data.get("subsets", []), len(questions)),
            questions=questions,
            controls=controls,
            twins=twins,
            aim=aim,
            pairings=pairings,
            sha256=digest,
        )
        if self.faults:
            raise RecipeError(self.where, self.faults)
        return result

    # -------------------------------------------------------------------------------------------------- single values

    def also(self, value: object, answers: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """Other words for each answer. No word may mean two answers."""
        if not isinstance(value, dict):
            self.fault("also must map answers to lists of other words for them")
            return {}
        self.unknown(value, set(answers), "also")
        result = {name: tuple(self.strings(words, f"also.{name}")) for name, words in value.items() if name in answers}
        every = [text.strip().casefold() for text in (*answers, *(text for words in result.values() for text in words))]
        if len(set(every)) < len(every):
            self.fault("also: a word means two answers, or appears twice")
        return result

    def fault(self, text: str) -> None:
        if len(self.faults) < _MOST_FAULTS:
            self.faults.append(text)

    def unknown(self, data: dict, known: Iterable[str], where: str) -> None:
        for key in data:
            if key not in known:
                self.fault(f"{where}: unknown key {shown(key)}")

    def duplicates(self, texts: Iterable[str], what: str) -> None:
        """Report each text that appears twice, ignoring case and spaces."""
        counts = Counter(" ".join(text.casefold().split()) for text in texts)
        for text, count in sorted(counts.items()):
            if text and count > 1:
                self.fault(f"{what} appears twice: {shown(text)}")

    def string(self, value: object, where: str) -> str:
        if not isinstance(value, str) or has_lone_surrogate(value):
            self.fault(f"{where} must be text")
            return ""
        return value

    def words(self, value: object, where: str) -> str:
        """A question or a sentence: text that is neither empty nor too long."""
        text = self.string(value, where)
        if isinstance(value, str) and not text.strip():
            self.fault(f"{where} is empty")
        return self.bounded(text, where)

    def bounded(self, text: str, where: str, length: int | None = None) -> str:
        """`text`, or "" with a fault if it is too long. length: of the text after its fields are filled."""
        length = len(text) if length is None else length
        if length > _MOST_CHARACTERS:
            self.fault(f"{where} has {length} characters; {_MOST_CHARACTERS} are the most")
            return ""
        self.characters += length
        if self.characters > _MOST_TEXT:
            raise RecipeError(self.where, [*self.faults, f"{where}: more than {_MOST_TEXT} characters in all"])
        return text

    def strings(self, value: object, where: str) -> list[str]:
        if not isinstance(value, list):
            self.fault(f"{where} must be a list")
            return []
        return [self.string(v, f"{where}[{i}]") for i, v in enumerate(value)]

    def number(self, value: object, where: str, low: float = -1e6, high: float = 1e6) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            self.fault(f"{where} is {shown(value)}; it must be a number from {low:g} to {high:g}")
            return 0.0
        return float(value)

    def prompt(self, value: object) -> dict[str, str]:
        if not isinstance(value, dict) or "plain" not in value:
            self.fault("prompt must have `plain` (and may have `chat`)")
            return {}
        self.unknown(value, {"plain", "chat"}, "prompt")
        for key, text in value.items():
            if "{question}" not in self.string(text, f"prompt.{key}"):
                self.fault(f"prompt.{key} lacks {{question}}")
        return value

    def select(self, value: object) -> Rule:
        if not isinstance(value, dict):
            self.fault("select must be a mapping")
            return Rule()
        self.unknown(value, {"rule", "tau", "beta", "top", "combine", "same_sign"}, "select")
        name, combine, same_sign = value.get("rule", "paper"), value.get("combine", "union"), value.get("same_sign")
        for key, given, known in (("rule", name, RULES), ("combine", combine, COMBINE)):
            if given not in known:
                self.fault(f"select.{key} is {shown(given)}; it must be one of {', '.join(known)}")
        if str(same_sign).lower() not in ("none", "true", "false"):  # the reader leaves booleans as strings
            self.fault(f"select.same_sign is {shown(same_sign)}; it must be true or false")
        tau, beta = (self.number(value.get(key, 0.1), f"select.{key}", 0, 1) for key in ("tau", "beta"))
        top = self.number(value["top"], "select.top", 0, 1) if "top" in value else None
        if self.faults:  # the recipe is refused anyway
            return Rule()
        return Rule(name, tau, beta, top, combine, str(same_sign).lower() == "true")

    def subsets(self, value: object, count: int) -> tuple[int, ...]:
        if not isinstance(value, list) or not all(type(n) is int and 0 < n <= count for n in value):
            self.fault(f"subsets must list whole numbers from 1 to {count}")
            return ()
        return tuple(value)

    # ------------------------------------------------------------------------------------------ questions and controls

    def section(self, value: object, where: str, answers: tuple[str, ...], control: bool) -> tuple[Question, ...]:
        if not isinstance(value, dict):
            self.fault(f"{where} must be a mapping with forms, dimensions and concepts, or items")
            return ()
        self.unknown(value, {"forms", "dimensions", "concepts", "order", "items"}, where)
        rows, items = self.grid(value, where), value.get("items", [])
        if not isinstance(items, list):
            self.fault(f"{where}.items must be a list")
            items = []
        questions = []
        for i, item in enumerate(rows + items):
            spot = f"{where} {i + 1}"
            if not isinstance(item, dict) or not {"text", "answer", "dimension"} <= set(item):
                self.fault(f"{spot}: needs text, answer and dimension")
                continue
            self.unknown(item, {"text", "answer", "dimension", "form", "twin"}, spot)
            if item["answer"] not in answers:
                self.fault(f"{spot}: answer {shown(item['answer'])} is not one of {', '.join(answers)}")
            if control and "twin" in item:
                self.fault(f"{spot}: a control cannot have a twin")
            twin = self.words(item["twin"], f"{spot}: twin") if item.get("twin", "") != "" else ""
            text = self.words(item["text"], f"{spot}: text")
            answer, dimension, form = (
                self.string(item.get(key, ""), f"{spot}: {key}") for key in ("answer", "dimension", "form")
            )
            questions.append(Question(text, answer, dimension, form, control, twin))
        return tuple(questions)

    def grid(self, value: dict, where: str) -> list[dict]:
        """The questions of the grid, in the form of `items`: all forms of each (concept, dimension), in order."""
        parts = [value.get(key, {}) for key in ("forms", "dimensions", "concepts")]
        if not any(parts):
            return []
        forms, dimensions, concepts = parts
        if not all(isinstance(p, dict) and p and all(isinstance(v, dict) for v in p.values()) for p in parts):
            self.fault(f"{where}: a grid needs forms, dimensions and concepts, each a mapping of mappings")
            return []
        if math.prod(map(len, parts)) > _MOST_QUESTIONS:
            self.fault(f"{where}: the grid has more than {_MOST_QUESTIONS} questions")
            return []
        for name, form in forms.items():
            self.unknown(form, {"text", "twin", "answer"}, f"{where}: form {shown(name)}")
        pairs = {
            name: self.pairs(about, f"{where}: pairs of dimension {shown(name)}") for name, about in dimensions.items()
        }
        met: Counter[str] = Counter()
        rows = []
        for concept, dimension in self.cells(value.get("order"), concepts, dimensions, where):
            values = {key: text for key, text in dimensions[dimension].items() if key != "pairs"} | concepts[concept]
            if of_dimension := pairs[dimension]:
                a, b = of_dimension[met[dimension] % len(of_dimension)]
                values |= {"a": a, "b": b}
                self.pairings.append(Pairing(str(dimension), a, b))
            met[dimension] += 1
            for name, form in forms.items():
                spot = f"{where}: form {shown(name)} with {shown(concept)}, {shown(dimension)}"
                texts = {key: self.fill(form.get(key), values, spot) for key in ("text", *({"twin"} & set(form)))}
                rows.append({**texts, "answer": form.get("answer"), "dimension": str(dimension), "form": str(name)})
        return rows

    def pairs(self, about: dict, where: str) -> list[list[str]]:
        """The pairs [a, b] of a dimension; the i-th pair goes with the dimension's i-th concept."""
        pairs = about.get("pairs", [])
        if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            self.fault(f"{where} must be a list of [a, b]")
            return []
        return [self.strings(pair, where) for pair in pairs]

    def cells(self, order: object, concepts: dict, dimensions: dict, where: str) -> list[tuple]:
        """(concept, dimension) in the order of the questions: concept by concept, or by `order`.

        `order` lists blocks of concepts and dimensions; each block is expanded concept by concept. So a subset may have
        few dimensions with several concepts each, and dimensions may differ in their concepts.
        """
        if order is None:
            return [(concept, dimension) for concept in concepts for dimension in dimensions]
        keys = {"concepts": concepts, "dimensions": dimensions}
        if not isinstance(order, list) or not all(
            isinstance(block, dict) and set(block) == set(keys) and all(isinstance(v, list) for v in block.values())
            for block in order
        ):
            self.fault(f"{where}.order must list blocks, each with a list of concepts and one of dimensions")
            return []
        for key, known in keys.items():
            named = [name for block in order for name in block[key]]
            odd = [name for name in named if not isinstance(name, str) or name not in known]
            for name in odd:
                self.fault(f"{where}.order: {shown(name)} is not one of the {key}")
            if odd:
                return []
            present = set(named)
            for name in [name for name in known if name not in present]:
                self.fault(f"{where}.order leaves out {shown(name)}")
        if sum(len(block["concepts"]) * len(block["dimensions"]) for block in order) > len(concepts) * len(dimensions):
            self.fault(f"{where}.order has more cells than the grid: a concept meets a dimension twice")
            return []
        cells = [(c, d) for block in order for c in block["concepts"] for d in block["dimensions"]]
        for (concept, dimension), count in sorted(Counter(cells).items()):
            if count > 1:
                self.fault(f"{where}.order: {shown(concept)} meets {shown(dimension)} twice")
        return cells

    def fill(self, text: object, values: dict, where: str) -> str:
        """The text with its fields filled in, without recursion. Rejected: str.format, which gives a recipe access to
        attributes."""
        try:
            pieces = list(string.Formatter().parse(self.string(text, where)))
        except ValueError as error:
            self.fault(f"{where}: {error}")
            return ""
        if odd := sorted({name for _, name, form, kind in pieces if name is not None and (form or kind)}):
            self.fault(f"{where}: {shown(odd[0])} has a format; a field is just a name")
        if missing := [name for _, name, *_ in pieces if name is not None and name not in values]:
            self.fault(f"{where}: no value for {', '.join('{' + m + '}' for m in missing)[:80]}")
            return ""
        filled = [
            (before, self.string(values[name], f"{where}: {{{name}}}") if name is not None else "")
            for before, name, *_ in pieces
        ]
        length = sum(len(before) + len(value) for before, value in filled)
        if length > _MOST_CHARACTERS:  # known before the text is made
            return self.bounded("", where, length)
        return "".join(before + value for before, value in filled)

    # --------------------------------------------------------------------------------------------------------- probes

    def probes(self, value: object) -> tuple[str, tuple[Twin, ...]]:
        """(aim, twins)."""
        items = value.get("items", []) if isinstance(value, dict) else None
        if not isinstance(value, dict) or not isinstance(items, list):
            self.fault("probes must be a mapping with items")
            return "balance", ()
        self.unknown(value, {"aim", "items"}, "probes")
        aim = value.get("aim", "balance")
        if aim not in list(AIMS):  # in a list, since the value may not be hashable
            self.fault(f"probes.aim is {shown(aim)}; it must be one of {', '.join(AIMS)}")
            aim = "balance"
        if len(items) > _MOST_QUESTIONS:
            self.fault(f"probes: more than {_MOST_QUESTIONS}")
            return aim, ()
        twins: list[Twin] = []
        for i, item in enumerate(items):
            if twin := self.twin(item, aim, f"probe {i + 1}"):
                twins.append(twin)
        twins = paired(twins)
        self.duplicates((f"{probe.first} / {probe.second}" for twin in twins for probe in twin.probes), "probe")
        return aim, tuple(twins)

    def twin(self, item: object, aim: str, where: str) -> Twin | None:
        """A twin in one of three forms: a template, two full pairs, or (older) a single pair."""
        fillings, _ = TEMPLATES[aim]
        flat = {*AIMS[aim], "dimension"}
        if isinstance(item, dict) and set(item) == {"dimension", "first", "second", fillings}:
            return self.template(item, aim, where)
        if isinstance(item, dict) and set(item) == {"dimension", "first", "second"}:
            dimension = self.string(item["dimension"], f"{where}: dimension")
            first, second = (self.pair(item[key], aim, dimension, f"{where}: {key}") for key in ("first", "second"))
            if first and second and first == Probe(second.second, second.first, dimension):
                self.fault(f"{where}: first and second are the same two sentences")
            return Twin(first, second) if first and second else None
        if isinstance(item, dict) and set(item) == flat:
            dimension = self.string(item["dimension"], f"{where}: dimension")
            pair = self.pair({key: item[key] for key in AIMS[aim]}, aim, dimension, where)
            return Twin(pair, None) if pair else None
        one, other = AIMS[aim]
        self.fault(
            f"{where}: needs exactly {one}, {other} and dimension, or dimension, first and second (each with "
            f"{one} and {other}), or {fillings} besides"
        )
        return None

    def pair(self, value: object, aim: str, dimension: str, where: str) -> Probe | None:
        keys = AIMS[aim]
        if not isinstance(value, dict) or set(value) != set(keys):
            self.fault(f"{where}: needs exactly {keys[0]} and {keys[1]}")
            return None
        one, other = (self.words(value[key], f"{where}: {key}") for key in keys)
        if one.strip() and " ".join(one.split()) == " ".join(other.split()):
            self.fault(f"{where}: {keys[0]} and {keys[1]} are the same sentence")
        return Probe(one, other, dimension)

    def template(self, item: dict, aim: str, where: str) -> Twin | None:
        """Two sentences with a gap, and two fillings. With the first filling `first` is the stereotyped (unwanted)
        sentence, with the second filling `second` is."""
        fillings, gap = TEMPLATES[aim]
        dimension = self.string(item["dimension"], f"{where}: dimension")
        groups = [text.strip() for text in self.strings(item[fillings], f"{where}: {fillings}")]
        if len(groups) != 2 or groups[0] == groups[1] or not all(groups):
            self.fault(f"{where}: {fillings} must list two different texts")
            return None
        sentences = []
        for key in ("first", "second"):
            text = self.string(item[key], f"{where}: {key}")
            if "{" + gap + "}" not in text:
                self.fault(f"{where}: {key} lacks {{{gap}}}")
                return None
            filled = (self.fill(text, {gap: group}, f"{where}: {key}") for group in groups)
            sentences.append([self.words(_capitalised(text, sentence), f"{where}: {key}") for sentence in filled])
        if " ".join(item["first"].split()) == " ".join(item["second"].split()):
            self.fault(f"{where}: first and second are the same sentence")
        (a_first, b_first), (a_second, b_second) = sentences
        return Twin(Probe(a_first, b_first, dimension), Probe(b_second, a_second, dimension), tuple(groups))


def _capitalised(template: str, sentence: str) -> str:
    """Capitalise a sentence that begins with its gap."""
    return sentence[:1].upper() + sentence[1:] if template.startswith("{") else sentence


def paired(twins: list[Twin]) -> list[Twin]:
    """Join single probes (of the older format) with the next one that mirrors them; others stay single."""
    result: list[Twin | None] = list(twins)
    waiting: dict[tuple, list[int]] = {}
    for i, twin in enumerate(twins):
        if twin.second is not None:
            continue
        one, other = (frozenset(words.items()) for words in twin.first.exchanged)
        if earlier := waiting.get((twin.dimension, other, one)):
            partner = earlier.pop(0)
            result[partner] = Twin(twins[partner].first, twin.first)
            result[i] = None
        else:
            waiting.setdefault((twin.dimension, one, other), []).append(i)
    return [twin for twin in result if twin is not None]
