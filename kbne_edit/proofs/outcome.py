"""The results of the two proofs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, NotRequired, TypedDict

from ..edit import Edit
from ..families import Site

EditFrom = Literal["manifest", "given", "recovered from the weights"]


@dataclass(frozen=True)
class FileProof:
    """The first proof: the files hold the edit.

    edit: the edit that was looked for; edit_from: where it comes from. tensors: number of tensors compared; edited:
    number of them that the edit changes; files: number of files compared. faults: of weights, then of other files,
    empty if the proof holds; notes: differences that do not affect a loaded model.
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
        """A copy with one more fault."""
        return replace(self, faults=(*self.faults, fault))


class BehaviourFigures(TypedDict):
    """The second proof in one dtype. difference: largest of the logits, noise: from rounding, both in the logits'
    standard deviations.

    kl: nats per token; top1, greedy, rerouted: shares, 0 to 1. A figure that was not measured is left out.
    """

    dtype: str
    how: str
    bit_equal: bool
    difference: float
    noise: float
    positions: int
    kl: NotRequired[float]
    top1: NotRequired[float]
    greedy: NotRequired[float]
    rerouted: NotRequired[float]


class BehaviourJSON(BehaviourFigures):
    """The figures, and whether the proof holds."""

    ok: bool


@dataclass(frozen=True)
class BehaviourProof:
    """The second proof in one dtype: the model behaves as the base with run-time hooks.

    how: "whole model", then the reader and "layer by layer" if they apply; or "site by site". difference: the largest
    of the logits, noise: the largest from rounding alone, both relative to the logits' standard deviation. kl: nats per
    position; top1: share of positions with the same top token; greedy: share of texts continued alike; rerouted: share
    of positions left out because rounding changed a router's choice. None where not measured.
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

    def to_dict(self) -> BehaviourJSON:
        data: BehaviourJSON = {
            "dtype": self.dtype,
            "how": self.how,
            "bit_equal": self.bit_equal,
            "difference": self.difference,
            "noise": self.noise,
            "positions": self.positions,
            "ok": self.holds,
        }
        for key in _OPTIONAL:
            if (value := getattr(self, key)) is not None:
                data[key] = value
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BehaviourProof:
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


_OPTIONAL: Final = ("kl", "top1", "greedy", "rerouted")


class EditJSON(TypedDict):
    """The edit in short. factors: the distinct ones."""

    site: Site
    neurons: int
    factors: list[float]


def edit_json(edit: Edit) -> EditJSON:
    return {"site": edit.site, "neurons": edit.num_neurons, "factors": edit.distinct_factors}


class ProofsJSON(TypedDict):
    """Both proofs. source: where the edit comes from; tensors, files: number compared; edited: tensors that it changes.

    file_proof: the first proof holds; behaviour: the second one in each dtype, null if it was not run; ok: every proof
    that was run holds.
    """

    edit: EditJSON
    source: EditFrom
    tensors: int
    edited: int
    files: int
    faults: list[str]
    notes: list[str]
    behaviour: list[BehaviourJSON] | None
    ok: bool
    file_proof: bool


@dataclass(frozen=True)
class Proofs:
    """Both proofs. behaviour: one entry per dtype, None if the second proof was not run."""

    files: FileProof
    behaviour: tuple[BehaviourProof, ...] | None = None

    @property
    def ok(self) -> bool:
        """True if every proof that was run holds."""
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
        """True if both proofs were run and hold."""
        return self.ok and bool(self.behaviour)

    @property
    def fault(self) -> str:
        """The first fault; "" if there is none."""
        if self.files.faults:
            return self.files.faults[0]
        return "" if self.ok else "behaviour differs"

    @property
    def failed(self) -> str:
        """Which proof failed: "first", "second", or ""."""
        if self.ok:
            return ""
        return "second" if self.files.holds else "first"

    def to_dict(self) -> ProofsJSON:
        """JSON form, as the manifest records it."""
        files = self.files
        return {
            "edit": edit_json(files.edit),
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
    def from_dict(cls, data: Mapping[str, Any], edit: Edit) -> Proofs:
        """Recorded proofs. edit: of the same record. Raises KeyError, TypeError, ValueError."""
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
