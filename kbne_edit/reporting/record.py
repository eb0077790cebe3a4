"""The figures in a manifest's summary, parsed into types."""

from __future__ import annotations

from dataclasses import dataclass

from ..evaluation.cost import Cost
from ..evaluation.effect import Effect
from ..evaluation.measures.quick import QuickMeasure
from ..evaluation.onrecord import KeptEvaluation, kept_evaluations
from ..evaluation.verdict import Verdict, verdict_of
from ..selection.summary import SelectionSummary
from ..statistics import Interval

KNOWN = {"selection", "attribution", "effect", "cost", "measures", "evaluations", "verdict"}


@dataclass(frozen=True)
class Measured:
    """The figures of a manifest's summary; None: not measured.

    verdict: as recorded; of earlier versions, which had none, it is made of what they recorded. evaluations: on
    benchmarks, the oldest first.
    further: figures of a later version.
    """

    verdict: Verdict
    effect: Effect | None = None
    cost: Cost | None = None
    selection: SelectionSummary | None = None
    measures: tuple[QuickMeasure, ...] = ()
    evaluations: tuple[KeptEvaluation, ...] = ()
    further: tuple[str, ...] = ()

    @classmethod
    def of(cls, summary: dict | None) -> Measured:
        """Raises KeyError, TypeError or ValueError for figures of another form."""
        summary = summary or {}
        effect = Effect.from_dict(summary["effect"]) if "effect" in summary else None
        cost = Cost.from_dict(summary["cost"]) if "cost" in summary else None
        selection = SelectionSummary.from_dict(summary["selection"]) if "selection" in summary else None
        if "verdict" in summary:
            verdict = Verdict.from_dict(summary["verdict"])
        else:
            verdict = verdict_of(effect=effect, cost=cost, selection=selection)
        measures = tuple(QuickMeasure.from_dict(record) for record in summary.get("measures", ()))
        further = tuple(sorted(set(summary) - KNOWN))
        return cls(verdict, effect, cost, selection, measures, kept_evaluations(summary), further)


def effect_rows(effect: Effect) -> dict[str, Interval]:
    """{what: change with its interval}, of the edit and of its controls; nats per token."""
    random = effect.random
    rows = {
        "this edit": effect.change,
        f"control: random neurons of the same layers, {random.draws} draws": effect.random_change,
        "this edit less the control": random.versus,
    }
    if flat := effect.flattening:
        rows["this edit less a flattening of the same KL"] = flat.versus
    return rows | {"this edit, score with its sign": effect.change_signed}
