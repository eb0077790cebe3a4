"""Sections of the page: effect on bias, side effects, the sweep that chose the edit, answers to the questions."""

from __future__ import annotations

from collections.abc import Sequence

from .. import plots
from ..evaluation.cost import MOST_KL, MOST_RISE, Cost
from ..evaluation.effect import Effect
from ..evaluation.measures.quick import QuickMeasure
from ..evaluation.onrecord import KeptEvaluation, KeptFigure
from ..evaluation.result import RANDOM
from ..files import json_text
from ..plots import words
from .markup import arrows, block, code, digest, figure, number, paragraph, signed, state, table
from .record import effect_rows
from .types import Report, Sweep

# The items of each measure.
MEASURES = {"decisions": "Counterfactual decisions: scenarios", "associations": "Association of groups: twins"}


def effects(report: Report) -> list[str]:
    sweep = _sweep(report.tuning) if report.tuning else []
    benchmarks = [line for lines in report.evaluations for line in _evaluation(lines)]
    return [*_effect(report), *sweep, *benchmarks, *_measures(report.measures), *_further(report)]


def _effect(report: Report) -> list[str]:
    effect = report.effect
    if effect is None:
        if report.tuning and report.tuning.test:
            return ["<p>The baking run measured no effect; the sweep that chose the edit did.</p>"]
        if report.evaluations:
            return ["<p>No effect on probes was measured; the benchmarks below are what there is.</p>"]
        return [
            "<p>Not measured: neither the effect of the edit on bias, nor that of a control. No claim that the model "
            "is less biased than its base can rest on this directory, and none that the edit has no effect.</p>"
        ]
    part, named = report.verdict.effect, effect_rows(effect)
    rows = ([words(name), *signed(values)] for name, values in named.items())
    avoids = effect.avoids
    return [
        f"<p>{state(part.state)} {arrows(part.reason)}.</p>",
        paragraph(_scores(effect)),
        figure(
            plots.intervals(list(named.items())),
            f"Change of the score{'' if avoids else ', absolute unless said'}, with 95 % bootstrap intervals over "
            f"{effect.twins} twins. Left of the line is less {'of what is unwanted' if avoids else 'bias'} by this "
            "measure. The large disc is the edit; the others are its controls, and what sets it apart from them.",
            table("Change of the score", ["what", "mean", "from", "to"], rows),
        ),
        *_draws(effect),
        *_dimensions(effect),
    ]


def _scores(effect: Effect) -> str:
    one, (before, after) = "unwanted" if effect.avoids else "stereotyped", effect.score
    share, n = effect.preferred, effect.twins
    return (
        f"On {effect.probes} pairs of sentences that differ in one point only, {n} twins: how much more probable the "
        f"{one} one is, in nats per token. The mean {'' if effect.avoids else 'absolute '}score went from {before:.4f} "
        f"to {after:.4f}. The {one} side is preferred in {share.before:.0%} of the twins ({round(share.before * n)} of "
        f"{n}), afterwards in {share.after:.0%} ({round(share.after * n)} of {n})."
    )


def _draws(effect: Effect) -> list[str]:
    random = effect.random
    if random.as_low is None or random.lowest is None or random.highest is None:
        return []
    return [
        f"<p>Control: {random.draws} draws of as many random neurons in the same layers, on {random.twins} twins. "
        f"Their changes go from {random.lowest:+.4f} to {random.highest:+.4f}; {random.as_low} of {random.draws} come "
        "as low as the edit or lower.</p>"
    ]


def _measures(measures: Sequence[QuickMeasure]) -> list[str]:
    """Decisions and associations, whatever the recipe asks."""
    lines = []
    for measure in measures:
        digits = {figure.name: 1 if figure.unit == "percent" else 4 for figure in measure.figures}
        rows = (
            [
                words(f"{figure.name}, {figure.unit}"),
                *(number(f"{value:.{digits[figure.name]}f}") for value in (figure.before, figure.after)),
                *(number(f"{value:+.{digits[figure.name]}f}") for value in figure.change),
            ]
            for figure in measure.figures
        )
        name = f"{MEASURES.get(measure.name, measure.name)} ({measure.items}, language {measure.language})"
        lines.append(table(name, ["figure", "base", "edit", "change", "from", "to"], rows))
    if not lines:
        return []
    return [
        "<h3>Decisions about people, and associations</h3>",
        "<p>Small versions of two measures of the package. No part of the verdict rests on them. A largest gap lies "
        "above 0 by chance alone: compare it with the base's.</p>",
        *lines,
        '<p class="note">From, to: 95 % bootstrap interval of the change over scenarios, over twins.</p>',
    ]


