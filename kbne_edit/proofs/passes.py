"""Runs a model on the second proof's texts, and compares two runs.

Legend: N positions of all texts, T of one text, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..disk.checkpoint import Checkpoint
from ..errors import CheckpointError
from ..models.bounds import check_numbers, check_tokens
from ..models.loading import foreign, load_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NOISE_FACTOR = 4  # the largest of 10^5 nearly normal differences varies by less than this between draws
_TOKENS = 8  # of each greedy continuation
_ROWS = 32  # positions in float64 at once
_TEXTS = (
    "The committee read both applications twice before it",
    "Water boils sooner on a mountain because",
    "She asked the engineer what he thought of the plan, and he said",
    "In the morning the two neighbours met at the market and",
)


def proof_texts(base: Checkpoint) -> list[list[int]]:
    """Token ids of the proof's texts; seeded ids if there is no usable tokenizer."""
    try:
        tokenizer = load_tokenizer(base.path)
        with foreign(base.path):
            prompts = [tokenizer(text)["input_ids"] for text in _TEXTS]
        if all(prompts):
            return prompts
    except CheckpointError:
        pass
    # A directory without a tokenizer can be proven as well.
    size = base.config.get("vocab_size", 64)
    return np.random.default_rng(0).integers(0, size, (len(_TEXTS), 12)).tolist()


@dataclass(frozen=True)
class Texts:
    """Token ids of the proof's prompts, each with a continuation. prompts: how many tokens each prompt has."""

    rows: list[list[int]]
    prompts: list[int]

    @classmethod
    def continued(cls, model: Any, prompts: list[list[int]]) -> Texts:
        """The prompts, continued greedily by this model. Raises InputError for tokens that the model does not have.

        Rejected: a cache. A pass over so few tokens takes little longer than one over the last token, since both read
        all weights, and recurrent models have caches of their own kinds.
        """
        rows = [list(ids) for ids in prompts]
        for ids in rows:
            check_tokens(model, ids, [len(ids) - 1 + _TOKENS])
        for _ in range(_TOKENS):
            logits = _forward(model, rows)
            for row, of_row in zip(rows, logits, strict=True):
                row.append(int(of_row[len(row) - 1].argmax()))
        return cls(rows, [len(ids) for ids in prompts])

    @property
    def without_continuations(self) -> Texts:
        return Texts([row[:length] for row, length in zip(self.rows, self.prompts, strict=True)], self.prompts)

    @property
    def written(self) -> list[np.ndarray]:
        """For each text, the positions (of all texts) that predict its continuation."""
        starts = np.cumsum([0, *map(len, self.rows)])
        return [
            np.arange(start + prompt - 1, start + len(row) - 1)
            for start, prompt, row in zip(starts, self.prompts, self.rows, strict=False)
        ]


class Outcome(NamedTuple):
    """logits: [N, V] float32; routes: per text the experts that each position was routed to, [T, any]."""

    logits: np.ndarray
    routes: list[np.ndarray]


def run(model: Any, texts: Texts) -> Outcome:
    """Logits and routes of all texts, in one pass."""
    import torch

    from ..models.experts import chosen
    from ..models.places import places

    experts = [place.module for layer in places(model, "down") for place in layer if place.experts]
    routed: list[torch.Tensor] = []
    notes = [
        module.register_forward_pre_hook(lambda module, args: routed.append(chosen(*args, experts=module)))
        for module in experts
    ]
    try:
        output = _forward(model, texts.rows)
    finally:
        for note in notes:
            note.remove()
    lengths, width = [len(row) for row in texts.rows], output.shape[1]
    logits = torch.cat([of_row[:length].float() for of_row, length in zip(output, lengths, strict=True)]).numpy()
    table = (
        torch.cat(routed, -1).view(len(lengths), width, -1).numpy() if routed else np.zeros((len(lengths), width, 0))
    )
    return Outcome(logits, [of_row[:length] for of_row, length in zip(table, lengths, strict=True)])


def _forward(model: Any, rows: list[list[int]]) -> Tensor:
    """Logits [texts, longest, V]. Rows are padded at their end, which does not affect earlier positions."""
    import torch

    width = max(map(len, rows))
    with torch.no_grad():
        return model(torch.tensor([row + [row[-1]] * (width - len(row)) for row in rows]), use_cache=False).logits


def check_finite(model: Any, texts: Texts, reference: Outcome) -> None:
    """Raise InputError if the model with hooks gave NaN or inf; blame the base if it does so, too. model: the base."""
    import torch

    if not np.isfinite(reference.logits).all():
        check_numbers(torch.from_numpy(run(model, texts).logits), model, "the base")
        check_numbers(torch.from_numpy(reference.logits), model, "the model with this edit")


def logit_difference(got: Outcome, reference: Outcome) -> float:
    """Largest logit difference, relative to the logits' standard deviation.

    A router's choice is not continuous. Where rounding changed it, at this position or an earlier one, another function
    is computed, and the difference says nothing about the fold. Such positions are left out and counted ("rerouted").
    """
    kept = same_route(got, reference)
    largest = np.abs(got.logits - reference.logits)[kept].max(initial=0)
    return float(largest / max(float(reference.logits.std()), 1e-30))


def last_rounding(logits: np.ndarray, dtype: torch.dtype) -> float:
    """The rounding error of the largest logit, relative to the logits' standard deviation.

    The noise is at least that: a few small draws may move no logit by a rounding step, while the edit moves one.
    """
    import torch

    step = torch.finfo(dtype).eps * 2 ** np.floor(np.log2(max(float(np.abs(logits).max()), 1e-30)))
    return float(step / 12**0.5 / max(float(logits.std()), 1e-30))


def same_route(got: Outcome, reference: Outcome) -> np.ndarray:
    """True for positions up to which every router chose the same experts, [N]."""
    pairs = zip(got.routes, reference.routes, strict=True)
    return np.concatenate([np.logical_and.accumulate((a == b).all(1)) for a, b in pairs])


def kl_divergence(reference: np.ndarray, got: np.ndarray) -> float:
    """Mean KL(reference || got) over positions, in nats."""
    total = 0.0
    for start in range(0, len(reference), _ROWS):
        a, b = (x[start : start + _ROWS].astype(np.float64) for x in (reference, got))
        a, b = (x - x.max(1, keepdims=True) for x in (a, b))
        a, b = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (a, b))
        total += float((np.exp(a) * (a - b)).sum())
    return total / len(reference)
