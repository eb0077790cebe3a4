"""An edit as an IA3 adapter of PEFT, and back.

IA3 multiplies the input of a "feedforward module", or the output of any other module, by a vector. A vector of the
factors, with 1 for all other neurons, is an edit at the site `down`, or at `gate` or `up`.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..disk.checkpoint import Checkpoint
from ..disk.dtypes import to_float
from ..disk.manifest import Origin
from ..disk.tensors import Shard, read_array, read_metadata, write_tensors
from ..edit import Edit
from ..errors import EditError, FamilyError, ProofError, shown
from ..families import SITES, Site, family_of, text_part
from ..files import json_text, read_json
from .plan import Plan

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def check_form(form: str, checkpoint: Checkpoint) -> None:
    """Raise FamilyError if edits of this model cannot take this form. Called before long work."""
    if form == "peft" and family_of(checkpoint.config).experts:
        raise FamilyError(
            f"{shown(checkpoint.config['model_type'])} is a mixture of experts: IA3 scales whole modules, and "
            "routed experts are not modules. Save its edits as an edit.json, a checkpoint or a delta"
        )


def load_edit(path: str | Path, checkpoint: Checkpoint) -> Edit:
    """The edit in a file of kbne-edit, or in the folder of an IA3 adapter of PEFT. Raises EditError."""
    return read_adapter(path, checkpoint) if Path(path).is_dir() else Edit.load(path)


class _Vector(NamedTuple):
    """Where an IA3 vector acts. shape: (1, F) scales a module's input, (F, 1) its output, (2 F, 1) packed gate and up.

    start: index of the first neuron's value.
    """

    module: str
    site: Site
    layer: int
    neurons: int
    shape: tuple[int, int]
    start: int

    @property
    def key(self) -> str:
        return f"base_model.model.{self.module}.ia3_l"

    def matches(self, name: str, values: np.ndarray) -> bool:
        """True if the name fits, and only this site's neurons are scaled (gate and up may be packed)."""
        others = np.delete(values.ravel(), np.s_[self.start : self.start + self.neurons])
        return name == self.key and values.shape == self.shape and bool((others == 1).all())


def _vectors(checkpoint: Checkpoint) -> list[_Vector]:
    """The vector of every layer and every site of the family."""
    family = family_of(checkpoint.config)
    result = []
    for site in SITES if family.gate else SITES[:1]:
        for layer, slots in checkpoint.slots(site).items():
            if not slots:
                continue
            slot = slots[0]
            size = slot.neurons if checkpoint.quantised else checkpoint.shapes[slot.tensor][slot.axis]
            shape = (1, size) if site == "down" else (size, 1)
            start = 0 if site == "down" or checkpoint.quantised else slot.start
            result.append(
                _Vector(f"{family.layers}.{layer}.{family.module(site)}", site, layer, slot.neurons, shape, start)
            )
    return result


def write_adapter(checkpoint: Checkpoint, edit: Edit, part: Path, source: Origin) -> None:
    """Write the edit as an IA3 adapter into the folder `part`. source: the base that the adapter names.

    Modules are named in full, so that PEFT touches only those of the edited layers.
    Raises ProofError if reading the adapter does not give the edit.
    """
    used = [v for v in _vectors(checkpoint) if v.site == edit.site and v.layer in edit.factors]
    tensors = {}
    for vector in used:
        values = np.ones(max(vector.shape), np.float32)
        neurons = vector.start + np.array(list(edit.factors[vector.layer]))
        values[neurons] = list(edit.factors[vector.layer].values())
        tensors[vector.key] = ("F32", values.reshape(vector.shape))
    modules = sorted(vector.module for vector in used)
    config = {
        "peft_type": "IA3",
        "task_type": None if text_part(checkpoint.config) else "CAUSAL_LM",
        "base_model_name_or_path": source.id,
        "revision": source.commit,
        "target_modules": modules,
        "feedforward_modules": modules if edit.site == "down" else [],
        "fan_in_fan_out": family_of(checkpoint.config).conv1d,
        "inference_mode": True,
    }
    (part / _CONFIG).write_text(json_text(config), encoding="utf-8")
    write_tensors(part / _WEIGHTS, tensors, {"format": "pt", "kbne_base": checkpoint.fingerprint()})
    stored = read_adapter(part, checkpoint)
    if (stored.site, stored.factors) != (edit.site, _effective(edit.factors)):
        raise ProofError("the adapter that was written does not read back as the edit: nothing was published")


def adapter_fault(folder: Path, plan: Plan) -> str:
    """Why an adapter is not the plan's edit; "" if it is. Raises EditError."""
    stored = read_adapter(folder, plan.checkpoint)
    same = (stored.site, stored.factors) == (plan.edit.site, _effective(plan.edit.factors))
    return "" if same else "the adapter is not the edit that its manifest records"


def _effective(factors: dict[int, dict[int, float]]) -> dict[int, dict[int, float]]:
    """The factors as an adapter stores them: in float32, and without factors of 1."""
    kept = {la: {n: float(np.float32(f)) for n, f in ns.items() if np.float32(f) != 1} for la, ns in factors.items()}
    return {layer: neurons for layer, neurons in kept.items() if neurons}


def read_adapter(folder: str | Path, checkpoint: Checkpoint) -> Edit:
    """The edit in an IA3 adapter. Raises EditError for other adapters, and for modules that an edit cannot scale."""
    folder = Path(folder)
    config = read_json(folder / _CONFIG, EditError, "--edit takes an edit.json, or the folder of an IA3 adapter")
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "IA3":
        raise EditError(
            f"{folder} holds an adapter of type {shown(kind)}: only IA3 scales neurons. Merge it into its base first "
            "(PEFT: merge_and_unload)"
        )
    check_form("peft", checkpoint)
    if not (folder / _WEIGHTS).is_file():
        raise EditError(f"{folder} has no {_WEIGHTS}: save the adapter again with PEFT (safe_serialization)")
    shard, known = Shard.open(folder / _WEIGHTS), _vectors(checkpoint)
    sites: dict[Site, dict[int, dict[int, float]]] = {}
    for tensor in shard.tensors:
        values = to_float(read_array(shard, tensor), tensor.dtype)
        if tensor.name.endswith(".ia3_l") and (values == 1).all():
            continue
        vector = next((vector for vector in known if vector.matches(tensor.name, values)), None)
        if vector is None:
            raise EditError(
                f"{folder} changes {shown(tensor.name)} {list(values.shape)}: an edit scales the input of the "
                "down-projections or the output of the gate or up projections of this model, and nothing else"
            )
        factors = {n - vector.start: float(factor) for n, factor in enumerate(values.ravel()) if factor != 1}
        sites.setdefault(vector.site, {})[vector.layer] = factors
    if len(sites) != 1:
        what = "several sites, and an edit has one" if sites else "nothing"
        raise EditError(f"{folder} scales {what}: train it with target_modules and feedforward_modules at one of them")
    ((site, layers),) = sites.items()
    return Edit(site, layers, read_metadata(folder / _WEIGHTS).get("kbne_base"), {"adapter": folder.resolve().name})
