"""From scores to an edit (arXiv:2601.21864, section 3): by the paper's rule, and by rules that look for specific
neurons.

The rules are in `votes`. Under every rule that looks for a difference, the controls that it has seen select few
neurons. So `Selection.unseen` gives a stricter overlap, with the neurons that held-out controls use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..edit import Edit
from ..errors import EditError, InputError
from ..rule import Rule
from .questions import Questions, by_layer
from .summary import DimensionSummary, SelectionSummary, Shared
from .votes import votes_of

if TYPE_CHECKING:
    from ..attribution.scores import Scores
    from .stability import Stability


@dataclass(frozen=True)
class Selection:
    """What a rule selected.

    dimensions: {name: mask [L, F]}. controls: mask [L, F] of the neurons that the controls select, None if there are no
    controls. counts: index of a question -> mask [L, F] of the neurons that count for it.
    """

    edit: Edit
    rule: Rule
    questions: Questions
    dimensions: dict[str, np.ndarray]
    controls: np.ndarray | None
    counts: Callable[[int], np.ndarray]

    def __repr__(self) -> str:
        return f"Selection({self.rule.describe()}: {self.edit.num_neurons} neurons)"

    def stable(self, stability: Stability, least: float) -> Selection:
        """Only the neurons that at least a share `least` of the resamples select. Raises EditError if none is left."""
        factors = {
            layer: {n: factor for n, factor in neurons.items() if stability.neurons[layer][n] >= least}
            for layer, neurons in self.edit.factors.items()
        }
        if not any(factors.values()):
            raise EditError(f"no neuron is selected in {least:.0%} of the resamples: lower --min-stability or --tau")
        record = {**self.edit.found, "select": {**self.edit.found["select"], "min_stability": least}}
        return replace(self, edit=Edit(self.edit.site, factors, self.edit.base, record))

    def summary(self) -> SelectionSummary:
        """Neurons by dimension, overlaps between dimensions, overlap with the controls' selection."""
        union = mask_of(self.edit, next(iter(self.dimensions.values())).shape)
        names = list(self.dimensions)
        return SelectionSummary(
            rule=self.rule.name,
            neurons=int(union.sum()),
            share=float(union.mean()),
            layers=tuple(sorted(self.edit.factors)),
            dimensions={name: self._dimension(mask) for name, mask in self.dimensions.items()},
            overlap={
                f"{a} & {b}": int((self.dimensions[a] & self.dimensions[b]).sum())
                for i, a in enumerate(names)
                for b in names[i + 1 :]
            },
            controls_neurons=None if self.controls is None else int(self.controls.sum()),
            controls_overlap=None if self.controls is None else int((union & self.controls).sum()),
            unseen=tuple(self.unseen()),
        )

    def _dimension(self, mask: np.ndarray) -> DimensionSummary:
        shared = None if self.controls is None else int((mask & self.controls).sum())
        return DimensionSummary(int(mask.sum()), tuple(np.flatnonzero(mask.any(1)).tolist()), shared)

    def unseen(self) -> list[Shared]:
        """For each half of the controls, held out during a selection: how many of the selected neurons it uses most.

        If k neurons are selected, the shared ones are those among the k neurons that the held-out controls use most. []
        if there are too few controls. Under the paired rule, twins are never held out.
        """
        result = []
        for half in (0, 1):
            held = self._own_controls()
            held = held[self.questions.half[held] == half]
            rest = self.questions.without(held)
            try:
                votes = votes_of(rest, self.rule)
                mask = votes.combined(list(votes.masks().values()))
            except InputError:  # no controls are left for the rule
                return []
            if not len(held):
                return []
            used = most_used(self.questions, held, int(mask.sum()))
            result.append(Shared(int((mask & used).sum()), int(mask.sum())))
        return result

    def used_by_controls(self) -> np.ndarray | None:
        """The k neurons that the controls use most, [L, F], if k are selected; None if there are no controls."""
        controls = self._own_controls()
        return most_used(self.questions, controls, self.edit.num_neurons) if len(controls) else None

    def _own_controls(self) -> np.ndarray:
        return self.questions.unrelated if self.rule.name == "paired" else self.questions.controls


def select(
    scores: Scores | Questions,
    rule: Rule | str = Rule(),  # noqa: B008  (frozen)
    *,
    factor: float = 2.0,
    only: Sequence[bool] | None = None,
) -> Edit:
    """Select neurons from the scores of questions.

    rule: a `Rule`, or its name for the default thresholds. factor: of every selected neuron. only: False leaves
    a question out, one per question.
    Raises InputError for settings out of range, EditError if no neuron is selected.
    """
    return selection(scores, rule, factor=factor, only=only).edit


def selection(
    scores: Scores | Questions,
    rule: Rule | str = Rule(),  # noqa: B008
    *,
    factor: float = 2.0,
    only: Sequence[bool] | None = None,
) -> Selection:
    """`select`, with the masks that a report needs."""
    rule = Rule(rule) if isinstance(rule, str) else rule
    questions = Questions.of(scores, only)
    votes = votes_of(questions, rule)
    masks = votes.masks()
    factors = at_factor(votes.combined(list(masks.values())), factor)
    if not factors:
        raise EditError(rule.nothing())
    record = rule.to_dict() | {"controls": len(questions.controls), "questions": len(questions.non_controls)}
    edit = Edit(questions.site, factors, questions.base, {"select": record})
    return Selection(edit, rule, questions, masks, votes.by_controls(), votes.counts)


def most_used(questions: Questions, controls: np.ndarray, count: int) -> np.ndarray:
    """The neurons with the largest mean share in these controls, [L, F]."""
    used = questions.mean_share(controls)
    mask = np.zeros(used.size, bool)
    mask[np.argsort(-used, axis=None, kind="stable")[:count]] = True
    return mask.reshape(used.shape)


def mask_of(edit: Edit, shape: tuple[int, int]) -> np.ndarray:
    """The edit's neurons as a mask [L, F]."""
    mask = np.zeros(shape, bool)
    for layer, neurons in edit.factors.items():
        mask[layer, list(neurons)] = True
    return mask


def at_factor(mask: np.ndarray, factor: float) -> dict[int, dict[int, float]]:
    """The factors of an edit that scales the neurons of a mask [L, F] by `factor`."""
    return by_layer(dict.fromkeys(np.flatnonzero(mask).tolist(), float(factor)), mask.shape[1])


def by_dimension(chosen: Selection, factors: dict[str, float]) -> Edit:
    """The chosen neurons, each with the factor of its dimension; a factor of 1 leaves them out.

    A neuron's dimension is the one with its largest mean share, among the dimensions that select it. factors: of every
    dimension. The edit may be empty.
    """
    layers, neurons = np.nonzero(mask_of(chosen.edit, chosen.questions.scores.shape[1:]))
    means = []
    for name, questions in chosen.questions.dimensions.items():
        mean = chosen.questions.mean_share(questions)[layers, neurons]
        means.append(np.where(chosen.dimensions[name][layers, neurons], mean, -np.inf))
    scaled: dict[int, dict[int, float]]
    names, scaled = list(chosen.dimensions), {}
    for layer, neuron, most in zip(layers.tolist(), neurons.tolist(), np.argmax(means, 0).tolist(), strict=True):
        if factors[names[most]] != 1:
            scaled.setdefault(layer, {})[neuron] = factors[names[most]]
    record = {**chosen.edit.found["select"], "factors": factors}
    return replace(chosen.edit, factors=scaled, found={**chosen.edit.found, "select": record})