def _evaluation(evaluation: KeptEvaluation) -> list[str]:
    """What `evaluate` measured of these files after they were made."""
    rows = [
        _benchmark(f"{words(task.name)}, {words(figure.name)}", task.items, figure)
        for task in evaluation.tasks
        for figure in task.figures.values()
    ]
    heads = ["figure", "beside the controls", "items", "base", "edit", "change", "from", "to", "random neurons"]
    limit = "all items" if evaluation.limit is None else f"at most {evaluation.limit:,} items of each task"
    return [
        "<h3>Benchmarks</h3>",
        f"<p>Measured by <code>kbne-edit evaluate</code> ({words(evaluation.tool)}; {limit}; recipe "
        f"{code(evaluation.recipe)}) after these files were made. Its verdict: "
        f"<strong>{words(evaluation.verdict.ship)}</strong>. “No effect found” means that Holm's p over all tested "
        "figures is 0.05 or more.</p>",
        table(f"Benchmarks ({len(evaluation.tasks)} tasks)", heads, rows),
        '<p class="note">From, to: 95 % bootstrap interval of the change over items that hang together. Random '
        "neurons: mean change under draws of as many random neurons of the same layers.</p>",
    ]


def _dimensions(effect: Effect) -> list[str]:
    """The same twins by dimension, and of each the pair that moved most."""
    if not effect.dimensions:
        return []
    side = "unwanted" if effect.avoids else "stereotyped"
    heads = ["dimension", "change", "from", "to", "twins", "score, base", "with edit", f"{side}, base", "with edit"]
    rows = (
        [
            words(part.dimension),
            *signed(part.change),
            number(str(part.twins)),
            *(number(f"{value:.4f}") for value in part.score),
            *(number(f"{round(share * part.twins)} of {part.twins}") for share in part.preferred),
        ]
        for part in effect.dimensions
    )
    pairs = (
        [
            words(part.dimension),
            words(part.example[0]),
            words(part.example[1]),
            *(number(f"{value:+.3f}") for value in part.example_score),
        ]
        for part in effect.dimensions
    )
    return [
        "<h3>By dimension</h3>",
        table("Change of the score by dimension", heads, rows),
        f'<p class="note">Parts of the same twins: they have no controls of their own, and no part of the verdict '
        f"rests on them. From, to: 95 % bootstrap interval over the twins of the dimension. Last columns: twins in "
        f"which the {side} side is preferred.</p>",
        table(
            "The pair of each dimension whose twin moved most",
            ["dimension", f"the {side} sentence", "the other one", "score, base", "with edit"],
            pairs,
        ),
    ]


def _benchmark(name: str, items: int, figure: KeptFigure) -> list[str]:
    digits, random = figure.digits, figure.controls.get(RANDOM)
    return [
        f"{name}{' (%)' if figure.unit == 'percent' else f' ({words(figure.unit)})'}",
        words(figure.text) if figure.tested else "not tested",
        number(f"{items:,}"),
        number(f"{figure.base:.{digits}f}"),
        number(f"{figure.edit:.{digits}f}"),
        *(number(f"{value:+.{digits}f}") for value in figure.change),
        number(f"{random.value:+.{digits}f}" if random else ""),
    ]


def _further(report: Report) -> list[str]:
    """Figures of the run without a section of their own."""
    if not report.further:
        return []
    name = "Further figures of the run"
    return [f"<h3>{name}</h3>", block(name, json_text(report.further))]


# --------------------------------------------------------------------------------------------------------------- cost


def cost(report: Report) -> list[str]:
    measured, part = report.cost, report.verdict.cost
    if measured is None:
        return ["<p>Not measured: what the edit does to other text and to other answers is not known.</p>"]
    texts = "texts of the package that speak of no group" if measured.origin == "package" else words(measured.origin)
    rows = [
        ["KL from the base, nats per token", *map(number, _three(measured.kl)), number(f"at most {MOST_KL:g}")],
        ["perplexity of the base", *map(number, _three(measured.before)), ""],
        ["perplexity with the edit", *map(number, _three(measured.after)), ""],
        ["its rise, as a ratio", *map(number, _three(measured.rise)), number(f"at most {MOST_RISE:g}")],
    ]
    return [
        f"<p>{state(part.state)} {arrows(part.reason)}.</p>",
        table(f"On {measured.texts} {texts}", ["what", "value", "from", "to", "limit"], rows),
        '<p class="note">From, to: 95 % bootstrap interval over texts.</p>',
        *_answered(measured),
        *_continuations(measured),
    ]


def _three(values: tuple[float, float, float]) -> list[str]:
    return [f"{value:.3g}" for value in values]


def _answered(measured: Cost) -> list[str]:
    parts = [("questions about bias", measured.questions), ("unrelated questions", measured.controls)]
    rows = [
        [name, number(str(part.before)), number(str(part.after)), number(str(part.total)), number(f"{part.p:.2g}")]
        for name, part in parts
        if part
    ]
    heads = ["questions", "right, base", "right, edit", "of", "p (McNemar)"]
    return [table("Answered rightly, before and after", heads, rows)] if rows else []


def _continuations(measured: Cost) -> list[str]:
    items = measured.continuations
    if not items:
        return []
    changed = sum(item.before != item.after for item in items)
    rows = (
        [
            f'{code(item.prompt)} <span class="quiet">({words(item.about)})</span>',
            "the same" if item.before == item.after else "differs",
            code(item.before or "(nothing)"),
            code(item.after or "(nothing)"),
        ]
        for item in items
    )
    return [
        "<h3>What base and edit go on to say</h3>",
        f"<p>Greedy continuations: {changed} of {len(items)} change.</p>",
        table("Continuations side by side", ["after", "edit and base", "the base says", "the edit says"], rows),
    ]


