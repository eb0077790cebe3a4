"""Plots as inline SVG. They contain shapes, text and classes; the page's style sheet has the colours, light and dark.

Each plot has a title and a description for screen readers. It is 480 units wide, so that its text can be read on a
phone. Text from files is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from .errors import one_line

_WIDTH = 480
_LEFT = 96  # width of the row labels
COLUMNS = 16  # of the overlap plot: more would not be legible
_PIXELS = 640  # across, of a plot that is a file of its own


def words(value: object) -> str:
    """Text from outside, escaped for HTML and SVG, on one line."""
    return escape(one_line(str(value)))


def _svg(name: str, height: float, title: str, description: str, body: list[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{words(title)}</title><desc id="{name}-desc">{words(description)}</desc>'
        f"{''.join(body)}</svg>"
    )


def _text(x: float, y: float, label: str, anchor: str = "start", kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.4g}" y="{y:.4g}" text-anchor="{anchor}"{style}>{words(label)}</text>'


def _rect(x: float, y: float, width: float, height: float, kind: str, opacity: float = 1) -> str:
    shade = "" if opacity == 1 else f' fill-opacity="{opacity:.3f}"'
    return f'<rect class="{kind}" x="{x:.5g}" y="{y:.5g}" width="{width:.5g}" height="{height:.5g}"{shade}/>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.5g}" y1="{y1:.5g}" x2="{x2:.5g}" y2="{y2:.5g}"/>'


def _dot(x: float, y: float, kind: str, radius: float = 3) -> str:
    return f'<circle class="{kind}" cx="{x:.5g}" cy="{y:.5g}" r="{radius:g}"/>'


def _short(label: str, most: int = 13) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"


def neuron_map(
    layers: int, width: int, edited: Sequence[tuple[int, int, bool | None]], others: Iterable[tuple[int, int]]
) -> str:
    """Layers downwards, neurons across. edited: (layer, neuron, selected by the controls too); others: (layer, neuron).

    Shapes differ as well as colours: a disc, a square if the controls select the neuron, a ring if it is not edited.
    """
    step, top, span = max(min(16.0, 384 / layers), 4.0), 26.0, _WIDTH - 60.0
    bottom = top + step * layers

    def at(layer: int, neuron: int) -> tuple[float, float]:
        return 44 + span * neuron / max(width - 1, 1), top + step * (layer + 0.5)

    body = [_text(8, 16, "layer", kind="quiet"), _text(_WIDTH - 16, 16, "neuron in its layer", "end", "quiet")]
    for layer in range(0, layers, max(1, round(16 / step))):
        y = top + step * (layer + 0.5)
        body += [_text(34, y + 4, str(layer), "end", "quiet"), _line(44, y, 44 + span, y, "grid")]
    body += [_dot(*at(*place), "ring", 2) for place in others]
    shared: int | None  # of one neuron, then their number
    for layer, neuron, shared in edited:
        x, y = at(layer, neuron)
        body.append(_rect(x - 3.5, y - 3.5, 7, 7, "second") if shared else _dot(x, y, "first", 4))
    body += [_text(44, bottom + 16, "0", kind="quiet"), _text(44 + span, bottom + 16, f"{width - 1:,}", "end", "quiet")]
    shared = sum(bool(mark[2]) for mark in edited)
    used = len({layer for layer, _, _ in edited})
    caption = f"{len(edited)} edited neurons in {used} of {layers} layers; controls select {shared} of them, too."
    return _svg("map", bottom + 24, "Where the edited neurons are", caption, body)


def heat_map(rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Share of attribution, dimensions downwards, layers across. rows: (name, share per layer)."""
    layers, high = len(rows[0][1]), max(max(values) for _, values in rows) or 1
    cell, top = (_WIDTH - _LEFT - 8) / layers, 8.0
    body = []
    for place, (name, values) in enumerate(rows):
        y = top + 30 * place
        body.append(_text(_LEFT - 8, y + 18, _short(name), "end"))
        for layer, value in enumerate(values):
            x = _LEFT + cell * layer
            body += [_rect(x, y, cell, 26, "cell"), _rect(x, y, cell, 26, "heat", max(value, 0) / high)]
    bottom = top + 30 * len(rows)
    for layer in range(0, layers, max(1, round(28 / cell))):
        body.append(_text(_LEFT + cell * (layer + 0.5), bottom + 14, str(layer), "middle", "quiet"))
    body.append(_text(_LEFT - 8, bottom + 14, "layer", "end", "quiet"))
    peaks = (f"{name}: most in layer {max(range(layers), key=values.__getitem__)}" for name, values in rows)
    return _svg("heat", bottom + 24, "Share of attribution by layer", "; ".join(peaks) + ".", body)


