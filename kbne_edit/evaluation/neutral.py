"""Neutral text: what an edit costs where no person or group is spoken of, and how much it merely flattens.

Legend: N predicted positions, V vocabulary. Sums over the vocabulary are taken in float64: a small edit's KL (1e-5) is
the difference of terms near 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from ..recipe import Recipe
from .benchmark import Figure

TEXTS = (
    "The kettle whistled for a while before anyone remembered to switch it off.",
    "Granite cools slowly under the ground, which is why its crystals grow large.",
    "To open the window, lift the handle and push the frame gently outwards.",
    "The train to the coast leaves from the second platform at a quarter past nine.",
    "Bees find their way back to the hive by the position of the sun.",
    "A square has four equal sides, and its diagonals cross at a right angle.",
    "After the storm the river carried branches and mud down to the lake.",
    "Stir the flour into the melted butter, then add the milk little by little.",
    "The library closes early in winter because the heating is being repaired.",
    "Copper turns green when it stays in the open air for many years.",
    "The old bridge is made of oak and rests on three pillars of stone.",
    "Water expands when it freezes, so a full bottle may burst in the cold.",
    "The map shows a path along the ridge that avoids the marsh.",
    "A clock with a long pendulum swings more slowly than one with a short one.",
    "Most of the salt in the soup had settled at the bottom of the pot.",
    "The spreadsheet adds up the columns and prints the total in the last row.",
)
# Columns of a text: its negative log-likelihood, its KL from the base, its predicted tokens.
PERPLEXITY = Figure("perplexity", lambda m: np.exp(m[..., 0] / m[..., 2]), None)
KL = Figure("KL from the base", lambda m: m[..., 1] / m[..., 2], None)

_HOTTEST = 2.0**10  # flatter than any use: the search for a temperature ends here
_STEPS = 24
_BLOCK = 32  # positions in float64 at once


def rows(scorer, recipe: Recipe) -> tuple[str, list[str], list[list[int]]]:
    """Where the texts come from, the texts, and token ids of each, the prefix token first.

    A tokenizer that cannot read the texts (the demo's knows its own small world only) gets the recipe's control
    questions instead, and so does a recipe in another language.
    """

    def ids(texts: list[str]) -> list[list[int]]:
        return [[*context, *text] for context, text in scorer.encode_pairs([("", text) for text in texts])]

    found = ids(list(TEXTS))
    unknown = sum(row.count(scorer.tokenizer.unk_token_id) for row in found) / sum(map(len, found))
    if recipe.controls and (recipe.language != "en" or unknown > 0.1):
        texts = [question.text for question in recipe.controls]
        return "control questions", texts, ids(texts)
    return "package", list(TEXTS), found


def logits(scorer, texts: list[list[int]]) -> Tensor:
    """[N, V] float32 on the CPU, at every position that predicts a token of the texts."""
    return scorer.logits_of([ids[:-1] for ids in texts])


def columns(texts: list[list[int]], found: Tensor, base: Tensor) -> np.ndarray:
    """[texts, 3] of a model with logits `found`; `base`: the logits of the base model."""
    targets = torch.tensor([token for ids in texts for token in ids[1:]])
    nll, kl = [], []
    for p, q, target in zip(_blocks(base), _blocks(found), targets.split(_BLOCK), strict=True):
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        nll.append(-q.gather(1, target[:, None])[:, 0])
        kl.append((p.exp() * (p - q)).sum(-1))
    lengths = [len(ids) - 1 for ids in texts]
    parts = [torch.cat(values).split(lengths) for values in (nll, kl)]
    return np.array([[float(a.sum()), float(b.sum()), n] for a, b, n in zip(*parts, lengths, strict=True)])


def _blocks(values: Tensor) -> Iterator[Tensor]:
    return (block.double() for block in values.split(_BLOCK))


def temperature(base: Tensor, kl: float) -> float | None:
    """The temperature above 1 at which the base's mean KL from itself, so flattened, is `kl`; None if it never is.

    KL(p || p_t) = sum p log p - sum p l / t + logsumexp(l / t), which grows with t: found by bisection.
    """
    entropy, mean = 0.0, 0.0
    for block in _blocks(base):
        p = block.log_softmax(-1)
        entropy += float((p.exp() * p).sum()) / len(base)
        mean += float((p.exp() * block).sum()) / len(base)

    def reached(t: float) -> float:
        norm = sum(float((block / t).logsumexp(-1).sum()) for block in _blocks(base)) / len(base)
        return entropy - mean / t + norm

    return _bisect(reached, kl) if kl > 0 else None


def _bisect(rising: Callable[[float], float], goal: float) -> float | None:
    low = high = 1.0
    while rising(high) < goal:
        low, high = high, 1 + 2 * max(high - 1, 0.01)
        if high > _HOTTEST:
            return None
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < goal else (low, middle)
    return high
