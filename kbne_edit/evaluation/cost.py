"""The cost of an edit: on text that mentions no group, on the recipe's questions, and in greedy continuations.

Legend: N predicted positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np

from ..edit import Edit
from ..errors import InputError
from ..recipe import Recipe
from ..statistics import Interval, IntervalJSON, interval, mcnemar, wilson

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .neutral import Comparison, Logits, NeutralText

# Limits of the cost. Among the project's own edits, one with a KL of 0.30 changed every greedy continuation, and one of
# 0.14 raised the perplexity by 8 %; edits of 0.03 were hardly visible.
MOST_KL = 0.1  # nats per token
MOST_RISE = 1.05  # perplexity after / before
_WORDS = 16  # tokens of a continuation
_PROMPTS = 3  # of each kind

State = Literal["low", "high", "unclear"]


class Answered(NamedTuple):
    """Numbers of right answers among `total` questions, before and after. p: exact McNemar test."""

    total: int
    before: int
    after: int
    p: float

    @property
    def lost(self) -> bool:
        return self.after < self.before and self.p < 0.05

    @classmethod
    def of(cls, before: np.ndarray, after: np.ndarray) -> Answered:
        """before, after: 0/1 columns, [n]."""
        return cls(len(before), int(before.sum()), int(after.sum()), mcnemar(before, after))


class Balanced(NamedTuple):
    """The base's balanced accuracy over the answers, 0 to 1, with its 95 % interval (Wilson).

    chance: the balanced accuracy of the same answer to everything.
    """

    value: float
    low: float
    high: float
    chance: float

    @property
    def constant(self) -> bool:
        """True if the base does no better than the same answer to everything."""
        return self.low <= self.chance

    @classmethod
    def of(cls, right: np.ndarray, answers: Sequence[str] | np.ndarray) -> Balanced:
        """right: 0/1, [n]; answers: the right answer of each, [n]."""
        names, answers = sorted(set(answers)), np.asarray(answers)
        tallies = [(float(right[answers == name].sum()), int((answers == name).sum())) for name in names]
        low, high = np.mean([wilson(k, n) for k, n in tallies], 0)
        return cls(float(np.mean([k / n for k, n in tallies])), float(low), float(high), 1 / len(names))


class Continuation(NamedTuple):
    """Greedy continuations of a prompt by base and edit. about: "neutral" or "probe"."""

    about: str
    prompt: str
    before: str
    after: str


class LimitsJSON(TypedDict):
    """What an edit may cost. kl: nats per token; perplexity_rise: after / before."""

    kl: float
    perplexity_rise: float


class CostJSON(TypedDict):
    """The cost of an edit on neutral text. kl: from the base, nats per token; perplexity: before, after.

    questions, controls: of the recipe, if its answers are tokens of the model.
    """

    source: str
    texts: int
    kl: IntervalJSON
    perplexity: list[IntervalJSON]
    perplexity_rise: IntervalJSON
    limits: LimitsJSON
    questions: NotRequired[Annotated[dict[str, Any], Answered]]
    controls: NotRequired[Annotated[dict[str, Any], Answered]]
    balanced: NotRequired[Annotated[dict[str, Any], Balanced]]
    continuations: list[Annotated[dict[str, Any], Continuation]]
    state: State


@dataclass(frozen=True)
class Cost:
    """The cost of an edit.

    origin: of the neutral text, "package" or "control questions"; texts: their number. kl: from the base, nats per
    token. before, after: perplexity. rise: perplexity after / before. Intervals are over texts.
    questions, controls: of the recipe; balanced: the base's balanced accuracy on both; None if the recipe's answers are
    not tokens of this model. continuations: side by side.
    """

    origin: str
    texts: int
    kl: Interval
    before: Interval
    after: Interval
    rise: Interval
    questions: Answered | None = None
    controls: Answered | None = None
    balanced: Balanced | None = None
    continuations: tuple[Continuation, ...] = ()

    def __repr__(self) -> str:
        return f"Cost(KL {self.kl.value:.2g}, perplexity {self.before.value:.4g} -> {self.after.value:.4g})"

    @property
    def lost(self) -> bool:
        """True if questions or controls are answered significantly worse."""
        return any(part.lost for part in (self.questions, self.controls) if part)

    @property
    def state(self) -> State:
        """ "low": the upper ends of the intervals are within the limits; "high": a lower end is beyond one, or answers
        are lost; else "unclear"."""
        if not all(map(math.isfinite, (*self.kl, *self.rise))):
            return "high"
        if self.kl.low > MOST_KL or self.rise.low > MOST_RISE or self.lost:
            return "high"
        return "low" if self.kl.high <= MOST_KL and self.rise.high <= MOST_RISE else "unclear"

    def to_dict(self) -> CostJSON:
        record: CostJSON = {
            "source": self.origin,
            "texts": self.texts,
            "kl": list(self.kl),
            "perplexity": [list(self.before), list(self.after)],
            "perplexity_rise": list(self.rise),
            "limits": {"kl": MOST_KL, "perplexity_rise": MOST_RISE},
            "continuations": [item._asdict() for item in self.continuations],
            "state": self.state,
        }
        if self.questions:
            record["questions"] = self.questions._asdict()
        if self.controls:
            record["controls"] = self.controls._asdict()
        if self.balanced:
            record["balanced"] = self.balanced._asdict()
        return record

    @classmethod
    def from_dict(cls, record: dict) -> Cost:
        """Inverse of `to_dict`. Raises KeyError, TypeError or ValueError."""

        def answered(name: str) -> Answered | None:
            part = record.get(name)
            if part is None:
                return None
            return Answered(int(part["total"]), int(part["before"]), int(part["after"]), float(part["p"]))

        before, after = record["perplexity"]
        items = [Continuation(*(str(item[key]) for key in Continuation._fields)) for item in record["continuations"]]
        return cls(
            str(record["source"]),
            int(record["texts"]),
            Interval.from_list(record["kl"]),
            Interval.from_list(before),
            Interval.from_list(after),
            Interval.from_list(record["perplexity_rise"]),
            answered("questions"),
            answered("controls"),
            record.get("balanced") and Balanced(*(float(record["balanced"][key]) for key in Balanced._fields)),
            tuple(items),
        )


@dataclass(frozen=True)
class NeutralRun:
    """Base and edit on neutral text. before, after: the last layer's output at every predicting position, [N, D]."""

    model: nn.Module
    text: NeutralText
    before: Tensor
    after: Tensor

    @classmethod
    def of(cls, model: nn.Module, text: NeutralText, edit: Edit) -> NeutralRun:
        """Both in one pass."""
        import torch

        from ..models.masks import longest
        from ..models.trees import Tree, cut
        from .batched import TREE_TOKENS
        from .states import TreePass, states_of

        rows = [tuple(row[:-1]) for row in text.rows]
        order = sorted(range(len(rows)), key=rows.__getitem__)
        ordered = [rows[i] for i in order]
        result: dict[int, tuple[Tensor, Tensor]] = {}
        trees = (Tree(ordered[part]) for part in cut(ordered, int(min(TREE_TOKENS, longest(model)))))
        passes = (TreePass(tree, [None, edit], range(len(tree.tokens))) for tree in trees)
        remaining = iter(order)
        for one, states in states_of(model, passes):
            for path, i in zip(one.tree.paths, remaining, strict=False):
                result[i] = (states[0, path].cpu(), states[1, path].cpu())
        before, after = zip(*(result[i] for i in range(len(rows))), strict=True)
        return cls(model, text, torch.cat(before), torch.cat(after))

    @cached_property
    def compared(self) -> Comparison:
        """Losses and KL of both, and the moments of the base's logits, in one pass."""
        from .neutral import compare

        return compare(self.text.rows, self._logits(self.after), self._logits(self.before), moments=True)

    def temperature(self, kl: float) -> float | None:
        """The temperature at which the flattened base has this KL from the base."""
        from .neutral import temperature

        return temperature(self._logits(self.before), kl, self.compared.moments)

    def _logits(self, states: Tensor) -> Logits:
        from .neutral import Logits

        return Logits(self.model, states)


