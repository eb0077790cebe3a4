"""The card of what is written, from its manifest alone.

The base's own card stays beside it as README.base.md. The same manifest gives the same bytes.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from dataclasses import replace
from pathlib import Path

from ..disk.manifest import TOOL, FileRecord, Manifest
from ..disk.names import CARD, MANIFEST, OLD_DELTA, UNDO, base_card
from ..errors import InputError
from ..evaluation.cost import Cost
from ..evaluation.effect import Effect
from ..hub.licences import base_metadata, duty, licence_of, metadata_in
from ..rule import Rule
from .record import Measured, effect_rows
from .wording import WORDS

_CARRIED = ("license", "license_name", "license_link", "pipeline_tag")


def add_card(directory: Path, manifest: Manifest, metadata: dict | None = None) -> Manifest:
    """Write README.md, and return the manifest that records it; the base's own card becomes README.base.md.

    metadata: of the base's card, where that is not in the directory.
    """
    path = directory / CARD
    metadata = metadata_in(directory) if metadata is None else metadata
    files = dict(manifest.files)
    if path.exists():
        kept = base_card(files)
        path.rename(directory / kept)
        files[kept] = replace(files.pop(CARD), base_name=CARD)
    manifest = replace(manifest, files=dict(sorted(files.items())))
    card = _bytes(card_of(manifest, metadata))
    path.write_bytes(card)
    return manifest.with_file(CARD, FileRecord(None, hashlib.sha256(card).hexdigest()))


def _bytes(card: str) -> bytes:
    """Names from outside may hold bytes that are no text: those are escaped."""
    return card.encode("utf-8", errors="backslashreplace")


def card_of(manifest: Manifest, metadata: dict) -> str:
    """The card that a manifest gives, and which record it was made from. metadata: of the base's card."""
    manifest = replace(manifest, files={name: record for name, record in manifest.files.items() if name != CARD})
    manifest = manifest.as_read()
    return f"{build(manifest.to_dict(), metadata)}\n<!-- record: {manifest.record_sha256()} -->\n"


def card_fault(directory: Path, manifest: Manifest, base: Path | None = None) -> str:
    """What is wrong with the card of an output that `add_card` wrote; "" if nothing is.

    base: the base's directory; None where it is not at hand: then the copy of its card that the output keeps is taken.
    A card of another version cannot be made again: there the record that it names must be the manifest's. Those of
    outputs whose undo file has its earlier name say nothing of it, and are not compared.
    """
    earlier = manifest.is_checkpoint and not (directory / UNDO).is_file()
    if earlier or OLD_DELTA in manifest.files or CARD not in manifest.files:
        return ""
    if manifest.files[CARD].before is not None:  # the base's own: nothing was added
        return ""
    text = (directory / CARD).read_bytes().decode("utf-8", errors="replace")
    if f"<!-- record: {manifest.record_sha256()} -->" not in text:
        return f"{CARD} was not made from what {MANIFEST} records"
    if manifest.tool != TOOL or (base is None and not manifest.is_checkpoint):
        return ""
    try:
        expected = card_of(manifest, _metadata_kept(directory, manifest) if base is None else metadata_in(base))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, InputError):
        return f"{MANIFEST} has figures of another form than kbne-edit writes"
    return "" if text.encode() == _bytes(expected) else f"{CARD} is not the card that {MANIFEST} gives"


def _metadata_kept(directory: Path, manifest: Manifest) -> dict:
    """The metadata of the base's card, from the copy that an output keeps of it."""
    for name, record in manifest.files.items():
        if record.base_name == CARD:
            return base_metadata((directory / name).read_text(encoding="utf-8-sig", errors="replace"))
    return {}


