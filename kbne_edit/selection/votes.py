"""The selection rules: which neurons each question votes for.

A neuron's share in a question is its score divided by the question's largest score. A neuron counts for a question if
its share exceeds the expected share by more than tau. The rules differ in the expected share:

paper: 0.
contrastive: the share that at least beta of the matched controls reach. Controls match if they have the same right
    answer (and the same form, if there are such). Rejected: their mean, which keeps neurons that few controls use
    strongly.
paired: the neuron's share in the question's twin.

A neuron is kept for a dimension if it counts in at least beta of the dimension's questions. The fourth rule uses all
questions at once:

specific: keeps the neurons with the largest lower bound of the difference between the mean share in the dimension's
    questions and in matched controls (`differences`), if that bound is above 0. It does not use tau and beta.

`top` uses ranks instead of tau: a neuron counts (with the specific rule: is kept) if it is among this share of all
neurons with the largest excess.

A control is compared with the other half of the controls (under the paired rule with a control of its kind). So the
reported overlap is with what the rule selects on unseen controls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import cast

import numpy as np

from ..errors import InputError
from ..rule import Rule
from .differences import lower_bounds
from .questions import Questions

Expected = Callable[[int], "np.ndarray | float"]  # index of a question -> expected shares [L, F]
Kept = Callable[[np.ndarray], np.ndarray]  # indices of questions, possibly repeated -> mask [L, F]


@dataclass(frozen=True)
class Votes:
    """A rule applied to questions.

    counts: index of a question -> mask [L, F] of the neurons that count for it. dimensions: {name: its questions}.
    kept: {name: function from questions of the dimension, or a resample of them, to a mask [L, F]}. by_controls:
    returns the mask [L, F] that the controls select, None if there are too few.
    """

    rule: Rule
    counts: Callable[[int], np.ndarray]
    dimensions: dict[str, np.ndarray]
    kept: dict[str, Kept]
    by_controls: Callable[[], np.ndarray | None]

    def masks(self) -> dict[str, np.ndarray]:
        """{dimension: mask [L, F]} of all questions."""
        return {name: self.kept[name](questions) for name, questions in self.dimensions.items()}

    def combined(self, masks: Sequence[np.ndarray]) -> np.ndarray:
        """The union or intersection of the dimensions' masks, [L, F]."""
        return np.any(masks, 0) if self.rule.combine == "union" else np.all(masks, 0)


def votes_of(questions: Questions, rule: Rule) -> Votes:
    """The rule, applied to these questions. Raises InputError if they lack what the rule needs."""
    if rule.name in ("contrastive", "specific") and not len(questions.controls):
        raise InputError(f"select: the {rule.name} rule needs control questions")
    votes = _by_difference(questions, rule) if rule.name == "specific" else _by_count(questions, rule)
    return _same_sign(questions, votes) if rule.same_sign else votes


def _by_count(questions: Questions, rule: Rule) -> Votes:
    twins = _twins(questions)
    controls = questions.controls
    if rule.name == "paired":
        controls = np.array([q for q in controls.tolist() if q in twins], int)
    expected: Expected = {
        "paper": _nothing,
        "contrastive": _level(questions, rule.beta),
        "paired": _twin(questions, twins),
    }[rule.name]

    @cache
    def counts(q: int) -> np.ndarray:
        excess = questions.share(q) - expected(q)
        return excess > rule.tau if rule.top is None else _largest(excess, rule.top)

    kept = partial(_voted, counts, rule.beta)
    named = questions.dimensions
    return Votes(rule, counts, named, dict.fromkeys(named, kept), lambda: kept(controls) if len(controls) else None)


def _largest(excess: np.ndarray, top: float) -> np.ndarray:
    """The share `top` of all neurons (at least one) with the largest excess, among those above 0."""
    rank = excess.size - max(round(top * excess.size), 1)
    return (excess >= np.partition(excess, rank, axis=None)[rank]) & (excess > 0)


def _needed(beta: float, count: int) -> int:
    """The share beta of `count`, rounded up, at least 1. The 1e-9: .07 * 100 is 7.000000000000001."""
    return max(math.ceil(beta * count - 1e-9), 1)


def _voted(counts: Callable[[int], np.ndarray], beta: float, questions: np.ndarray) -> np.ndarray:
    """Neurons that count in at least beta of these questions (and in at least one)."""
    return cast("np.ndarray", sum(counts(q).astype(np.int32) for q in questions.tolist())) >= _needed(
        beta, len(questions)
    )


