"""The types of a report. Field names are the keys of its JSON; None: not known, or not measured.

Parts that other stages made (`Effect`, `Cost`, `Verdict`, `Proofs`, `AttributionSummary`) are those stages' own types.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, cast

from ..attribution.answers import AttributionSummary
from ..disk.manifest import RecipeRecord
from ..evaluation.cost import Cost
from ..evaluation.effect import Effect
from ..evaluation.measures.quick import QuickMeasure
from ..evaluation.onrecord import KeptEvaluation
from ..evaluation.verdict import Verdict
from ..families import Site
from ..proofs.outcome import BehaviourFigures, Proofs
from ..rule import Rule, RuleJSON
from ..statistics import Interval

VERSION = 2
State = Literal["holds", "warning", "failed", "open"]


def plain(value: object) -> object:
    """A part of a report as JSON has it."""
    if isinstance(value, Proofs):
        return _proofs(value)
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if is_dataclass(value):
        return {entry.name: plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, (tuple, list)) else value


class BehaviourRow(BehaviourFigures):
    """The second proof in one dtype, with the figures that were measured (docs/output.md)."""

    holds: bool


class ProofsRow(TypedDict):
    """Both proofs, as the manifest records them. file: the first one holds."""

    file: bool
    faults: list[str]
    tensors: int
    edited: int
    files: int
    behaviour: list[BehaviourRow]


def _proofs(proofs: Proofs) -> ProofsRow:
    behaviour = [{"holds" if key == "ok" else key: v for key, v in e.to_dict().items()} for e in proofs.behaviour or ()]
    files = proofs.files
    return {
        "file": files.holds,
        "faults": list(files.faults),
        "tensors": files.tensors,
        "edited": files.edited,
        "files": files.files,
        "behaviour": cast(list[BehaviourRow], behaviour),
    }


@dataclass(frozen=True)
class Model:
    """The base. neurons: of all layers; neurons_of_a_layer: of the widest. None if there are no weights."""

    id: str | None
    commit: str | None
    fingerprint: str | None
    architecture: str | None = None
    layers: int | None = None
    neurons: int | None = None
    neurons_of_a_layer: int | None = None


class LayerRow(NamedTuple):
    """How many neurons of a layer are edited."""

    layer: int
    neurons: int

    def to_dict(self) -> dict[str, Any]:
        return self._asdict()


class Bin(NamedTuple):
    """How many neurons have a factor from low to high."""

    low: float
    high: float
    neurons: int

    def to_dict(self) -> dict[str, Any]:
        return self._asdict()


@dataclass(frozen=True)
class Change:
    """The edit. share: of all neurons, 0 to 1. factors: the distinct ones. found: as in the edit.

    histogram: of an edit with many factors, else empty.
    """

    site: Site
    neurons: int
    share: float | None
    factors: tuple[float, ...]
    exact: bool
    layers: tuple[LayerRow, ...]
    found: dict[str, Any]
    histogram: tuple[Bin, ...] = ()


class RepeatedJSON(RuleJSON):
    """The selection, repeated from the scores: its rule, its questions, and whether it is the same."""

    described: str
    on_record: bool
    wrong_left_out: bool
    reproduced: bool
    recipe: str
    quadrature: str
    questions: int
    controls: int


@dataclass(frozen=True)
class Repeated:
    """The selection, repeated from the scores. on_record: the edit names its rule (else the published one was used).

    wrong_left_out: questions that the base answers wrongly were left out. reproduced: the same neurons are selected.
    """

    rule: Rule
    on_record: bool
    wrong_left_out: bool
    reproduced: bool
    recipe: str
    quadrature: str
    questions: int
    controls: int

    def to_dict(self) -> RepeatedJSON:
        rest = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "rule"}
        rule = {"top": None} | self.rule.to_dict() | {"described": self.rule.describe()}
        return cast(RepeatedJSON, rule | rest)


class Attributed(NamedTuple):
    """One neuron over a dimension's questions. score: mean share of the largest; counts: share where it counts."""

    score: float
    counts: float

    def to_dict(self) -> dict[str, Any]:
        return self._asdict()


@dataclass(frozen=True)
class QuestionShare:
    """A question in which a neuron counts. share: of the question's largest score."""

    text: str
    answer: str
    dimension: str
    control: bool
    share: float


@dataclass(frozen=True)
class Token:
    """text: None where there is no tokenizer. z: standard deviations from the vocabulary's mean."""

    id: int
    text: str | None
    z: float


@dataclass(frozen=True)
class Tokens:
    """What a neuron's column raises and lowers most (a logit lens)."""

    raised: tuple[Token, ...] = ()
    lowered: tuple[Token, ...] = ()


@dataclass(frozen=True)
class NeuronRow:
    """One edited neuron. dimensions, controls, selected_by_controls, questions: from the scores, if available."""

    layer: int
    neuron: int
    factor: float
    dimensions: dict[str, Attributed] = field(default_factory=dict)
    controls: Attributed | None = None
    selected_by_controls: bool | None = None
    questions: tuple[QuestionShare, ...] = ()
    tokens: Tokens | None = None