def build(manifest: dict, metadata: dict) -> str:
    """The card's text. metadata: of the base's card."""
    from huggingface_hub import ModelCard, ModelCardData

    source, found = manifest["source"], Measured.of(manifest["summary"])
    # Who searches by tag or metric is to find models whose effect was shown, and no others.
    effect = found.effect if found.verdict.effect.state == "PASS" else None
    name = source["id"].rpartition("/")[2]
    tags = [tag for tag in _listed(metadata.get("tags")) if not tag.startswith("base_model:")]
    languages = [code for code in _listed(metadata.get("language")) if re.fullmatch("[a-z]{2,3}|multilingual", code)]
    form = manifest.get("form")
    data = ModelCardData(
        base_model=source["id"] if source["commit"] else None,
        language=languages or None,
        library_name={None: "transformers", "delta": "kbne-edit"}.get(form, form),
        tags=[*tags, *(["ia3"] if form == "peft" else []), "kbne-edit", *(["bias-mitigation"] if effect else [])],
        model_name=f"{name}, know-bias neurons scaled" if effect else None,
        eval_results=_results(effect, _recipe(manifest)) if effect else None,
        **{"pipeline_tag": "text-generation"}
        | {key: metadata[key] for key in _CARRIED if isinstance(metadata.get(key), str)},
        **({"base_model_relation": "adapter" if form else "finetune"} if source["commit"] else {}),
    )
    proven, last = (_read_back, _use) if form else (_proven, _undo)
    sections = [_intro, _verdict, _done, proven, _measured, _not_found, _limits, last]
    lines = [line for section in sections for line in [*section(manifest), ""]]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join([*lines, *_licence(metadata)]) + "\n"))


def _listed(value: object) -> list[str]:
    """A metadata value that is one string or several. YAML reads a bare `no`, Norwegian, as false."""
    values = value if isinstance(value, list) else [value]
    return [v for v in ("no" if v is False else v for v in values) if isinstance(v, str)]


def _recipe(manifest: dict) -> str:
    return manifest["recipe"]["name"]


def _results(effect: Effect, recipe: str) -> list:
    """The effect as entries of the card's model-index."""
    from huggingface_hub import EvalResult

    avoid = {
        "mean_score": ("mean score of the unwanted side, nats per token", effect.signed.after),
        "mean_score_change": ("its change by the edit", effect.change_signed.value),
        "mean_score_change_random": ("its change by random neurons", effect.random.signed.value),
    }
    balance = {
        "mean_absolute_score": ("mean absolute score of twins, nats per token", effect.absolute.after),
        "mean_absolute_score_change": ("its change by the edit", effect.change_absolute.value),
        "mean_absolute_score_change_random": ("its change by random neurons", effect.random.absolute.value),
        "stereotype_share": ("share of twins with the stereotype preferred", effect.preferred.after),
    }
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=recipe,
            dataset_name=f"{_first(effect)} probes of the recipe {recipe}",
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 6),
        )
        for kind, (name, value) in (avoid if effect.avoids else balance).items()
    ]


def _first(effect: Effect) -> str:
    return "unwanted" if effect.avoids else "stereotype"


# ----------------------------------------------------------------------------------------------------------- sections


def _intro(manifest: dict) -> list[str]:
    source, edit = manifest["source"], manifest["edit"]
    base = f"`{source['id']}`"
    if source["commit"]:
        base = f"[{source['id']}](https://huggingface.co/{source['id']}) at commit `{source['commit']}`"
    layers = edit["factors"]
    scaled = f"{sum(map(len, layers.values()))} feed-forward neurons in {len(layers)} layers"
    what = {
        None: f"This is {base}, in which {scaled} were scaled by {_factors(edit)}. Nothing else was changed. ",
        "peft": f"This is an IA3 adapter for {base}: it scales {scaled} by {_factors(edit)}, and does nothing else. ",
        "delta": f"This is the difference between {base} and the same model with {scaled} scaled by {_factors(edit)}: "
        "the weights that change, as they become. ",
    }
    return [
        f"# {source['id'].rpartition('/')[2]}, know-bias neurons scaled",
        "",
        f"{what[manifest.get('form')]}{_resharded(manifest)}It was made by {manifest['tool']}; each figure below was "
        "computed in the run that made it, and stands in `kbne_edit.json`.",
    ]


def _resharded(manifest: dict) -> str:
    old, files = manifest.get("resharded", {}), manifest["files"].items()
    if not old:
        return ""
    new = [name for name, entry in files if entry["in"] is None and name.endswith(".safetensors")]
    count = sum(name.endswith(".safetensors") for name in old)
    return f"The weights lie in other files than the base's ({count} became {len(new)}), as the same tensors. "


def _factors(edit: dict) -> str:
    found = sorted({factor for neurons in edit["factors"].values() for factor in neurons.values()})
    return f"the factor {found[0]:g}" if len(found) == 1 else f"{len(found)} factors, {found[0]:g} to {found[-1]:g}"


