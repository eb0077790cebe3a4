"""The types of a recipe. `Recipe.from_dict` is the only place that makes one from data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypedDict

from ..errors import RecipeError
from ..rule import Rule

# The aims of probes, with the keys of the two sentences in a recipe: that neither sentence of a pair is preferred, or
# that the first becomes less probable than the second.
AIMS = {"balance": ("stereotype", "anti_stereotype"), "avoid": ("unwanted", "wanted")}
# For templates of each aim: the key of the two fillings, and the field that they fill.
TEMPLATES = {"balance": ("groups", "group"), "avoid": ("replies", "reply")}
_USUAL = 48  # questions of a run


@dataclass(frozen=True)
class Question:
    """One question with its right answer. form: the sentence pattern, by which controls are matched.

    twin: text of a control with the same answer that differs only in the subject (ideally in one word).
    """

    text: str
    answer: str
    dimension: str
    form: str
    control: bool = False
    twin: str = ""


class RecipeRow(TypedDict):
    """A recipe of the package: numbers of questions, controls and twins, language and description."""

    questions: int
    controls: int
    twins: int
    language: str
    text: str


class RecipeListJSON(TypedDict):
    """What `recipes list --json` prints, by the recipe's name."""

    recipes: dict[str, RecipeRow]


class RecipeJSON(TypedDict):
    """What `recipes show --json` prints."""

    name: str
    questions: list[Annotated[dict[str, Any], Question]]


@dataclass(frozen=True)
class Probe:
    """Two sentences that differ only in the group, or in the reply. first: the stereotyped or unwanted one."""

    first: str
    second: str
    dimension: str

    @property
    def exchanged(self) -> tuple[Counter[str], Counter[str]]:
        """Words of the first sentence that the second lacks, and the other way round, without case."""
        one, other = (Counter(text.casefold().split()) for text in (self.first, self.second))
        return one - other, other - one


@dataclass(frozen=True)
class Twin:
    """Two probes in which the same two groups (or replies) exchange roles, so that their own frequencies cancel.

    With the aim "balance", `first` is a stereotype of one group and `second` of the other. With "avoid", the unwanted
    reply of `first` is the wanted one in `second` (agreeing with a true claim, answering a question with an answer).
    second: None for a probe of the older format that no other probe mirrors; its score includes word frequency.
    groups: the two fillings of a template; empty if the sentences are written in full.
    """

    first: Probe
    second: Probe | None
    groups: tuple[str, ...] = ()

    @property
    def dimension(self) -> str:
        return self.first.dimension

    @property
    def probes(self) -> tuple[Probe, ...]:
        return (self.first, self.second) if self.second else (self.first,)

    @property
    def mirrored(self) -> bool:
        """True if the two probes exchange the same words, in opposite directions."""
        if self.second is None:
            return False
        # A template mirrors by construction, also in languages without spaces between words.
        return bool(self.groups) or self.first.exchanged == self.second.exchanged[::-1]


@dataclass(frozen=True)
class Pairing:
    """The groups {a} and {b} of one concept in one dimension of the grid."""

    dimension: str
    a: str
    b: str


@dataclass(frozen=True)
class Recipe:
    """A validated recipe. also: other words for an answer. sha256: of the file. pairings: of the questions' grid, in
    its
    order."""

    name: str
    description: str
    language: str
    prompt: dict[str, str]
    answers: tuple[str, ...]
    also: dict[str, tuple[str, ...]]
    factor: float
    select: Rule
    subsets: tuple[int, ...]
    questions: tuple[Question, ...]
    controls: tuple[Question, ...]
    twins: tuple[Twin, ...]
    aim: str
    pairings: tuple[Pairing, ...]
    sha256: str

    @classmethod
    def from_dict(cls, data: object, where: str = "recipe", sha256: str = "") -> Recipe:
        """A recipe from the content of its file. Raises RecipeError with all faults. where: prefix of the message."""
        from .parsing import Parser

        return Parser(where).recipe(data, sha256)

    @property
    def probes(self) -> tuple[Probe, ...]:
        """The probes of all twins, in order."""
        return tuple(probe for twin in self.twins for probe in twin.probes)

    def ask(self, count: int | None) -> tuple[Question, ...]:
        """The first `count` questions (None: `default_count`), their twins, and at most as many controls."""
        if count is None:
            count = self.default_count
        if count not in self.sizes:
            known = ", ".join(map(str, self.sizes))
            raise RecipeError(f"recipe {self.name}", [f"--questions {count} is not one of its subsets ({known})"])
        questions = self.questions[:count]
        return questions + question_twins(questions) + self.controls[:count]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The possible numbers of questions, ascending."""
        return tuple(sorted({*self.subsets, len(self.questions)}))

    @property
    def default_count(self) -> int:
        """The largest size up to 48, which keeps a default run short; the smallest if all are larger."""
        return max((size for size in self.sizes if size <= _USUAL), default=self.sizes[0])


def question_twins(questions: Sequence[Question]) -> tuple[Question, ...]:
    """The questions' twins, which are controls like any other."""
    return tuple(replace(q, text=q.twin, twin="", control=True) for q in questions if q.twin)
