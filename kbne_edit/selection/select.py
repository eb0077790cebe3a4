"""Scores to an edit (method, section 3): by the paper's rule, and by rules that ask what is specific to the subject.

A neuron's share in a question is score / the largest score that the question has anywhere. A neuron counts for a
question if its share exceeds tau and what the rule expects of it anyway:

paper: nothing.
contrastive: the level of matched controls, what at least beta of those with the same right answer (and the same form
    where there are any) reach. Rejected: their mean, which keeps what few of them need much.
paired: its share in the question's twin.

It is kept for a dimension if it counts in at least beta of its questions. The fourth rule looks at all of them at once:

specific: kept are the neurons with the largest lower bound of the difference between the mean share in the dimension's
    questions and in matched controls (`differences`), if it is above 0. tau and beta play no part.

top counts ranks in place of tau: a neuron counts (or is kept, by the specific rule) if it is among this share of all
neurons with the largest excess. The result combines the dimensions.

A control is held against the other half of the controls (under the paired rule against one of its kind), so the overlap
that is reported is with what the rule selects on controls it has not seen. Since that is little for every rule that
asks for a difference, whatever it selects, `Selection.unseen` gives a stricter one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from ..edit import Edit
from ..errors import EditError, InputError
from ..families import Site
from ..recipe import COMBINE, RULES
from .differences import lower_bounds

if TYPE_CHECKING:
    from ..attribution.scores import Scores

T = TypeVar("T")
TOP = 0.002  # of all neurons: what the specific rule keeps of each dimension unless told otherwise


@dataclass(frozen=True)
class Selection:
    """What a rule selected. dimensions, controls: boolean masks [L, F], per dimension, and by the controls alone.

    counts: a function, index of a question -> mask [L, F] of the neurons that count for it.
    asked, rule: what was selected from, and the arguments of `ballot`.
    """

    edit: Edit
    dimensions: dict[str, np.ndarray]
    controls: np.ndarray | None
    counts: Callable[[int], np.ndarray]
    asked: Asked
    rule: tuple

    def stable(self, shares: dict[int, dict[int, float]], least: float) -> Selection:
        """Only the neurons whose share {layer: {neuron: share}} is at least `least`. Raises EditError if none is."""
        factors = {
            layer: {n: factor for n, factor in neurons.items() if shares[layer][n] >= least}
            for layer, neurons in self.edit.factors.items()
        }
        if not any(factors.values()):
            raise EditError(f"no neuron is selected in {least:.0%} of the resamples: lower --min-stability or --tau")
        found = {**self.edit.found, "select": {**self.edit.found["select"], "min_stability": least}}
        return replace(self, edit=Edit(self.edit.site, factors, self.edit.base, found))

    def summary(self) -> dict:
        """Per dimension: neurons and layers; overlaps between dimensions; overlap with the controls' selection."""
        union = _mask(self.edit, next(iter(self.dimensions.values())).shape)
        names = list(self.dimensions)
        result = {
            "rule": self.edit.found["select"]["rule"],
            "neurons": int(union.sum()),
            "share": float(union.mean()),
            "layers": sorted(self.edit.factors),
            "dimensions": {n: _describe(self.dimensions[n], self.controls) for n in names},
            "overlap": {
                f"{a} & {b}": int((self.dimensions[a] & self.dimensions[b]).sum())
                for i, a in enumerate(names)
                for b in names[i + 1 :]
            },
        }
        if self.controls is not None:
            result["controls_neurons"] = int(self.controls.sum())
            result["controls_overlap"] = int((union & self.controls).sum())
        if unseen := self.unseen():
            result["unseen"] = unseen
        return result

    def unseen(self) -> list[tuple[int, int]]:
        """[(shared, selected)] of each half of the controls, held out while the rule selects.

        shared: how many of the n selected are among the n that the held-out controls use most, whatever the questions
        do with them. [] if there are too few controls. Under the paired rule, twins of questions are never held out.
        """
        result = []
        for half in (0, 1):
            held = self._own_controls()
            held = held[self.asked.half[held] == half]
            rest = self.asked._replace(compared=np.setdiff1d(self.asked.compared, held))
            try:
                mask = combined(list(ballot(rest, *self.rule).masks().values()), self.rule[-1])
            except InputError:  # none is left to compare with
                return []
            if not len(held):
                return []
            result.append((int((mask & _most_used(self.asked, held, int(mask.sum()))).sum()), int(mask.sum())))
        return result

    def used_by_controls(self) -> np.ndarray | None:
        """As many neurons as are selected, those that the controls use most, [L, F]; None if there are no controls."""
        own = self._own_controls()
        return _most_used(self.asked, own, self.edit.num_neurons) if len(own) else None

    def _own_controls(self) -> np.ndarray:
        compared = self.asked.compared
        return np.setdiff1d(compared, self.asked.twin) if self.rule[0] == "paired" else compared


