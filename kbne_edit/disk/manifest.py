"""The manifest, kbne_edit.json: what kbne-edit records about a directory that it wrote.

It ends with the SHA-256 of its own text. That is a checksum against damage, which anybody can recompute. It proves
nothing: to rely on a directory, compare it with its base (`verify`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..edit import Edit
from ..errors import CheckpointError, EditError
from ..files import json_text, read_json
from .names import CARD, DELTA, INDEX, MANIFEST, OLD_DELTA

VERSION = 1
TOOL = f"kbne-edit {__version__}"
# Forms of an edit other than a checkpoint: {the manifest's "form": the sets of files that hold it, now or earlier}.
FORMS = {"peft": ({"adapter_config.json", "adapter_model.safetensors"},), "delta": ({DELTA}, {OLD_DELTA})}


@dataclass(frozen=True)
class Origin:
    """Where a base comes from. id: on the Hub, or a folder's name; commit: on the Hub, None for a local directory."""

    id: str
    commit: str | None = None

    def __str__(self) -> str:
        return f"{self.id}@{self.commit}" if self.commit else self.id

    def to_dict(self) -> dict[str, Any]:
        return {"id": self.id, "commit": self.commit}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Origin:
        """Raises TypeError, KeyError."""
        if set(data) != {"id", "commit"}:
            raise TypeError
        return cls(_text(data["id"]), None if data["commit"] is None else _text(data["commit"]))


@dataclass(frozen=True)
class FileRecord:
    """SHA-256 of one file. before: in the base, None for a file that the base does not have; after: as written.

    base_name: its name in the base, if that differs.
    """

    before: str | None
    after: str
    base_name: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"in": self.before, "out": self.after} | ({"base": self.base_name} if self.base_name else {})

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FileRecord:
        """Raises TypeError, KeyError."""
        name = data.get("base")
        if name is not None and not re.fullmatch(r"\w[\w.-]*", name):
            raise TypeError
        if set(data) - {"in", "out", "base"}:
            raise TypeError
        return cls(None if data["in"] is None else _text(data["in"]), _text(data["out"]), name)


@dataclass(frozen=True)
class OldShard:
    """A file of the base that was resharded. before: its SHA-256; into: the files that hold its tensors now."""

    before: str
    into: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"in": self.before, "into": list(self.into)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> OldShard:
        """Raises TypeError, KeyError."""
        if set(data) != {"in", "into"}:
            raise TypeError
        return cls(_text(data["in"]), _texts(data["into"]))


@dataclass(frozen=True)
class RecipeRecord:
    """The recipe of a run, by name and SHA-256 of its text."""

    name: str
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": self.sha256}


