"""Section of the page: how the factors were fitted, and what moved on units that were not fitted."""

from __future__ import annotations

from ..errors import EditError
from ..fitting.record import FitRecord, Moved
from ..plots import words
from .markup import number, paragraph, table
from .types import Report


def fitted(report: Report) -> list[str]:
    """Nothing for an edit that was not fitted."""
    data = report.edit.found.get("fit")
    if not isinstance(data, dict) or "gains" not in data:
        return []
    try:
        record = FitRecord.from_dict(data)
    except EditError as error:
        return ["<h3>Fit</h3>", paragraph(words(f"Not shown: {error}."))]
    return [
        "<h3>Fit</h3>",
        paragraph(words(_made(record))),
        paragraph(words(_moved(record))),
        _gains(record),
        _controls(record),
        table(
            "Root mean square of factor minus 1, by layer",
            ["layer", "root mean square"],
            ([str(layer), number(f"{value:.4f}")] for layer, value in enumerate(record.by_layer)),
        ),
    ]


def _made(record: FitRecord) -> str:
    return (
        f"The factors follow from {record.facts:,} facts, {record.contrasts:,} contrasts and {record.public:,} public "
        f"pairs by linear algebra, under a bound of {record.max_kl:g} on the KL (measured: {record.kl:.4f}). On "
        f"neutral texts the perplexity went from {record.perplexity_base:.2f} to {record.perplexity:.2f}. "
        f"{record.set_aside:,} units were set aside and not fitted."
    )


def _moved(record: FitRecord) -> str:
    if not record.moved:
        return "On the units set aside no part moved beyond shuffled labels."
    if "association" in record.moved or "pair" in record.moved:
        return f"On the units set aside these fell beyond shuffled labels: {', '.join(record.moved)}."
    return (
        f"On the units set aside these fell beyond shuffled labels: {', '.join(record.moved)}. The association of "
        "groups and attributes did not: this is not less stereotyping."
    )


def _gains(record: FitRecord) -> str:
    def cells(row: Moved) -> list[str]:
        change = f"{row.change:+.4f} [{row.low:+.4f}, {row.high:+.4f}]"
        return [words(row.part), number(f"{row.units:,}"), number(f"{row.before:+.4f}"), number(change)]

    heads = ["part", "units", "before", "change, 95 %"]
    return table("Units set aside: margins in nats per token", heads, (cells(row) for row in record.gains))


def _controls(record: FitRecord) -> str:
    heads = ["control", *(row.part for row in record.gains)]
    rows = ([words(row.name), *(number(f"{value:+.4f}") for value in row.changes)] for row in record.controls)
    return table("Controls of the same KL: changes in nats per token", heads, rows)