def _most_used(asked: Asked, controls: np.ndarray, count: int) -> np.ndarray:
    """The neurons with the largest mean share in these controls, [L, F]."""
    used = sum(asked.share(q) for q in controls.tolist()) / len(controls)
    mask = np.zeros(used.size, bool)
    mask[np.argsort(-used, axis=None, kind="stable")[:count]] = True
    return mask.reshape(used.shape)


def _describe(mask: np.ndarray, controls: np.ndarray | None) -> dict:
    found = {"neurons": int(mask.sum()), "layers": np.flatnonzero(mask.any(1)).tolist()}
    return found if controls is None else found | {"controls_overlap": int((mask & controls).sum())}


def select(
    scores: Scores | np.ndarray,
    *,
    dimensions: Sequence[str] | None = None,
    answers: Sequence[str] | None = None,
    forms: Sequence[str] | None = None,
    controls: Sequence[bool] | None = None,
    twins: Sequence[int] | None = None,
    rule: str = "paper",
    tau: float = 0.1,
    beta: float = 0.1,
    top: float | None = None,
    combine: str = "union",
    factor: float = 2.0,
    site: Site = "down",
    base: str | None = None,
    only: Sequence[bool] | None = None,
) -> Edit:
    """Select neurons. scores: [Q, L, F] (tensor or array), or a `Scores`, which knows the rest about its questions.

    dimensions, answers, forms: one per question. controls: True where a question is a control. twins: the index of each
    question's twin, -1 if it has none. top: share of all neurons, in place of tau. only: False leaves a question out.
    Raises InputError for settings out of range, EditError if no neuron is selected.
    """
    return selection(
        scores,
        dimensions=dimensions,
        answers=answers,
        forms=forms,
        controls=controls,
        twins=twins,
        rule=rule,
        tau=tau,
        beta=beta,
        top=top,
        combine=combine,
        factor=factor,
        site=site,
        base=base,
        only=only,
    ).edit


class Asked(NamedTuple):
    """Scores [Q, L, F] and what is known about each question, [Q].

    asked, compared: indices of the questions and of the controls that take part. twin: index of a question's twin, -1
    for none. half: 0 or 1, the controls of each answer and form dealt in turn.
    """

    scores: np.ndarray
    dimension: np.ndarray
    answer: np.ndarray
    form: np.ndarray
    twin: np.ndarray
    half: np.ndarray
    asked: np.ndarray
    compared: np.ndarray
    site: Site
    base: str | None

    def share(self, q: int) -> np.ndarray:
        return self.scores[q] / max(float(self.scores[q].max()), 1e-30)