def overlaps(sets: Sequence[tuple[str, int]], parts: Sequence[tuple[Sequence[int], int]]) -> str:
    """An UpSet plot. sets: (name, size); parts: (indices of the sets that share exactly these neurons, how many)."""
    shown, high, base = parts[:COLUMNS], max((n for _, n in parts), default=1), 110.0
    step = min((_WIDTH - _LEFT - 60) / max(len(shown), 1), 40.0)
    start = _LEFT + 52
    body = [_line(start - 4, base, start + step * len(shown), base, "axis")]
    for row, (name, size) in enumerate(sets):
        y = base + 22 + 24 * row
        body += [_text(_LEFT - 8, y + 4, _short(name), "end"), _text(_LEFT + 36, y + 4, f"{size:,}", "end", "quiet")]
    for column, (members, count) in enumerate(shown):
        x = start + step * (column + 0.5)
        body += [_rect(x - step * 0.3, base - 84 * count / high, step * 0.6, 84 * count / high, "first")]
        body.append(_text(x, base - 84 * count / high - 5, f"{count:,}", "middle"))
        places = [base + 22 + 24 * row for row in range(len(sets))]
        body += [_dot(x, y, "on" if row in members else "off", 5) for row, y in enumerate(places)]
        body.append(_line(x, places[min(members)], x, places[max(members)], "link"))
    names = [" and ".join(sets[m][0] for m in members) + f" only: {count}" for members, count in shown]
    caption = "Neurons that are selected by exactly these: " + "; ".join(names) + "."
    return _svg("overlap", base + 22 + 24 * len(sets), "Overlaps of the selections", caption, body)


