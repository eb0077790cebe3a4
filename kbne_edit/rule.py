"""The selection rule: which neurons are kept, as a value that recipes, selections, sweeps and reports pass on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NotRequired, TypedDict

from .errors import InputError, shown

RULES, COMBINE = ("paper", "contrastive", "paired", "specific"), ("union", "intersection")
TOP = 0.002  # of all neurons: the default of the specific rule for each dimension


class RuleJSON(TypedDict):
    """How neurons are selected; see docs/rules.md."""

    rule: str
    tau: float
    beta: float
    combine: str
    top: NotRequired[float | None]
    same_sign: NotRequired[bool]


@dataclass(frozen=True)
class Rule:
    """How neurons are selected (arXiv:2601.21864, extended; see `selection.votes`).

    name: "paper", "contrastive", "paired" or "specific".
    tau: a neuron counts for a question if its share of the question's largest score exceeds it, 0 to 1.
    beta: share of a dimension's questions in which a neuron must count, 0 to 1.
    top: in place of tau, the share of all neurons that counts, 0 to 1; None: tau decides.
    combine: "union" or "intersection" of the dimensions.
    same_sign: keep only neurons whose mean effect on the right answer is positive for every right answer. This drops a
        neuron that favours "yes" whatever the question.
    Raises InputError on construction.
    """

    name: str = "paper"
    tau: float = 0.1
    beta: float = 0.1
    top: float | None = None
    combine: str = "union"
    same_sign: bool = False

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise InputError(f"rule is {shown(self.name)}; it must be one of {', '.join(RULES)}")
        if self.combine not in COMBINE:
            raise InputError(f"combine is {shown(self.combine)}; it must be one of {', '.join(COMBINE)}")
        for name in ("tau", "beta", "top"):
            value = getattr(self, name)
            if value is None and name == "top":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise InputError(f"{name} is {shown(value)}; it must lie from 0 to 1")
        if not isinstance(self.same_sign, bool):
            raise InputError(f"same_sign is {shown(self.same_sign)}; it must be true or false")

    @property
    def share(self) -> float | None:
        """The share of all neurons that counts, or is kept; None if tau decides."""
        return TOP if self.name == "specific" and self.top is None else self.top

    def describe(self) -> str:
        """Rule and thresholds in a few words."""
        limits = [f"tau {self.tau:g}" if self.top is None else f"the largest {self.top:.3%} of all neurons"]
        if self.name != "specific":
            limits.append(f"beta {self.beta:g}")
        elif self.top is None:
            limits = [f"the largest {TOP:.3%} of all neurons"]
        words = [f"rule {self.name}", *limits, f"{self.combine} over the dimensions"]
        return ", ".join(words + ["same sign for every right answer"] * self.same_sign)

    def nothing(self) -> str:
        """Why no neuron was selected, and what to do."""
        signs = ", same sign" if self.same_sign else ""
        if self.name == "specific":
            return (
                "no neuron's share is larger in questions than in matched controls, beyond chance "
                f"({self.combine}{signs})"
            )
        above = {
            "contrastive": " above what the controls reach",
            "paired": " above what it does in the question's twin",
        }
        threshold = f"tau {self.tau:g}" if self.top is None else f"top {self.top:g}"
        cure = "--tau or --beta" if self.top is None else "--beta"
        return (
            f"no neuron counts{above.get(self.name, '')} (rule {self.name}, {threshold}, beta {self.beta:g}, "
            f"{self.combine}{signs}): lower {cure}"
        )

    def to_dict(self) -> RuleJSON:
        """JSON form, as edits record it, without unused settings."""
        record: RuleJSON = {"rule": self.name, "tau": self.tau, "beta": self.beta, "combine": self.combine}
        if self.top is not None:
            record["top"] = self.top
        if self.same_sign:
            record["same_sign"] = True
        return record

    @classmethod
    def from_dict(cls, record: object) -> Rule:
        """Inverse of `to_dict`; further keys of a record are ignored. Raises InputError."""
        if not isinstance(record, dict):
            raise InputError("a selection rule must be an object with rule, tau, beta and combine")
        known = {key: record[key] for key in ("tau", "beta", "top", "combine", "same_sign") if key in record}
        return cls(record.get("rule", "paper"), **known)