def questions(
    scores, dimensions=None, answers=None, forms=None, controls=None, twins=None, only=None, site="down", base=None
) -> Asked:
    """What `select` was given, in order. Raises InputError if no question is left."""
    if hasattr(scores, "questions"):
        known = scores.questions
        dimensions, answers = [q.dimension for q in known], [q.answer for q in known]
        forms, controls = [q.form for q in known], [q.control for q in known]
        place = {q.text: i for i, q in enumerate(known) if q.control}
        twins = [place.get(q.twin, -1) for q in known]
        site, base, scores = scores.site, scores.base, scores.values
    scores = np.asarray(scores)
    count = len(scores)

    def column(given, default) -> np.ndarray:
        return np.array(given if given is not None else [default] * count)

    control, keep = column(controls, False).astype(bool), column(only, True).astype(bool)
    if not (keep & ~control).any():
        raise InputError("select: no question is left to select from")
    answer, form = np.array([f"{a}" for a in column(answers, "")]), column(forms, "")
    half, seen = np.zeros(count, int), {}
    for q in np.flatnonzero(keep & control):
        key = (answer[q], form[q])
        half[q] = seen[key] = 1 - seen.get(key, 1)
    asked, compared = np.flatnonzero(keep & ~control), np.flatnonzero(keep & control)
    return Asked(scores, column(dimensions, "all"), answer, form, column(twins, -1), half, asked, compared, site, base)


class Ballot(NamedTuple):
    """What each question votes for, and what comes of it.

    counts: index of a question -> mask [L, F]. dimensions: {name: its questions}. kept: {name: function, questions
    (drawn from the dimension's own, some of them more than once) -> mask}. by_controls: mask of what controls select.
    """

    counts: Callable[[int], np.ndarray]
    dimensions: dict[str, np.ndarray]
    kept: dict[str, Callable[[np.ndarray], np.ndarray]]
    by_controls: Callable[[], np.ndarray | None]

    def masks(self) -> dict[str, np.ndarray]:
        return {name: self.kept[name](asked) for name, asked in self.dimensions.items()}


def ballot(asked: Asked, rule: str, tau: float, beta: float, top: float | None, combine: str) -> Ballot:
    """The rule's way to decide on these questions. Raises InputError for settings out of range."""
    if rule not in RULES or combine not in COMBINE or not all(0 <= x <= 1 for x in (tau, beta, top or 0)):
        raise InputError(f"select: rule is one of {RULES}, combine one of {COMBINE}, tau, beta and top lie from 0 to 1")
    if rule in ("contrastive", "specific") and not len(asked.compared):
        raise InputError(f"select: the {rule} rule needs control questions")
    dimension = asked.dimension[asked.asked]
    named = {n: asked.asked[dimension == n] for n in dict.fromkeys(dimension.tolist())}
    if rule == "specific":
        return _by_difference(asked, named, TOP if top is None else top)
    twins = _twins(asked)
    own = asked.compared if rule != "paired" else np.array([q for q in asked.compared.tolist() if q in twins], int)
    expected = {"paper": lambda q: 0.0, "contrastive": _level(asked, beta), "paired": _twin(asked, twins)}[rule]

    @cache
    def counts(q: int) -> np.ndarray:
        excess = asked.share(q) - expected(q)
        return excess > tau if top is None else _largest(excess, top)

    kept = partial(_voted, counts, beta)
    return Ballot(counts, named, dict.fromkeys(named, kept), lambda: kept(own) if len(own) else None)


def selection(
    scores,
    *,
    dimensions=None,
    answers=None,
    forms=None,
    controls=None,
    twins=None,
    rule="paper",
    tau=0.1,
    beta=0.1,
    top=None,
    combine="union",
    factor=2.0,
    site="down",
    base=None,
    only=None,
) -> Selection:
    """`select`, with the masks that the report needs."""
    asked = questions(scores, dimensions, answers, forms, controls, twins, only, site, base)
    votes = ballot(asked, rule, tau, beta, top, combine)
    masks = votes.masks()
    factors = at_factor(combined(list(masks.values()), combine), factor)
    settings = {
        "rule": rule,
        "tau": tau,
        "beta": beta,
        "combine": combine,
        "controls": len(asked.compared),
        "questions": len(asked.asked),
    } | ({} if top is None else {"top": top})
    if not factors:
        raise EditError(nothing(**settings))
    edit = Edit(asked.site, factors, asked.base, {"select": settings})
    return Selection(edit, masks, votes.by_controls(), votes.counts, asked, (rule, tau, beta, top, combine))


