"""Fisher rows: gradients of log-probabilities of tokens drawn from the model after everyday sentences.

A text gives one row for all its tokens, summed with random signs so that products of different tokens cancel on
average, and rows for the factors at some single positions. The first is unbiased and noisy. The others ignore effects
across positions, but many of them cost no more than one pass. Half of the Fisher information is taken from each: on
rows set aside, the mean change per KL was twice that of either alone.

The sentences come from a small grammar of the project, and mention no group of people.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .passes import Scored

POSITIONS = 4  # of each text that get a row of their own
SAMPLES = 1 + POSITIONS

_SUBJECTS = (
    "The gardener|A carpenter|My cousin|The old clock|A heavy lorry|The river|This recipe|The library|A small dog|"
    "The museum|Our team|The report|The new bridge|A cold wind|The teacher|The bakery on the corner|An engineer|"
    "The committee|The children|The second chapter|A violin|The lamp in the hall|The ferry|His letter|The map|"
    "The weather|The software|A farmer|The train|The city council|The experiment|Her answer|The moon|The market|"
    "The customer|A thick book|The company|The blue door|The patient|The judge"
).split("|")
_VERBS = (
    "was repaired|had been moved|will be finished|looked different|changed slowly|was described|arrived|is mentioned|"
    "stayed the same|was measured|could be seen|became important|was sold|needs some care|made a sound|was painted|"
    "turned to the left|was put aside|is older than it seems|did not work"
).split("|")
_PLACES = (
    "before the summer holidays|because of the heavy snow|in the second half of the year|near the station|"
    "at the end of the meeting|after the storm|on the way to the coast|with a simple tool|for the first time|"
    "during the long winter|in front of the town hall|when the lights went out|according to the newspaper|"
    "by two friends|as everyone had expected|although nobody had asked|behind the wooden fence|in less than an hour|"
    "since the factory was closed|without any difficulty"
).split("|")
_ENDS = (
    " and the price rose by ten per cent| so we waited for the next bus| which surprised the visitors|"
    " and then the music began| but the reason was not clear|, the manager said| until the water was warm enough|"
    " and a bowl of soup was served| because the numbers did not agree|, as the letter explains|"
    " so that the paint could dry| and the door was left open| while the others watched|"
    ", however, the results were good| and people began to talk about it"
).split("|")


def sentences(count: int, seed: int) -> list[str]:
    """Different everyday sentences. Raises ValueError if the grammar has too few."""
    most = len(_SUBJECTS) * len(_VERBS) * len(_PLACES) * len(_ENDS)
    chosen = np.random.default_rng(seed).choice(most, count, replace=False).tolist()
    return [_sentence(number) for number in chosen]


def _sentence(number: int) -> str:
    words = []
    for choices in (_ENDS, _PLACES, _VERBS, _SUBJECTS):
        number, index = divmod(number, len(choices))
        words.append(choices[index])
    end, place, verb, subject = words
    return f"{subject} {verb} {place}{end}."


def signed(ids: Sequence[Sequence[int]], seed: int) -> list[Scored]:
    """Texts whose predictions have random weights 1 or -1."""
    rng = np.random.default_rng(seed)
    return [Scored(tuple(row), tuple(rng.choice([-1.0, 1.0], len(row) - 1).tolist())) for row in ids]


def samples(by_position: Tensor, tokens: int, number: int, seed: int) -> Tensor:
    """A text's rows [SAMPLES, P]: the sum, then some positions. by_position: [T, P]; tokens: predictions made.

    number: index of the text, which seeds the choice. Rows of a too short text are 0.
    """
    chosen = _chosen(tokens, number, seed)
    rows = torch.zeros(SAMPLES, by_position.shape[1])
    rows[0] = by_position[:tokens].sum(0)
    rows[1 : 1 + len(chosen)] = by_position[chosen]
    return rows


def weights(tokens: Sequence[int]) -> np.ndarray:
    """The weight of each row in S, the Fisher information per token, [texts * SAMPLES]."""
    total = sum(tokens)
    result = np.zeros((len(tokens), SAMPLES))
    result[:, 0] = 0.5 / total
    for row, count in zip(result, tokens, strict=True):
        taken = min(POSITIONS, count)
        row[1 : 1 + taken] = 0.5 * count / taken / total
    return result.ravel()


def _chosen(tokens: int, number: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, number]).choice(tokens, min(POSITIONS, tokens), replace=False)
