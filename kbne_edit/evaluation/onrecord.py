"""What an output records of an evaluation: the figures and the verdict.

Single draws are left out: a figure records their number, their mean change, and whether the edit exceeds each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict, cast

from ..statistics import Interval, IntervalJSON
from .effect import FEWEST_DRAWS
from .result import ABILITIES, FigureResult, State, TaskResult
from .verdict import Verdict, VerdictJSON


class KeptFigureJSON(TypedDict):
    """A figure of base and edit. controls, draws, p_holm, state, text: of figures that were tested beside controls."""

    unit: str
    digits: int
    base: float
    edit: float
    change: IntervalJSON
    controls: NotRequired[dict[str, IntervalJSON]]
    draws: NotRequired[int]
    p_holm: NotRequired[float]
    state: NotRequired[State]
    same_as: NotRequired[list[str]]
    text: NotRequired[str]


class KeptTaskJSON(TypedDict):
    """A task. kind: "bias", "capability", "knowledge" or "open"."""

    kind: str
    items: int
    figures: dict[str, KeptFigureJSON]


class KeptEvaluationJSON(TypedDict):
    """An evaluation. limit: items of each task, null for all; margin: points of accuracy; neutral: base, edit."""

    tool: str
    recipe: str
    limit: int | None
    margin: float
    tasks: dict[str, KeptTaskJSON]
    neutral: dict[str, list[IntervalJSON]]
    verdict: VerdictJSON


@dataclass(frozen=True)
class KeptFigure:
    """A figure of base and edit. controls: change under each kind; text: the conclusion in words. p_holm is None if the
    figure was not tested."""

    name: str
    unit: str
    digits: int
    base: float
    edit: float
    change: Interval
    controls: Mapping[str, Interval]
    draws: int = 0
    p_holm: float | None = None
    state: State = "none"
    same_as: tuple[str, ...] = ()
    text: str = ""

    @property
    def tested(self) -> bool:
        return self.p_holm is not None

    def beyond_every_control(self, state: State) -> bool:
        """True if it is better (or worse), and beyond every control, enough random draws among them."""
        return self.state == state and not self.same_as and self.draws >= FEWEST_DRAWS

    @classmethod
    def of(cls, name: str, result: FigureResult) -> KeptFigure:
        """From a figure with an edit."""
        return cls(
            name,
            result.figure.unit,
            result.figure.digits,
            result.values["base"],
            result.values["edit"],
            cast(Interval, result.change),
            result.controls or {},
            result.draws,
            result.p_holm,
            result.state,
            result.same_as if result.tested else (),
            result.described if result.tested else "",
        )

    def to_dict(self) -> KeptFigureJSON:
        record: KeptFigureJSON = {
            "unit": self.unit,
            "digits": self.digits,
            "base": self.base,
            "edit": self.edit,
            "change": list(self.change),
        }
        if self.p_holm is not None:
            record["controls"] = {kind: list(values) for kind, values in self.controls.items()}
            record |= {"draws": self.draws, "p_holm": self.p_holm, "state": self.state}  # type: ignore[typeddict-item]
            record |= {"same_as": list(self.same_as), "text": self.text}  # type: ignore[typeddict-item]
        return record

    @classmethod
    def from_dict(cls, name: str, record: dict) -> KeptFigure:
        """Raises KeyError, TypeError, ValueError or AttributeError."""
        p_holm, state = record.get("p_holm"), record.get("state", "none")
        if state not in ("better", "worse", "none"):
            raise ValueError("unknown state")
        return cls(
            name,
            str(record["unit"]),
            int(record["digits"]),
            float(record["base"]),
            float(record["edit"]),
            Interval.from_list(record["change"]),
            {str(kind): Interval.from_list(values) for kind, values in record.get("controls", {}).items()},
            int(record.get("draws", 0)),
            None if p_holm is None else float(p_holm),
            state,
            tuple(map(str, record.get("same_as", ()))),
            str(record.get("text", "")),
        )


@dataclass(frozen=True)
class KeptTask:
    """A task of an evaluation. figures: by name."""

    name: str
    kind: str
    items: int
    figures: Mapping[str, KeptFigure]

    @property
    def loss(self) -> bool:
        """True if it is an ability that an edit must not reduce."""
        return self.kind in ABILITIES

    @classmethod
    def of(cls, task: TaskResult) -> KeptTask:
        figures = {name: KeptFigure.of(name, result) for name, result in task.figures.items() if result.change}
        return cls(task.name, task.kind, task.items, figures)

    def to_dict(self) -> KeptTaskJSON:
        figures = {name: figure.to_dict() for name, figure in self.figures.items()}
        return {"kind": self.kind, "items": self.items, "figures": figures}

    @classmethod
    def from_dict(cls, name: str, record: dict) -> KeptTask:
        """Raises KeyError, TypeError, ValueError or AttributeError."""
        figures = {str(key): KeptFigure.from_dict(str(key), of) for key, of in record["figures"].items()}
        return cls(name, str(record["kind"]), int(record["items"]), figures)


@dataclass(frozen=True)
class KeptEvaluation:
    """An evaluation. tool: version that ran it; neutral: {figure: (base, edit)}; verdict: of that run."""

    tool: str
    recipe: str
    limit: int | None
    margin: float
    tasks: tuple[KeptTask, ...]
    neutral: Mapping[str, tuple[Interval, Interval]]
    verdict: Verdict

    def to_dict(self) -> KeptEvaluationJSON:
        return {
            "tool": self.tool,
            "recipe": self.recipe,
            "limit": self.limit,
            "margin": self.margin,
            "tasks": {task.name: task.to_dict() for task in self.tasks},
            "neutral": {name: [list(value) for value in pair] for name, pair in self.neutral.items()},
            "verdict": self.verdict.to_dict(),
        }

    @classmethod
    def from_dict(cls, record: dict) -> KeptEvaluation:
        """Inverse of `to_dict`. Raises KeyError, TypeError, ValueError or AttributeError."""
        limit = record["limit"]
        return cls(
            str(record["tool"]),
            str(record["recipe"]),
            None if limit is None else int(limit),
            float(record["margin"]),
            tuple(KeptTask.from_dict(str(name), of) for name, of in record["tasks"].items()),
            {str(name): _pair(pair) for name, pair in record["neutral"].items()},
            Verdict.from_dict(record["verdict"]),
        )


def _pair(values: Sequence[Any]) -> tuple[Interval, Interval]:
    base, edit = map(Interval.from_list, values)
    return base, edit


def kept_evaluations(summary: Mapping[str, Any] | None) -> tuple[KeptEvaluation, ...]:
    """The evaluations in a manifest's summary, the oldest first. Raises as `from_dict`."""
    return tuple(map(KeptEvaluation.from_dict, (summary or {}).get("evaluations", ())))
