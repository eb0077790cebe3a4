"""A report as one page of HTML that needs nothing else: no script, no font, no request; it says so in its policy.

The same report gives the same bytes. Everything that comes from files passes through `plots.words`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from .. import plots
from ..errors import one_line
from ..evaluation.effect import Effect
from ..plots import words
from .record import WORDS, effect_rows
from .wording import LIMITS, NOT_COVERED, RULES, SERVES, STATES

_CONTROLS = "controls"


def render(report: dict) -> str:
    """The page for a report of `report.build`."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    title = f"Edit report: {report['model']['id'] or 'a model that is not named'}"
    sections = {
        "summary": ("Summary", _summary),
        "change": ("What was changed", _change),
        "map": ("Where it was changed", _map),
        "neurons": ("What each neuron does", _each),
        "proofs": ("Proofs", _proofs),
        "effects": ("Effects", _effects),
        "answers": ("Answers to the questions", _answers),
        "provenance": ("Provenance and hashes", _provenance),
        "limits": ("Limits", _limits),
        "frameworks": ("Where this fits in a technical file", _frameworks),
    }
    links = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, (heading, _) in sections.items())
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{heading}</h2>'
        f"{''.join(part(report))}</section>\n"
        for name, (heading, part) in sections.items()
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{words(title)}</title>\n<style>\n{style}</style></head>\n<body>"
        f'<a class="skip" href="#main">Skip to the report</a>\n<header><h1>{words(title)}</h1>'
        '<p class="lead">Neurons of a language model were scaled, to have it show less social bias. This page says '
        "what was changed, what was proven and measured, and what was not.</p></header>\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main id="main" tabindex="-1">\n{body}</main>\n'
        f"<footer><p>Made by {words(report['tool'])} from the files of the edit alone. Every figure was read "
        "from them or computed from them for this page.</p></footer></body></html>\n"
    )


# ------------------------------------------------------------------------------------------------------------ pieces


def _code(value: object) -> str:
    return f"<code>{words(value)}</code>"


def _token(text: str | None, index: int) -> str:
    """A token; a space at its edge is made visible."""
    if text is None:
        return f"token {index}"
    inner = text.strip(" ")
    left = len(text) - len(text.lstrip(" ")) if inner else len(text)
    return _code("␣" * left + inner + "␣" * (len(text) - len(inner) - left))


def _number(text: str) -> str:
    return f'<td class="number">{text}</td>'


def _score(value: float) -> str:
    return f"{round(value, 3) + 0:.3f}"  # + 0: no minus before a zero


