"""What a report on a baked directory says, as one plain dict: the JSON of `report --json`, and all that the page shows.

It comes from the directory itself (manifest, undo file, unembedding) and, where they are there, from the scores file of
the run that made it and from the sweep that chose its edit. What is absent is null, never guessed. No time, no path:
the same files give the same report. Form: report.schema.json.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .. import __version__
from ..attribution.answers import AttributionSummary
from ..attribution.scores import Scores, load_scores
from ..disk.checkpoint import Checkpoint
from ..disk.hashing import file_hash
from ..disk.manifest import Manifest
from ..disk.names import MANIFEST
from ..edit import Edit
from ..errors import CheckpointError, InputError, ScoresError
from ..files import work_folder
from ..proofs.record import check_hashes
from ..rule import Rule
from ..tuning.result import Tuning, load_tuning
from ..tuning.search import in_words
from ..tuning.tune import RESULT
from .lens import Neuron, columns, vocabulary, written
from .record import Measured as Record
from .wording import verdicts

if TYPE_CHECKING:
    from ..selection.select import Selection

VERSION = 1
TOKENS, QUESTIONS, STRONGEST = 6, 3, 60  # shown per neuron, per neuron, on the map
_OPTIONAL = ("difference", "noise", "kl", "top1", "greedy", "rerouted")  # figures of the second proof


def build(
    baked: str | Path,
    scores: str | Path | None = None,
    say: Callable[[str], None] = lambda _: None,
    tuning: str | Path | None = None,
) -> dict:
    """The report on a baked directory.

    scores: the scores file of the run (default: BAKED.work/scores.safetensors, where it is there and was made for this
    base). tuning: the tune.json of the edit (default: BAKED.work/tune.json, where it chose this one). say: called with
    lines for the user. Raises CheckpointError for a directory that is not as it was baked as far as is looked at here,
    ScoresError for given scores that do not belong to it, InputError for such a tune.json.
    """
    path = Path(os.path.abspath(baked))
    checkpoint, manifest = Checkpoint.open(path), _manifest(path)
    edit = Edit.from_dict(manifest["edit"])
    sizes = checkpoint.layer_sizes(edit.site)
    edit.check(sizes)
    work = work_folder(path)
    file = Path(scores) if scores else work / "scores.safetensors"
    found, measured = _scores(file, bool(scores), edit, sizes, say) or (None, None)
    try:
        recorded = _recorded(path, manifest)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{path / MANIFEST} has figures of another form than kbne-edit writes") from None
    report = {
        "kbne_report": VERSION,
        "tool": f"kbne-edit {__version__}",
        "model": recorded["source"] | _model(checkpoint, edit, sizes),
        "edit": _edit(edit, sizes),
        "selection": measured and measured.selection,
        "neurons": _neurons(edit, measured, _tokens(checkpoint, edit)),
        "map": measured and measured.map,
        "overlap": measured and measured.overlap,
        "answers": recorded["answers"] or (found and _answers(AttributionSummary.of(found).to_dict())),
        **{key: recorded[key] for key in ("proofs", "effect", "cost", "verdict")},
        "tuning": _tuning(Path(tuning) if tuning else work / RESULT, bool(tuning), edit, say),
        "controls_overlap": measured.controls_overlap if measured else recorded["controls_overlap"],
        "further": {k: v for k, v in recorded["further"].items() if not (measured and k == "selection")},
        "provenance": recorded["provenance"] | {"scores_sha256": file_hash(file) if found else None},
    }
    return report | {"verdicts": verdicts(report)}


def _manifest(path: Path) -> dict:
    manifest = Manifest.read(path)
    if manifest is None:
        raise CheckpointError(f"{path} has no {MANIFEST}: a report is made on a directory that kbne-edit baked")
    if not manifest.sealed:
        raise CheckpointError(f"{path / MANIFEST} was changed after baking: its figures are not those of the run")
    if faults := check_hashes(path, manifest):
        raise CheckpointError(f"{path}/{faults[0]}: a report is made on a directory as it was baked")
    return manifest.to_dict()


def _scores(
    file: Path, given: bool, edit: Edit, sizes: list[int], say: Callable[[str], None]
) -> tuple[Scores, Measured] | None:
    """The scores, if they belong to the edit. Others are an error if they were asked for, and left out if not."""
    try:
        if not given and not file.exists():
            return None
        found = load_scores(file)
        if (found.base, found.site, found.values.shape[1:]) != (edit.base, edit.site, (len(sizes), max(sizes))):
            raise ScoresError(f"{file} was made for another model or site than the edit: pass the --scores of its run")
        return found, measure(found, edit)
    except ScoresError as error:
        if given:
            raise
        say(f"scores left out: {error}")
        return None


def _tuning(file: Path, given: bool, edit: Edit, say: Callable[[str], None]) -> dict | None:
    """What a sweep found, if it chose this edit. Another one is an error if it was asked for, and left out if not."""
    if not given and not file.exists():
        return None
    try:
        found = load_tuning(file)
        if (found.base, found.chosen) != (edit.base, edit.sha256):
            raise InputError(f"{file} did not choose this edit: pass the --tuning of its run")
        return _chosen(found) | {"sha256": file_hash(file)}
    except InputError as error:
        if given:
            raise
        say(f"tune.json left out: {error}")
        return None


def _chosen(found: Tuning) -> dict:
    """The front, the choice and its confirmation."""
    points = [
        {
            "settings": in_words(point.settings),
            "neurons": point.neurons,
            "bias": list(point.bias),
            "kl": point.kl,
            "lowest": min(point.lowest.values()),
            "within": point.within,
            "front": point.front,
            "chosen": point.edit == found.chosen,
        }
        for point in found.points
    ]
    split = [
        {"task": name} | {f"{side}_{key}": of[side][key] for side in ("dev", "test") for key in ("items", "sha256")}
        for name, of in found.split.items()
    ]
    tested = [
        {"task": entry.task, "change": list(entry.change), "p": entry.p, "beyond": entry.beyond, "found": entry.text}
        for entry in found.tested
    ]
    said = found.confirmation
    return {
        "figure": found.figure,
        "margin": found.margin,
        "max_kl": found.max_kl,
        "chosen_by": found.chosen_by,
        "steered_by": list(found.steered_by),
        "bounded_by": list(found.bounded_by),
        "split": split,
        "points": points,
        "test": tested or None,
        "uses": said and said.uses,
        "confirmed": said and said.confirmed,
        "verdict": said and said.text,
    }


# ------------------------------------------------------------------------------------------------- from the manifest


def _model(checkpoint: Checkpoint, edit: Edit, sizes: list[int]) -> dict:
    return {
        "fingerprint": edit.base,
        "architecture": checkpoint.config["model_type"],
        "layers": len(sizes),
        "neurons": sum(sizes),
        "neurons_of_a_layer": max(sizes),
    }


def _edit(edit: Edit, sizes: list[int]) -> dict:
    return {
        "site": edit.site,
        "neurons": edit.num_neurons,
        "share": edit.num_neurons / sum(sizes),
        "factors": edit.distinct_factors,
        "exact": edit.exact,
        "layers": [{"layer": layer, "neurons": len(found)} for layer, found in edit.factors.items()],
        "found": edit.found,
    }


def _recorded(path: Path, manifest: dict) -> dict:
    """What the baking run wrote down, each figure of the type that it must have."""
    summary, proofs = dict(manifest.get("summary") or {}), manifest.get("proofs")
    source = manifest.get("source") or {"id": None, "commit": None}
    answers, found = summary.pop("attribution", None), Record.of(summary)
    controls = (summary.get("selection") or {}).get("controls_overlap")
    return {
        "controls_overlap": None if controls is None else int(controls),
        "source": {key: _text(source[key]) for key in ("id", "commit")},
        "provenance": _provenance(path, manifest),
        "proofs": _proofs(proofs) if proofs else None,
        "effect": found.effect and found.effect.to_dict(),
        "cost": found.cost and found.cost.to_dict(),
        "verdict": found.verdict.to_dict(),
        "answers": _answers(answers) if answers else None,
        "further": {key: value for key, value in summary.items() if key in found.further or key == "selection"},
    }


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _proofs(proofs: dict) -> dict:
    return {
        "file": bool(proofs["file_proof"]),
        "faults": [str(fault) for fault in proofs["faults"]],
        **{key: int(proofs[key]) for key in ("tensors", "edited", "files")},
        "behaviour": [
            {"dtype": str(e["dtype"]), "how": str(e["how"]), "holds": bool(e["ok"])}
            | {"bit_equal": bool(e["bit_equal"]), "positions": int(e["positions"])}
            | {key: float(e[key]) for key in _OPTIONAL if key in e}
            for e in proofs["behaviour"] or []
        ],
    }


def _answers(found: dict) -> dict:
    counts = {key: int(found[key]) for key in ("questions", "right", "controls", "controls_right")}
    tallies = {
        key: {str(name): [int(right), int(n)] for name, (right, n) in found[key].items()}
        for key in ("right_by_answer", "right_by_form")
    }
    value, low, high = map(float, found["balanced"])
    return (
        counts
        | tallies
        | {
            "balanced": [value, low, high],
            "constant": bool(found["constant"]),
            "wrong": list(map(str, found["wrong"])),
            "largest_residual": float(found["largest_residual"]),
            "nodes_per_layer": float(found["nodes_per_layer"]),
        }
    )


def _provenance(path: Path, manifest: dict) -> dict:
    """Hashes. That of the manifest is computed here, that of the undo file was compared, the others are on record."""
    recipe = manifest.get("recipe")
    return {
        "baked_with": _text(manifest.get("tool")),
        "recipe": recipe and {key: str(recipe[key]) for key in ("name", "sha256")},
        "manifest_sha256": file_hash(path / MANIFEST),
        "undo_sha256": manifest["undo"],
        "files": [
            {"name": name, "sha256": entry["out"], "base_sha256": entry["in"], "base_name": entry.get("base")}
            for name, entry in sorted(manifest["files"].items())
        ],
        "resharded": [
            {"name": name, "sha256": entry["in"], "into": entry["into"]}
            for name, entry in sorted(manifest.get("resharded", {}).items())
        ],
        "edited_tensors": manifest["tensors"],
        "left_out": manifest["left_out"],
    }


# --------------------------------------------------------------------------------------------------- from the scores


@dataclass(frozen=True)
class Measured:
    """What the scores say, as parts of the report. neurons: {(layer, neuron): entry}."""

    selection: dict
    neurons: dict[Neuron, dict]
    map: dict
    overlap: dict

    @property
    def controls_overlap(self) -> int | None:
        """How many edited neurons the controls select; None if no control was asked."""
        found = [entry["selected_by_controls"] for entry in self.neurons.values()]
        return None if None in found else sum(found)


def measure(scores: Scores, edit: Edit) -> Measured:
    """Attribution of the edited neurons, layer by layer, and the selections that the questions make."""
    settings, only, chosen = _selected(scores, edit)
    groups: dict[str | None, list[int]] = {}
    for q, question in enumerate(scores.questions):
        if only[q]:
            groups.setdefault(None if question.control else question.dimension, []).append(q)
    where = tuple(np.array([(la, n) for la, ns in edit.factors.items() for n in ns]).T)
    share, counted = np.zeros((len(only), len(where[0]))), np.zeros((len(only), len(where[0])), bool)
    mass = np.zeros((len(only), scores.values.shape[1]))
    mean = {name: np.zeros(scores.values.shape[1:]) for name in groups}
    for name, asked in groups.items():
        for q in asked:
            relative = scores.values[q] / max(float(scores.values[q].max()), 1e-30)
            share[q], counted[q] = relative[where], chosen.counts(q)[where]
            positive = np.maximum(relative, 0).sum(1, dtype=np.float64)
            mass[q] = positive / max(positive.sum(), 1e-30)
            mean[name] += relative / len(asked)
    by_group = {
        name: {"score": share[asked].mean(0), "counts": counted[asked].mean(0)} for name, asked in groups.items()
    }
    neurons = {
        (layer, neuron): _entry(j, layer, neuron, by_group, chosen.controls, share[:, j], only, scores)
        for j, (layer, neuron) in enumerate(zip(*(axis.tolist() for axis in where), strict=True))
    }
    union = np.stack([mask for name, mask in mean.items() if name is not None]).max(0)
    rows = {name: mass[asked].mean(0) for name, asked in groups.items()}
    return Measured(settings, neurons, _map(union, rows, edit), _overlap(chosen))


def _selected(scores: Scores, edit: Edit) -> tuple[dict, list[bool], Selection]:
    """Select again with the thresholds on record (the paper's if there are none), and see if the same comes out.

    Returns (settings, which questions were asked, the selection).
    """
    from ..selection.select import by_dimension, selection

    record = edit.found.get("select")
    record = record if isinstance(record, dict) else {}
    try:
        rule = Rule.from_dict(record)
    except InputError as error:
        raise ScoresError(f"the edit's thresholds are none: {error}") from None
    right = scores.correct
    kept = [
        sum(bool(r) for r, q in zip(right, scores.questions, strict=True) if q.control == control)
        for control in (False, True)
    ]
    dropped = [record.get("questions"), record.get("controls")] == kept and not right.all()
    only = [bool(r) or not dropped for r in right]
    try:
        chosen = selection(scores, rule, only=only)
    except InputError:  # nothing selected
        raise ScoresError(f"the edit's thresholds ({rule.describe()}) select nothing from these scores") from None
    again = by_dimension(chosen, record["factors"]) if "factors" in record else chosen.edit
    same = {la: set(ns) for la, ns in again.factors.items()} == {la: set(ns) for la, ns in edit.factors.items()}
    settings = {"top": None} | rule.to_dict()
    settings |= {
        "described": rule.describe(),
        "on_record": bool(record),
        "wrong_left_out": dropped,
        "reproduced": same,
        "recipe": scores.settings["recipe"],
        "quadrature": str(scores.settings.get("quadrature")),
        "questions": chosen.edit.found["select"]["questions"],
        "controls": chosen.edit.found["select"]["controls"],
    }
    return settings, only, chosen


def _entry(j: int, layer: int, neuron: int, groups: dict, controls, share: np.ndarray, only, scores: Scores) -> dict:
    """One neuron. share: of the largest score, question by question [Q]."""
    figures = {
        name: {key: round(float(values[j]), 6) for key, values in found.items()} for name, found in groups.items()
    }
    most = [q for q in np.argsort(-share, kind="stable").tolist() if only[q] and share[q] > 0][:QUESTIONS]
    return {
        "dimensions": {name: found for name, found in figures.items() if name is not None},
        "controls": None if None not in figures else figures[None],
        "selected_by_controls": None if controls is None else bool(controls[layer, neuron]),
        "questions": [
            {key: value for key, value in asdict(scores.questions[q]).items() if key not in ("form", "twin")}
            | {"share": round(float(share[q]), 6)}
            for q in most
        ],
    }


def _map(strength: np.ndarray, rows: dict, edit: Edit) -> dict:
    """strength: the largest mean relative score over the dimensions, [L, F]. rows: {dimension: share by layer [L]}."""
    flat = np.argsort(-strength, axis=None, kind="stable")[:STRONGEST]
    strongest = [(*map(int, divmod(index, strength.shape[1])), float(strength.flat[index])) for index in flat.tolist()]
    return {
        "mass": [
            {"dimension": name, "controls": name is None, "layers": [round(float(v), 6) for v in values]}
            for name, values in sorted(rows.items(), key=lambda row: row[0] is None)
        ],
        "strongest": [
            {"layer": la, "neuron": n, "score": round(score, 6), "edited": n in edit.factors.get(la, {})}
            for la, n, score in strongest
            if score > 0
        ],
    }


def _overlap(chosen: Selection) -> dict:
    """How many neurons each selection has, and how many lie in exactly these selections and no other."""
    masks = [*chosen.dimensions.values(), *([] if chosen.controls is None else [chosen.controls])]
    sets = [
        {"dimension": name, "controls": False, "neurons": int(mask.sum())} for name, mask in chosen.dimensions.items()
    ]
    if chosen.controls is not None:
        sets.append({"dimension": None, "controls": True, "neurons": int(chosen.controls.sum())})
    members, counts = np.unique(np.stack([mask.ravel() for mask in masks], 1), axis=0, return_counts=True)
    parts = [
        {"sets": np.flatnonzero(row).tolist(), "neurons": int(n)}
        for row, n in zip(members, counts, strict=True)
        if row.any()
    ]
    return {"sets": sets, "parts": sorted(parts, key=lambda p: (-p["neurons"], p["sets"]))}


# ------------------------------------------------------------------------------------------------- the edited neurons


def _tokens(checkpoint: Checkpoint, edit: Edit) -> dict[Neuron, dict] | None:
    texts = vocabulary(checkpoint.path)
    found = written(checkpoint, columns(checkpoint, edit), set(texts) if texts else None, TOKENS)

    def named(pairs: list) -> list[dict]:
        return [{"id": index, "text": texts[index] if texts else None, "z": z} for index, z in pairs]

    return found and {neuron: {"raised": named(up), "lowered": named(down)} for neuron, (up, down) in found.items()}


def _neurons(edit: Edit, measured: Measured | None, tokens: dict[Neuron, dict] | None) -> list[dict]:
    unknown = {"dimensions": {}, "controls": None, "selected_by_controls": None, "questions": []}
    return [
        {"layer": layer, "neuron": neuron, "factor": factor}
        | (measured.neurons[layer, neuron] if measured else unknown)
        | {"tokens": tokens[layer, neuron] if tokens else None}
        for layer, neurons in edit.factors.items()
        for neuron, factor in neurons.items()
    ]
