"""A report on an edit that was written to disk: a checkpoint, an adapter or a delta.

It is made from the directory itself (manifest, undo file, unembedding) and, if present, from the scores file of its run
and the sweep that chose its edit. Missing data are None, never guessed. It holds no time and no path, so the same files
give the same report.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .. import __version__
from ..attribution.answers import AttributionSummary
from ..attribution.scores import load_scores
from ..disk.checkpoint import Checkpoint
from ..disk.hashing import file_hash
from ..disk.manifest import Manifest
from ..disk.names import MANIFEST
from ..edit import Edit
from ..errors import CheckpointError, ScoresError
from ..files import work_folder
from ..folding.columns import undo_path
from ..proofs.record import check_hashes, recorded_hashes, recorded_proofs
from ..tuning.tune import RESULT
from .card import card_fault
from .lens import Neuron, columns, vocabulary, written
from .record import Measured
from .scored import Scored, scored
from .swept import sweep_of
from .types import (
    Bin,
    Change,
    FileRow,
    Hashes,
    LayerRow,
    Model,
    NeuronRow,
    Provenance,
    Report,
    ReshardedRow,
    Token,
    Tokens,
)

TOKENS = 6  # shown per neuron at either end
MANY, BINS = 8, 20  # with more distinct factors, show a histogram with so many bins
MOST = 500  # neurons with a row in the report: a fitted edit may have factors for all neurons


def report(
    edited: str | Path,
    scores: str | Path | None = None,
    tuning: str | Path | None = None,
    *,
    hashes: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """The report on a directory that kbne-edit wrote. No model is loaded.

    scores: the scores file of the run (None: EDITED.work/scores.safetensors, where it is there and was made for this
    base). tuning: the tune.json of the edit (None: EDITED.work/tune.json, where it chose this one).
    hashes: compare the SHA-256 of every file with the one on record. say: called with lines for the user.
    Raises CheckpointError for a directory that kbne-edit did not write or that was changed since,
    ScoresError for given scores that do not belong to it, InputError for such a tune.json.
    """
    path = Path(os.path.abspath(edited))
    manifest = _manifest(path)
    checkpoint = Checkpoint.open(path) if manifest.is_checkpoint else None
    edit, work = manifest.edit, work_folder(path)
    sizes = checkpoint.layer_sizes(edit.site) if checkpoint else None
    if sizes:
        edit.check(sizes)
    recorded = _recorded(path, manifest)
    checked = _checked(path, manifest, hashes)
    file = Path(scores) if scores else work / "scores.safetensors"
    attribution = _scores(file, bool(scores), edit, sizes, say)
    further = {key: manifest.summary[key] for key in recorded.further} if manifest.summary else {}
    if not attribution and recorded.selection:
        further["selection"] = recorded.selection.to_dict()
    controls = recorded.selection.controls_overlap if recorded.selection else None
    rows = _rows(edit, attribution.scored.neurons if attribution else {})
    proofs = recorded_proofs(path, manifest)
    return Report(
        tool=f"kbne-edit {__version__}",
        form=manifest.form,
        model=_model(checkpoint, manifest, sizes),
        edit=_change(edit, sizes),
        selection=attribution.scored.selection if attribution else None,
        neurons=_with_tokens(rows, _tokens(checkpoint, edit, rows) if checkpoint else None),
        map=attribution.scored.map if attribution else None,
        overlap=attribution.scored.overlap if attribution else None,
        answers=_answers(path, manifest) or (attribution.answers if attribution else None),
        proofs=proofs,
        effect=recorded.effect,
        cost=recorded.cost,
        measures=recorded.measures,
        evaluations=recorded.evaluations,
        verdict=recorded.verdict,
        tuning=sweep_of(Path(tuning) if tuning else work / RESULT, bool(tuning), edit, say),
        controls_overlap=attribution.scored.controls_overlap if attribution else controls,
        further=further,
        provenance=_provenance(path, manifest, file_hash(file) if attribution else None),
        hashes=checked,
    )


def _manifest(path: Path) -> Manifest:
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist, or is not a directory")
    manifest = Manifest.read(path)
    if manifest is None:
        raise CheckpointError(f"{path} has no {MANIFEST}: a report is made on a directory that kbne-edit wrote")
    if not manifest.sealed:
        raise CheckpointError(f"{path / MANIFEST} was changed after baking: its figures are not those of the run")
    return manifest


def _recorded(path: Path, manifest: Manifest) -> Measured:
    try:
        return Measured.of(manifest.summary)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{path / MANIFEST} has figures that kbne-edit did not write") from None


def _answers(path: Path, manifest: Manifest) -> AttributionSummary | None:
    record = (manifest.summary or {}).get("attribution")
    return AttributionSummary.from_dict(record, str(path / MANIFEST)) if record else None


def _checked(path: Path, manifest: Manifest, hashes: bool) -> Hashes:
    """Compare the files with the manifest; always the undo file, since columns are read from it."""
    if hashes:
        if faults := check_hashes(path, manifest):
            raise CheckpointError(f"{path}/{faults[0]}: a report is made on a directory as it was baked")
        if fault := card_fault(path, manifest):
            raise CheckpointError(f"{path}: {fault}")
        return Hashes(True, len(recorded_hashes(path, manifest)))
    undo = undo_path(path)
    if manifest.is_checkpoint and (not undo.is_file() or file_hash(undo) != manifest.undo):
        raise CheckpointError(f"{undo} is missing or was changed after baking: the columns are not the base's")
    return Hashes(False)


@dataclass(frozen=True)
class _Found:
    scored: Scored
    answers: AttributionSummary


def _scores(
    file: Path, given: bool, edit: Edit, sizes: Sequence[int] | None, say: Callable[[str], None]
) -> _Found | None:
    """The scores, if they belong to the edit. Other scores are an error if they were given, else they are left out."""
    try:
        if not given and not file.exists():
            return None
        scores = load_scores(file)
        shape = scores.values.shape[1:]
        fits = (len(sizes), max(sizes)) == shape if sizes else max(edit.factors) < shape[0]
        if (scores.base, scores.site) != (edit.base, edit.site) or not fits:
            raise ScoresError(f"{file} was made for another model or site than the edit: pass the --scores of its run")
        return _Found(scored(scores, edit), AttributionSummary.of(scores))
    except ScoresError as error:
        if given:
            raise
        say(f"scores left out: {error}")
        return None


# ------------------------------------------------------------------------------------------------- from the manifest


def _model(checkpoint: Checkpoint | None, manifest: Manifest, sizes: Sequence[int] | None) -> Model:
    source = manifest.source
    about = Model(source.id if source else None, source.commit if source else None, manifest.edit.base)
    if checkpoint is None or sizes is None:
        return about
    kind = checkpoint.config["model_type"]
    return replace(about, architecture=kind, layers=len(sizes), neurons=sum(sizes), neurons_of_a_layer=max(sizes))


def _change(edit: Edit, sizes: Sequence[int] | None) -> Change:
    return Change(
        site=edit.site,
        neurons=edit.num_neurons,
        share=edit.num_neurons / sum(sizes) if sizes else None,
        factors=tuple(edit.distinct_factors),
        exact=edit.exact,
        layers=tuple(LayerRow(layer, len(factors)) for layer, factors in edit.factors.items()),
        found=edit.found,
        histogram=_histogram(edit),
    )


def _histogram(edit: Edit) -> tuple[Bin, ...]:
    if len(edit.distinct_factors) <= MANY:
        return ()
    counts, ends = np.histogram([f for factors in edit.factors.values() for f in factors.values()], BINS)
    return tuple(Bin(float(a), float(b), int(n)) for a, b, n in zip(ends, ends[1:], counts, strict=False))


def _provenance(path: Path, manifest: Manifest, scores: str | None) -> Provenance:
    return Provenance(
        baked_with=manifest.tool,
        recipe=manifest.recipe,
        manifest_sha256=file_hash(path / MANIFEST),
        undo_sha256=manifest.undo or None,
        files=tuple(
            FileRow(name, file.after, file.before, file.base_name) for name, file in sorted(manifest.files.items())
        ),
        resharded=tuple(ReshardedRow(name, old.before, old.into) for name, old in sorted(manifest.resharded.items())),
        edited_tensors=manifest.tensors,
        left_out=manifest.left_out,
        scores_sha256=scores,
    )


# ------------------------------------------------------------------------------------------------- the edited neurons


def _rows(edit: Edit, known: dict[Neuron, NeuronRow]) -> tuple[NeuronRow, ...]:
    """All edited neurons; of very many, those with the factors furthest from 1."""
    places = [(la, n, factor) for la, factors in edit.factors.items() for n, factor in factors.items()]
    if len(places) > MOST:
        places = sorted(sorted(places, key=_distance, reverse=True)[:MOST])
    return tuple(known.get((la, n)) or NeuronRow(la, n, factor) for la, n, factor in places)


def _distance(place: tuple[int, int, float]) -> float:
    return abs(place[2] - 1)


def _tokens(checkpoint: Checkpoint, edit: Edit, rows: Sequence[NeuronRow]) -> dict[Neuron, Tokens] | None:
    texts, kept = vocabulary(checkpoint.path), columns(checkpoint, edit)
    shown = {place: kept[place] for row in rows if (place := (row.layer, row.neuron)) in kept}
    tokens = written(checkpoint, shown, set(texts) if texts else None, TOKENS)

    def named(pairs: list[tuple[int, float]]) -> tuple[Token, ...]:
        return tuple(Token(index, texts[index] if texts else None, z) for index, z in pairs)

    return {neuron: Tokens(named(up), named(down)) for neuron, (up, down) in tokens.items()} if tokens else None


def _with_tokens(rows: Sequence[NeuronRow], tokens: dict[Neuron, Tokens] | None) -> tuple[NeuronRow, ...]:
    return tuple(replace(row, tokens=tokens[row.layer, row.neuron]) if tokens else row for row in rows)
