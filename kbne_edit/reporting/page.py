"""A report as one self-contained HTML page: no script, no font, no request, as its content security policy says.

The same report gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..plots import words
from .effects import answers, cost, effects
from .evidence import change, frameworks, limits, opening, proofs, provenance, summary
from .neurons import each, where
from .types import Report

Section = Callable[[Report], list[str]]
SECTIONS: dict[str, tuple[str, Section]] = {  # name: (heading, what writes it)
    "summary": ("Verdict", summary),
    "change": ("What was changed", change),
    "proofs": ("Proofs", proofs),
    "effects": ("Effect", effects),
    "cost": ("Side effects", cost),
    "answers": ("Answers to the questions", answers),
    "map": ("Where it was changed", where),
    "neurons": ("What each neuron does", each),
    "provenance": ("Provenance and hashes", provenance),
    "limits": ("Limits", limits),
    "frameworks": ("Where this fits in a technical file", frameworks),
}


def render(report: Report) -> str:
    """The page for a report."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    title = f"Edit report: {report.model.id or 'a model that is not named'}"
    links = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, (heading, _) in SECTIONS.items())
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{heading}</h2>'
        f"{''.join(part(report))}</section>\n"
        for name, (heading, part) in SECTIONS.items()
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{words(title)}</title>\n<style>\n{style}</style></head>\n<body>"
        f'<a class="skip" href="#main">Skip to the report</a>\n<header><h1>{words(title)}</h1>{opening(report)}'
        '<p class="lead">Neurons of a language model were scaled, to have it show less social bias. This page says '
        "what was changed, what was proven and measured, and what was not.</p></header>\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main id="main" tabindex="-1">\n{body}</main>\n'
        f"<footer><p>Made by {words(report.tool)} from the files of the edit alone. Figures of proofs, effect, side "
        "effects and answers are those on record; hashes, tokens, map and shares by neuron were computed for this "
        "page.</p></footer></body></html>\n"
    )