def _done(manifest: dict) -> list[str]:
    edit, found = manifest["edit"], manifest["edit"]["found"]
    where = {
        "down": "the input of the down-projection; on disk, the matching column of its weight",
        "gate": "the output of the gate projection, before the activation; on disk, the matching row of its weight",
    }
    lines = [
        "## What was done",
        "",
        f"Know-bias neuron enhancement ([arXiv:2601.21864](https://arxiv.org/abs/2601.21864)). What is scaled, at "
        f"every position, is {where[edit['site']]}.",
        "",
        "| layer | neurons |",
        "|---|---|",
        *(f"| {layer} | {len(neurons)} |" for layer, neurons in edit["factors"].items()),
        "",
    ]
    asked, chosen = manifest["summary"].get("attribution"), found.get("select")
    if not asked or not isinstance(chosen, dict):
        return [*lines, "The neurons were given to the run that made this; it did not locate them."]
    rule = Rule.from_dict(chosen).describe()
    answers = ", ".join(f"{answer} {right} of {n}" for answer, (right, n) in asked["right_by_answer"].items())
    return [
        *lines,
        f"The neurons were located with the recipe `{_recipe(manifest)}`: {asked['questions']} questions about bias, "
        f"of which the base answers {asked['right']} rightly ({answers}), and {asked['controls']} unrelated ones "
        f"({asked['controls_right']} rightly). Scores are integrated gradients; the largest gap in completeness is "
        f"{asked['largest_residual']:.1%} of a question's largest score. Selection: {rule}.",
    ]


def _proven(manifest: dict) -> list[str]:
    proofs = manifest["proofs"]
    lines = [
        "## What was proven",
        "",
        f"- The file is the edit: of {proofs['tensors']} tensors, {proofs['edited']} are the base's with the factors "
        "multiplied in and rounded once, the others are the base's to the bit.",
    ]
    for entry in proofs["behaviour"] or []:
        figures = "equal to the bit"
        if not entry["bit_equal"]:
            figures = f"largest difference {entry['difference']:.1e} of the logits' spread"
            figures += f", where rounding alone makes {entry['noise']:.1e}"
        lines.append(
            f"- The model behaves as the base with run-time hooks, {entry['dtype']}, {entry['how']}: {figures} "
            f"({entry['positions']} positions)."
        )
    if not proofs["behaviour"]:
        lines.append("- That the model behaves as the base with run-time hooks was not put to the proof.")
    return lines


def _read_back(manifest: dict) -> list[str]:
    held = {
        "peft": "The adapter is the edit: read back after it was written, it holds these neurons and factors alone.",
        "delta": "The delta gives the folded weights: put into the base, its columns give files of the same SHA-256 as "
        "the products of the base's columns and their factors.",
    }
    return [
        "## What was checked",
        "",
        f"- {held[manifest['form']]}",
        "- That a model with it behaves as the base with run-time hooks was not put to the proof here: `kbne-edit`, as "
        "below, does that, and makes no checkpoint if it fails.",
    ]


def _verdict(manifest: dict) -> list[str]:
    verdict = Measured.of(manifest["summary"]).verdict
    rows = [f"| {WORDS[name]} | {part.state} | {part.reason} |" for name, part in verdict]
    return ["## Verdict", "", f"**{verdict.ship}**", "", "| question | state | reason |", "|---|---|---|", *rows]


def _measured(manifest: dict) -> list[str]:
    found = Measured.of(manifest["summary"])
    if not found.effect and not found.cost:
        return ["## What was measured", "", "Neither the effect of the edit on bias nor its cost was measured."]
    lines = ["## What was measured", ""]
    lines += _effect_lines(found.effect, _recipe(manifest)) if found.effect else ["Its effect was not measured."]
    return lines + (["", *_cost_lines(found.cost)] if found.cost else [])


def _effect_lines(effect: Effect, recipe: str) -> list[str]:
    one, absolute = ("unwanted", "") if effect.avoids else ("stereotyped", "absolute ")
    (before, after), share = effect.score, effect.preferred
    return [
        f"On {effect.probes} pairs of sentences (recipe `{recipe}`; {effect.twins} twins): how much more probable the "
        f"{one} one is, in nats per token. The mean {absolute}score of the twins went from {before:.4f} to "
        f"{after:.4f}; the {one} side is preferred in {share.before:.0%} of them, afterwards in {share.after:.0%}.",
        "",
        f"| change of the score{', absolute unless said' if absolute else ''} | mean | 95 % interval |",
        "|---|---|---|",
        *(
            f"| {name} | {mean:+.4f} | {low:+.4f} to {high:+.4f} |"
            for name, (mean, low, high) in effect_rows(effect).items()
        ),
    ]


