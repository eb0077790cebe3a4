"""The edit: "multiply these neurons by these factors in this model". The stages exchange nothing else."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .errors import EditError, one_line, shown
from .families import SITES, Site
from .files import read_json, write_json

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import nn

VERSION = 1


@dataclass(frozen=True)
class Edit:
    """Factors of feed-forward neurons.

    site: "down" scales h_i, the input of the down-projection; "gate" scales gate_i, before the activation; "up"
        scales up_i.
    factors: {layer: {neuron: factor}}, neurons counted from 0 within their layer.
    base: fingerprint of the checkpoint it was made for (`Checkpoint.fingerprint()`); None fits every model that has
        these layers and neurons.
    found: how it was located (recipe, thresholds, counts): free-form JSON.

    Raises EditError on construction if the values are not of this form.
    """

    site: Site
    factors: dict[int, dict[int, float]]
    base: str | None = None
    found: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise EditError(f"edit: site is {shown(self.site)}; it must be one of {', '.join(SITES)}")
        try:
            json.dumps(self.found, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise EditError("edit: found must be plain JSON") from None
        clean: dict[int, dict[int, float]] = {}
        for layer, neurons in sorted(self.factors.items()):
            clean[_index(layer, "layer")] = {
                _index(neuron, f"neuron of layer {layer}"): _factor(value, layer, neuron)
                for neuron, value in sorted(neurons.items())
            }
        object.__setattr__(self, "factors", {layer: neurons for layer, neurons in clean.items() if neurons})

    @property
    def num_neurons(self) -> int:
        return sum(map(len, self.factors.values()))

    @property
    def distinct_factors(self) -> list[float]:
        return sorted({f for neurons in self.factors.values() for f in neurons.values()})

    @property
    def exact(self) -> bool:
        """True if every factor is a power of two: then fold and hooks agree bit for bit (docs/method.md, section 5)."""
        return all(f != 0 and abs(math.frexp(f)[0]) == 0.5 for f in self.distinct_factors)

    @property
    def sha256(self) -> str:
        """Of site and factors only: edits with the same effect have the same hash."""
        return hashlib.sha256(json.dumps([self.site, self.to_dict()["factors"]]).encode()).hexdigest()

    def with_factor(self, factor: float) -> Edit:
        """A copy in which all neurons have one factor."""
        return replace(self, factors={layer: dict.fromkeys(neurons, factor) for layer, neurons in self.factors.items()})

    def without(self, neurons: dict[int, set[int]]) -> Edit:
        """A copy without some neurons, {layer: neurons}."""
        kept = {
            layer: {n: factor for n, factor in factors.items() if n not in neurons.get(layer, ())}
            for layer, factors in self.factors.items()
        }
        return replace(self, factors=kept)

    def made_for(self, base: str) -> Edit:
        """A copy for the checkpoint with this fingerprint."""
        return replace(self, base=base)

    def check(self, neurons: Sequence[int], base: str | None = None) -> None:
        """Raise EditError unless the edit fits a model and changes it. neurons: number in each layer."""
        if all(f == 1 for f in self.distinct_factors):
            what = "no neuron" if not self.factors else "only factors of 1"
            raise EditError(
                f"the edit has {what}, so it would change nothing: lower --tau or --beta, or pass another --factor"
            )
        if base and self.base and base != self.base:
            raise EditError(
                f"the edit was made for another model (fingerprint {self.base[:12]}…, this one is {base[:12]}…): "
                'locate again on this model, or remove "base" from the edit if you mean it'
            )
        for layer, factors in self.factors.items():
            if layer >= len(neurons):
                raise EditError(
                    f"the edit names layer {layer}; the model has {len(neurons)} layers (0 to {len(neurons) - 1})"
                )
            if max(factors) >= neurons[layer]:
                raise EditError(
                    f"the edit names neuron {max(factors)} of layer {layer}, which has {neurons[layer]} neurons "
                    f"(0 to {neurons[layer] - 1})"
                )

    def hooks(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """A context in which a causal model of transformers computes with the edit.

        As the function `hooked`. Raises EditError if the edit does not fit the model.
        """
        from .models.hooks import hooked

        return hooked(model, self)

    def apply_(self, model: nn.Module) -> nn.Module:
        """Scale the weights of a model in memory, in place, and return it. Raises EditError as `hooks` does."""
        from .models.hooks import apply_

        return apply_(model, self)

    def to_dict(self) -> dict[str, Any]:
        """JSON form. Keys are strings; numbers read back to the same value."""
        factors = {str(layer): {str(n): f for n, f in neurons.items()} for layer, neurons in self.factors.items()}
        return {"kbne_edit": VERSION, "site": self.site, "base": self.base, "found": self.found, "factors": factors}

    @classmethod
    def from_dict(cls, data: object, where: str = "edit") -> Edit:
        """Inverse of `to_dict`. Raises EditError that names `where`."""
        if not isinstance(data, dict) or data.get("kbne_edit") != VERSION:
            raise EditError(f'{where}: not an edit of kbne-edit (expected "kbne_edit": {VERSION})')
        if unknown := sorted(set(data) - {"kbne_edit", "site", "base", "found", "factors"}):
            raise EditError(f"{where}: unknown key {one_line(', '.join(unknown)[:80])}")
        base, found, factors = data.get("base"), data.get("found", {}), data.get("factors")
        if not (base is None or isinstance(base, str)) or not isinstance(found, dict):
            raise EditError(f"{where}: base must be a string or null, found an object")
        if not isinstance(factors, dict) or not all(isinstance(n, dict) for n in factors.values()):
            raise EditError(f"{where}: factors must be an object of objects, {{layer: {{neuron: factor}}}}")
        try:
            parsed = {_number(layer): {_number(n): f for n, f in neurons.items()} for layer, neurons in factors.items()}
            return cls(cast(Site, data.get("site")), parsed, base, found)  # checked on construction
        except EditError as error:
            raise EditError(f"{where}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write canonical JSON: the same edit gives the same bytes. Raises OutputError."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read an edit. Raises EditError."""
        data = read_json(path, EditError, "an edit is a file that `kbne-edit bake` or `select` wrote")
        return cls.from_dict(data, str(path))


def _number(key: str) -> int:
    """A layer or a neuron from a key of JSON. Only one spelling: "7" and "07" would be two keys of one neuron."""
    if not (key.isascii() and key.isdecimal() and len(key) < 19 and str(int(key)) == key):
        raise EditError(f"{shown(key)} is not a layer or a neuron: they are whole numbers from 0")
    return int(key)


def _index(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise EditError(f"edit: {what} is {shown(value)}; it must be a whole number, 0 or more")
    return value


def _factor(value: object, layer: int, neuron: int) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 2.0**64:
        raise EditError(f"edit: factor {shown(value)} of neuron {neuron} in layer {layer} is not a usable number")
    return float(value)
