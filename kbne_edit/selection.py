"""Scores to an edit (method, section 3), by the paper's rule and by a contrastive one.

paper: a neuron counts for a question if its score exceeds tau of the largest score that the question has anywhere.
contrastive: the same, above the level that matched controls reach without any bias in them: score / largest must
    exceed tau + level, where level is what at least beta of the controls with the same right answer (and the same
    form where there are any) reach. A control is held against the other half of the controls, so the overlap that is
    reported is with what the rule selects on controls it has not seen. Without controls it is the paper's rule.
    Rejected: the mean of the controls as the level, which keeps what few of them need much.
Then: kept for a dimension if it counts in at least beta of its questions; the result combines the dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .edit import Edit
from .errors import EditError, InputError
from .families import Site
from .recipe import COMBINE, RULES

if TYPE_CHECKING:
    from .scores import Scores


@dataclass(frozen=True)
class Selection:
    """What a rule selected. dimensions, controls: boolean masks [L, F], per dimension, and by the controls alone.

    counts: a function, index of a question -> mask [L, F] of the neurons that count for it.
    """

    edit: Edit
    dimensions: dict[str, np.ndarray]
    controls: np.ndarray | None
    counts: Callable[[int], np.ndarray]

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
                for i, a in enumerate(names) for b in names[i + 1 :]
            },
        }  # fmt: skip
        if self.controls is not None:
            result["controls_neurons"] = int(self.controls.sum())
            result["controls_overlap"] = int((union & self.controls).sum())
        return result


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
    rule: str = "paper",
    tau: float = 0.1,
    beta: float = 0.1,
    combine: str = "union",
    factor: float = 2.0,
    site: Site = "down",
    base: str | None = None,
    only: Sequence[bool] | None = None,
) -> Edit:
    """Select neurons. scores: [Q, L, F] (tensor or array), or a `Scores`, which knows the rest about its questions.

    dimensions, answers, forms: one per question. controls: True where a question is a control. only: False leaves a
    question out. Raises InputError for settings out of range, EditError if no neuron is selected.
    """
    return selection(
        scores, dimensions=dimensions, answers=answers, forms=forms, controls=controls, rule=rule, tau=tau, beta=beta,
        combine=combine, factor=factor, site=site, base=base, only=only,
    ).edit  # fmt: skip


class Ballot(NamedTuple):
    """What each question votes for. counts: index of a question -> mask [L, F]; dimensions: {name: its questions}."""

    counts: Callable[[int], np.ndarray]
    dimensions: dict[str, np.ndarray]
    compared: np.ndarray
    site: Site
    base: str | None


def ballot(scores, dimensions, answers, forms, controls, rule, tau, beta, combine, site, base, only) -> Ballot:
    if rule not in RULES or combine not in COMBINE or not (0 <= tau <= 1 and 0 <= beta <= 1):
        raise InputError(f"select: rule is one of {RULES}, combine one of {COMBINE}, tau and beta lie from 0 to 1")
    if hasattr(scores, "questions"):
        about = scores.questions
        dimensions, answers = [q.dimension for q in about], [q.answer for q in about]
        forms, controls = [q.form for q in about], [q.control for q in about]
        site, base, scores = scores.site, scores.base, scores.values
    scores = np.asarray(scores)
    count = len(scores)
    dimensions = np.array(dimensions if dimensions is not None else ["all"] * count)
    groups = np.array([f"{a}" for a in (answers if answers is not None else [""] * count)])
    forms = np.array(forms if forms is not None else [""] * count)
    controls = np.array(controls if controls is not None else [False] * count, bool)
    keep = np.ones(count, bool) if only is None else np.array(only, bool)
    asked, compared = keep & ~controls, keep & controls
    if not asked.any():
        raise InputError("select: no question is left to select from")
    if rule == "contrastive" and not compared.any():
        raise InputError("select: the contrastive rule needs control questions")
    named = {n: np.flatnonzero(asked & (dimensions == n)) for n in dict.fromkeys(dimensions[asked].tolist())}
    counts = _counting(scores, groups, forms, compared, rule, tau, beta)
    return Ballot(counts, named, np.flatnonzero(compared), site, base)


def selection(
    scores, *, dimensions=None, answers=None, forms=None, controls=None, rule="paper", tau=0.1, beta=0.1,
    combine="union", factor=2.0, site="down", base=None, only=None,
) -> Selection:  # fmt: skip
    """`select`, with the masks that the report needs."""
    votes = ballot(scores, dimensions, answers, forms, controls, rule, tau, beta, combine, site, base, only)
    masks = {name: _kept(votes.counts, questions, beta) for name, questions in votes.dimensions.items()}
    union = combined(list(masks.values()), combine)
    by_controls = _kept(votes.counts, votes.compared, beta) if len(votes.compared) else None
    factors: dict[int, dict[int, float]] = {}
    for layer, neuron in np.argwhere(union).tolist():
        factors.setdefault(layer, {})[neuron] = float(factor)
    if not factors:
        above = " above what the controls reach" if rule == "contrastive" else ""
        raise EditError(
            f"no neuron counts{above} (rule {rule}, tau {tau:g}, beta {beta:g}, {combine}): lower --tau or --beta"
        )
    settings = {"rule": rule, "tau": tau, "beta": beta, "combine": combine, "controls": len(votes.compared),
                "questions": sum(map(len, votes.dimensions.values()))}  # fmt: skip
    return Selection(Edit(votes.site, factors, votes.base, {"select": settings}), masks, by_controls, votes.counts)


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


def needed(beta: float, count: int) -> int:
    return max(math.ceil(beta * count - 1e-9), 1)


def _counting(scores, groups, forms, compared, rule, tau, beta):
    """A function: index of a question -> mask [L, F] of the neurons that count for it."""

    def share(q: int) -> np.ndarray:
        return scores[q] / max(float(scores[q].max()), 1e-30)

    def paper(q: int) -> np.ndarray:
        return share(q) > tau

    def contrast(q: int) -> np.ndarray:
        same = compared & (groups == groups[q])
        if compared[q]:
            same &= half != half[q]
        matched = same & (forms == forms[q])
        pool = np.flatnonzero(matched if matched.any() else same)
        if not len(pool):
            raise InputError(f"select: the contrastive rule finds too few controls with the answer {str(groups[q])!r}")
        if tuple(pool) not in levels:
            levels[tuple(pool)] = _level([share(c) for c in pool], beta)
        return share(q) > tau + levels[tuple(pool)]

    levels: dict[tuple[int, ...], np.ndarray] = {}
    half = _halves(groups, forms, compared)
    return paper if rule == "paper" else contrast


def _halves(groups: np.ndarray, forms: np.ndarray, compared: np.ndarray) -> np.ndarray:
    """0 or 1 per question: the controls of each answer and form, dealt in turn to two halves."""
    half, seen = np.zeros(len(compared), int), {}
    for q in np.flatnonzero(compared):
        key = (groups[q], forms[q])
        half[q] = seen[key] = 1 - seen.get(key, 1)
    return half


def _level(shares: list[np.ndarray], beta: float) -> np.ndarray:
    """What at least beta of these controls (and one) reach, neuron by neuron and never below 0, [L, F]."""
    rank = needed(beta, len(shares))
    return np.maximum(np.partition(np.stack(shares), len(shares) - rank, axis=0)[len(shares) - rank], 0)


def _kept(counts, questions: np.ndarray, beta: float) -> np.ndarray:
    """Neurons that count in at least beta of these questions (and in at least one)."""
    return sum(counts(q).astype(np.int32) for q in questions) >= needed(beta, len(questions))


def _mask(edit: Edit, shape: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for layer, neurons in edit.factors.items():
        mask[layer, list(neurons)] = True
    return mask
