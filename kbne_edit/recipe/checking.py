"""What a recipe gives away to a model that does not understand it: how often a constant answer, or the most frequent
answer to the opening words, is right; how questions and controls differ in length; how groups and answers are balanced.

If the right answer to "Is it unfair …" is always yes, a recipe cannot tell a model that knows from one that matches
words.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from .types import Question, Recipe

LONGEST_OPENING = 3  # words (characters where words are not spaced) that count as the opening
TOLERANCE = 0.05  # above chance: beyond it an answer or an opening gives too much away
LENGTHS = (0.85, 1.15)  # allowed ratio of the mean lengths of a form's controls and questions
FEWEST_TWINS = 6  # with fewer, even a unanimous sign test is not significant at 5 %, two-sided


@dataclass(frozen=True)
class Shortcuts:
    """Shares of right answers without reading the question. always: by a constant answer; opening: by the most frequent
    answer to the same first words, for the length from 1 to `LONGEST_OPENING` words that gives most away. An opening
    that occurs once counts as a guess."""

    count: int
    always: dict[str, float]
    opening: float


@dataclass(frozen=True)
class FormLength:
    """Mean number of words (characters where words are not spaced) of a form's questions and controls.

    controls: None if the form has none."""

    form: str
    questions: float
    controls: float | None

    @property
    def ratio(self) -> float | None:
        return None if self.controls is None else self.controls / self.questions


@dataclass(frozen=True)
class GroupUse:
    """How often a group is {a} and is {b} in one dimension."""

    dimension: str
    group: str
    first: int
    second: int


@dataclass(frozen=True)
class RecipeCheck:
    """The result of `check_recipe`. questions, controls: their shortcuts. uneven_subsets: sizes of subsets in which an
    answer, an opening or a dimension is too frequent. uneven_groups: groups that are {a} and {b} unequally often.
    twins: number in each dimension. notes: what to look at, one sentence each."""

    name: str
    chance: float
    questions: Shortcuts
    controls: Shortcuts
    lengths: tuple[FormLength, ...]
    uneven_subsets: tuple[int, ...]
    uneven_groups: tuple[GroupUse, ...]
    twins: dict[str, int]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def words(text: str) -> list[str]:
    """The words of a text; its characters where words are not spaced."""
    return text.split() if " " in text.strip() else list(text.strip())


def shortcuts(questions: Sequence[Question], answers: Sequence[str]) -> Shortcuts:
    """Shares of right answers by a constant answer and by the opening; 0 if there are no questions."""
    count = len(questions)
    if not count:
        return Shortcuts(0, dict.fromkeys(answers, 0.0), 0.0)
    given = Counter(question.answer for question in questions)
    by_length = []
    for length in range(1, LONGEST_OPENING + 1):
        answers_of: defaultdict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        for question in questions:
            answers_of[tuple(words(question.text)[:length])][question.answer] += 1
        # For an opening that occurs once, the most frequent answer is its own: that is not a prediction.
        right = [max(counts.values()) if counts.total() > 1 else 1 / len(answers) for counts in answers_of.values()]
        by_length.append(sum(right) / count)
    return Shortcuts(count, {answer: given[answer] / count for answer in answers}, max(by_length))


def check_recipe(recipe: Recipe) -> RecipeCheck:
    """Measure what a valid recipe gives away."""
    chance = 1 / len(recipe.answers)
    sides = [shortcuts(side, recipe.answers) for side in (recipe.questions, recipe.controls)]
    lengths = _lengths(recipe)
    uneven = tuple(size for size in sorted({*recipe.subsets, len(recipe.questions)}) if _uneven(recipe, size, chance))
    groups = _uneven_groups(recipe)
    twins = Counter(twin.dimension for twin in recipe.twins)
    notes = [*_shortcut_notes(sides, chance), *_form_notes(recipe, lengths)]
    notes += [
        f"subset {size} is not balanced: an answer or a dimension is more frequent than others" for size in uneven
    ]
    notes += [f"{use.group} ({use.dimension}) is {use.first} times a and {use.second} times b" for use in groups]
    notes += _twin_notes(recipe, twins)
    return RecipeCheck(recipe.name, chance, sides[0], sides[1], lengths, uneven, groups, dict(twins), tuple(notes))


def _lengths(recipe: Recipe) -> tuple[FormLength, ...]:
    forms = dict.fromkeys(question.form for question in recipe.questions)

    def of(side: Iterable[Question], form: str) -> float | None:
        lengths = [len(words(question.text)) for question in side if question.form == form]
        return mean(lengths) if lengths else None

    return tuple(FormLength(form, of(recipe.questions, form) or 0.0, of(recipe.controls, form)) for form in forms)


def _uneven(recipe: Recipe, size: int, chance: float) -> bool:
    """True if an answer, an opening or a dimension is too frequent among the first `size` questions."""
    questions = recipe.questions[:size]
    shares = shortcuts(questions, recipe.answers)
    dimensions = Counter(question.dimension for question in questions)
    return max(*shares.always.values(), shares.opening) > chance + TOLERANCE or len(set(dimensions.values())) > 1


def _uneven_groups(recipe: Recipe) -> tuple[GroupUse, ...]:
    """Groups that are {a} and {b} unequally often. () if {a} and {b} are not groups (but a question and its twin, or
    something harmless and something harmful): then they are not meant to change places."""
    if recipe.aim != "balance" or any(question.twin for question in recipe.questions):
        return ()
    uses: defaultdict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for pairing in recipe.pairings:
        uses[pairing.dimension, pairing.a][0] += 1
        uses[pairing.dimension, pairing.b][1] += 1
    return tuple(
        GroupUse(dimension, group, first, second)
        for (dimension, group), (first, second) in uses.items()
        if first != second
    )


def _shortcut_notes(sides: Sequence[Shortcuts], chance: float) -> list[str]:
    notes = []
    for name, shares in zip(("questions", "controls"), sides, strict=True):
        for answer, share in shares.always.items():
            if share > chance + TOLERANCE:
                notes.append(f'always "{answer}" is right in {share:.1%} of the {name}: balance the answers')
        if shares.opening > chance + TOLERANCE:
            notes.append(
                f"the opening words give away {shares.opening:.1%} of the {name}: write forms in pairs that begin "
                "alike and have different answers"
            )
    return notes


def _form_notes(recipe: Recipe, lengths: Sequence[FormLength]) -> list[str]:
    if not recipe.controls:
        return ["there are no controls: a selection cannot be told from the neurons that any question uses"]
    notes = []
    for length in lengths:
        if length.ratio is None:
            notes.append(f"form {length.form or '(none)'} has no controls")
        elif not LENGTHS[0] <= length.ratio <= LENGTHS[1]:
            notes.append(f"controls of form {length.form} are {length.ratio:.2f} times as long as its questions")
    kinds = {(question.form, question.answer) for question in recipe.questions}
    for form, answer in sorted({(control.form, control.answer) for control in recipe.controls} - kinds):
        notes.append(f'controls of form {form or "(none)"} with the answer "{answer}" match no question')
    return notes


def _twin_notes(recipe: Recipe, twins: Counter[str]) -> list[str]:
    if len(recipe.twins) < FEWEST_TWINS:
        few = f"{len(recipe.twins)} twins are too few to measure an effect"
        return [f"{few}: at least {FEWEST_TWINS} are needed, better some dozens"]
    notes = []
    dimensions = {question.dimension for question in recipe.questions}
    notes += [f"dimension {name} has no twins" for name in sorted(dimensions - set(twins))]
    notes += [f"twins of {name}, which is not a dimension of the questions" for name in sorted(set(twins) - dimensions)]
    if alone := sum(not twin.mirrored for twin in recipe.twins):
        notes.append(f"{alone} twins do not mirror each other: word frequency does not cancel in their score")
    return notes
