"""The manifest: what a directory that this tool wrote says of itself, kbne_edit.json."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from ..edit import Edit
from ..errors import CheckpointError, EditError
from ..files import json_text, read_json
from .checkpoint import DELTA, INDEX, MANIFEST

# The edit in another form than a checkpoint: {the manifest's "form": the files that hold it}.
FORMS = {"peft": {"adapter_config.json", "adapter_model.safetensors"}, "delta": {DELTA}}


def write_manifest(directory: Path, manifest: dict) -> None:
    """Write the manifest with its own SHA-256, so that what no file can be compared with is covered as well."""
    text = json_text({**manifest, "sha256": _seal(manifest)})
    (directory / MANIFEST).write_text(text, encoding="utf-8")


def _seal(manifest: dict) -> str:
    """SHA-256 of the manifest's text, the seal left out."""
    return hashlib.sha256(json_text({k: v for k, v in manifest.items() if k != "sha256"}).encode()).hexdigest()


def is_sealed(directory: str | Path, manifest: dict) -> bool:
    """False if the manifest's file is not to the byte what `write_manifest` wrote."""
    written = (Path(directory) / MANIFEST).read_bytes()
    return manifest["sha256"] == _seal(manifest) and written == json_text(manifest).encode()


def read_manifest(directory: str | Path) -> dict | None:
    """The manifest of a directory that kbne-edit wrote, or None. Raises CheckpointError if it is damaged."""
    path = Path(directory) / MANIFEST
    if not path.is_file():
        return None
    manifest = read_json(path)
    try:
        Edit.from_dict(manifest["edit"], str(path))
        entries, old = manifest["files"].values(), manifest.get("resharded", {})
        hashes = [h for entry in entries for h in (entry["out"], *([] if entry["in"] is None else [entry["in"]]))]
        texts = [*hashes, manifest["sha256"]]
        if "form" not in manifest:
            texts += [*manifest["tensors"], *manifest["left_out"], manifest["undo"]]
        else:
            texts += [manifest["source"]["id"], manifest["source"]["commit"] or ""]
            if set(manifest["files"]) - {"README.md"} != FORMS[manifest["form"]]:
                raise TypeError
        texts += [text for entry in old.values() for text in (entry["in"], *entry["into"])]
        if manifest["kbne_manifest"] != 1 or not all(isinstance(text, str) for text in texts):
            raise TypeError
        if not all(re.fullmatch(r"\w[\w.-]*", entry.get("base", "as_here")) for entry in entries):
            raise TypeError
        if not all(re.fullmatch(rf"[^/\0]+\.safetensors|{re.escape(INDEX)}", name) for name in old):
            raise TypeError
    except (KeyError, TypeError, AttributeError, EditError):
        raise CheckpointError(f"{path} is damaged: it is no manifest that kbne-edit wrote") from None
    return manifest


def base_names(manifest: dict | None, names: Iterable[str]) -> dict[str, str | None]:
    """{file of a baked directory: its name in the base}; None for one that the base does not have, such as the card.

    The manifest's entry of a file says so: "base" if its name was another, "in" null if it was made while baking.
    .gitattributes, which the Hub adds to whatever it holds, is left out unless the manifest knows it.
    """
    known = manifest["files"] if manifest else {}
    names = [name for name in names if name in known or not (manifest and name == ".gitattributes")]
    entries = {name: known.get(name, {}) for name in names}
    return {name: None if entry.get("in", "") is None else entry.get("base", name) for name, entry in entries.items()}
