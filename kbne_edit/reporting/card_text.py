"""The text of a card, in Markdown. Text from files (names, answers, licences) is escaped."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..attribution.answers import AttributionSummary
from ..disk.manifest import Manifest, Origin
from ..errors import one_line
from ..evaluation.cost import MOST_KL, MOST_RISE, Cost
from ..evaluation.effect import Effect
from ..evaluation.measures.quick import QuickMeasure
from ..evaluation.onrecord import KeptEvaluation
from ..hub.licences import duty, licence_of
from ..proofs.outcome import Proofs
from ..proofs.record import recorded_proofs
from ..rule import Rule
from .evidence import factors_in_words
from .record import Measured, effect_rows
from .wording import WORDS

_MARKUP = {"&": "&amp;", "<": "&lt;", "`": "&#96;", "|": "&#124;", "*": "&#42;", "_": "&#95;", "](": "]&#40;"}


@dataclass(frozen=True)
class Card:
    """The data of a card."""

    manifest: Manifest
    source: Origin
    measured: Measured
    answers: AttributionSummary | None
    proofs: Proofs | None

    @classmethod
    def of(cls, manifest: Manifest) -> Card:
        """Raises CheckpointError, KeyError, TypeError or ValueError for figures of another form."""
        attribution = (manifest.summary or {}).get("attribution")
        return cls(
            manifest,
            manifest.source or Origin("the base"),
            Measured.of(manifest.summary),
            AttributionSummary.from_dict(attribution) if attribution else None,
            recorded_proofs(Path(), manifest),
        )

    @property
    def name(self) -> str:
        """Of the base, without its owner."""
        return self.source.id.rpartition("/")[2]

    @property
    def recipe(self) -> str:
        return self.manifest.recipe.name if self.manifest.recipe else "unnamed"

    @property
    def base(self) -> str:
        """The base as --in takes it."""
        return shlex.quote(one_line(str(self.source)))


def prose(text: str) -> str:
    """Text from outside, on one line, escaped for Markdown and HTML."""
    return re.sub("|".join(map(re.escape, _MARKUP)), lambda match: _MARKUP[match[0]], one_line(text))


def code(text: str) -> str:
    """Text from outside as a code span."""
    return f"`{one_line(text).replace('`', chr(39))}`"


def text_of(card: Card, metadata: dict) -> str:
    """The text below the metadata."""
    proven, last = (_proven, _undo) if card.manifest.is_checkpoint else (_read_back, _use)
    sections = [_intro, _verdict, _uses, _done, proven, _measured, _not_found, _limits, last]
    lines = [line for section in sections for line in [*section(card), ""]]
    return "\n".join([*lines, *_licence(metadata)])


def _intro(card: Card) -> list[str]:
    source, edit = card.source, card.manifest.edit
    later = " or in a later evaluation" if card.measured.evaluations else ""
    base = code(source.id)
    if source.commit and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.id, re.ASCII):
        base = f"[{source.id}](https://huggingface.co/{source.id}) at commit {code(source.commit)}"
    scaled = f"{edit.num_neurons} feed-forward neurons in {len(edit.factors)} layers"
    by = factors_in_words(edit.distinct_factors)
    what = {
        "checkpoint": f"This is {base}, in which {scaled} were scaled by {by}. Nothing else was changed. ",
        "peft": f"This is an IA3 adapter for {base}: it scales {scaled} by {by}, and does nothing else. ",
        "delta": f"This is the difference between {base} and the same model with {scaled} scaled by {by}: "
        "the weights that change, as they become. ",
    }[card.manifest.form]
    return [
        f"# {prose(card.name)}, know-bias neurons scaled",
        "",
        f"{what}{_resharded(card.manifest)}It was made by {prose(card.manifest.tool)}; each figure below was "
        f"computed in the run that made it{later}, and stands in `kbne_edit.json`.",
    ]


def _resharded(manifest: Manifest) -> str:
    if not manifest.resharded:
        return ""
    new = [name for name, file in manifest.files.items() if file.before is None and name.endswith(".safetensors")]
    count = sum(name.endswith(".safetensors") for name in manifest.resharded)
    return f"The weights lie in other files than the base's ({count} became {len(new)}), as the same tensors. "


def _verdict(card: Card) -> list[str]:
    verdict = card.measured.verdict
    rows = [f"| {part.state} | {WORDS[name]} | {prose(part.reason)} |" for name, part in verdict]
    lines = ["## Verdict", "", f"**{verdict.ship}**", "", "| state | question | reason |", "|---|---|---|", *rows]
    if card.answers and (constant := card.answers.answers.constant) is not None:
        lines += [
            "",
            f"> Caution: the base does no better than one answer ({prose(constant)}) to every question. What was "
            "located then says little about what the model knows.",
        ]
    return lines


def _uses(card: Card) -> list[str]:
    shipped = card.measured.verdict.ship == "ship"
    intended = (
        "What the base is meant for, where the groups, the language and the kind of text are those of the probes below."
        if shipped
        else "Research on this edit and its effects. By its verdict, it is not meant to replace the base."
    )
    return [
        "## Use",
        "",
        f"- Intended: {intended}",
        "- Out of scope: decisions about people (hiring, credit, housing, care, policing) on the strength of this "
        "edit; claims that the model is free of bias or fair; whatever the base's card excludes.",
        "- Problems with this model: tell whoever publishes it (on the Hub, in its Community tab), with the prompt, "
        "the output and the SHA-256 of `kbne_edit.json`.",
    ]


def _done(card: Card) -> list[str]:
    edit = card.manifest.edit
    where = {
        "down": "the input of the down-projection; on disk, the matching column of its weight",
        "gate": "the output of the gate projection, before the activation; on disk, the matching row of its weight",
        "up": "the output of the up-projection; on disk, the matching row of its weight",
    }[edit.site]
    lines = [
        "## What was done",
        "",
        f"Know-bias neuron enhancement ([arXiv:2601.21864](https://arxiv.org/abs/2601.21864)). What is scaled, at "
        f"every position, is {where}.",
        "",
        "| layer | neurons |",
        "|---|---|",
        *(f"| {layer} | {len(factors)} |" for layer, factors in edit.factors.items()),
        "",
    ]
    chosen = edit.found.get("select")
    if card.answers is None or not isinstance(chosen, dict):
        return [*lines, "The neurons were given to the run that made this; it did not locate them."]
    given = card.answers.answers
    answers = ", ".join(f"{prose(name)} {tally.right} of {tally.total}" for name, tally in given.by_answer.items())
    return [
        *lines,
        f"The neurons were located with the recipe {code(card.recipe)}: {given.questions.total} questions about bias, "
        f"of which the base answers {given.questions.right} rightly ({answers}), and {given.controls.total} unrelated "
        f"ones ({given.controls.right} rightly). Scores are integrated gradients; the largest gap in completeness is "
        f"{card.answers.largest_residual:.1%} of a question's largest score. Selection: "
        f"{Rule.from_dict(chosen).describe()}.",
    ]


def _proven(card: Card) -> list[str]:
    proofs = card.proofs
    if proofs is None:
        return ["## What was proven", "", "- Nothing: this was made without a proof."]
    lines = [
        "## What was proven",
        "",
        f"- The file is the edit: of {proofs.files.tensors} tensors, {proofs.files.edited} are the base's with the "
        "factors multiplied in and rounded once, the others are the base's to the bit.",
    ]
    for entry in proofs.behaviour or ():
        figures = "equal to the bit"
        if not entry.bit_equal:
            figures = f"largest difference {entry.difference:.1e} of the logits' spread"
            figures += f", where rounding alone makes {entry.noise:.1e}"
        lines.append(
            f"- The model behaves as the base with run-time hooks, {prose(entry.dtype)}, {prose(entry.how)}: {figures} "
            f"({entry.positions} positions)."
        )
    if not proofs.behaviour:
        lines.append("- That the model behaves as the base with run-time hooks was not put to the proof.")
    return lines


def _read_back(card: Card) -> list[str]:
    held = {
        "peft": "The adapter is the edit: read back after it was written, it holds these neurons and factors alone.",
        "delta": "The delta gives the folded weights: put into the base, its columns give files of the same SHA-256 as "
        "the products of the base's columns and their factors.",
    }[card.manifest.form]
    return [
        "## What was checked",
        "",
        f"- {held}",
        "- That a model with it behaves as the base with run-time hooks was not put to the proof here: `kbne-edit`, as "
        "below, does that, and makes no checkpoint if it fails.",
    ]


def _measured(card: Card) -> list[str]:
    measured, lines = card.measured, ["## What was measured", ""]
    if not measured.effect and not measured.cost and not measured.evaluations:
        return [*lines, "Nothing: neither the effect of the edit on bias nor its cost. That is not “no effect”."]
    lines += _effect(measured.effect, card.recipe) if measured.effect else ["Its effect on bias was not measured."]
    lines += ["", *(_cost(measured.cost) if measured.cost else ["Its cost was not measured."])]
    lines += _measures(measured.measures)
    return lines + [line for one in measured.evaluations for line in _benchmarks(one)]


def _benchmarks(evaluation: KeptEvaluation) -> list[str]:
    """What `evaluate` measured of this output after it was made: the figures that were tested."""
    rows = [
        f"| {prose(task.name)} ({task.items}) | {prose(figure.name)}, {prose(figure.unit)} | "
        f"{figure.base:.{figure.digits}f} | {figure.edit:.{figure.digits}f} | {figure.change.value:+.{figure.digits}f} "
        f"({figure.change.low:+.{figure.digits}f} to {figure.change.high:+.{figure.digits}f}) | {prose(figure.text)} |"
        for task in evaluation.tasks
        for figure in task.figures.values()
        if figure.tested
    ]
    limit = "all items" if evaluation.limit is None else f"at most {evaluation.limit} items of each task"
    return [
        "",
        f"Benchmarks, measured later by `kbne-edit evaluate` ({prose(evaluation.tool)}, {limit}):",
        "",
        "| task (items) | figure | base | edit | change (95 % interval) | beside the controls |",
        "|---|---|---|---|---|---|",
        *rows,
    ]


def _effect(effect: Effect, recipe: str) -> list[str]:
    one, absolute = ("unwanted", "") if effect.avoids else ("stereotyped", "absolute ")
    (before, after), share = effect.score, effect.preferred
    return [
        f"On {effect.probes} pairs of sentences (recipe {code(recipe)}; {effect.twins} twins): how much more probable "
        f"the {one} one is, in nats per token. The mean {absolute}score of the twins went from {before:.4f} to "
        f"{after:.4f}; the {one} side is preferred in {share.before:.0%} of them, afterwards in {share.after:.0%}.",
        "",
        f"| change of the score{', absolute unless said' if absolute else ''} | mean | 95 % interval |",
        "|---|---|---|",
        *(
            f"| {name} | {mean:+.4f} | {low:+.4f} to {high:+.4f} |"
            for name, (mean, low, high) in effect_rows(effect).items()
        ),
    ]


def _cost(cost: Cost) -> list[str]:
    text = (
        f"Cost, on {cost.texts} texts that speak of no group: KL from the base {cost.kl.value:.2g} nats per token "
        f"(95 % {cost.kl.low:.2g} to {cost.kl.high:.2g}, limit {MOST_KL:g}), perplexity {cost.before.value:.4g}, with "
        f"the edit {cost.after.value:.4g} (limit x{MOST_RISE:g})."
    )
    for name, part in (("questions", cost.questions), ("unrelated questions", cost.controls)):
        if part:
            text += f" Of {part.total} {name} the base answers {part.before} rightly, with the edit {part.after}."
    changed = sum(item.before != item.after for item in cost.continuations)
    return [text, "", f"{changed} of {len(cost.continuations)} greedy continuations change."]


def _measures(measures: Sequence[QuickMeasure]) -> list[str]:
    """The overall figures; those of groups are in the manifest."""
    if not measures:
        return []
    rows = [
        f"| {prose(measure.name)} ({prose(measure.language)}, {measure.items}) | {prose(figure.name)}, "
        f"{prose(figure.unit)} | {figure.before:.4g} | {figure.after:.4g} | {figure.change.value:+.2g} | "
        f"{figure.change.low:+.2g} to {figure.change.high:+.2g} |"
        for measure in measures
        for figure in measure.overall
    ]
    return [
        "",
        "Decisions about people of different groups, and associations of groups (small versions of the measures of "
        "kbne-edit; a largest gap lies above 0 by chance alone):",
        "",
        "| measure (language, items) | figure | base | edit | change | 95 % interval |",
        "|---|---|---|---|---|---|",
        *rows,
    ]


def _not_found(card: Card) -> list[str]:
    """What was not found, as plainly as what was found."""
    measured = card.measured
    effect, lines = measured.effect, ["## What was not found", ""]
    if not effect and not measured.evaluations:
        lines.append("- Whether this model shows less bias than its base: it was not measured.")
    elif not effect and measured.verdict.effect.state != "PASS":
        lines.append(f"- Less bias on benchmarks: {prose(measured.verdict.effect.reason)}.")
    if effect and effect.state == "more":
        what = "of what is unwanted" if effect.avoids else "bias"
        lines.append(f"- Less {what}: the edit raised the score more than random neurons did.")
    elif effect and effect.state == "none":
        lines.append(f"- An effect on the probes: {prose(measured.verdict.effect.reason)}.")
    if effect and effect.preferred.after >= effect.preferred.before:
        side = "unwanted" if effect.avoids else "stereotype"
        lines.append(f"- Fewer twins in which the {side} side is preferred: their share did not fall.")
    lines += _specific(measured)
    if not measured.cost:
        lines.append("- Whether other text and abilities are affected: it was not measured.")
    if measured.further:
        further = ", ".join(map(prose, measured.further))
        lines.append(f"- Further figures of the run stand in `kbne_edit.json`: {further}.")
    lines.append("- Whether other groups, languages and prompts are affected: it was not measured.")
    return lines


def _specific(measured: Measured) -> list[str]:
    selection = measured.selection
    if selection is None or selection.controls_overlap is None:
        return ["- Whether the neurons are specific to bias: no control was asked."]
    shared, total = selection.controls_overlap, selection.neurons
    lines = [
        f"- That the neurons are specific to bias: {shared} of the {total} are selected by unrelated questions too."
        if shared
        else "- Neurons that unrelated questions select too: none of the edit's is."
    ]
    if (unseen := selection.unseen_share) and unseen.value:
        lines.append(
            f"- Neurons that serve questions about bias alone: of those selected without one half of the controls, "
            f"{unseen.value:.0%} are among as many that this half uses most."
        )
    return lines


def _limits(_: Card) -> list[str]:
    return [
        "## Limits",
        "",
        "The base's limits are this model's. The edit scales neurons with which the model answers questions about "
        "bias; it removes nothing, and nothing but the measurement above, if any, says what it does to other text.",
    ]


def _use(card: Card) -> list[str]:
    lines, adapter = ["## How to use it", ""], card.manifest.form == "peft"
    if adapter:
        lines += [
            "With PEFT, on the base as it is loaded for any other use; `merge_and_unload` makes a plain model of both.",
            "",
            "```python",
            "from peft import PeftModel",
            "",
            'model = PeftModel.from_pretrained(base, "this repository, or its directory")',
            "```",
            "",
        ]
    command = f"bake --in {card.base} --edit adapter" if adapter else f"apply delta --in {card.base}"
    return [
        *lines,
        f"With this repository in the directory `{'adapter' if adapter else 'delta'}`, as a checkpoint of its own, "
        "once both proofs hold:",
        "",
        "```bash",
        f"kbne-edit {command} --out model",
        "```",
    ]


def _undo(card: Card) -> list[str]:
    return [
        "## How to undo it, and how to verify it",
        "",
        "`kbne_undo.kbne` holds the scaled weights as they were; `README.base.md` is the base's own card, if it "
        "has one. With this repository in the directory `model`:",
        "",
        "```bash",
        "kbne-edit revert model --out base                # the base, byte for byte, without a download",
        f"kbne-edit verify model --in {card.base}",
        "```",
    ]


def _licence(metadata: dict) -> list[str]:
    licence = licence_of(metadata)
    lines = ["## Licence", "", f"The base's: {prose(licence)}." if licence else "The base's card names none."]
    if terms := duty(licence):
        lines += ["", *([terms.shown, ""] if terms.shown else []), f"{terms.asks[0].upper()}{terms.asks[1:]}."]
    return lines
