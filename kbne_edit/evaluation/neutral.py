"""Neutral text: the cost of an edit on text that mentions no person or group, and the temperature of a flattened base.

The texts of each language are in `neutral/LANGUAGE.txt`, one per line; lines that begin with # are comments.

Legend: N predicted positions, D hidden size, V vocabulary. Sums over the vocabulary are taken in float64: a small
edit's KL (1e-5) is the difference of terms near 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..recipe import Recipe
from .benchmark import Figure

if TYPE_CHECKING:
    from torch import nn

    from .scoring import Scorer

# Columns of a text: its negative log-likelihood, its KL from the base, its predicted tokens.
PERPLEXITY = Figure("perplexity", lambda m: np.exp(m[..., 0] / m[..., 2]), None)
KL = Figure("KL from the base", lambda m: m[..., 1] / m[..., 2], None)

_HOTTEST = 2.0**10  # the largest temperature of the search
_NEWTON, _CLOSE = 12, 1e-4  # steps at most; relative error of the KL at which the search ends
_LEFT_OUT = 1e-4  # of the KL: the largest truncation error of the power series
_BLOCK = 4  # positions whose logits are worked on at once: they stay in the processor's cache
_HEAD_ROWS = 64 * _BLOCK  # positions that go through the head at once
_UNREAD = 0.1  # share of unknown tokens above which a tokenizer cannot read a text


@dataclass(frozen=True)
class NeutralText:
    """Texts that speak of no group. origin: "package", or "control questions" of the recipe. rows: token ids of each,
    the prefix token first."""

    origin: str
    texts: tuple[str, ...]
    rows: list[list[int]] = field(repr=False)

    @property
    def targets(self) -> int:
        """The number of predicted tokens."""
        return sum(len(row) - 1 for row in self.rows)

    def within(self, targets: int) -> NeutralText:
        """Texts spread over the list that predict about so many tokens; all texts, if they predict fewer."""
        count = min(len(self.texts), max(round(len(self.texts) * targets / max(self.targets, 1)), 1))
        place = np.unique(np.linspace(0, len(self.texts) - 1, count).round().astype(int)).tolist()
        return NeutralText(self.origin, tuple(self.texts[i] for i in place), [self.rows[i] for i in place])


def packaged(language: str) -> tuple[str, ...]:
    """The texts of a language, () if the package has none."""
    # The name comes from a recipe: only letters, or it could name another file.
    path = Path(__file__).parent / "neutral" / f"{language}.txt"
    if not (language.isascii() and language.isalpha() and path.is_file()):
        return ()
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))


def neutral_text(tokenizer: Any, recipe: Recipe) -> NeutralText:
    """The texts for a model and a recipe.

    If the tokenizer cannot read the package's texts (the demo's knows few words), or the package has no texts in the
    recipe's language, these are the recipe's control questions. Texts of fewer than two tokens predict nothing and are
    left out. Raises InputError if none is left.
    """
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id

    def rows(texts: Iterable[str]) -> list[list[int]]:
        tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return [[prefix, *ids] if prefix is not None and ids[:1] != [prefix] else list(ids) for ids in tokens]

    def readable(origin: str, texts: Sequence[str]) -> NeutralText:
        kept = [(text, row) for text, row in zip(texts, rows(texts), strict=True) if len(row) > 1]
        if not kept:
            raise InputError(f"the tokenizer makes no tokens of the neutral texts ({origin}): is it this model's own?")
        return NeutralText(origin, tuple(text for text, _ in kept), [row for _, row in kept])

    texts = packaged(recipe.language)
    ids = rows(texts)
    unknown = sum(row.count(tokenizer.unk_token_id) for row in ids) / max(sum(map(len, ids)), 1)
    if recipe.controls and (not texts or unknown > _UNREAD):
        return readable("control questions", [question.text for question in recipe.controls])
    return readable("package", texts)


@dataclass(frozen=True)
class Logits:
    """A model's logits at N positions, computed in blocks each time they are needed.

    states: the last layer's output, [N, D]. Rejected: holding the logits. With a vocabulary of 150,000 those of the 64
    texts take 2.3 GB for base and edit, and twice that while they are put together; on a machine with less memory the
    kernel killed the process.
    """

    model: nn.Module
    states: Tensor
    temperature: float = 1.0

    def blocks(self) -> Iterator[Tensor]:
        """Blocks [positions, V] float32, divided by the temperature."""
        from .batched import logits_of

        device = self.model.get_input_embeddings().weight.device  # type: ignore[operator]
        for rows in self.states.split(_HEAD_ROWS):
            output = logits_of(self.model, rows.to(device))
            yield from (output if self.temperature == 1 else output / self.temperature).split(_BLOCK)


def states(model: nn.Module, texts: Sequence[Sequence[int]]) -> Tensor:
    """The last layer's output at every position that predicts a token of the texts, [N, D] on the CPU.

    Raises InputError for tokens that the model does not have, and if it gives NaN or inf.
    """
    from ..models.bounds import check_numbers, check_tokens
    from ..models.trees import Tree, cut, tokens_of_a_pass
    from .states import TreePass, states_of

    rows = [tuple(ids[:-1]) for ids in texts]
    trees = [Tree(rows[part]) for part in cut(rows, tokens_of_a_pass(model))]
    for tree in trees:
        check_tokens(model, tree.tokens, tree.depth)
    outputs = []
    passes = (TreePass(tree, [None], [node for path in tree.paths for node in path]) for tree in trees)
    for _, output in states_of(model, passes):
        check_numbers(output[0], model)
        outputs.append(output[0].cpu())
    return torch.cat(outputs)


def logits(scorer: Scorer, texts: Sequence[Sequence[int]]) -> Logits:
    """Of the scorer's model at its temperature, at every position that predicts a token of the texts."""
    return Logits(scorer.model, states(scorer.model, texts), scorer.temperature)