def _same_sign(questions: Questions, votes: Votes) -> Votes:
    """Keep only neurons whose mean share is positive for every right answer of the dimension.

    A neuron that pushes towards "yes" has a positive effect where yes is right and a negative one where no is.
    Raises InputError for a dimension in which one answer is always right: there the option has no effect.
    """

    def positive(drawn: np.ndarray) -> np.ndarray:
        answers = questions.answer[drawn]
        means = [questions.mean_share(drawn[answers == answer]) for answer in dict.fromkeys(answers.tolist())]
        return np.all([values > 0 for values in means], 0)

    for name, indices in votes.dimensions.items():
        if len(set(questions.answer[indices].tolist())) < 2:
            raise InputError(
                f"select: same-sign needs questions with different right answers in every dimension, and in {name} "
                f"the answer is always {str(questions.answer[indices][0])!r}"
            )
    kept = {name: _both(inner, positive) for name, inner in votes.kept.items()}
    return Votes(votes.rule, votes.counts, votes.dimensions, kept, votes.by_controls)


def _both(first: Kept, second: Kept) -> Kept:
    return lambda drawn: first(drawn) & second(drawn)


# ------------------------------------------------------------------------------------------------ expected shares


def _nothing(_: int) -> float:
    return 0.0


def _matched(questions: Questions, q: int) -> tuple[int, ...]:
    """Controls with the same answer and, if there are any, the same form; for a control only those of the other half.

    Raises InputError if there are none.
    """
    rest = questions.controls
    if q in rest:
        rest = rest[questions.half[rest] != questions.half[q]]
    same = rest[questions.answer[rest] == questions.answer[q]]
    alike = same[questions.form[same] == questions.form[q]]
    if not len(same):
        raise InputError(f"select: there are too few controls with the answer {str(questions.answer[q])!r}")
    return tuple((alike if len(alike) else same).tolist())


def _level(questions: Questions, beta: float) -> Expected:
    """For each neuron the share that at least beta of the matched controls reach, but not below 0, [L, F]."""

    @cache
    def level(pool: tuple[int, ...]) -> np.ndarray:
        shares = np.stack([questions.share(c) for c in pool])
        rank = len(pool) - _needed(beta, len(pool))
        return np.maximum(np.partition(shares, rank, axis=0)[rank], 0)

    return lambda q: level(_matched(questions, q))


def _twin(questions: Questions, twins: dict[int, int]) -> Expected:
    """The share in the question's twin, [L, F]."""

    def share(q: int) -> np.ndarray:
        if q not in twins:
            raise InputError(f"select: the paired rule needs a twin of every question, and question {q + 1} has none")
        return questions.share(twins[q])

    return share


def _twins(questions: Questions) -> dict[int, int]:
    """{question: its twin}. Controls without a question are paired with each other, within one answer and form."""
    result = {q: twin for q in questions.non_controls.tolist() if (twin := int(questions.twin[q])) >= 0}
    kinds: dict[tuple, list[int]] = {}
    for q in questions.unrelated.tolist():
        kinds.setdefault((questions.answer[q], questions.form[q]), []).append(q)
    for alike in kinds.values():
        for i in range(len(alike) if len(alike) > 1 else 0):
            result[alike[i]] = alike[i ^ 1] if i ^ 1 < len(alike) else alike[i - 1]
    return result


# ------------------------------------------------------------------------------------------------ the specific rule


def _by_difference(questions: Questions, rule: Rule) -> Votes:
    top = cast("float", rule.share)

    def kept(indices: np.ndarray, pool: np.ndarray) -> Kept:
        bounds = _bounds(questions, indices, pool)
        return lambda drawn: _largest(bounds(drawn), top)

    @cache
    def mean(pool: tuple[int, ...]) -> np.ndarray:
        return questions.mean_share(pool)

    def by_controls() -> np.ndarray | None:
        controls = questions.controls
        halves = [controls[questions.half[controls] == half] for half in (0, 1)]
        try:
            return np.any([kept(a, b)(a) for a, b in (halves, halves[::-1])], 0)
        except InputError:  # too few controls to compare one half with the other
            return None

    named = questions.dimensions
    by_name = {name: kept(its, questions.controls) for name, its in named.items()}
    return Votes(rule, lambda q: questions.share(q) > mean(_matched(questions, q)), named, by_name, by_controls)


def _bounds(questions: Questions, indices: np.ndarray, pool: np.ndarray) -> Kept:
    """`lower_bounds` of the mean share in these questions minus that in matched controls.

    Controls match by answer and form, or by answer only if a form has no controls or too few questions. Raises
    InputError if there are too few questions or controls to estimate a variance.
    """
    by_form = [f"{a} {f}" for a, f in zip(questions.answer, questions.form, strict=True)]
    for kinds in (by_form, questions.answer.tolist()):
        wanted = {kinds[q] for q in indices}
        matched = np.array([c for c in pool if kinds[c] in wanted], int)
        if {kinds[c] for c in matched} == wanted and min(len(indices), len(matched)) > len(wanted):
            strata = np.array([kinds[q] for q in (*indices, *matched)])
            return lower_bounds(questions.scores, indices, matched, strata)
    raise InputError(
        "select: the specific rule needs, in every dimension, more questions than answers and as many controls with "
        "the same answers: ask more with --questions"
    )