@dataclass(frozen=True)
class Manifest:
    """What was written: the edit, every file with its hashes, and what the run recorded.

    form: "checkpoint", "peft" or "delta". tensors: names of those that changed; undo: SHA-256 of the undo file;
    left_out: weight files of the base in other formats; resharded: {file of the base: its `OldShard`}, {} if the
    files are the base's. recipe, proofs, summary: as recorded by the run; None if it had none.
    sealed: False if the file is not byte for byte what `write` wrote.
    """

    edit: Edit
    files: dict[str, FileRecord]
    tool: str = TOOL
    form: str = "checkpoint"
    tensors: tuple[str, ...] = ()
    undo: str = ""
    left_out: tuple[str, ...] = ()
    resharded: dict[str, OldShard] = field(default_factory=dict)
    source: Origin | None = None
    recipe: RecipeRecord | None = None
    proofs: Mapping[str, Any] | None = None
    summary: dict[str, Any] | None = None
    sealed: bool = field(default=True, compare=False)

    def __repr__(self) -> str:
        return f"Manifest({self.form}, {self.edit.num_neurons} neurons, {len(self.files)} files)"

    @property
    def is_checkpoint(self) -> bool:
        return self.form == "checkpoint"

    def with_file(self, name: str, record: FileRecord) -> Manifest:
        """A copy with one more file."""
        return replace(self, files=dict(sorted((self.files | {name: record}).items())))

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without the seal."""
        data: dict[str, Any] = {"kbne_manifest": VERSION, "tool": self.tool}
        if not self.is_checkpoint:
            data["form"] = self.form
        data["edit"] = self.edit.to_dict()
        files = {name: record.to_dict() for name, record in self.files.items()}
        if self.is_checkpoint:
            data |= {"tensors": list(self.tensors), "files": files, "undo": self.undo, "left_out": list(self.left_out)}
        else:
            data["files"] = files
        if self.resharded:
            data["resharded"] = {name: old.to_dict() for name, old in self.resharded.items()}
        if self.source:
            data["source"] = self.source.to_dict()
        if self.recipe:
            data["recipe"] = self.recipe.to_dict()
        if self.proofs is not None:
            data["proofs"] = self.proofs
        if self.summary is not None:
            data["summary"] = self.summary
        return data

    @classmethod
    def from_dict(cls, data: Any, where: str = MANIFEST) -> Manifest:
        """Inverse of `to_dict`, for data with the seal or without. Raises CheckpointError that names `where`."""
        try:
            return cls._parsed(data, where)
        except (KeyError, TypeError, AttributeError, ValueError, EditError):
            raise CheckpointError(f"{where} is damaged: kbne-edit did not write it") from None

    @classmethod
    def _parsed(cls, data: dict[str, Any], where: str) -> Manifest:
        if type(data["kbne_manifest"]) is not int or data["kbne_manifest"] != VERSION or set(data) - _KEYS:
            raise TypeError
        form = data.get("form", "checkpoint")
        files = {name: FileRecord.from_dict(entry) for name, entry in data["files"].items()}
        if "form" in data and set(files) - {CARD} not in FORMS[form]:
            raise TypeError
        whole = "form" not in data
        old = data.get("resharded", {})
        if not all(re.fullmatch(rf"[^/\0]+\.safetensors|{re.escape(INDEX)}", name) for name in old):
            raise TypeError
        source = data["source"] if form != "checkpoint" else data.get("source")
        return cls(
            edit=Edit.from_dict(data["edit"], where),
            files=files,
            tool=_text(data["tool"]),
            form=form,
            tensors=_texts(data["tensors"]) if whole else (),
            undo=_text(data["undo"]) if whole else "",
            left_out=_texts(data["left_out"]) if whole else (),
            resharded={name: OldShard.from_dict(entry) for name, entry in old.items()},
            source=Origin.from_dict(source) if source is not None else None,
            recipe=_recipe(data.get("recipe")),
            proofs=_object(data.get("proofs")),
            summary=_object(data.get("summary")),
        )

    def record_sha256(self) -> str:
        """SHA-256 of the record without the card. The card quotes it, which ties the two together."""
        data = self.to_dict()
        data["files"] = {name: entry for name, entry in data["files"].items() if name != CARD}
        return _seal(data)

    def write(self, directory: Path) -> None:
        """Write the manifest into a directory, with the SHA-256 of its own text."""
        data = self.to_dict()
        (directory / MANIFEST).write_text(json_text({**data, "sha256": _seal(data)}), encoding="utf-8")

    def fold_sha256(self) -> str:
        """SHA-256 of the tool, the edit and the files left out. The undo file quotes it."""
        return _seal({"tool": self.tool, "edit": self.edit.to_dict(), "left_out": list(self.left_out)})

    def as_read(self) -> Manifest:
        """The manifest after writing and reading: JSON has no tuples, and no numbers as keys."""
        return Manifest.from_dict(json.loads(json_text(self.to_dict())))

    @classmethod
    def read(cls, directory: str | Path) -> Manifest | None:
        """The manifest of a directory, None if there is none. Raises CheckpointError."""
        path = Path(directory) / MANIFEST
        if not path.is_file():
            return None
        data = read_json(path)
        manifest = cls.from_dict(data, str(path))
        if not isinstance(data.get("sha256"), str):
            raise CheckpointError(f"{path} is damaged: kbne-edit did not write it")
        sealed = data["sha256"] == _seal(data) and path.read_bytes() == json_text(data).encode()
        return replace(manifest, sealed=sealed)

    def base_names(self, names: Iterable[str]) -> dict[str, str | None]:
        """{file of the directory: its name in the base}; None for one that the base does not have, such as the card.

        .gitattributes, which the Hub adds to every repository, is left out unless the manifest lists it.
        """
        result = {}
        for name in names:
            record = self.files.get(name)
            if record is not None:
                result[name] = None if record.before is None else record.base_name or name
            elif name != ".gitattributes":
                result[name] = name
        return result


_KEYS = {
    *("kbne_manifest", "tool", "form", "edit", "tensors", "files", "undo", "left_out", "resharded"),
    *("source", "recipe", "proofs", "summary", "sha256"),
}


def _seal(data: dict[str, Any]) -> str:
    """SHA-256 of the manifest's text, the seal left out."""
    return hashlib.sha256(json_text({k: v for k, v in data.items() if k != "sha256"}).encode()).hexdigest()


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _texts(values: object) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise TypeError
    return tuple(_text(value) for value in values)


def _object(value: object) -> dict[str, Any] | None:
    if value is not None and not isinstance(value, dict):
        raise TypeError
    return value


def _recipe(data: Any) -> RecipeRecord | None:
    if data is not None and set(data) != {"name", "sha256"}:
        raise TypeError
    return None if data is None else RecipeRecord(_text(data["name"]), _text(data["sha256"]))