def intervals(rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Means with their intervals around a line at zero. rows: (name, (mean, low, high)).

    The first row is the edit; the controls have another colour and a smaller disc.
    """
    reach = max(abs(value) for _, values in rows for value in values) or 1
    left, right, top = 16.0, _WIDTH - 16.0, 10.0

    def at(value: float) -> float:
        return (left + right) / 2 + (right - left) / 2 * 0.94 * value / reach

    bottom = top + 44 * len(rows)
    body = [_line(at(0), top, at(0), bottom, "axis")]  # first, so that names stand before it
    for place, (name, (mean, low, high)) in enumerate(rows):
        y = top + 44 * place + 30
        body += [
            _text(left, y - 14, name),
            _line(at(low), y, at(high), y, "bar"),
            _dot(at(mean), y, "second" if place else "first", 4 if place else 6),
        ]
        body += [_line(at(end), y - 5, at(end), y + 5, "bar") for end in (low, high)]
    body += [_text(at(0), bottom + 16, "0, no change", "middle", "quiet")]
    body += [_text(at(-reach), bottom + 16, f"{-reach:+.3g}", "start", "quiet")]
    body += [_text(at(reach), bottom + 16, f"{reach:+.3g}", "end", "quiet")]
    caption = "; ".join(f"{name}: {mean:+.4f}, from {low:+.4f} to {high:+.4f}" for name, (mean, low, high) in rows)
    return _svg("effect", bottom + 24, "Change of the score", caption + ".", body)


def histogram(bars: Sequence[tuple[float, float, int]]) -> str:
    """Bars: (from, to, how many), of equal width and without gaps; their height is linear."""
    high, base = max(count for _, _, count in bars) or 1, 130.0
    step = (_WIDTH - 32.0) / len(bars)
    body = [_line(16, base, _WIDTH - 16, base, "axis")]
    for place, (_, _, count) in enumerate(bars):
        tall = 100 * count / high
        body.append(_rect(16 + step * (place + 0.1), base - tall, step * 0.8, tall, "first"))
    body += [_text(16, base + 18, f"{bars[0][0]:.3g}", kind="quiet"), _text(16, 16, f"{high:,} neurons", kind="quiet")]
    body += [_text(_WIDTH - 16, base + 18, f"{bars[-1][1]:.3g}", "end", "quiet")]
    body += [_text(_WIDTH / 2, base + 18, "factor", "middle", "quiet")]
    caption = "; ".join(f"{low:.3g} to {top:.3g}: {count}" for low, top, count in bars)
    return _svg("factors", base + 26, "Distribution of the factors", caption + ".", body)


def pareto(points: Sequence[tuple[float, float, bool, bool, bool]], figure: str) -> str:
    """Effect (lower is better) against cost (KL, logarithmic) of each edit of a sweep.

    points: (KL, change of the figure's distance from its ideal, within bounds, on the front, chosen). Shapes differ as
    well as colours: a disc on the front, a ring behind it, a square out of bounds, a second ring around the chosen one.
    Rises above twice the largest fall are drawn at the upper edge.
    """
    costs = [max(point[0], 1e-12) for point in points]
    left, right = math.floor(math.log10(min(costs))), math.ceil(math.log10(max(costs)))
    right = max(right, left + 1)
    changes = [point[1] for point in points]
    low, high = min(0.0, *changes), max(0.0, *changes)
    high = min(high, -2 * low) if low else high
    top, bottom, edge = 30.0, 270.0, _WIDTH - 24.0
    spread = (high - low) or 1.0

    def across(cost: float) -> float:
        return _LEFT - 24 + (edge - _LEFT + 24) * (math.log10(cost) - left) / (right - left)

    def down(bias: float) -> float:
        return top + (bottom - top) * (high - min(bias, high)) / spread

    body = [_text(8, 16, f"change ({figure})", kind="quiet")]
    for power in range(left, right + 1):
        x = across(10.0**power)
        body += [_line(x, top, x, bottom, "grid"), _text(x, bottom + 18, f"1e{power}", "middle", "quiet")]
    for value in sorted({low, 0.0, high}):
        if value == 0 or abs(down(value) - down(0)) > 14:
            body.append(_text(_LEFT - 32, down(value) + 4, f"{value:+.3g}" if value else "0", "end", "quiet"))
    body += [_line(across(10.0**left), down(0), edge, down(0), "axis")]
    body.append(_text(edge, bottom + 36, "KL from the base on neutral text, nats per token", "end", "quiet"))
    best = sorted((across(cost), down(point[1])) for cost, point in zip(costs, points, strict=True) if point[3])
    if len(best) > 1:
        path = " ".join(f"{x:.5g},{y:.5g}" for x, y in best)
        body.append(f'<polyline class="step" points="{path}"/>')
    for cost, (_, bias, within, on_front, chosen) in zip(costs, points, strict=True):
        x, y = across(cost), down(bias)
        if not within:
            body.append(_rect(x - 3.5, y - 3.5, 7, 7, "second"))
        else:
            body.append(_dot(x, y, "first", 4) if on_front else _dot(x, y, "ring", 3))
        if chosen:
            body.append(_dot(x, y, "around", 8))
    counts = [sum(point[3] for point in points), sum(not point[2] for point in points), sum(c > high for c in changes)]
    caption = f"{len(points)} edits; {counts[0]} on the front, {counts[1]} out of bounds"
    if counts[2]:
        caption += f", {counts[2]} above the upper edge"
        body.append(_text(edge, 16, f"{counts[2]} above the upper edge", "end", "quiet"))
    picked = [f"; chosen: bias {bias:+.4g} at KL {kl:.2g}" for kl, bias, *_, chosen in points if chosen]
    return _svg("pareto", bottom + 44, "Bias against cost", caption + "".join(picked) + ".", body)


def standalone(drawing: str) -> str:
    """A plot as a separate file.

    It has the page's colours for both themes, and a background, since the viewer's theme may differ.
    """
    sheet = (Path(__file__).parent / "reporting" / "report.css").read_text(encoding="utf-8")
    colours = sheet[sheet.index(":root") : sheet.index("* {")].rstrip()
    shapes = [line for line in sheet.splitlines() if line.startswith("svg ")]
    style = "\n".join(["<style>", colours, *shapes, "svg .ground { fill: var(--paper); }", "</style>"])
    ground = '<rect class="ground" width="100%" height="100%" rx="6"/>'
    root = f'<svg xmlns="http://www.w3.org/2000/svg" width="{_PIXELS}"'
    head, body = drawing.replace("<svg", root, 1).split("</desc>", 1)
    return f"{head}</desc>\n{style}\n{ground}\n{body}\n"
