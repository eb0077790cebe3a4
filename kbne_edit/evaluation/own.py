"""The recipe's own tasks: its probes, and right answers to its questions and controls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..recipe import Recipe
from .benchmark import Answer, Benchmark, sample
from .datafiles import NoDataError
from .figures import AVOIDED, KNOWLEDGE, TWINS, twin_columns
from .twins import twin_cluster, twin_scores

if TYPE_CHECKING:
    from .scoring import Scorer


def probes_benchmark(recipe: Recipe, scorer: Scorer, limit: int | None) -> Benchmark:
    """The recipe's twins, scored as `twins` describes."""
    twins = [recipe.twins[i] for i in sample(len(recipe.twins), limit)]
    if not twins:
        raise NoDataError(f"probes: the recipe {recipe.name} has none")
    texts = [text for twin in twins for probe in twin.probes for text in (probe.first, probe.second)]

    def read(i: int, answers: list[Answer]) -> list[float]:
        values = [answer.per_token for answer in answers]
        margins = np.subtract(values[::2], values[1::2])
        return twin_columns(float(twin_scores([twins[i]], margins, recipe.aim)[0]))

    return Benchmark(
        name="probes",
        kind="bias",
        pairs=scorer.encode_pairs([("", text) for text in texts]),
        sizes=[2 * len(twin.probes) for twin in twins],
        groups=[twin.dimension for twin in twins],
        read=read,
        figures=TWINS if recipe.aim == "balance" else AVOIDED,
        clusters=[twin_cluster(twin) for twin in twins],
    )


def knowledge_benchmark(name: str, recipe: Recipe, tokenizer: Any, limit: int | None) -> Benchmark:
    """Right answers to questions: P of the right answer's tokens above that of each other answer's, as in `locate`."""
    from ..models.prompts import answer_tokens, encode

    every = [q for q in recipe.ask(None) if q.control == (name == "knowledge_controls")]
    questions = [every[i] for i in sample(len(every), limit)]
    if not questions:
        raise NoDataError(f"{name}: the recipe {recipe.name} has no such questions")
    surfaces = [
        (answer, token)
        for answer, ids in answer_tokens(tokenizer, recipe.answers, also=recipe.also).items()
        for token in ids.values()
    ]
    prompts = [encode(tokenizer, recipe, question) for question in questions]

    def read(i: int, answers: list[Answer]) -> list[float]:
        p = dict.fromkeys(recipe.answers, 0.0)
        for (answer, _), scored in zip(surfaces, answers, strict=True):
            p[answer] += float(np.exp(scored.logprob))
        right = p.pop(questions[i].answer)
        return [float(right > max(p.values()))]

    return Benchmark(
        name=name,
        kind="knowledge",
        pairs=[(prompt, [token]) for prompt in prompts for _, token in surfaces],
        sizes=[len(surfaces)] * len(questions),
        groups=[question.dimension for question in questions],
        read=read,
        figures=KNOWLEDGE,
        clusters=[question.text for question in questions],
        chance=100 / len(recipe.answers),
    )
