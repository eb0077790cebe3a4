"""Sections of the page: verdict, what was changed, proofs, provenance, limits, and where they can serve."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .. import plots
from ..errors import one_line
from ..plots import words
from ..proofs.outcome import BehaviourProof
from .fitted import fitted
from .markup import arrows, block, bullets, code, digest, figure, number, paragraph, score, state, table
from .types import FileRow, NeuronRow, Report, by_name
from .wording import LIMITS, NO_MITIGATION, NOT_COVERED, RULES, SERVES, STATES, WORDS, checked

_SHIP = {"ship": "holds", "do not ship": "failed", "try further": "warning"}


def opening(report: Report) -> str:
    """The verdict in one line."""
    verdict = report.verdict
    why = f"Not passed: {', '.join(verdict.open)}." if verdict.open else "Every part passes."
    text = words(verdict.ship[0].upper() + verdict.ship[1:])
    return f'<p class="ship {_SHIP[verdict.ship]}"><strong>{text}.</strong> {why}</p>'


def summary(report: Report) -> list[str]:
    items = "".join(
        f'<li class="{line.state}"><b>{STATES[line.state]}</b> <strong>{words(line.about)}</strong>: '
        f"{arrows(line.text)}</li>"
        for line in report.verdicts
    )
    rows = ([state(part.state), words(WORDS[name]), arrows(part.reason)] for name, part in report.verdict)
    return [
        table("The five parts of the verdict", ["state", "question", "reason"], rows),
        paragraph(f"{_scaled(report)} were scaled by {factors_in_words(report.edit.factors)}."),
        "<h3>On record, and checked again</h3>",
        paragraph(
            f"Proofs and figures are on record: {words(report.provenance.baked_with)} computed them in the run that "
            f"made these files. {checked_in_words(report)} Hashes show damage, not forgery: whoever wrote the files "
            f"could have written these figures as well. This page was made by {words(report.tool)}."
        ),
        "<h3>In more words</h3>",
        f'<ul class="verdicts">{items}</ul>',
    ]


def _scaled(report: Report) -> str:
    """How many neurons, and of how many."""
    edit, model = report.edit, report.model
    if not model.neurons or not model.layers or edit.share is None:
        return f"{edit.neurons:,} feed-forward neurons in {len(edit.layers)} layers"
    return (
        f"{edit.neurons:,} of {model.neurons:,} feed-forward neurons ({edit.share:.3%}) in {len(edit.layers)} of "
        f"{model.layers} layers"
    )


def checked_in_words(report: Report) -> str:
    """Which files were hashed for the page, as HTML."""
    return re.sub("`(.+?)`", r"<code>\1</code>", words(checked(report)))


def factors_in_words(factors: Sequence[float]) -> str:
    if len(factors) == 1:
        return f"the factor {factors[0]:g}"
    return f"{len(factors)} factors, {factors[0]:g} to {factors[-1]:g}"


def change(report: Report) -> list[str]:
    model, edit, chosen = report.model, report.edit, report.selection
    site = {
        "down": "the input of the down-projection, which is the matching column of its weight",
        "gate": "the output of the gate projection, which is the matching row of its weight",
        "up": "the output of the up-projection, which is the matching row of its weight",
    }[edit.site]
    commit = f" at commit {code(model.commit)}" if model.commit else ""
    kind = f", architecture {code(model.architecture)}" if model.architecture else ""
    form = {"peft": " This directory is an IA3 adapter of PEFT.", "delta": " This directory is a delta."}
    lines = [
        f"<p>The base is {code(model.id or 'not named')}{commit}{kind}. Scaled, at every position of a text, is "
        f"{site}.{form.get(report.form, '')}</p>",
    ]
    if chosen is None:
        lines.append(
            "<p>The scores from which the neurons were selected were not at hand: how much each neuron counts "
            "for which question is not shown.</p>"
        )
    else:
        by = "" if chosen.on_record else " (the edit names no thresholds: these are the published ones)"
        lines.append(
            f"<p>Selection: {words(chosen.rule.describe())}{by}; recipe {code(chosen.recipe)}, "
            f"{chosen.questions} questions and {chosen.controls} controls. {RULES.get(chosen.rule.name, '')}</p>"
        )
    rows = ([str(row.layer), number(f"{row.neurons:,}")] for row in edit.layers)
    by_layer = table("Edited neurons by layer", ["layer", "neurons"], rows)
    return [
        *lines,
        *_factors(report),
        *fitted(report),
        f"<details><summary>By layer</summary>{by_layer}</details>",
        _neuron_table(report),
    ]


def _factors(report: Report) -> list[str]:
    """How the factors of an edit with many of them are distributed."""
    bars = report.edit.histogram
    if not bars:
        return []
    rows = ([f"{bar.low:.4g} to {bar.high:.4g}", number(f"{bar.neurons:,}")] for bar in bars)
    behind = table("Factors", ["from, to", "neurons"], rows)
    return ["<h3>Factors</h3>", figure(plots.histogram(bars), "How many neurons have which factor.", behind)]


def _neuron_table(report: Report) -> str:
    rows, names = report.neurons, by_name(report.neurons)
    has_controls = bool(rows) and rows[0].controls is not None
    heads = ["layer, neuron", *(["controls select it"] if has_controls else []), "factor", *names]
    heads += ["controls"] if has_controls else []

    def cells(row: NeuronRow) -> list[str]:
        figures = [*(row.dimensions[name] for name in names), *([row.controls] if row.controls else [])]
        shared = ["yes" if row.selected_by_controls else "no"] if has_controls else []
        shown = [number(f"{score(column.score)} ({column.counts:.0%})") for column in figures]
        return [place(row.layer, row.neuron), *shared, number(f"{row.factor:g}"), *shown]

    caption = f"Edited neurons ({len(rows):,}{'' if len(rows) == report.edit.neurons else ' furthest from 1'})"
    note = (
        '<p class="note">By dimension: the mean score, which is the attribution to the right answer (integrated '
        "gradients) over the largest of its question, averaged over the questions; in brackets, the share of questions "
        "in which the neuron counts.</p>"
    )
    return table(caption, heads, map(cells, rows)) + (note if names else "")


def place(layer: int, neuron: int) -> str:
    return f"{layer},&nbsp;{neuron}"


def proofs(report: Report) -> list[str]:
    recorded = report.proofs
    if recorded is None:
        return ["<p>The manifest holds no proof: this directory was made without one.</p>"]
    files = recorded.files
    holds = (
        f"holds. Of {files.tensors} tensors, {files.edited} are the base's with the factors multiplied in and "
        f"rounded once, the others are the base's to the bit; {files.files} further files are as expected"
    )
    lines = [
        f"<p>1. The file is the edit: {holds if files.holds else 'fails'} (on record, by "
        f"{words(report.provenance.baked_with)}). {checked_in_words(report)}</p>",
        *(f"<p>Fault: {words(fault)}</p>" for fault in files.faults),
        "<p>2. The model behaves as the base with run-time hooks: "
        + ("see the table (on record).</p>" if recorded.behaviour else "not put to the proof.</p>"),
    ]
    if not recorded.behaviour:
        return lines
    heads = ["in", "verdict", "positions", "largest difference", "rounding noise", "same top token", "same greedy text"]
    return [*lines, table("The second proof", heads, map(_behaviour, recorded.behaviour))]


def _behaviour(entry: BehaviourProof) -> list[str]:
    return [
        f"{words(entry.dtype)}, {words(entry.how)}",
        "holds" if entry.holds else "fails",
        number(f"{entry.positions:,}"),
        "none, equal to the bit" if entry.bit_equal else f"{entry.difference:.1e} of the logits' spread",
        number("not needed" if entry.bit_equal else f"{entry.noise:.1e}"),
        number("" if entry.top1 is None else f"{entry.top1:.1%}"),
        number("" if entry.greedy is None else f"{entry.greedy:.0%}"),
    ]


def provenance(report: Report) -> list[str]:
    origin, model = report.provenance, report.model
    rows = [
        ("base", model.id),
        ("commit of the base", model.commit),
        ("fingerprint of the base", model.fingerprint),
        ("made with", origin.baked_with),
        ("recipe", origin.recipe.name if origin.recipe else None),
        ("SHA-256 of the recipe", origin.recipe.sha256 if origin.recipe else None),
        ("SHA-256 of kbne_edit.json, computed for this page", origin.manifest_sha256),
        ("SHA-256 of the undo file, computed for this page", origin.undo_sha256),
        ("SHA-256 of scores.safetensors, computed for this page", origin.scores_sha256),
        ("weights in other formats, left out", ", ".join(origin.left_out) or "none"),
    ]
    cells = ([words(name), words("not known" if value is None else value)] for name, value in rows)
    files = ([words(file.name), digest(file.sha256), _same(file)] for file in origin.files)
    old = ([words(row.name), digest(row.sha256), words(", ".join(row.into) or "none")] for row in origin.resharded)
    hashes = {file.name: file.sha256 for file in origin.files}
    hashes |= {"kbne_undo.kbne": origin.undo_sha256} if origin.undo_sha256 else {}
    hashes |= {"kbne_edit.json": origin.manifest_sha256}
    sums = "\n".join(one_line(f"{value}  {name}") for name, value in hashes.items())
    cut = [table("Files of the base, resharded", ["file", "SHA-256", "its tensors are in"], old)]
    return [
        table("Where it comes from", ["what", "value"], cells),
        table("Files", ["file", "SHA-256", "in the base"], files),
        *(cut if origin.resharded else []),
        f"<p>These are the hashes on record. {checked_in_words(report)} They can be checked without this tool. In the "
        "directory, with the shell of Linux (on macOS, <code>shasum -a 256</code> takes the place of the first "
        "word):</p>",
        block("Check of every file", f"sha256sum -c <<'END'\n{sums}\nEND"),
        "<p>The manifest covers itself: the hash in it is that of its text without that hash. In the directory, with "
        "Python alone:</p>",
        block("Check of the manifest", SEAL),
        "<p>With this tool, the base is restored from the directory by <code>kbne-edit revert</code>, and both proofs "
        "are made again by <code>kbne-edit verify</code>.</p>",
    ]


SEAL = (
    "python3 -c \"import json, hashlib; m = json.load(open('kbne_edit.json')); seal = m.pop('sha256'); "
    'print(seal == hashlib.sha256((json.dumps(m, indent=1) + chr(10)).encode()).hexdigest())"'
)


def _same(file: FileRow) -> str:
    if file.base_sha256 is None:
        return "not there: made while baking"
    named = f", there as {file.base_name}" if file.base_name else ""
    if file.base_sha256 == file.sha256:
        return f"the same bytes{words(named)}"
    return digest(f"{file.base_sha256}{named}")


def limits(report: Report) -> list[str]:
    return [bullets(LIMITS)]


def frameworks(report: Report) -> list[str]:
    rows = ([f'<a href="#{name}">{title}</a>', annex, measure] for name, title, annex, measure in SERVES)
    return [
        "<p>Which section can serve which point of a technical file. It is a guide for whoever writes one, not a claim "
        "that a system conforms: whether a point applies and is fulfilled depends on the system and its use.</p>",
        paragraph(f"<strong>{NO_MITIGATION}</strong>"),
        table(
            "Sections, the EU AI Act and the NIST AI RMF",
            ["section", "Regulation (EU) 2024/1689, annex IV", "NIST AI 100-1, MEASURE"],
            rows,
        ),
        paragraph(NOT_COVERED),
    ]