def at_factor(mask: np.ndarray, factor: float) -> dict[int, dict[int, float]]:
    """The factors of an edit that scales the neurons of a mask [L, F] by one number."""
    return by_layer(dict.fromkeys(np.flatnonzero(mask).tolist(), float(factor)), mask.shape[1])


def by_layer(values: dict[int, T], neurons: int) -> dict[int, dict[int, T]]:
    """{layer: {neuron: value}} of values by their place in [L * F]. neurons: F."""
    result: dict[int, dict[int, T]] = {}
    for place, value in values.items():
        layer, neuron = divmod(place, neurons)
        result.setdefault(layer, {})[neuron] = value
    return result


def described(found: dict) -> str:
    """Rule and thresholds of a record, in a few words."""
    top = found.get("top")
    limits = [f"tau {found['tau']:g}" if top is None else f"the largest {top:.3%} of all neurons"]
    limits = [*limits, f"beta {found['beta']:g}"] if found["rule"] != "specific" else limits
    return ", ".join([f"rule {found['rule']}", *limits, f"{found['combine']} over the dimensions"])


def nothing(rule: str, tau: float, beta: float, combine: str, top: float | None = None, **_) -> str:
    """Why no neuron was selected, and what to do."""
    above = {"contrastive": " above what the controls reach", "paired": " above what it does in the question's twin"}
    if rule == "specific":
        return f"no neuron's share is larger in questions than in matched controls, beyond chance ({combine})"
    threshold = f"tau {tau:g}" if top is None else f"top {top:g}"
    cure = "--tau or --beta" if top is None else "--beta"
    return f"no neuron counts{above.get(rule, '')} (rule {rule}, {threshold}, beta {beta:g}, {combine}): lower {cure}"


def by_dimension(chosen: Selection, scores: Scores, factors: dict[str, float]) -> Edit:
    """The chosen neurons, each with the factor of its dimension; a factor of 1 leaves them out.

    A neuron's dimension is the one, of those that keep it, in whose questions its mean share of the largest score is
    greatest. factors: of every dimension. The edit may have no neuron.
    """
    layers, neurons = np.nonzero(_mask(chosen.edit, scores.values.shape[1:]))
    means = []
    for name, kept in chosen.dimensions.items():
        asked = [scores.values[i] for i, q in enumerate(scores.questions) if q.dimension == name and not q.control]
        mean = np.mean([values[layers, neurons] / max(float(values.max()), 1e-30) for values in asked], 0)
        means.append(np.where(kept[layers, neurons], mean, -np.inf))
    names, found = list(chosen.dimensions), {}
    for layer, neuron, most in zip(layers.tolist(), neurons.tolist(), np.argmax(means, 0).tolist(), strict=True):
        if factors[names[most]] != 1:
            found.setdefault(layer, {})[neuron] = factors[names[most]]
    select = {**chosen.edit.found["select"], "factors": factors}
    return replace(chosen.edit, factors=found, found={**chosen.edit.found, "select": select})


def combined(masks: Sequence[np.ndarray], combine: str) -> np.ndarray:
    return np.any(masks, 0) if combine == "union" else np.all(masks, 0)


def _largest(excess: np.ndarray, top: float) -> np.ndarray:
    """The share `top` of all neurons (one at least) with the largest excess, as far as it is above 0."""
    rank = excess.size - max(round(top * excess.size), 1)
    return (excess >= np.partition(excess, rank, axis=None)[rank]) & (excess > 0)


def _needed(beta: float, count: int) -> int:
    return max(math.ceil(beta * count - 1e-9), 1)


def _voted(counts, beta: float, questions: np.ndarray) -> np.ndarray:
    """Neurons that count in at least beta of these questions (and in at least one)."""
    return sum(counts(q).astype(np.int32) for q in questions.tolist()) >= _needed(beta, len(questions))


# ------------------------------------------------------------------------------------------- what is expected anyway