def measure_cost(run: NeutralRun, tokenizer: Any, recipe: Recipe, edit: Edit) -> Cost:
    """The edit's cost. run: base and edit on the neutral text."""
    columns = run.compared.columns
    answered = _answered(run.model, tokenizer, recipe, edit)
    return Cost(
        origin=run.text.origin,
        texts=len(run.text.texts),
        kl=interval(columns, _ratio(2)),
        before=interval(columns, _perplexity(0)),
        after=interval(columns, _perplexity(1)),
        rise=interval(columns, lambda m: np.exp((m[..., 1] - m[..., 0]) / m[..., 3])),
        **answered,
        continuations=tuple(continuations(run.model, tokenizer, recipe, run.text, edit)),
    )


def _ratio(index: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda means: means[..., index] / means[..., 3]


def _perplexity(index: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda means: np.exp(means[..., index] / means[..., 3])


def _answered(model: nn.Module, tokenizer: Any, recipe: Recipe, edit: Edit) -> dict[str, Any]:
    """`questions`, `controls` and `balanced` of a cost; answers are judged as in `locate`."""
    from ..models.prompts import answer_tokens, encode
    from .batched import score_edits

    try:
        tokens = answer_tokens(tokenizer, recipe.answers, also=recipe.also)
    except InputError:  # an answer is not a token of this model
        return {}
    surfaces = [(answer, token) for answer, ids in tokens.items() for token in ids.values()]
    questions = recipe.ask(None)
    pairs = [(encode(tokenizer, recipe, question), [token]) for question in questions for _, token in surfaces]
    probabilities = np.exp(score_edits(model, pairs, [None, edit]).logprobs).reshape(2, len(questions), len(surfaces))
    p = {answer: probabilities[:, :, [a == answer for a, _ in surfaces]].sum(-1) for answer in recipe.answers}
    right = np.zeros((2, len(questions)))
    for i, question in enumerate(questions):
        others = [p[answer][:, i] for answer in recipe.answers if answer != question.answer]
        right[:, i] = p[question.answer][:, i] > np.max(others, 0)
    control = np.array([question.control for question in questions])
    return {
        "questions": Answered.of(*right[:, ~control]),
        "controls": Answered.of(*right[:, control]) if control.any() else None,
        "balanced": Balanced.of(right[0], [question.answer for question in questions]),
    }


def continuations(
    model: nn.Module, tokenizer: Any, recipe: Recipe, text: NeutralText, edit: Edit
) -> list[Continuation]:
    """Greedy continuations of the beginnings of some neutral texts and probes, by base and edit."""
    places: Sequence[int] | np.ndarray = (
        np.unique(np.linspace(0, len(recipe.twins) - 1, _PROMPTS).astype(int)) if recipe.twins else []
    )
    prompts = [("neutral", whole) for whole in text.texts[:_PROMPTS]]
    prompts += [("probe", recipe.twins[i].first.first) for i in places]
    cut = [(about, _beginning(whole)) for about, whole in prompts]
    written = [prompt for _, prompt in cut]
    before, after = _continued(model, tokenizer, written, [None, edit])
    return [Continuation(*about, b, a) for about, b, a in zip(cut, before, after, strict=True)]


def _beginning(text: str) -> str:
    """The first half of a text's words, or of its characters if words are not spaced."""
    words = text.split()
    return " ".join(words[: (len(words) + 1) // 2]) if len(words) > 1 else text[: (len(text) + 1) // 2]


def _continued(model: Any, tokenizer: Any, prompts: Sequence[str], edits: Sequence[Edit | None]) -> list[list[str]]:
    """Greedy, under each edit. All prompts and edits in one batch, padded on the left: a step reads all weights."""
    import torch

    from .states import in_one_batch

    device = model.get_input_embeddings().weight.device
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    end, width = model.generation_config.eos_token_id, max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    new = int(min(_WORDS, longest - width))
    if new <= 0:
        return [[""] * len(rows) for _ in edits]
    with torch.inference_mode(), in_one_batch(model, edits):
        tokens = model.generate(
            input_ids=ids.repeat(len(edits), 1),
            attention_mask=mask.repeat(len(edits), 1),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=end,
        )
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in tokens[:, width:].tolist()]
    return [texts[i : i + len(rows)] for i in range(0, len(texts), len(rows))]
