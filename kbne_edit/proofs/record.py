"""Checks the hashes that an output records, and reads the proofs that its run recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..disk.checkpoint import other_files
from ..disk.hashing import file_hash
from ..disk.manifest import Manifest
from ..disk.names import CARD, INDEX, MANIFEST, base_card
from ..errors import CheckpointError, one_line
from ..folding.columns import undo_path
from .outcome import Proofs


def check_hashes(directory: Path, manifest: Manifest, progress: Callable[[int], None] | None = None) -> tuple[str, ...]:
    """Files of an output that its manifest contradicts: changed, missing, or not listed; () if there are none.

    This detects damage and carelessness, not forgery: whoever writes the manifest writes its hashes, too.
    progress: called with the number of bytes hashed since the last call.
    """
    known = recorded_hashes(directory, manifest)
    faults = _unlikely_files(manifest)
    for name, digest in known.items():
        path = directory / name
        if not path.is_file():
            faults.append(f"{one_line(name)} is missing")
            continue
        if file_hash(path) != digest:
            faults.append(f"{one_line(name)} was changed after baking")
        if progress:
            progress(path.stat().st_size)
    faults += [f"{one_line(name)} is not in the manifest" for name in unknown_files(directory, manifest)]
    return tuple(faults)


def _unlikely_files(manifest: Manifest) -> list[str]:
    """Files that the manifest claims a bake made or renamed, and that no bake makes or renames."""
    made = {CARD}
    if manifest.resharded:
        made |= {INDEX, *(name for name in manifest.files if name.endswith(".safetensors"))}
    if not manifest.is_checkpoint:
        made |= manifest.files.keys()
    kept = base_card([name for name, record in manifest.files.items() if record.base_name is None])
    faults = []
    for name, record in manifest.files.items():
        if record.before is None and name not in made:
            faults.append(f"{one_line(name)} is not a file that a bake makes")
        if record.base_name is not None and (name, record.base_name) != (kept, CARD):
            faults.append(f"{one_line(name)} is not a name that a bake gives to {one_line(record.base_name)}")
    return faults


def recorded_hashes(directory: Path, manifest: Manifest) -> dict[str, str]:
    """{file: its recorded SHA-256}, without the manifest itself."""
    known = {name: record.after for name, record in manifest.files.items()}
    if manifest.is_checkpoint:
        known[undo_path(directory).name] = manifest.undo
    return known


def unknown_files(directory: Path, manifest: Manifest) -> list[str]:
    """Files in an output that its manifest does not list."""
    carried, weights = other_files(directory, private=True)
    # The Hub adds .gitattributes to every repository, so it is allowed.
    return sorted({*carried, *weights} - set(recorded_hashes(directory, manifest)) - {".gitattributes"})


def recorded_proofs(directory: Path, manifest: Manifest) -> Proofs | None:
    """The recorded proofs, None if there are none. Raises CheckpointError if they are damaged."""
    try:
        return Proofs.from_dict(manifest.proofs, manifest.edit) if manifest.proofs is not None else None
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{directory / MANIFEST} is damaged (proofs)") from None
