"""An edit as a delta: the edited columns alone, with the hashes of the weights before and after."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from .. import __version__
from ..disk.checkpoint import DELTA, Checkpoint, Shard, read_metadata
from ..edit import Edit
from ..errors import CheckpointError, ProofError, shown
from ..files import parse_json
from .fold import Progress, Target, file_hash, rewrite, stored_columns, write_tensors


def manifest_of(form: str, checkpoint: Checkpoint, edit: Edit, part: Path, source: dict) -> dict:
    """The manifest of an adapter or a delta that was written to `part` and read back. source: as in `write_adapter`."""
    return {
        "kbne_manifest": 1,
        "tool": f"kbne-edit {__version__}",
        "form": form,
        "edit": {**edit.to_dict(), "base": checkpoint.fingerprint()},
        "files": {file.name: {"in": None, "out": file_hash(file)} for file in sorted(part.iterdir())},
        "source": source,
    }


def write_delta(
    checkpoint: Checkpoint, edit: Edit, targets: dict[str, Target], part: Path, source: dict, progress: Progress
) -> None:
    """The edited columns alone, as a safetensors file in the folder `part`: {tensor name: [D, k], [k, D] or [k]}.

    Its metadata hold the edit, the base's fingerprint, and SHA-256 of the weights' files before and after, which are
    computed twice: from the products, and with the columns of the delta put in. Raises ProofError if they differ.
    """
    files, undo = fold_hashes(checkpoint, targets, progress)
    columns = {}
    for name, parts in undo.items():
        tensor = checkpoint.tensors[name][1]
        columns[name] = (tensor.dtype, targets[name].product(np.concatenate(parts), slice(None), tensor))
    about = {
        "kbne_delta": 1,
        "edit": {**edit.to_dict(), "base": checkpoint.fingerprint()},
        "files": files,
        "source": source,
    }
    write_tensors(part / DELTA, columns, {"kbne": json.dumps(about)})
    found = stored_columns(part / DELTA, targets, checkpoint)
    again, _ = fold_hashes(checkpoint, {n: replace(t, values=found[n]) for n, t in targets.items()}, progress)
    if again != files:
        raise ProofError("the delta that was written does not give the folded weights: nothing was published")


def fold_hashes(checkpoint: Checkpoint, targets: dict[str, Target], progress: Progress) -> tuple[dict, dict]:
    """({file: SHA-256 in and out}, undo) of a fold that is written nowhere."""
    files, undo = {}, {}
    with ThreadPoolExecutor(2) as pool, open(os.devnull, "wb") as nowhere:
        for shard in checkpoint.shards:
            before, after = rewrite(shard, targets, nowhere, undo, pool, progress)
            files[shard.path.name] = {"in": before, "out": after}
    return files, undo


def read_about(path: Path) -> dict:
    """What a delta says of itself. Raises CheckpointError if it is none."""
    Shard.open(path)
    about = parse_json(read_metadata(path).get("kbne", "null").encode(), str(path), cure="download it again")
    try:
        hashes = [entry[way] for entry in about["files"].values() for way in ("in", "out")]
        texts = [*hashes, about["source"]["id"], about["edit"]["base"]]
        if about["kbne_delta"] != 1 or not all(isinstance(text, str) for text in texts):
            raise TypeError
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} is no delta that kbne-edit wrote, or is damaged: download it again") from None
    return about


def origin_of(about: dict) -> str:
    commit = about["source"].get("commit")
    return shown(about["source"]["id"] + (f"@{commit}" if commit else ""))
