"""The result of a sweep: every edit on dev, the choice, and its confirmation on test. The format of OUT/tune.json."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypedDict, cast

from ..errors import InputError
from ..evaluation.evaluate import NeutralJSON
from ..evaluation.result import TaskJSON
from ..evaluation.verdict import Part, Verdict, VerdictJSON, verdict_of
from ..files import read_json
from ..statistics import Interval
from .objective import Confirmation
from .search import Space

VERSION = 1


@dataclass(frozen=True)
class Point:
    """One edit on dev. edit: its SHA-256; settings: all that select it. bias: change of the distance from the ideal,
    mean over the steering tasks; kl: from the base on neutral text; lowest: lower end of the change of each ability.
    within: the bounds hold; front: no other edit dominates it in bias and KL. beyond_random: its distance minus that of
    the draws, None if it was not compared with draws; draws: their number, as_good: number of draws that are as good.
    """

    edit: str
    neurons: int
    settings: tuple[dict, ...]
    bias: Interval
    kl: float
    lowest: dict[str, float]
    within: bool
    front: bool = False
    beyond_random: Interval | None = None
    draws: int = 0
    as_good: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "edit": self.edit,
            "neurons": self.neurons,
            "settings": list(self.settings),
            "bias": list(self.bias),
            "kl": self.kl,
            "lowest": self.lowest,
            "within": self.within,
            "front": self.front,
            "beyond_random": self.beyond_random and list(self.beyond_random),
            "draws": self.draws,
            "as_good": self.as_good,
        }

    @classmethod
    def from_dict(cls, record: dict) -> Point:
        """Raises KeyError, TypeError or ValueError."""
        beyond = record["beyond_random"]
        return cls(
            str(record["edit"]),
            int(record["neurons"]),
            tuple(dict(setting) for setting in record["settings"]),
            Interval.from_list(record["bias"]),
            float(record["kl"]),
            {str(name): float(value) for name, value in record["lowest"].items()},
            bool(record["within"]),
            bool(record["front"]),
            None if beyond is None else Interval.from_list(beyond),
            int(record.get("draws", 0)),
            int(record.get("as_good", 0)),
        )


class HalfJSON(TypedDict):
    """One half of a task's items. sha256: of the requests."""

    items: int
    sha256: str


class SplitJSON(TypedDict):
    """The halves of a task."""

    dev: HalfJSON
    test: HalfJSON


class SearchJSON(TypedDict):
    """How the space was searched. size: of it; empty: settings that select no neuron."""

    how: str
    size: int
    empty: int


class TestJSON(TypedDict):
    """The test half, scored for the chosen edit: as of `evaluate`."""

    controls: dict[str, int]
    temperature: float | None
    comparisons: int
    tasks: dict[str, TaskJSON]
    neutral: NeutralJSON


class TuningJSON(TypedDict):
    """What OUT/tune.json holds, and `tune --json` prints. base: fingerprint of the model; scores: {site: SHA-256}.

    base_bias: distance from the ideal; chosen: SHA-256 of the choice. test, confirmation: null before the test half is
    scored.
    """

    kbne_tune: int
    tool: str
    base: str
    recipe_sha256: str
    dtype: str
    split: dict[str, SplitJSON]
    model: str
    commit: str | None
    recipe: str
    scores: dict[str, str]
    space: Annotated[dict[str, Any], Space]
    trials: int
    seed: int
    draws: int
    figure: str
    margin: float
    max_kl: float | None
    digits: int
    steered_by: list[str]
    bounded_by: list[str]
    base_bias: dict[str, float]
    search: SearchJSON
    points: list[Annotated[dict[str, Any], Point]]
    chosen: str | None
    chosen_by: str
    test: TestJSON | None
    confirmation: Annotated[dict[str, Any], Confirmation] | None
    verdict: VerdictJSON


@dataclass(frozen=True)
class Tested:
    """The steering figure of one task on test. beyond: better, and beyond every control; text: in words."""

    task: str
    change: Interval
    p: float
    beyond: bool
    text: str


