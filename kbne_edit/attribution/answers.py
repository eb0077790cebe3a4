"""How a model answers the questions: what a scores file says of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..recipe import Question
from ..statistics import wilson
from .scores import Scores


def attribution_summary(scores: Scores) -> dict:
    """Answers and quadrature: how many are right, by answer and by form; completeness, nodes.

    balanced: mean share of right answers over the answers, [value, low, high] (95 %, Wilson); a model that says the
    same to everything has 1 / number of answers. constant: True if the interval holds that value.
    """
    questions, right = scores.questions, scores.correct
    asked = [i for i, q in enumerate(questions) if not q.control]
    controls = [i for i, q in enumerate(questions) if q.control]

    def tally(key: Callable[[Question], str], among: list[int]) -> dict[str, list[int]]:
        keys = [key(questions[i]) for i in among]
        return {
            k: [int(sum(right[i] for i, own in zip(among, keys, strict=True) if own == k)), keys.count(k)]
            for k in sorted(set(keys))
        }

    everywhere = tally(lambda q: q.answer, asked + controls)
    bounds = np.mean([wilson(*counts) for counts in everywhere.values()], 0)
    balanced = [float(np.mean([k / n for k, n in everywhere.values()])), *map(float, bounds)]
    return {
        "questions": len(asked),
        "right": int(right[asked].sum()),
        "controls": len(controls),
        "controls_right": int(right[controls].sum()),
        "right_by_answer": tally(lambda q: q.answer, asked),
        "right_by_form": tally(lambda q: q.form, asked),
        "balanced": balanced,
        "constant": balanced[1] <= 1 / len(everywhere) <= balanced[2],
        "wrong": [questions[i].text for i in asked if not right[i]],
        "largest_residual": float(scores.residual.max()),
        "nodes_per_layer": float(scores.nodes.mean()),
    }