def _cell(content: str) -> str:
    return content if content.startswith("<td") else f"<td>{content}</td>"


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """heads: text; rows: cells, the first one the row's header, others HTML or whole cells that begin with <td."""
    top = "".join(f'<th scope="col">{words(head)}</th>' for head in heads)
    body = "".join(f'<tr><th scope="row">{first}</th>{"".join(map(_cell, cells))}</tr>\n' for first, *cells in rows)
    name = words(caption)
    return (
        f'<div class="scroll" role="group" aria-label="{name}" tabindex="0"><table><caption>{name}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def _figure(drawing: str, caption: str, table: str) -> str:
    """A plot with its figures in a table behind it."""
    return (
        f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>"
        f"<details><summary>The same as a table</summary>{table}</details>"
    )


def _block(name: str, lines: str) -> str:
    return f'<pre tabindex="0" role="group" aria-label="{name}">{escape(lines)}</pre>'


def _name(group: dict) -> str:
    """A dimension's name, or that of the controls."""
    return _CONTROLS if group["controls"] else group["dimension"]


# ----------------------------------------------------------------------------------------------------------- sections


def _summary(report: dict) -> list[str]:
    edit = report["edit"]
    items = "".join(
        f'<li class="{v["state"]}"><b>{STATES[v["state"]]}</b> <strong>{words(v["about"])}</strong>: '
        f"{words(v['text'])}</li>"
        for v in report["verdicts"]
    )
    return [
        f"<p>{edit['neurons']:,} of {report['model']['neurons']:,} feed-forward neurons ({edit['share']:.3%}) in "
        f"{len(edit['layers'])} of {report['model']['layers']} layers were scaled by {_factors(edit['factors'])}.</p>",
        f"<p><strong>Verdict: {words(report['verdict']['ship'])}.</strong></p>",
        _table(
            "Verdict",
            ["question", "state", "reason"],
            (
                [words(asked), words(report["verdict"][name]), words(report["verdict"]["reasons"][name])]
                for name, asked in WORDS.items()
            ),
        ),
        f'<ul class="verdicts">{items}</ul>',
    ]


def _factors(factors: Sequence[float]) -> str:
    if len(factors) == 1:
        return f"the factor {factors[0]:g}"
    return f"{len(factors)} factors, {factors[0]:g} to {factors[-1]:g}"


def _change(report: dict) -> list[str]:
    model, edit, chosen = report["model"], report["edit"], report["selection"]
    where = {
        "down": "the input of the down-projection, which is the matching column of its weight",
        "gate": "the output of the gate projection, which is the matching row of its weight",
    }
    commit = f" at commit {_code(model['commit'])}" if model["commit"] else ""
    lines = [
        f"<p>The base is {_code(model['id'] or 'not named')}{commit}, architecture {_code(model['architecture'])}. "
        f"Scaled, at every position of a text, is {where[edit['site']]}.</p>",
    ]
    if chosen is None:
        lines.append(
            "<p>The scores from which the neurons were selected were not at hand: how much each neuron counts "
            "for which question is not shown.</p>"
        )
    else:
        by = "" if chosen["on_record"] else " (the edit names no thresholds: these are the published ones)"
        lines.append(
            f"<p>Selection: {words(chosen['described'])}{by}; recipe {_code(chosen['recipe'])}, "
            f"{chosen['questions']} questions and {chosen['controls']} controls. {RULES.get(chosen['rule'], '')}</p>"
        )
    return [*lines, _neuron_table(report)]


def _neuron_table(report: dict) -> str:
    names = list(report["neurons"][0]["dimensions"])
    asked = report["neurons"][0]["controls"] is not None
    groups = [*names, *([_CONTROLS] if asked else [])]
    heads = ["layer, neuron", "factor"]
    heads += [f"{name}: {what}" for name in groups for what in ("mean score", "counts in")]
    heads += ["controls select it"] if asked else []

    def row(n: dict) -> list[str]:
        figures = [*n["dimensions"].values(), *([n["controls"]] if asked else [])]
        cells = [_number(_score(f["score"])) + _number(f"{f['counts']:.0%}") for f in figures]
        last = ["yes" if n["selected_by_controls"] else "no"] if asked else []
        return [_place(n["layer"], n["neuron"]), _number(f"{n['factor']:g}"), *cells, *last]

    return _table(f"Edited neurons ({len(report['neurons']):,})", heads, map(row, report["neurons"])) + (
        '<p class="note">Mean score: attribution to the right answer (integrated gradients) over the largest of its '
        "question, averaged over the questions. Counts in: the share of questions in which the neuron counts.</p>"
        if names
        else ""
    )


def _place(layer: int, neuron: int) -> str:
    return f"{layer},&nbsp;{neuron}"


def marks(report: dict) -> dict:
    """What `plots.neuron_map` draws of a report: its arguments."""
    found = report["map"]
    return {
        "layers": report["model"]["layers"],
        "width": report["model"]["neurons_of_a_layer"],
        "edited": [(n["layer"], n["neuron"], n["selected_by_controls"]) for n in report["neurons"]],
        "others": sorted((s["layer"], s["neuron"]) for s in found["strongest"] if not s["edited"]) if found else [],
    }


def _map(report: dict) -> list[str]:
    found, drawn = report["map"], marks(report)
    strong = {(s["layer"], s["neuron"]): _score(s["score"]) for s in found["strongest"]} if found else {}
    kinds = [(la, n, "edited; controls select it too" if shared else "edited") for la, n, shared in drawn["edited"]]
    kinds += [(la, n, "not edited") for la, n in drawn["others"]]
    rows = ([_place(la, n), kind, _number(strong.get((la, n), ""))] for la, n, kind in sorted(kinds))
    caption = "Discs: edited neurons; squares: edited ones that the controls select too"
    caption += f"; rings: others among the {len(strong)} with the largest mean score." if found else "."
    table = _table("Neurons on the map", ["layer, neuron", "mark", "mean score"], rows)
    lines = ["<h3>Map of the neurons</h3>", _figure(plots.neuron_map(**drawn), caption, table)]
    return lines + [*_heat(found["mass"]), *_overlaps(report["overlap"])] if found else lines


def _heat(mass: list[dict]) -> list[str]:
    named = [(_name(row), row["layers"]) for row in mass]
    layers = range(len(named[0][1]))
    rows = ([str(layer), *(_number(f"{values[layer]:.1%}") for _, values in named)] for layer in layers)
    return [
        "<h3>Attribution by layer</h3>",
        _figure(
            plots.heat_map(named),
            "The share of a question's positive attribution that lies in a layer, averaged over the questions of a "
            "dimension; the controls are questions that have nothing to do with bias. Darker is more in light, "
            "brighter in dark; each row adds up to 100 %.",
            _table("Share of attribution by layer", ["layer", *(name for name, _ in named)], rows),
        ),
    ]


def _overlaps(found: dict) -> list[str]:
    sets = [(_name(s), s["neurons"]) for s in found["sets"]]
    parts = [(p["sets"], p["neurons"]) for p in found["parts"]]
    rows = ([words(" and ".join(sets[m][0] for m in members)), _number(f"{n:,}")] for members, n in parts)
    return [
        "<h3>Overlaps of the selections</h3>",
        _figure(
            plots.overlaps(sets, parts),
            "Each column: how many neurons are selected by exactly the marked dimensions and by no other; beside the "
            "names, how many each selects in all. What the controls select too is not specific to bias."
            + ("" if len(parts) <= plots.COLUMNS else f" Shown are the {plots.COLUMNS} largest of {len(parts)}."),
            _table("Neurons selected by exactly these", ["selected by", "neurons"], rows),
        ),
    ]


def _each(report: dict) -> list[str]:
    neurons = report["neurons"]
    lines = [
        "<p>Left: the tokens that the neuron's column of the down-projection raises and lowers most, if its activation "
        "is positive; a negative one swaps the two. This is an approximation (a “logit lens”): the base's column, "
        "times the final norm's weight, straight to the unembedding, as if no layer came after it. In brackets: "
        "standard deviations from the mean over the vocabulary. ␣ stands for a space. Right: the questions in which "
        "the neuron counts most, with its share of the largest score.</p>"
    ]
    if neurons[0]["tokens"] is None:
        lines.append("<p>No tokens are shown: this model's unembedding does not fit its columns.</p>")

    def row(n: dict) -> list[str]:
        tokens = n["tokens"] or {"raised": [], "lowered": []}
        written = [
            " ".join(f"{_token(t['text'], t['id'])} ({t['z']:+.1f})" for t in tokens[end]) or "none"
            for end in ("raised", "lowered")
        ]
        asked = "".join(
            f'<li>{words(q["text"])} <span class="quiet">({words(_CONTROLS if q["control"] else q["dimension"])}, '
            f"{words(q['answer'])}, {q['share']:.0%})</span></li>"
            for q in n["questions"]
        )
        return [_place(n["layer"], n["neuron"]), *written, f"<ul>{asked}</ul>" if asked else "not known"]

    heads = ["layer, neuron", "raises", "lowers", "counts most in"]
    return [*lines, _table(f"Tokens and questions of each edited neuron ({len(neurons):,})", heads, map(row, neurons))]


def _proofs(report: dict) -> list[str]:
    proofs = report["proofs"]
    if proofs is None:
        return ["<p>The manifest holds no proof: this directory was made without one.</p>"]
    holds = (
        f"holds. Of {proofs['tensors']} tensors, {proofs['edited']} are the base's with the factors multiplied in and "
        f"rounded once, the others are the base's to the bit; {proofs['files']} further files are as expected"
    )
    lines = [
        f"<p>1. The file is the edit: {holds if proofs['file'] else 'fails'}.</p>",
        *(f"<p>Fault: {words(fault)}</p>" for fault in proofs["faults"]),
        "<p>2. The model behaves as the base with run-time hooks: "
        + ("see the table.</p>" if proofs["behaviour"] else "not put to the proof.</p>"),
    ]
    if not proofs["behaviour"]:
        return lines
    rows = (
        [
            f"{words(e['dtype'])}, {words(e['how'])}",
            "holds" if e["holds"] else "fails",
            _number(f"{e['positions']:,}"),
            "none, equal to the bit" if e["bit_equal"] else f"{e['difference']:.1e} of the logits' spread",
            _number("not needed" if e["bit_equal"] else f"{e['noise']:.1e}"),
            _number(f"{e['top1']:.1%}" if "top1" in e else ""),
            _number(f"{e['greedy']:.0%}" if "greedy" in e else ""),
        ]
        for e in proofs["behaviour"]
    )
    heads = ["in", "verdict", "positions", "largest difference", "rounding noise", "same top token", "same greedy text"]
    return [*lines, _table("The second proof", heads, rows)]


def _effects(report: dict) -> list[str]:
    effect = report["effect"]
    if effect is None:
        return [
            "<p>The baking run measured no effect; the sweep that chose the edit did.</p>"
            if report["tuning"] and report["tuning"]["test"]
            else "<p>Nothing was measured: neither the effect of the edit on bias, nor that of a control. No claim "
            "that the model is less biased than its base can rest on this directory.</p>",
            *_tuning(report),
            *_further(report),
        ]
    known = Effect.from_dict(effect)
    avoids, one = known.avoids, "unwanted" if known.avoids else "stereotyped"
    (before, after), named = known.score, effect_rows(known)
    share, share_after = known.preferred
    rows = ([words(name), *(_number(f"{v:+.4f}") for v in values)] for name, values in named.items())
    verdict = f"{report['verdict']['effect']}: {report['verdict']['reasons']['effect']}"
    return [
        f"<p>On {known.probes} pairs of sentences that differ in one point only, {known.twins} twins: how much more "
        f"probable the {one} one is, in nats per token. The mean {'' if avoids else 'absolute '}score went from "
        f"{before:.4f} to {after:.4f}. The {one} side is preferred in {share:.0%} of the twins, afterwards in "
        f"{share_after:.0%}.</p>",
        _figure(
            plots.intervals(list(named.items())),
            f"Change of the score{'' if avoids else ', absolute unless said'}, with 95 % bootstrap intervals over the "
            f"twins. Left of the line is less {'of what is unwanted' if avoids else 'bias'} by this measure.",
            _table("Change of the score", ["what", "mean", "from", "to"], rows),
        ),
        f"<p>Verdict: {words(verdict)}</p>",
        *_tuning(report),
        *_further(report),
    ]


def _tuning(report: dict) -> list[str]:
    """How factor and thresholds were chosen, and what the choice does on items that had no part in it."""
    found = report["tuning"]
    if found is None:
        return []
    points, figure = found["points"], words(found["figure"])
    drawing = plots.pareto(
        [(p["kl"], p["bias"][0], p["within"], p["front"], p["chosen"]) for p in points], found["figure"]
    )
    rows = (
        [
            words(p["settings"]),
            _number(str(p["neurons"])),
            *(_number(f"{v:+.4f}") for v in p["bias"]),
            _number(f"{p['kl']:.2e}"),
            _number(f"{p['lowest']:+.1f}"),
            "chosen" if p["chosen"] else "on the front" if p["front"] else "" if p["within"] else "out of bounds",
        ]
        for p in sorted(points, key=lambda p: (not p["front"], p["bias"][0]))
    )
    heads = ["settings", "neurons", "change", "from", "to", "KL", "lower end of the capability", "note"]
    steered, bounded = (words(", ".join(found[key])) for key in ("steered_by", "bounded_by"))
    bound = "" if found["max_kl"] is None else f" and the KL is below {found['max_kl']:g}"
    return [
        "<h3>How factor and thresholds were chosen</h3>",
        f"<p>{len(points)} edits were measured on one half of the items (dev): the change of the {figure} of {steered} "
        "(as a distance from its ideal), and the cost, the KL divergence from the base on neutral text. An edit is "
        f"within bounds if a loss of {found['margin']:g} points of {bounded} is excluded{bound}. Chosen: "
        f"{words(found['chosen_by'])}.</p>",
        _figure(
            drawing,
            "Discs: edits on the front, which no other edit within bounds beats in both; rings: other edits; squares: "
            "edits out of bounds; a second ring: the chosen edit.",
            _table(f"Edits that were tried, on dev ({len(points)})", heads, rows),
        ),
        *_confirmation(found),
    ]


def _confirmation(found: dict) -> list[str]:
    split = (
        [words(s["task"])]
        + [
            cell
            for side in ("dev", "test")
            for cell in (_number(str(s[f"{side}_items"])), f'<td class="hash">{words(s[f"{side}_sha256"])}</td>')
        ]
        for s in found["split"]
    )
    heads = ["items of", "dev", "SHA-256 of the dev items", "test", "SHA-256 of the test items"]
    lines = [_table("The two halves", heads, split)]
    if found["test"] is None:
        return [*lines, "<p>The other half (test) was not scored.</p>"]
    rows = (
        [words(t["task"]), *(_number(f"{v:+.4f}") for v in t["change"]), _number(f"{t['p']:.2g}"), words(t["found"])]
        for t in found["test"]
    )
    heads = ["task", f"change of the {found['figure']}", "from", "to", "p (Holm)", "beside the controls"]
    confirmed = "Confirmed" if found["confirmed"] else "Not confirmed"
    return [
        *lines,
        _table("The chosen edit on the other half (test), scored once", heads, rows),
        f"<p>{confirmed}: {words(found['verdict'])}.</p>",
    ]


def _further(report: dict) -> list[str]:
    """Figures of the run that this page knows no better form for."""
    from ..files import json_text

    if not report["further"]:
        return []
    name = "Further figures of the run"
    return [f"<h3>{name}</h3>", _block(name, json_text(report["further"]))]


def _answers(report: dict) -> list[str]:
    found = report["answers"]
    if found is None:
        return ["<p>The neurons were given to the run; how the base answers the questions is not known.</p>"]
    value, low, high = found["balanced"]
    lines = [
        f"<p>The base answers {found['right']} of {found['questions']} questions rightly, and "
        f"{found['controls_right']} of {found['controls']} controls. Balanced accuracy over the answers: {value:.0%} "
        f"(95 % interval {low:.0%} to {high:.0%}). Largest gap in the completeness of the attribution: "
        f"{found['largest_residual']:.1%} of a question's largest score, with {found['nodes_per_layer']:.1f} nodes per "
        "layer.</p>"
    ]
    if found["constant"]:
        lines.append(
            "<p><strong>Caution: this is no better than the same answer to everything. What is attributed to a neuron "
            "then says little about what the model knows.</strong></p>"
        )
    tallies = [("right answer", found["right_by_answer"]), ("form", found["right_by_form"])]
    rows = (
        [f"{kind}: {words(name)}", _number(str(right)), _number(str(n))]
        for kind, tally in tallies
        for name, (right, n) in tally.items()
    )
    lines.append(_table("Right answers to the questions", ["questions", "right", "of"], rows))
    if found["wrong"]:
        wrong = "".join(f"<li>{words(text)}</li>" for text in found["wrong"])
        lines.append(f"<details><summary>Answered wrongly: {len(found['wrong'])}</summary><ul>{wrong}</ul></details>")
    return lines


def _provenance(report: dict) -> list[str]:
    found, model = report["provenance"], report["model"]
    recipe = found["recipe"] or {"name": None, "sha256": None}
    rows = [
        ("base", model["id"]),
        ("commit of the base", model["commit"]),
        ("fingerprint of the base", model["fingerprint"]),
        ("baked with", found["baked_with"]),
        ("recipe", recipe["name"]),
        ("SHA-256 of the recipe", recipe["sha256"]),
        ("SHA-256 of kbne_edit.json, computed for this page", found["manifest_sha256"]),
        ("SHA-256 of the undo file, computed for this page", found["undo_sha256"]),
        ("SHA-256 of scores.safetensors, computed for this page", found["scores_sha256"]),
        ("weights in other formats, left out", ", ".join(found["left_out"]) or "none"),
    ]
    cells = ([words(name), words("not known" if value is None else value)] for name, value in rows)
    files = ([words(f["name"]), f'<td class="hash">{words(f["sha256"])}</td>', _same(f)] for f in found["files"])
    old = (
        [words(f["name"]), f'<td class="hash">{words(f["sha256"])}</td>', words(", ".join(f["into"]) or "none")]
        for f in found["resharded"]
    )
    hashes = {f["name"]: f["sha256"] for f in found["files"]}
    hashes |= {"kbne_undo.kbne": found["undo_sha256"], "kbne_edit.json": found["manifest_sha256"]}
    sums = "\n".join(one_line(f"{digest}  {name}") for name, digest in hashes.items())
    return [
        _table("Where it comes from", ["what", "value"], cells),
        _table("Files", ["file", "SHA-256", "in the base"], files),
        *(
            [_table("Files of the base, cut anew", ["file", "SHA-256", "its tensors are in"], old)]
            if found["resharded"]
            else []
        ),
        "<p>The hashes of files are those that the baking run computed and wrote into the manifest. They can be "
        "checked without this tool. In the directory, with the shell of Linux (on macOS, <code>shasum -a 256</code> "
        "takes the place of the first word):</p>",
        _block("Check of every file", f"sha256sum -c <<'END'\n{sums}\nEND"),
        "<p>The manifest covers itself: the hash in it is that of its text without that hash. In the directory, with "
        "Python alone:</p>",
        _block("Check of the manifest", SEAL),
        "<p>With this tool, the base is restored from the directory by <code>kbne-edit revert</code>, and both proofs "
        "are made again by <code>kbne-edit verify</code>.</p>",
    ]


SEAL = (
    "python3 -c \"import json, hashlib; m = json.load(open('kbne_edit.json')); seal = m.pop('sha256'); "
    'print(seal == hashlib.sha256((json.dumps(m, indent=1) + chr(10)).encode()).hexdigest())"'
)


def _same(file: dict) -> str:
    if file["base_sha256"] is None:
        return "not there: made while baking"
    named = f", there as {words(file['base_name'])}" if file["base_name"] else ""
    if file["base_sha256"] == file["sha256"]:
        return f"the same bytes{named}"
    return f'<td class="hash">{words(file["base_sha256"])}{named}</td>'


def _limits(report: dict) -> list[str]:
    return [f"<ul>{''.join(f'<li>{point}</li>' for point in LIMITS)}</ul>"]


def _frameworks(report: dict) -> list[str]:
    rows = ([f'<a href="#{name}">{title}</a>', annex, measure] for name, title, annex, measure in SERVES)
    return [
        "<p>Which section can serve which point of a technical file. It is a guide for whoever writes one, not a claim "
        "that a system conforms: whether a point applies and is fulfilled depends on the system and its use.</p>",
        _table(
            "Sections, the EU AI Act and the NIST AI RMF",
            ["section", "Regulation (EU) 2024/1689, annex IV", "NIST AI 100-1, MEASURE"],
            rows,
        ),
        f"<p>{NOT_COVERED}</p>",
    ]
