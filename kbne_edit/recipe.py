"""Recipes: what a model is asked. Parses and validates; every fault is reported at once.

`recipes/social-bias.yaml` is the annotated example of the format.
"""

from __future__ import annotations

import hashlib
import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .errors import InputError, OutputError, RecipeError, shown
from .yamlfile import read_yaml

_KEYS = {
    "kbne_recipe",
    "name",
    "language",
    "description",
    "prompt",
    "answers",
    "factor",
    "select",
    "subsets",
    "questions",
    "controls",
    "probes",
}
_DEFAULT_QUESTIONS, _MOST_QUESTIONS = 48, 10_000
RULES, COMBINE = ("paper", "contrastive", "paired", "specific"), ("union", "intersection")
# What is asked of probes: that neither sentence of a pair is preferred, or that the first becomes less probable than
# the second. The keys of the two sentences in a recipe.
AIMS = {"balance": ("stereotype", "anti_stereotype"), "avoid": ("unwanted", "wanted")}


@dataclass(frozen=True)
class Question:
    """One question with its right answer. form: the sentence pattern, by which controls are matched.

    twin: text of the control that is this question but for what it is about (one word, at best), with the same answer.
    """

    text: str
    answer: str
    dimension: str
    form: str
    control: bool = False
    twin: str = ""


@dataclass(frozen=True)
class Probe:
    """Two sentences that differ in one point only: the group, or the behaviour."""

    first: str
    second: str
    dimension: str


@dataclass(frozen=True)
class Recipe:
    """A validated recipe. sha256: of the file, for the record."""

    name: str
    description: str
    language: str
    prompt: dict[str, str]
    answers: tuple[str, ...]
    factor: float
    select: dict
    subsets: tuple[int, ...]
    questions: tuple[Question, ...]
    controls: tuple[Question, ...]
    probes: tuple[Probe, ...]
    aim: str
    sha256: str

    def ask(self, count: int | None) -> tuple[Question, ...]:
        """The first `count` questions, their twins, and as many controls at most.

        None: the largest of the recipe's sizes that is at most 48, which keeps a default run short; if every size is
        larger, the smallest.
        """
        sizes = sorted({*self.subsets, len(self.questions)})
        if count is None:
            count = max((size for size in sizes if size <= _DEFAULT_QUESTIONS), default=sizes[0])
        if count not in sizes:
            known = ", ".join(map(str, sizes))
            raise RecipeError(f"recipe {self.name}", [f"--questions {count} is none of its subsets ({known})"])
        asked = self.questions[:count]
        return asked + _twins(asked) + self.controls[:count]


def _twins(questions: Sequence[Question]) -> tuple[Question, ...]:
    """The questions' twins, which are controls as any other."""
    return tuple(replace(q, text=q.twin, twin="", control=True) for q in questions if q.twin)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def _folder() -> Path:
    """Inside the wheel the recipes lie in the package, in a checkout beside it."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


def new_recipe(name: str, path: str | Path) -> None:
    """Write an annotated skeleton, in order as it stands, to a file that is not there yet. Raises OutputError."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise InputError(f"{shown(name)} is no name for a recipe: letters, digits, - and _ are")
    text = (Path(__file__).parent / "skeleton.yaml").read_text(encoding="utf-8")
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text.replace("NAME", name))
    except FileExistsError:
        raise OutputError(f"{path} exists: choose another --out") from None
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from None


def load_recipe(source: str | Path) -> Recipe:
    """A recipe by name or by path. Raises RecipeError with all faults."""
    path = Path(source)
    if path.suffix not in (".yaml", ".yml", ".json"):
        path = _folder() / f"{source}.yaml"
        if not path.is_file():
            raise RecipeError(
                f"recipe {source}", [f"no such recipe; there are: {', '.join(recipe_names())}, or a path"]
            )
    try:
        data, raw = read_yaml(path)
    except InputError as error:
        raise RecipeError(str(path), [str(error)]) from None
    return _Parser(str(path)).recipe(data, hashlib.sha256(raw).hexdigest())