@dataclass(frozen=True)
class MassRow:
    """Share of the positive attribution by layer, [L]. dimension: None for the controls."""

    dimension: str | None
    controls: bool
    layers: tuple[float, ...]


@dataclass(frozen=True)
class Strong:
    """One of the neurons with the largest mean scores."""

    layer: int
    neuron: int
    score: float
    edited: bool


@dataclass(frozen=True)
class Map:
    mass: tuple[MassRow, ...]
    strongest: tuple[Strong, ...]


@dataclass(frozen=True)
class Selected:
    """How many neurons a dimension selects; dimension: None for the controls."""

    dimension: str | None
    controls: bool
    neurons: int


@dataclass(frozen=True)
class OverlapPart:
    """How many neurons exactly these sets select, by index, and no other."""

    sets: tuple[int, ...]
    neurons: int


@dataclass(frozen=True)
class Overlap:
    sets: tuple[Selected, ...]
    parts: tuple[OverlapPart, ...]


@dataclass(frozen=True)
class SweepPoint:
    """One edit that a sweep tried, on dev. bias: change of the figure; lowest: lower end of the capability, points."""

    settings: str
    neurons: int
    bias: Interval
    kl: float
    lowest: float
    within: bool
    front: bool
    chosen: bool


@dataclass(frozen=True)
class SplitRow:
    """The two halves of a task's items."""

    task: str
    dev_items: int
    dev_sha256: str
    test_items: int
    test_sha256: str


@dataclass(frozen=True)
class TaskTest:
    """The chosen edit on the test half. found: the conclusion; beyond: better, and beyond every control."""

    task: str
    change: Interval
    p: float
    found: str
    beyond: bool


@dataclass(frozen=True)
class Sweep:
    """How factor and thresholds were chosen on one half of the items, and confirmed on the other.

    uses: how often that half was used on this data. None where it was not scored.
    """

    figure: str
    margin: float
    max_kl: float | None
    chosen_by: str
    steered_by: tuple[str, ...]
    bounded_by: tuple[str, ...]
    split: tuple[SplitRow, ...]
    points: tuple[SweepPoint, ...]
    test: tuple[TaskTest, ...] | None
    confirmed: bool | None
    verdict: str | None
    uses: int | None
    sha256: str


@dataclass(frozen=True)
class FileRow:
    """A file as it was written. base_sha256: None if the base lacks it; base_name: in the base, if it differs."""

    name: str
    sha256: str
    base_sha256: str | None
    base_name: str | None


@dataclass(frozen=True)
class ReshardedRow:
    """A file of the base that was resharded. into: the files with its tensors."""

    name: str
    sha256: str
    into: tuple[str, ...]


@dataclass(frozen=True)
class Provenance:
    """Where it comes from. Hashes of the manifest and of the scores are computed for the report."""

    baked_with: str
    recipe: RecipeRecord | None
    manifest_sha256: str
    undo_sha256: str | None
    files: tuple[FileRow, ...]
    resharded: tuple[ReshardedRow, ...]
    edited_tensors: tuple[str, ...]
    left_out: tuple[str, ...]
    scores_sha256: str | None


@dataclass(frozen=True)
class Hashes:
    """The comparison with the manifest for this report. checked: False if hashing was skipped.

    files: number of files hashed. All are unchanged, or there would be no report.
    """

    checked: bool
    files: int = 0


@dataclass(frozen=True)
class Finding:
    """One line of the summary."""

    about: str
    state: State
    text: str


class ReportKeys(TypedDict):
    """What the JSON of a report has beside the fields. verdicts: the lines of its summary."""

    version: int
    verdicts: list[Finding]


@dataclass(frozen=True)
class Report:
    """The report on an edit on disk. further: figures of the run without a field here."""

    tool: str
    form: str
    model: Model
    edit: Change
    selection: Repeated | None
    neurons: tuple[NeuronRow, ...]
    map: Map | None
    overlap: Overlap | None
    answers: AttributionSummary | None
    proofs: Annotated[Proofs | None, ProofsRow | None]
    effect: Effect | None
    cost: Cost | None
    measures: tuple[QuickMeasure, ...]
    evaluations: tuple[KeptEvaluation, ...]
    verdict: Verdict
    tuning: Sweep | None
    controls_overlap: int | None
    further: dict[str, Any]
    provenance: Provenance
    hashes: Hashes

    def __repr__(self) -> str:
        return f"Report({self.model.id}, {self.edit.neurons} neurons, {self.verdict.ship})"

    @property
    def verdicts(self) -> tuple[Finding, ...]:
        """The lines of the summary."""
        from .wording import findings

        return findings(self)

    def to_dict(self) -> Annotated[dict[str, Any], ReportKeys]:
        parts = {entry.name: plain(getattr(self, entry.name)) for entry in fields(self)}
        return {"version": VERSION} | parts | {"verdicts": plain(self.verdicts)}

    def html(self) -> str:
        """The report as one self-contained page."""
        from .page import render

        return render(self)


def by_name(rows: Sequence[NeuronRow]) -> tuple[str, ...]:
    """The dimensions for which the rows have figures."""
    return tuple(rows[0].dimensions) if rows else ()
