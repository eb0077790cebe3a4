"""What an evaluation found, written into the directory that it is about: manifest and card, and so the report."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

from .disk.manifest import Manifest, RecipeRecord
from .disk.names import CARD, MANIFEST
from .disk.publishing import is_fixed, staged
from .errors import InputError, one_line
from .evaluation.evaluate import Evaluation
from .evaluation.onrecord import kept_evaluations
from .hub.licences import base_metadata, metadata_in
from .hub.source import resolved
from .progress import say
from .proofs.record import unknown_files
from .recipe import load_recipe
from .reporting.card import add_card, card_fault


def check_recordable(directory: str | Path) -> Manifest:
    """The manifest of a directory that can take an evaluation. Raises InputError: asked before work that takes long."""
    path = Path(directory)
    manifest = Manifest.read(path) if path.is_dir() else None
    if manifest is None:
        raise InputError(f"{path} has no {MANIFEST}: an evaluation is kept in a directory that kbne-edit wrote")
    if not manifest.sealed:
        raise InputError(f"{path / MANIFEST} was changed after baking: bake again, and evaluate the result")
    if fault := card_fault(path, manifest):
        raise InputError(f"{path}: {fault}: bake again, and evaluate the result")
    if strange := unknown_files(path, manifest):
        raise InputError(f"{path} holds {one_line(strange[0])}, which is not part of it: move it away")
    if is_fixed(path):
        raise InputError(f"{path} is a mount point or the working directory: run the command elsewhere, or --no-record")
    if not os.access(path, os.W_OK) or not os.access(path.absolute().parent, os.W_OK):
        raise InputError(f"{path} cannot be written to: pass --no-record, or evaluate a copy")
    return manifest


def record_evaluation(
    directory: str | Path, evaluation: Evaluation, source: str | Path, recipe: str | Path | None = None
) -> Manifest:
    """Put an evaluation of an edit into the manifest and the card of a directory with this edit. Returns the manifest.

    The verdict becomes the evaluation's. Effect, cost and measures are replaced where the evaluation measured them; the
    benchmarks of earlier evaluations stay. The same evaluation is kept once.
    source: the base; recipe: that the evaluation was given, None for one of the package. The weights are linked, not
    copied: the directory appears whole, or stays as it was. Raises InputError for another edit, OutputError.
    """
    path, kept = Path(directory), evaluation.kept()
    manifest = check_recordable(path)
    if kept is None or evaluation.edit is None:
        raise InputError(f"{path}: nothing to keep: the base alone was evaluated")
    if manifest.edit.sha256 != evaluation.edit.sha256:
        raise InputError(f"{path} holds another edit than the one that was evaluated: give its own edit")
    summary = dict(manifest.summary or {})
    earlier = [one for one in kept_evaluations(summary) if one != kept]
    summary |= {**evaluation.impact.to_dict(), "verdict": kept.verdict.to_dict()}
    summary["evaluations"] = [one.to_dict() for one in (*earlier, kept)]
    measured = evaluation.impact.effect or evaluation.impact.cost
    about = _recipe(recipe or evaluation.recipe) if measured else manifest.recipe
    manifest = replace(manifest, summary=summary, recipe=about)
    metadata = _metadata(path, manifest, str(source))
    with staged(path, overwrite=True) as part:
        _link(path, part)
        if manifest.files.get(CARD) and manifest.files[CARD].before is None:
            manifest = replace(manifest, files={name: file for name, file in manifest.files.items() if name != CARD})
            manifest = add_card(part, manifest, metadata)
        elif CARD in manifest.files:  # the base's own: fold() adds none
            os.link(path / CARD, part / CARD)
        manifest.write(part)
    return manifest


def _recipe(source: str | Path) -> RecipeRecord:
    recipe = load_recipe(source)
    return RecipeRecord(recipe.name, recipe.sha256)


def _link(path: Path, part: Path) -> None:
    """All but card and manifest. A file system without links gets copies."""
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        if file.is_dir():
            (part / relative).mkdir(parents=True, exist_ok=True)
        elif relative.as_posix() not in (CARD, MANIFEST):
            (part / relative).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, part / relative, follow_symlinks=False)
            except OSError:
                shutil.copy2(file, part / relative, follow_symlinks=False)


def _metadata(path: Path, manifest: Manifest, source: str) -> dict:
    """Of the base's card: from the copy that a checkpoint keeps, else from the base."""
    for name, record in manifest.files.items():
        if record.base_name == CARD:
            return base_metadata((path / name).read_text(encoding="utf-8-sig", errors="replace"))
    if manifest.is_checkpoint:
        return {}
    with resolved(source, say) as base:
        return metadata_in(base.path)