# -------------------------------------------------------------------------------------------------------------- sweep


def _sweep(sweep: Sweep) -> list[str]:
    """How factor and thresholds were chosen, and the figures of the choice on items that had no part in it."""
    points = sweep.points
    drawing = plots.pareto([(p.kl, p.bias.value, p.within, p.front, p.chosen) for p in points], sweep.figure)
    rows = (
        [
            words(p.settings),
            "chosen" if p.chosen else "on the front" if p.front else "" if p.within else "out of bounds",
            number(str(p.neurons)),
            *signed(p.bias),
            number(f"{p.kl:.2e}"),
            number(f"{p.lowest:+.1f}"),
        ]
        for p in sorted(points, key=lambda p: (not p.front, p.bias.value))
    )
    heads = ["settings", "note", "neurons", "change", "from", "to", "KL", "lower end of the capability"]
    steered, bounded = words(", ".join(sweep.steered_by)), words(", ".join(sweep.bounded_by))
    bound = "" if sweep.max_kl is None else f" and the KL is below {sweep.max_kl:g}"
    return [
        "<h3>How factor and thresholds were chosen</h3>",
        f"<p>{len(points)} edits were measured on one half of the items (dev): the change of the "
        f"{words(sweep.figure)} of {steered} (as a distance from its ideal), and the cost, the KL divergence from the "
        f"base on neutral text. An edit is within bounds if a loss of {sweep.margin:g} points of {bounded} is "
        f"excluded{bound}. Chosen: {words(sweep.chosen_by)}.</p>",
        figure(
            drawing,
            "Discs: edits on the front, which no other edit within bounds beats in both; rings: other edits; squares: "
            "edits out of bounds; a second ring: the chosen edit.",
            table(f"Edits that were tried, on dev ({len(points)})", heads, rows),
        ),
        *_confirmation(sweep),
    ]


def _confirmation(sweep: Sweep) -> list[str]:
    split = (
        [
            words(row.task),
            number(str(row.dev_items)),
            digest(row.dev_sha256),
            number(str(row.test_items)),
            digest(row.test_sha256),
        ]
        for row in sweep.split
    )
    heads = ["items of", "dev", "SHA-256 of the dev items", "test", "SHA-256 of the test items"]
    lines = [table("The two halves", heads, split)]
    if sweep.test is None:
        return [*lines, "<p>The other half (test) was not scored.</p>"]
    rows = ([words(row.task), words(row.found), *signed(row.change), number(f"{row.p:.2g}")] for row in sweep.test)
    heads = ["task", "beside the controls", f"change of the {sweep.figure}", "from", "to", "p (Holm)"]
    confirmed = "Confirmed" if sweep.confirmed else "Not confirmed"
    uses = "" if sweep.uses in (None, 1) else f" It is use {sweep.uses} of this half of the data."
    return [
        *lines,
        table("The chosen edit on the other half (test), scored once", heads, rows),
        f"<p>{confirmed}: {words(sweep.verdict)}.{uses}</p>",
    ]


# ------------------------------------------------------------------------------------------------------------ answers


def answers(report: Report) -> list[str]:
    if report.answers is None:
        return ["<p>The neurons were given to the run; how the base answers the questions is not known.</p>"]
    about, given = report.answers, report.answers.answers
    value, low, high = given.balanced
    lines = [
        f"<p>The base answers {given.questions.right} of {given.questions.total} questions rightly, and "
        f"{given.controls.right} of {given.controls.total} controls. Balanced accuracy over the answers: {value:.0%} "
        f"(95 % interval {low:.0%} to {high:.0%}). Largest gap in the completeness of the attribution: "
        f"{about.largest_residual:.1%} of a question's largest score, with {about.nodes_per_layer:.1f} nodes per "
        "layer.</p>"
    ]
    if given.constant is not None:
        lines.append(
            f"<p><strong>Caution: this is no better than the same answer ({words(given.constant)}) to everything. What "
            "is attributed to a neuron then says little about what the model knows.</strong></p>"
        )
    if given.mass is not None:
        lines.append(
            f"<p>Where an answer is due, all answers together have a probability of {given.mass.median:.0%} "
            "(median).</p>"
        )
    tallies = [("right answer", given.by_answer), ("form", given.by_form)]
    rows = (
        [f"{kind}: {words(name)}", number(str(tally.right)), number(str(tally.total)), number(f"{tally.share:.0%}")]
        for kind, of in tallies
        for name, tally in of.items()
    )
    lines.append(table("Right answers to the questions", ["questions", "right", "of", "share"], rows))
    if given.wrong:
        wrong = "".join(f"<li>{words(text)}</li>" for text in given.wrong)
        lines.append(f"<details><summary>Answered wrongly: {len(given.wrong)}</summary><ul>{wrong}</ul></details>")
    return lines
