"""What the two proofs found."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from ..edit import Edit

EditFrom = Literal["manifest", "given", "recovered from the weights"]


@dataclass(frozen=True)
class FileProof:
    """The first proof: the file is the edit.

    edit: whose products the weights are compared with; edit_from: where it comes from. tensors: how many were compared;
    edited: how many of them are products; files: how many files were compared. faults: of weights, then of the files
    beside them, empty if the proof holds; notes: differences that no loader of the model sees.
    """

    edit: Edit
    edit_from: EditFrom
    tensors: int = 0
    edited: int = 0
    files: int = 0
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"FileProof({'holds' if self.holds else f'{len(self.faults)} faults'}, {self.tensors} tensors)"

    @property
    def holds(self) -> bool:
        return not self.faults

    def with_fault(self, fault: str) -> FileProof:
        """The same, with one more fault."""
        return replace(self, faults=(*self.faults, fault))


@dataclass(frozen=True)
class BehaviourProof:
    """The second proof in one dtype: the model behaves as the base with run-time hooks.

    how: "whole model" or "site by site". difference: the largest of logits, noise: that rounding alone makes, both
    relative to the logits' standard deviation. kl: nats per position; top1: share of positions with the same top token;
    greedy: share of texts continued alike; rerouted: share of positions left out because rounding turned a router's
    choice. None where not measured.
    """

    dtype: str
    how: str
    holds: bool
    bit_equal: bool
    difference: float
    noise: float
    positions: int
    kl: float | None = None
    top1: float | None = None
    greedy: float | None = None
    rerouted: float | None = None

    def to_dict(self) -> dict[str, Any]:
        data = {
            "dtype": self.dtype,
            "how": self.how,
            "bit_equal": self.bit_equal,
            "difference": self.difference,
            "noise": self.noise,
            "positions": self.positions,
            "ok": self.holds,
        }
        optional = {key: getattr(self, key) for key in _OPTIONAL}
        return data | {key: value for key, value in optional.items() if value is not None}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BehaviourProof:
        """Raises KeyError, TypeError, ValueError."""
        return cls(
            dtype=str(data["dtype"]),
            how=str(data["how"]),
            holds=_flag(data["ok"]),
            bit_equal=_flag(data["bit_equal"]),
            difference=float(data["difference"]),
            noise=float(data["noise"]),
            positions=int(data["positions"]),
            **{key: float(data[key]) for key in _OPTIONAL if data.get(key) is not None},
        )


_OPTIONAL = ("kl", "top1", "greedy", "rerouted")


@dataclass(frozen=True)
class Proofs:
    """Both proofs. behaviour: one entry per dtype, None if the second proof was not asked for."""

    files: FileProof
    behaviour: tuple[BehaviourProof, ...] | None = None

    @property
    def ok(self) -> bool:
        """True if whatever was put to the proof holds."""
        return self.files.holds and all(entry.holds for entry in self.behaviour or ())

    @property
    def edit(self) -> Edit:
        return self.files.edit

    @property
    def faults(self) -> tuple[str, ...]:
        """Of the first proof."""
        return self.files.faults

    @property
    def both_held(self) -> bool:
        """True if both were put to the proof, and hold."""
        return self.ok and bool(self.behaviour)

    @property
    def fault(self) -> str:
        """The first fault in words; "" if there is none."""
        if self.files.faults:
            return self.files.faults[0]
        return "" if self.ok else "behaviour differs"

    @property
    def failed(self) -> str:
        """Which proof failed: "first", "second", or ""."""
        if self.ok:
            return ""
        return "second" if self.files.holds else "first"

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as the manifest records it."""
        files, edit = self.files, self.files.edit
        return {
            "edit": {"site": edit.site, "neurons": edit.num_neurons, "factors": edit.distinct_factors},
            "source": files.edit_from,
            "tensors": files.tensors,
            "edited": files.edited,
            "files": files.files,
            "faults": list(files.faults),
            "notes": list(files.notes),
            "behaviour": None if self.behaviour is None else [entry.to_dict() for entry in self.behaviour],
            "ok": self.ok,
            "file_proof": files.holds,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any], edit: Edit) -> Proofs:
        """Proofs on record. edit: the one that the same record has. Raises KeyError, TypeError, ValueError."""
        behaviour = data["behaviour"]
        faults = tuple(str(fault) for fault in data["faults"])
        if not _flag(data["file_proof"]) and not faults:
            faults = ("the first proof failed, by the record",)
        files = FileProof(
            edit=edit,
            edit_from=data["source"],
            tensors=int(data["tensors"]),
            edited=int(data["edited"]),
            files=int(data["files"]),
            faults=faults,
            notes=tuple(str(note) for note in data.get("notes", ())),
        )
        if _flag(data["file_proof"]) != files.holds:
            raise ValueError("file_proof")
        return cls(files, None if behaviour is None else tuple(BehaviourProof.from_dict(entry) for entry in behaviour))


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value