def _matched(asked: Asked, q: int) -> tuple[int, ...]:
    """The controls with the same answer and, where there are any, the same form; for a control those of the other half.

    Raises InputError if there are none.
    """
    rest = asked.compared
    if q in rest:
        rest = rest[asked.half[rest] != asked.half[q]]
    same = rest[asked.answer[rest] == asked.answer[q]]
    alike = same[asked.form[same] == asked.form[q]]
    if not len(same):
        raise InputError(f"select: there are too few controls with the answer {str(asked.answer[q])!r}")
    return tuple((alike if len(alike) else same).tolist())


def _level(asked: Asked, beta: float) -> Callable[[int], np.ndarray]:
    """What at least beta of the matched controls (and one) reach, neuron by neuron and never below 0, [L, F]."""

    @cache
    def level(pool: tuple[int, ...]) -> np.ndarray:
        shares = np.stack([asked.share(c) for c in pool])
        rank = len(pool) - _needed(beta, len(pool))
        return np.maximum(np.partition(shares, rank, axis=0)[rank], 0)

    return lambda q: level(_matched(asked, q))


def _twin(asked: Asked, twins: dict[int, int]) -> Callable[[int], np.ndarray]:
    """The share in the question's twin, [L, F]."""

    def share(q: int) -> np.ndarray:
        if q not in twins:
            raise InputError(f"select: the paired rule needs a twin of every question, and question {q + 1} has none")
        return asked.share(twins[q])

    return share


def _twins(asked: Asked) -> dict[int, int]:
    """{question: its twin}. Controls that are nobody's twin are each other's, two by two of one answer and form."""
    found = {q: twin for q in asked.asked.tolist() if (twin := int(asked.twin[q])) >= 0}
    kinds: dict[tuple, list[int]] = {}
    for q in np.setdiff1d(asked.compared, asked.twin).tolist():
        kinds.setdefault((asked.answer[q], asked.form[q]), []).append(q)
    for alike in kinds.values():
        for i in range(len(alike) if len(alike) > 1 else 0):
            found[alike[i]] = alike[i ^ 1] if i ^ 1 < len(alike) else alike[i - 1]
    return found


# ------------------------------------------------------------------------------------------------ the specific rule


def _by_difference(asked: Asked, named: dict[str, np.ndarray], top: float) -> Ballot:
    def kept(questions: np.ndarray, pool: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        bounds = _bounds(asked, questions, pool)
        return lambda drawn: _largest(bounds(drawn), top)

    @cache
    def mean(pool: tuple[int, ...]) -> np.ndarray:
        return sum(asked.share(c) for c in pool) / len(pool)

    def by_controls() -> np.ndarray | None:
        halves = [asked.compared[asked.half[asked.compared] == half] for half in (0, 1)]
        try:
            return np.any([kept(a, b)(a) for a, b in (halves, halves[::-1])], 0)
        except InputError:  # too few controls to hold one half of them against the other
            return None

    by_name = {name: kept(its, asked.compared) for name, its in named.items()}
    return Ballot(lambda q: asked.share(q) > mean(_matched(asked, q)), named, by_name, by_controls)


def _bounds(asked: Asked, questions: np.ndarray, pool: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """`lower_bounds` of mean share in these questions less that in matched controls.

    Matched by answer and form, or by answer alone where a form has no controls or there are too few questions for it.
    Raises InputError where a spread cannot be told.
    """
    for kinds in ([f"{a} {f}" for a, f in zip(asked.answer, asked.form, strict=True)], asked.answer.tolist()):
        wanted = {kinds[q] for q in questions}
        matched = np.array([c for c in pool if kinds[c] in wanted], int)
        if {kinds[c] for c in matched} == wanted and min(len(questions), len(matched)) > len(wanted):
            strata = np.array([kinds[q] for q in (*questions, *matched)])
            return lower_bounds(asked.scores, questions, matched, strata)
    raise InputError(
        "select: the specific rule needs, in every dimension, more questions than answers and as many controls with "
        "the same answers: ask more with --questions"
    )


def _mask(edit: Edit, shape: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for layer, neurons in edit.factors.items():
        mask[layer, list(neurons)] = True
    return mask