@dataclass(frozen=True)
class Tuning:
    """A sweep. figure: the steering one; steered_by, bounded_by: tasks; split: {task: {half: items and SHA-256}}.

    points: every edit tried; chosen: SHA-256 of the choice, None if no edit qualified. digits: decimals of the figure.
    tested, confirmation: of the test half, () and None if it was not scored. record: the content of OUT/tune.json.
    """

    base: str
    figure: str
    margin: float
    max_kl: float | None
    steered_by: tuple[str, ...]
    bounded_by: tuple[str, ...]
    split: dict[str, dict]
    points: tuple[Point, ...]
    chosen: str | None
    chosen_by: str
    digits: int = 4
    tested: tuple[Tested, ...] = ()
    confirmation: Confirmation | None = None
    record: dict = field(default_factory=dict, repr=False, compare=False)

    def __repr__(self) -> str:
        state = "not tested" if self.confirmation is None else f"confirmed: {self.confirmation.confirmed}"
        return f"Tuning({len(self.points)} edits, {self.figure}, {state})"

    @property
    def verdict(self) -> Verdict:
        """From the test half alone: figures on dev are biased by the choice."""
        verdict = verdict_of()
        if self.confirmation is None:
            return verdict
        good = self.confirmation.confirmed and all(entry.beyond for entry in self.tested)
        held = self.confirmation.bounded
        bounds = "the bounds hold on the test half" if held else f"a bound is broken: {self.confirmation.text}"
        return replace(
            verdict,
            effect=Part("PASS" if good else "NO EVIDENCE", f"on the test half, {self.confirmation.text}"),
            cost=Part("PASS" if held else "NO EVIDENCE", bounds),
        )

    def to_dict(self) -> TuningJSON:
        return cast(TuningJSON, self.record)

    @classmethod
    def from_dict(cls, record: object, where: str = "tune.json") -> Tuning:
        """Inverse of `to_dict`, of earlier versions' records, too. Raises InputError."""
        if not isinstance(record, dict) or record.get("kbne_tune") != VERSION:
            raise InputError(f"{where} is not a result of `kbne-edit tune`")
        try:
            return cls._parsed(record)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            raise InputError(f"{where} has figures that kbne-edit did not write") from None

    @classmethod
    def _parsed(cls, record: dict) -> Tuning:
        figure, test = str(record["figure"]), record["test"]
        confirmation = record["confirmation"] if "confirmation" in record else record["verdict"]
        steered = tuple(map(str, record["steered_by"]))
        tested = []
        for task in steered if test else ():
            entry = test["tasks"][task]["figures"][figure]
            # Earlier versions recorded no state, and compared with too few draws.
            beyond = entry.get("state") == "better" and not entry["same_as"]
            change = Interval.from_list(entry["change"])
            tested.append(Tested(task, change, float(entry["p_holm"]), beyond, str(entry["verdict"])))
        return cls(
            base=str(record["base"]),
            figure=figure,
            margin=float(record["margin"]),
            max_kl=None if record["max_kl"] is None else float(record["max_kl"]),
            steered_by=steered,
            bounded_by=tuple(map(str, record["bounded_by"])),
            split={str(name): _halves(of) for name, of in record["split"].items()},
            points=tuple(map(Point.from_dict, record["points"])),
            chosen=None if record["chosen"] is None else str(record["chosen"]),
            chosen_by=str(record["chosen_by"]),
            digits=int(record.get("digits", 4)),
            tested=tuple(tested),
            confirmation=confirmation and _confirmation(confirmation),
            record=record,
        )


def _confirmation(record: dict) -> Confirmation:
    confirmed = bool(record["confirmed"])
    uses, candidates = (int(record.get(key, 1)) for key in ("uses", "candidates"))
    return Confirmation(confirmed, str(record["text"]), bool(record.get("bounded", confirmed)), uses, candidates)


def _halves(of: dict) -> dict:
    return {side: {"items": int(of[side]["items"]), "sha256": str(of[side]["sha256"])} for side in ("dev", "test")}


def load_tuning(path: str | Path) -> Tuning:
    """A result of `tune`. Raises InputError."""
    return Tuning.from_dict(read_json(path, InputError, "run tune again"), str(path))