def columns(texts: Sequence[Sequence[int]], edited: Logits, base: Logits) -> np.ndarray:
    """[texts, 3] of the edited model; base: the base's logits."""
    return compare(texts, edited, base).columns[:, 1:]


@dataclass(frozen=True)
class Comparison:
    """A model beside the base on the texts. columns: [texts, 4], the base's negative log-likelihood, then `columns`.

    moments: of the base's logits, for `temperature`; None if they were not requested.
    """

    columns: np.ndarray
    moments: Moments | None = None


def compare(texts: Sequence[Sequence[int]], edited: Logits, base: Logits, *, moments: bool = False) -> Comparison:
    """Compare two models' logits in one pass. moments: also compute those of the base."""
    targets = torch.tensor([token for ids in texts for token in ids[1:]])
    parts, of_base, start = [], [], 0
    for p, q in zip(base.blocks(), edited.blocks(), strict=True):
        target = targets[start : start + len(p), None].to(q.device)
        start += len(p)
        losses = [(x.logsumexp(-1) - x.gather(1, target)[:, 0]).double() for x in (p, q)]
        parts.append(torch.stack([*losses, divergence(p, q)], 1).cpu())
        if moments:
            of_base.append(_moments(p))
    lengths = [len(ids) - 1 for ids in texts]
    table = np.array([[*rows.sum(0).tolist(), len(rows)] for rows in torch.cat(parts).split(lengths)])
    return Comparison(table, Moments(torch.cat(of_base)) if moments else None)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of logits [positions, V] in float32 -> [positions] float64.

    With y = p - q minus its mean under p, the KL is log E[exp(-y)], a mean under p. The sum is E[exp(-y) - 1 + y]: no
    term is negative, so nothing cancels, and a KL of 1e-5 needs no float64. Where p and q differ much the exponential
    may overflow; there the sum follows the definition, in float64.
    """
    weights = p.softmax(-1)
    y = p - q
    y = y - (weights * y).sum(-1, keepdim=True)
    kl = (weights * (torch.expm1(-y) + y)).sum(-1).double().log1p().clamp_min(0)
    if len(far := (~(kl < 1)).nonzero()[:, 0]):
        a, b = (x[far].double().log_softmax(-1) for x in (p, q))
        kl[far] = (a.exp() * (a - b)).sum(-1)
    return kl


@dataclass(frozen=True)
class Moments:
    """Moments of a model's logits l at N positions. values: [N, 8] float64, per position the KL from its distribution
    to the uniform one, then E[x^k] for k = 2 to 8, with x = l - E[l], all means under the model.
    """

    values: Tensor

    @property
    def flattest(self) -> float:
        """The mean KL of a uniform distribution."""
        return float(self.values[:, 0].mean())

    def divergence(self, d: float) -> tuple[float, float, float]:
        """(mean KL at the temperature 1 / (1 + d), its slope, a bound of the truncation error), by power series.

        The error is less than twice the last two terms if terms fall by half each; `temperature` uses the series only
        where these terms are a small part of the sum, so that they do.
        """
        orders = torch.arange(2, 9, dtype=torch.float64)
        terms = self.values[:, 1:] * d**orders / torch.tensor([math.factorial(k) for k in range(2, 9)])
        above = terms.sum(1).clamp_min(-0.5)
        slope = (terms * orders).sum(1) / d / (1 + above)
        return float(above.log1p().mean()), float(slope.mean()), 2 * float(terms[:, -2:].abs().sum(1).mean())


def _moments(logits: Tensor) -> Tensor:
    """The `values` of `Moments`, of logits [positions, V]."""
    p, x = _centred(logits)
    flattest = (p * (p + 1e-30).log()).sum(-1).double() + math.log(x.shape[-1])
    square = x * x
    cube, first = square * x, p * x
    fifth = first * square * square
    pairs = ((first, x), (first, square), (first, cube), (first * x, cube), (fifth, x), (fifth, square), (fifth, cube))
    return torch.stack([flattest, *((a * b).sum(-1).double() for a, b in pairs)], 1).cpu()


def temperature(base: Logits, kl: float, moments: Moments | None = None) -> float | None:
    """The temperature above 1 at which the flattened base has the mean KL `kl` from the base; None if there is none.

    At the temperature 1 / (1 + d) the KL of a position is f(d) = log E[exp(d x)], with x = l - E[l], both means under
    p: a cumulant generating function, convex, 0 at d = 0. Its slope is known, so Newton's method solves for d. moments:
    of the base, else they are computed. They suffice for a small d; else each step is a pass over the logits.
    """
    if kl <= 0:
        return None
    moments = moments or Moments(torch.cat([_moments(block) for block in base.blocks()]))
    if kl >= moments.flattest:  # even a uniform distribution has less
        return None
    second, third = (float(moments.values[:, k].mean()) for k in (1, 2))
    d = -math.sqrt(2 * kl / max(second, 1e-30))
    d *= min(max(1 - d * third / (6 * max(second, 1e-30)), 0.5), 2.0)
    series, rest = _solved(moments.divergence, d, kl)
    if rest <= _LEFT_OUT * kl:
        d = series
    else:
        d, _ = _solved(partial(_divergence, base, len(moments.values)), d, kl)
    return None if d <= 1 / _HOTTEST - 1 else 1 / (1 + d)


def _solved(divergence: Callable[[float], tuple[float, float, float]], d: float, kl: float) -> tuple[float, float]:
    """(d at which `divergence` is `kl`, its truncation error there), by Newton's method from a first guess."""
    rest = math.inf
    for _ in range(_NEWTON):
        d = min(max(d, 1 / _HOTTEST - 1), -1e-12)
        value, slope, rest = divergence(d)
        if abs(value - kl) <= _CLOSE * kl:
            break
        d -= (value - kl) / min(slope, -1e-30)
    return min(max(d, 1 / _HOTTEST - 1), -1e-12), rest


def _divergence(base: Logits, count: int, d: float) -> tuple[float, float, float]:
    """`Moments.divergence` by a pass over the logits of `count` positions, without truncation.

    The sum is E[exp(d x) - 1 - d x]: E[d x] is 0, and its rounding error would dominate in float32.
    """
    value, slope = 0.0, 0.0
    for block in base.blocks():
        p, x = _centred(block)
        growth = torch.expm1(d * x)
        above = (p * (growth - d * x)).sum(-1).double()
        value += float(above.log1p().sum()) / count
        slope += float(((p * x * growth).sum(-1).double() / (1 + above)).sum()) / count
    return value, slope, 0.0


def _centred(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(probabilities, logits minus their mean under them), [positions, V]."""
    values = logits.float()
    p = values.softmax(-1)
    return p, values - (p * values).sum(-1, keepdim=True)