def _cost_lines(cost: Cost) -> list[str]:
    lines = [
        f"On {cost.texts} texts that speak of no group: KL from the base {cost.kl.value:.2g} nats per token (95 % "
        f"{cost.kl.low:.2g} to {cost.kl.high:.2g}), perplexity {cost.before.value:.4g}, with the edit "
        f"{cost.after.value:.4g}."
    ]
    for name, part in (("questions", cost.questions), ("unrelated questions", cost.controls)):
        if part:
            lines[0] += f" Of {part.total} {name} the base answers {part.before} rightly, with the edit {part.after}."
    changed = sum(item.before != item.after for item in cost.continuations)
    return [*lines, "", f"{changed} of {len(cost.continuations)} greedy continuations change."]


def _not_found(manifest: dict) -> list[str]:
    """What a reader must not believe: said as plainly as what was found."""
    found = Measured.of(manifest["summary"])
    effect, selection = found.effect, found.selection
    lines = ["## What was not found", ""]
    if not effect:
        lines.append("- Whether this model shows less bias than its base: it was not measured.")
    elif effect.state == "more":
        what = "of what is unwanted" if effect.avoids else "bias"
        lines.append(f"- Less {what}: the edit raised the score more than random neurons did.")
    elif effect.state == "none":
        lines.append(f"- An effect on the probes: {found.verdict.effect.reason}.")
    if effect and effect.preferred.after >= effect.preferred.before:
        lines.append(f"- Fewer twins in which the {_first(effect)} side is preferred: their share did not fall.")
    if selection and selection.controls_overlap is not None:
        shared, total = selection.controls_overlap, selection.neurons
        lines.append(
            f"- That the neurons are specific to bias: {shared} of the {total} are selected by unrelated questions too."
            if shared
            else "- Neurons that unrelated questions select too: none of the edit's is."
        )
    else:
        lines.append("- Whether the neurons are specific to bias: no control was asked.")
    if selection and (unseen := selection.unseen_share) and unseen.value:
        lines.append(
            f"- Neurons that serve questions about bias alone: of those selected without one half of the controls, "
            f"{unseen.value:.0%} are among as many that this half uses most."
        )
    if not found.cost:
        lines.append("- Whether other text and abilities are affected: it was not measured.")
    if found.further:
        lines.append(f"- Further figures of the run stand in `kbne_edit.json`: {', '.join(found.further)}.")
    lines.append("- Whether other groups, languages and prompts are affected: it was not measured.")
    return lines


def _limits(_: dict) -> list[str]:
    return [
        "## Limits",
        "",
        "The base's limits are this model's. The edit scales neurons with which the model answers questions about "
        "bias; it removes nothing, and nothing but the measurement above, if any, says what it does to other text.",
    ]


def _base(manifest: dict) -> str:
    """The base as --in takes it."""
    source = manifest["source"]
    return shlex.quote(f"{source['id']}@{source['commit']}" if source["commit"] else source["id"])


def _use(manifest: dict) -> list[str]:
    lines = ["## How to use it", ""]
    if manifest["form"] == "peft":
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
    command = "bake --in {} --edit adapter" if manifest["form"] == "peft" else "apply delta --in {}"
    where = "adapter" if manifest["form"] == "peft" else "delta"
    return [
        *lines,
        f"With this repository in the directory `{where}`, as a checkpoint of its own, once both proofs hold:",
        "",
        "```bash",
        f"kbne-edit {command.format(_base(manifest))} --out model",
        "```",
    ]


def _undo(manifest: dict) -> list[str]:
    base = _base(manifest)
    return [
        "## How to undo it, and how to verify it",
        "",
        "`kbne_undo.kbne` holds the scaled weights as they were; `README.base.md` is the base's own card, if it "
        "has one. With this repository in the directory `model`:",
        "",
        "```bash",
        "kbne-edit revert model --out base                # the base, byte for byte, without a download",
        f"kbne-edit verify --in {base} --baked model",
        "```",
    ]


def _licence(metadata: dict) -> list[str]:
    licence = licence_of(metadata)
    lines = ["## Licence", "", f"The base's: {licence}." if licence else "The base's card names none."]
    if found := duty(licence):
        lines += ["", *([found.shown, ""] if found.shown else []), f"{found.asks[0].upper()}{found.asks[1:]}."]
    return lines
