"""Pieces of the page: cells, tables, figures. Text from files is escaped by `plots.words`."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from html import escape

from ..plots import words

_PLAIN = 0x0530  # Latin, Greek and Cyrillic are below it: every system has their glyphs
_PUNCTUATION = range(0x2010, 0x2040)


def code(value: object) -> str:
    return f"<code>{words(value)}</code>"


def arrows(text: str) -> str:
    """Words of a terminal, with its arrows drawn; a number and its % stay on one line."""
    return words(text.replace(" -> ", " → ").replace(" %", "\N{NO-BREAK SPACE}%"))


def token(text: str | None, index: int) -> str:
    """A token. A space at its edge is made visible; for rare glyphs the code points are added."""
    if text is None:
        return f"token {index}"
    inner = text.strip(" ")
    left = len(text) - len(text.lstrip(" ")) if inner else len(text)
    rare = [char for char in inner if _may_lack_a_glyph(char)]
    points = " ".join(f"U+{ord(char):04X}" for char in rare[:4]) + (" …" if len(rare) > 4 else "")
    if rare and all(unicodedata.category(char)[0] in "CM" for char in rare):  # nothing that could be seen
        inner = "".join("·" if char in rare else char for char in inner)
    shown = code("␣" * left + inner + "␣" * (len(text) - len(inner) - left))
    return f"{shown} {points}" if rare else shown


def _may_lack_a_glyph(char: str) -> bool:
    if unicodedata.category(char)[0] == "C" or unicodedata.combining(char):
        return True
    return ord(char) >= _PLAIN and ord(char) not in _PUNCTUATION


def number(text: str) -> str:
    return f'<td class="number">{text}</td>'


def digest(text: str) -> str:
    return f'<td class="hash">{words(text)}</td>'


def state(text: str) -> str:
    """A state of a verdict, in its colour."""
    kind = {"PASS": "holds", "FAIL": "failed", "NO EVIDENCE": "warning"}.get(text, "open")
    return f'<b class="state {kind}">{words(text)}</b>'


def score(value: float) -> str:
    return f"{round(value, 3) + 0:.3f}"  # + 0: no minus before a zero


def signed(values: Sequence[float]) -> list[str]:
    """A change and the ends of its interval, as cells."""
    return [number(f"{value:+.4f}") for value in values]


def _cell(content: str, head: str) -> str:
    start, rest = ("<td", content[3:]) if content.startswith("<td") else ("<td", f">{content}</td>")
    return f'{start} data-head="{words(head)}"{rest}'


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """heads: text; rows: cells, the first one the row's header, others HTML or whole cells that begin with <td.

    On a narrow screen every cell is on a separate line, after its head, so nothing scrolls sideways.
    """
    top = "".join(f'<th scope="col">{words(head)}</th>' for head in heads)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(map(_cell, cells, heads[1:]))}</tr>\n' for first, *cells in rows
    )
    return f"<table><caption>{words(caption)}</caption><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table>"


def figure(drawing: str, caption: str, behind: str) -> str:
    """A plot with its figures in a table behind it. caption: HTML."""
    return (
        f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>"
        f"<details><summary>The same as a table</summary>{behind}</details>"
    )


def block(name: str, lines: str) -> str:
    return f'<pre role="group" aria-label="{words(name)}">{escape(lines)}</pre>'


def paragraph(text: str) -> str:
    """text: HTML."""
    return f"<p>{text}</p>"


def bullets(items: Iterable[str]) -> str:
    """items: HTML."""
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"
