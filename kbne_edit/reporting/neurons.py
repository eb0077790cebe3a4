"""Sections of the page: where the edited neurons are, and what each one does."""

from __future__ import annotations

from dataclasses import dataclass

from .. import plots
from ..plots import words
from .evidence import place
from .markup import figure, number, score, table, token
from .types import Map, NeuronRow, Overlap, Report, Token

_CONTROLS = "controls"


@dataclass(frozen=True)
class Marks:
    """What `plots.neuron_map` draws. edited: (layer, neuron, selected by the controls too); others: (layer, neuron)."""

    layers: int
    width: int
    edited: tuple[tuple[int, int, bool | None], ...]
    others: tuple[tuple[int, int], ...]

    def to_dict(self) -> dict:
        """As `plots.neuron_map` takes them."""
        return {
            "layers": self.layers,
            "width": self.width,
            "edited": list(map(list, self.edited)),
            "others": list(map(list, self.others)),
        }


def marks(report: Report) -> Marks:
    """The marks of a report's map. Without weights the size of the model is that of its edit."""
    strongest = report.map.strongest if report.map else ()
    rows = report.neurons
    return Marks(
        report.model.layers or max(row.layer for row in rows) + 1,
        report.model.neurons_of_a_layer or max(row.neuron for row in rows) + 1,
        tuple((row.layer, row.neuron, row.selected_by_controls) for row in rows),
        tuple(sorted((neuron.layer, neuron.neuron) for neuron in strongest if not neuron.edited)),
    )


def where(report: Report) -> list[str]:
    drawn_map, drawn = report.map, marks(report)
    strong = {(s.layer, s.neuron): score(s.score) for s in drawn_map.strongest} if drawn_map else {}
    kinds = [(la, n, "edited; controls select it too" if shared else "edited") for la, n, shared in drawn.edited]
    kinds += [(la, n, "not edited") for la, n in drawn.others]
    rows = ([place(la, n), kind, number(strong.get((la, n), ""))] for la, n, kind in sorted(kinds))
    caption = "Discs: edited neurons; squares: edited ones that the controls select too"
    caption += f"; rings: others among the {len(strong)} with the largest mean score." if drawn_map else "."
    behind = table("Neurons on the map", ["layer, neuron", "mark", "mean score"], rows)
    drawing = plots.neuron_map(drawn.layers, drawn.width, drawn.edited, drawn.others)
    lines = ["<h3>Map of the neurons</h3>", figure(drawing, caption, behind)]
    lines += _by_layer(drawn_map) if drawn_map else []
    return lines + (_overlaps(report.overlap) if report.overlap else [])


def _name(dimension: str | None) -> str:
    return _CONTROLS if dimension is None else dimension


def _by_layer(drawn_map: Map) -> list[str]:
    named = [(_name(row.dimension), row.layers) for row in drawn_map.mass]
    layers = range(len(named[0][1]))
    rows = ([str(layer), *(number(f"{values[layer]:.1%}") for _, values in named)] for layer in layers)
    return [
        "<h3>Attribution by layer</h3>",
        figure(
            plots.heat_map(named),
            "The share of a question's positive attribution that lies in a layer, averaged over the questions of a "
            "dimension; the controls are questions that have nothing to do with bias. Darker is more in light, "
            "brighter in dark; each row adds up to 100 %.",
            table("Share of attribution by layer", ["layer", *(name for name, _ in named)], rows),
        ),
    ]


def _overlaps(overlap: Overlap) -> list[str]:
    sets = [(_name(one.dimension), one.neurons) for one in overlap.sets]
    parts = [(part.sets, part.neurons) for part in overlap.parts]
    rows = ([words(" and ".join(sets[m][0] for m in members)), number(f"{n:,}")] for members, n in parts)
    more = f" Shown are the {plots.COLUMNS} largest of {len(parts)}." if len(parts) > plots.COLUMNS else ""
    return [
        "<h3>Overlaps of the selections</h3>",
        figure(
            plots.overlaps(sets, parts),
            "Each column: how many neurons are selected by exactly the marked dimensions and by no other; beside the "
            f"names, how many each selects in all. What the controls select too is not specific to bias.{more}",
            table("Neurons selected by exactly these", ["selected by", "neurons"], rows),
        ),
    ]


def each(report: Report) -> list[str]:
    rows = report.neurons
    lines = [
        "<p>Tokens: those that the neuron's column of the down-projection raises and lowers most, if its activation "
        "is positive; a negative one swaps the two. This is a <em>logit lens</em>, an approximation: the base's "
        "column, times the final norm's weight, straight to the unembedding, as if no layer came after it. In "
        "brackets: standard deviations from the mean over the vocabulary. ␣ stands for a space; U+… are the code "
        "points of characters for which a system may have no glyph. Questions: those in which the neuron counts most, "
        "with its share of the largest score.</p>"
    ]
    if rows[0].tokens is None:
        lines.append("<p>No tokens are shown: there is no unembedding here that fits the neurons' columns.</p>")
    heads = ["layer, neuron", "raises", "lowers", "counts most in"]
    return [*lines, table(f"Tokens and questions of each edited neuron ({len(rows):,})", heads, map(_row, rows))]


def _row(row: NeuronRow) -> list[str]:
    ends = (row.tokens.raised, row.tokens.lowered) if row.tokens else ((), ())
    questions = "".join(
        f'<li>{words(q.text)} <span class="quiet">({words(_CONTROLS if q.control else q.dimension)}, '
        f"{words(q.answer)}, {q.share:.0%})</span></li>"
        for q in row.questions
    )
    return [place(row.layer, row.neuron), *map(_tokens, ends), f"<ul>{questions}</ul>" if questions else "not known"]


def _tokens(tokens: tuple[Token, ...]) -> str:
    return " ".join(f'<span class="token">{token(t.text, t.id)} ({t.z:+.1f})</span>' for t in tokens) or "none"
