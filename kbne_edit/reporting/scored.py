"""What the scores file of a run shows about its edit: the selection repeated, figures by neuron, map, overlaps.

Legend: Q questions, L layers, F neurons of a layer, k edited neurons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..attribution.scores import Scores
from ..edit import Edit
from ..errors import InputError, ScoresError
from ..rule import Rule
from ..selection.select import Selection, by_dimension, selection
from .lens import Neuron
from .types import (
    Attributed,
    Map,
    MassRow,
    NeuronRow,
    Overlap,
    OverlapPart,
    QuestionShare,
    Repeated,
    Selected,
    Strong,
)

QUESTIONS, STRONGEST = 3, 60  # shown per neuron, on the map


@dataclass(frozen=True)
class Scored:
    """Parts of the report. neurons: every edited neuron, with only the data from the scores."""

    selection: Repeated
    neurons: dict[Neuron, NeuronRow]
    map: Map
    overlap: Overlap

    @property
    def controls_overlap(self) -> int | None:
        """Number of edited neurons that the controls select; None without controls."""
        flags = [row.selected_by_controls for row in self.neurons.values()]
        return None if None in flags else sum(map(bool, flags))


class _Again(NamedTuple):
    """The selection, repeated. used: which questions took part, [Q]."""

    about: Repeated
    used: list[bool]
    chosen: Selection


def scored(scores: Scores, edit: Edit) -> Scored:
    """Attribution of the edited neurons, layer by layer, and the selections that the questions make.

    Raises ScoresError if the edit's rule selects nothing from these scores.
    """
    again = _again(scores, edit)
    groups: dict[str | None, list[int]] = {}  # None: the controls
    for q, question in enumerate(scores.questions):
        if again.used[q]:
            groups.setdefault(None if question.control else question.dimension, []).append(q)
    at = tuple(np.array([(layer, n) for layer, factors in edit.factors.items() for n in factors]).T)
    share = np.zeros((len(again.used), len(at[0])))  # [Q, k]
    counted = np.zeros(share.shape, bool)
    mass = np.zeros((len(again.used), scores.values.shape[1]))  # [Q, L]
    mean = {name: np.zeros(scores.values.shape[1:]) for name in groups}
    for name, questions in groups.items():
        for q in questions:
            relative = scores.values[q] / max(float(scores.values[q].max()), 1e-30)
            share[q], counted[q] = relative[at], again.chosen.counts(q)[at]
            positive = np.maximum(relative, 0).sum(1, dtype=np.float64)
            mass[q] = positive / max(positive.sum(), 1e-30)
            mean[name] += relative / len(questions)
    figures = {name: (share[questions].mean(0), counted[questions].mean(0)) for name, questions in groups.items()}
    rows = _Rows(scores, again, figures, share)
    strength = np.stack([values for name, values in mean.items() if name is not None]).max(0)
    by_layer = {name: mass[questions].mean(0) for name, questions in groups.items()}
    return Scored(again.about, rows.all(edit), _map(strength, by_layer, edit), _overlap(again.chosen))


def _again(scores: Scores, edit: Edit) -> _Again:
    """Select with the recorded thresholds (the paper's if there are none), and compare with the edit."""
    record = edit.found.get("select")
    record = record if isinstance(record, dict) else {}
    try:
        rule = Rule.from_dict(record)
    except InputError as error:
        raise ScoresError(f"the edit's thresholds are none: {error}") from None
    right = scores.correct
    kept = [
        sum(bool(r) for r, q in zip(right, scores.questions, strict=True) if q.control == control)
        for control in (False, True)
    ]
    dropped = [record.get("questions"), record.get("controls")] == kept and not right.all()
    used = [bool(r) or not dropped for r in right]
    try:
        chosen = selection(scores, rule, only=used)
    except InputError:  # nothing selected
        raise ScoresError(f"the edit's thresholds ({rule.describe()}) select nothing from these scores") from None
    again = by_dimension(chosen, record["factors"]) if "factors" in record else chosen.edit
    about = Repeated(
        rule=rule,
        on_record=bool(record),
        wrong_left_out=dropped,
        reproduced=_places(again) == _places(edit),
        recipe=str(scores.settings["recipe"]),
        quadrature=str(scores.settings.get("quadrature")),
        questions=chosen.edit.found["select"]["questions"],
        controls=chosen.edit.found["select"]["controls"],
    )
    return _Again(about, used, chosen)


def _places(edit: Edit) -> dict[int, set[int]]:
    return {layer: set(factors) for layer, factors in edit.factors.items()}


@dataclass(frozen=True)
class _Rows:
    """figures: {dimension or None: (mean share of the largest score [k], share of questions that count [k])}.

    share: of the largest score, [Q, k].
    """

    scores: Scores
    again: _Again
    figures: dict[str | None, tuple[np.ndarray, np.ndarray]]
    share: np.ndarray

    def all(self, edit: Edit) -> dict[Neuron, NeuronRow]:
        places = [(layer, n, factor) for layer, factors in edit.factors.items() for n, factor in factors.items()]
        return {(layer, n): self.row(j, layer, n, factor) for j, (layer, n, factor) in enumerate(places)}

    def row(self, j: int, layer: int, neuron: int, factor: float) -> NeuronRow:
        figures = {
            name: Attributed(round(float(score[j]), 6), round(float(counts[j]), 6))
            for name, (score, counts) in self.figures.items()
        }
        order = np.argsort(-self.share[:, j], kind="stable").tolist()
        most = [q for q in order if self.again.used[q] and self.share[q, j] > 0][:QUESTIONS]
        controls = self.again.chosen.controls
        return NeuronRow(
            layer,
            neuron,
            factor,
            dimensions={name: figure for name, figure in figures.items() if name is not None},
            controls=figures.get(None),
            selected_by_controls=None if controls is None else bool(controls[layer, neuron]),
            questions=tuple(self._question(q, j) for q in most),
        )

    def _question(self, q: int, j: int) -> QuestionShare:
        question, share = self.scores.questions[q], round(float(self.share[q, j]), 6)
        return QuestionShare(question.text, question.answer, question.dimension, question.control, share)


def _map(strength: np.ndarray, by_layer: dict[str | None, np.ndarray], edit: Edit) -> Map:
    """strength: the largest mean relative score over the dimensions, [L, F]. by_layer: {dimension: share [L]}."""
    flat = np.argsort(-strength, axis=None, kind="stable")[:STRONGEST].tolist()
    places = [(*divmod(index, strength.shape[1]), float(strength.flat[index])) for index in flat]
    return Map(
        mass=tuple(
            MassRow(name, name is None, tuple(round(float(v), 6) for v in values))
            for name, values in sorted(by_layer.items(), key=lambda row: row[0] is None)
        ),
        strongest=tuple(
            Strong(layer, neuron, round(score, 6), neuron in edit.factors.get(layer, {}))
            for layer, neuron, score in places
            if score > 0
        ),
    )


def _overlap(chosen: Selection) -> Overlap:
    """The number of neurons in each selection, and in exactly each combination of selections."""
    masks = list(chosen.dimensions.values())
    sets = [Selected(name, False, int(mask.sum())) for name, mask in chosen.dimensions.items()]
    if chosen.controls is not None:
        masks.append(chosen.controls)
        sets.append(Selected(None, True, int(chosen.controls.sum())))
    members, counts = np.unique(np.stack([mask.ravel() for mask in masks], 1), axis=0, return_counts=True)
    parts = [
        OverlapPart(tuple(np.flatnonzero(row).tolist()), int(n))
        for row, n in zip(members, counts, strict=True)
        if row.any()
    ]
    return Overlap(tuple(sets), tuple(sorted(parts, key=lambda part: (-part.neurons, part.sets))))