@dataclass
class _Parser:
    """Collects faults instead of stopping at the first."""

    where: str
    faults: list[str] = field(default_factory=list)

    def recipe(self, data: object, digest: str) -> Recipe:
        if not isinstance(data, dict):
            raise RecipeError(self.where, ["not a mapping of keys; `kbne-edit recipes show social-bias` prints one"])
        self.unknown(data, _KEYS, "recipe")
        if data.get("kbne_recipe") != 1:
            self.faults.append(f"kbne_recipe is {shown(data.get('kbne_recipe'))}; this version reads 1")
        answers = tuple(self.strings(data.get("answers"), "answers"))
        if len(answers) < 2 or len({a.casefold() for a in answers}) != len(answers):
            self.faults.append("answers must list two or more different answers")
        prompt = self.prompt(data.get("prompt"))
        questions = self.section(data.get("questions"), "questions", answers, False)
        controls = self.section(data.get("controls") or {}, "controls", answers, True)
        if not questions:
            self.faults.append("questions: there are none")
        texts = Counter(q.text for q in questions + _twins(questions) + controls)
        self.faults += [f"question stands twice: {shown(t)}" for t, count in sorted(texts.items()) if count > 1]
        result = Recipe(
            self.string(data.get("name"), "name"),
            self.string(data.get("description", ""), "description"),
            self.string(data.get("language", "en"), "language"),
            prompt,
            answers,
            self.number(data.get("factor", 2), "factor"),
            self.select(data.get("select", {})),
            self.subsets(data.get("subsets", []), len(questions)),
            questions,
            controls,
            *self.probes(data.get("probes") or {}),
            digest,
        )
        if self.faults:
            raise RecipeError(self.where, self.faults)
        return result

    def unknown(self, data: dict, known: set[str], where: str) -> None:
        self.faults += [f"{where}: unknown key {shown(key)}" for key in data if key not in known]

    def string(self, value: object, where: str) -> str:
        if not isinstance(value, str) or any("\ud800" <= c <= "\udfff" for c in value):  # half a character
            self.faults.append(f"{where} must be text")
            return ""
        return value

    def strings(self, value: object, where: str) -> list[str]:
        if not isinstance(value, list):
            self.faults.append(f"{where} must be a list")
            return []
        return [self.string(v, f"{where}[{i}]") for i, v in enumerate(value)]

    def number(self, value: object, where: str, low: float = -1e6, high: float = 1e6) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            self.faults.append(f"{where} is {shown(value)}; it must be a number from {low:g} to {high:g}")
            return 0.0
        return float(value)

    def prompt(self, value: object) -> dict[str, str]:
        if not isinstance(value, dict) or "plain" not in value:
            self.faults.append("prompt must have `plain` (and may have `chat`)")
            return {}
        self.unknown(value, {"plain", "chat"}, "prompt")
        for key, text in value.items():
            if "{question}" not in self.string(text, f"prompt.{key}"):
                self.faults.append(f"prompt.{key} lacks {{question}}")
        return value

    def select(self, value: object) -> dict:
        if not isinstance(value, dict):
            self.faults.append("select must be a mapping")
            return {}
        self.unknown(value, {"rule", "tau", "beta", "top", "combine"}, "select")
        result = {"rule": value.get("rule", "paper"), "combine": value.get("combine", "union")}
        for key, known in (("rule", RULES), ("combine", COMBINE)):
            if result[key] not in known:
                self.faults.append(f"select.{key} is {shown(result[key])}; it must be one of {', '.join(known)}")
        for key in ("tau", "beta"):
            result[key] = self.number(value.get(key, 0.1), f"select.{key}", 0, 1)
        result["top"] = self.number(value["top"], "select.top", 0, 1) if "top" in value else None
        return result

    def subsets(self, value: object, count: int) -> tuple[int, ...]:
        if not isinstance(value, list) or not all(type(n) is int and 0 < n <= count for n in value):
            self.faults.append(f"subsets must list whole numbers from 1 to {count}")
            return ()
        return tuple(value)

    def section(self, value: object, where: str, answers: tuple[str, ...], control: bool) -> tuple[Question, ...]:
        if not isinstance(value, dict):
            self.faults.append(f"{where} must be a mapping with forms, dimensions and concepts, or items")
            return ()
        self.unknown(value, {"forms", "dimensions", "concepts", "order", "items"}, where)
        rows, items = self.grid(value, where), value.get("items", [])
        if not isinstance(items, list):
            self.faults.append(f"{where}.items must be a list")
            items = []
        questions = []
        for i, item in enumerate(rows + items):
            spot = f"{where} {i + 1}"
            if not isinstance(item, dict) or not {"text", "answer", "dimension"} <= set(item):
                self.faults.append(f"{spot}: needs text, answer and dimension")
                continue
            self.unknown(item, {"text", "answer", "dimension", "form", "twin"}, spot)
            if item["answer"] not in answers:
                self.faults.append(f"{spot}: answer {shown(item['answer'])} is none of {', '.join(answers)}")
            if control and "twin" in item:
                self.faults.append(f"{spot}: a control has no twin; it is one")
            text, answer, dimension, form, twin = (
                self.string(item.get(key, ""), f"{spot}: {key}")
                for key in ("text", "answer", "dimension", "form", "twin")
            )
            questions.append(Question(text, answer, dimension, form, control, twin))
        return tuple(questions)

    def grid(self, value: dict, where: str) -> list[dict]:
        """The grid as items, as `items` lists them: every form of each (concept, dimension) in turn."""
        parts = [value.get(key, {}) for key in ("forms", "dimensions", "concepts")]
        if not any(parts):
            return []
        forms, dimensions, concepts = parts
        if not all(isinstance(p, dict) and p and all(isinstance(v, dict) for v in p.values()) for p in parts):
            self.faults.append(f"{where}: a grid needs forms, dimensions and concepts, each a mapping of mappings")
            return []
        if math.prod(map(len, parts)) > _MOST_QUESTIONS:
            self.faults.append(f"{where}: the grid has more than {_MOST_QUESTIONS} questions")
            return []
        for name, form in forms.items():
            self.unknown(form, {"text", "twin", "answer"}, f"{where}: form {shown(name)}")
        pairs = {
            name: self.pairs(about, f"{where}: pairs of dimension {shown(name)}") for name, about in dimensions.items()
        }
        met: Counter[str] = Counter()
        rows = []
        for concept, dimension in self.cells(value.get("order"), concepts, dimensions, where):
            turn = pairs[dimension][met[dimension] % len(pairs[dimension])] if pairs[dimension] else ()
            met[dimension] += 1
            about = {key: text for key, text in dimensions[dimension].items() if key != "pairs"}
            values = about | concepts[concept] | dict(zip("ab", turn, strict=False))
            for name, form in forms.items():
                spot = f"{where}: form {shown(name)} with {shown(concept)}, {shown(dimension)}"
                texts = {
                    key: self.fill(form.get(key), values, spot)
                    for key in ("text", "twin")
                    if key == "text" or key in form
                }
                rows.append({**texts, "answer": form.get("answer"), "dimension": str(dimension), "form": str(name)})
        return rows

    def pairs(self, about: dict, where: str) -> list:
        """The pairs [a, b] of a dimension; number i is used by the i-th concept that the dimension meets."""
        pairs = about.get("pairs", [])
        if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            self.faults.append(f"{where} must be a list of [a, b]")
            return []
        return pairs

    def cells(self, order: object, concepts: dict, dimensions: dict, where: str) -> list[tuple]:
        """(concept, dimension) in the order in which they are asked: concept by concept, or as `order` says.

        `order` lists blocks of concepts and dimensions; each block is gone through concept by concept. So a subset
        may hold few dimensions with several concepts each, and dimensions may differ in their concepts.
        """
        if order is None:
            return [(concept, dimension) for concept in concepts for dimension in dimensions]
        keys = {"concepts": concepts, "dimensions": dimensions}
        if not isinstance(order, list) or not all(
            isinstance(block, dict) and set(block) == set(keys) and all(isinstance(v, list) for v in block.values())
            for block in order
        ):
            self.faults.append(f"{where}.order must list blocks, each with a list of concepts and one of dimensions")
            return []
        for key, known in keys.items():
            named = [name for block in order for name in block[key]]
            odd = [name for name in named if not isinstance(name, str) or name not in known]
            self.faults += [f"{where}.order: {shown(name)} is none of the {key}" for name in odd]
            self.faults += [f"{where}.order leaves out {shown(name)}" for name in known if name not in named]
            if odd:
                return []
        if sum(len(block["concepts"]) * len(block["dimensions"]) for block in order) > len(concepts) * len(dimensions):
            self.faults.append(f"{where}.order has more cells than the grid: a concept meets a dimension twice")
            return []
        cells = [(c, d) for block in order for c in block["concepts"] for d in block["dimensions"]]
        twice = sorted(cell for cell, count in Counter(cells).items() if count > 1)
        self.faults += [f"{where}.order: {shown(c)} meets {shown(d)} twice" for c, d in twice]
        return cells

    def fill(self, text: object, values: dict, where: str) -> str:
        """The text with its fields filled in once: neither format(), which would let a recipe reach into attributes,
        nor the fields of a field."""
        try:
            pieces = list(string.Formatter().parse(self.string(text, where)))
        except ValueError as error:
            self.faults.append(f"{where}: {error}")
            return ""
        if odd := sorted({name for _, name, form, kind in pieces if name is not None and (form or kind)}):
            self.faults.append(f"{where}: {shown(odd[0])} has a format; a field is a name alone")
        if missing := [name for _, name, *_ in pieces if name is not None and name not in values]:
            self.faults.append(f"{where}: no value for {', '.join('{' + m + '}' for m in missing)[:80]}")
            return ""
        return "".join(
            before + (self.string(values[name], f"{where}: {{{name}}}") if name is not None else "")
            for before, name, *_ in pieces
        )

    def probes(self, value: object) -> tuple[tuple[Probe, ...], str]:
        """The pairs, and their aim."""
        items = value.get("items", []) if isinstance(value, dict) else None
        if not isinstance(items, list):
            self.faults.append("probes must be a mapping with items")
            return (), "balance"
        self.unknown(value, {"aim", "items"}, "probes")
        aim = value.get("aim", "balance")
        if aim not in list(AIMS):  # of a list, since a value from outside need not be hashable
            self.faults.append(f"probes.aim is {shown(aim)}; it must be one of {', '.join(AIMS)}")
            aim = "balance"
        keys = (*AIMS[aim], "dimension")
        found = []
        for i, item in enumerate(items):
            if not isinstance(item, dict) or set(item) != set(keys):
                self.faults.append(f"probe {i + 1}: needs exactly {keys[0]}, {keys[1]} and dimension")
                continue
            found.append(Probe(*(self.string(item[key], f"probe {i + 1}: {key}") for key in keys)))
        return tuple(found), aim
