"""Other forms of an edit than a checkpoint, each in a folder of its own and read back before it appears.

An IA3 adapter: PEFT multiplies the input of a feedforward module, or the output of another one, by a vector; with the
factors in it, and 1 for all else, that is the edit at the site `down` or `gate`. A delta: the edited columns alone.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import __version__
from ..disk.checkpoint import DELTA, Checkpoint, Shard, read_array, read_metadata, staged, to_float
from ..disk.manifest import write_manifest
from ..disk.sharding import cut
from ..edit import Edit
from ..errors import CheckpointError, EditError, FamilyError, ProofError, shown
from ..families import SITES, Site, family_of, slots, text_part
from ..files import forbid_overlap, json_text, parse_json, read_json
from ..proofs.verification import Report, behaviour_proof, file_proof
from ..reporting.card import add_card
from .fold import Progress, Target, file_hash, fold_into, plan, rewrite, stored_columns, write_tensors

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def check_form(form: str, checkpoint: Checkpoint) -> None:
    """Raise FamilyError if the edit of such a model has no such form: asked before work that takes long."""
    if form == "peft" and family_of(checkpoint.config).experts:
        raise FamilyError(
            f"{shown(checkpoint.config['model_type'])} is a mixture of experts: IA3 scales whole modules, and "
            "routed experts are none. Its edits are kept as an edit.json, a checkpoint or a delta"
        )


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


def load_edit(path: str | Path, checkpoint: Checkpoint) -> Edit:
    """The edit in a file of kbne-edit, or in the folder of an IA3 adapter of PEFT. Raises EditError."""
    return read_adapter(path, checkpoint) if Path(path).is_dir() else Edit.load(path)


# ---------------------------------------------------------------------------------------------------------------- IA3


class _Vector(NamedTuple):
    """Where an IA3 vector acts. shape: (1, F) scales a module's input, (F, 1) its output, packed gates (2 F, 1)."""

    module: str
    site: Site
    layer: int
    neurons: int
    shape: tuple[int, int]

    @property
    def key(self) -> str:
        return f"base_model.model.{self.module}.ia3_l"


def _vectors(checkpoint: Checkpoint) -> list[_Vector]:
    """One of every layer for each site that the family has."""
    family = family_of(checkpoint.config)
    found = []
    for site in SITES if family.gate else SITES[:1]:
        for layer, (slot, *_) in slots(checkpoint.shapes, checkpoint.config, site).items():
            size = checkpoint.shapes[slot.tensor][slot.axis]
            shape = (1, size) if site == "down" else (size, 1)
            found.append(_Vector(f"{family.layers}.{layer}.{family.module(site)}", site, layer, slot.neurons, shape))
    return found


def write_adapter(checkpoint: Checkpoint, edit: Edit, part: Path, source: dict) -> None:
    """The edit as an IA3 adapter in the folder `part`. source: {"id", "commit"} of the base.

    Modules are named in full, so that PEFT touches those of the edited layers and no other.
    Raises ProofError if what is read back is not the edit.
    """
    used = [v for v in _vectors(checkpoint) if v.site == edit.site and v.layer in edit.factors]
    tensors = {}
    for vector in used:
        values = np.ones(max(vector.shape), np.float32)
        values[list(edit.factors[vector.layer])] = list(edit.factors[vector.layer].values())
        tensors[vector.key] = ("F32", values.reshape(vector.shape))
    modules = sorted(vector.module for vector in used)
    config = {
        "peft_type": "IA3",
        "task_type": None if text_part(checkpoint.config) else "CAUSAL_LM",
        "base_model_name_or_path": source["id"],
        "revision": source["commit"],
        "target_modules": modules,
        "feedforward_modules": modules if edit.site == "down" else [],
        "fan_in_fan_out": family_of(checkpoint.config).conv1d,
        "inference_mode": True,
    }
    (part / _CONFIG).write_text(json_text(config), encoding="utf-8")
    write_tensors(part / _WEIGHTS, tensors, {"format": "pt", "kbne_base": checkpoint.fingerprint()})
    again = read_adapter(part, checkpoint)
    if (again.site, again.factors) != (edit.site, _effective(edit.factors)):
        raise ProofError("the adapter that was written does not read back as the edit: nothing was published")


def _effective(factors: dict[int, dict[int, float]]) -> dict[int, dict[int, float]]:
    """The factors as a vector keeps them: in float32, and without those of 1."""
    kept = {la: {n: float(np.float32(f)) for n, f in ns.items() if np.float32(f) != 1} for la, ns in factors.items()}
    return {layer: neurons for layer, neurons in kept.items() if neurons}


def read_adapter(folder: str | Path, checkpoint: Checkpoint) -> Edit:
    """The edit that an IA3 adapter is. Raises EditError if it is another adapter, or scales what an edit cannot."""
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
    shard, known, sites = Shard.open(folder / _WEIGHTS), {v.key: v for v in _vectors(checkpoint)}, {}
    for tensor in shard.tensors:
        values = to_float(read_array(shard, tensor), tensor.dtype)
        if tensor.name.endswith(".ia3_l") and (values == 1).all():
            continue
        vector = known.get(tensor.name)
        if vector is None or values.shape != vector.shape or (values.ravel()[vector.neurons :] != 1).any():
            raise EditError(
                f"{folder} changes {shown(tensor.name)} {list(values.shape)}: an edit scales the input of the "
                "down-projections or the output of the gate projections of this model, and nothing else"
            )
        factors = {n: float(factor) for n, factor in enumerate(values.ravel()) if factor != 1}
        sites.setdefault(vector.site, {})[vector.layer] = factors
    if len(sites) != 1:
        what = "both sites, and an edit has one" if sites else "nothing"
        raise EditError(f"{folder} scales {what}: train it with target_modules and feedforward_modules at one of them")
    ((site, factors),) = sites.items()
    return Edit(site, factors, read_metadata(folder / _WEIGHTS).get("kbne_base"), {"adapter": folder.resolve().name})


# -------------------------------------------------------------------------------------------------------------- delta


def write_delta(
    checkpoint: Checkpoint, edit: Edit, targets: dict[str, Target], part: Path, source: dict, progress: Progress
) -> None:
    """The edited columns alone, as a safetensors file in the folder `part`: {tensor name: [D, k], [k, D] or [k]}.

    Its metadata hold the edit, the base's fingerprint, and SHA-256 of the weights' files before and after, which are
    computed twice: from the products, and with the columns of the delta put in. Raises ProofError if they differ.
    """
    files, undo = _hashes(checkpoint, targets, progress)
    columns = {}
    for name, parts in undo.items():
        tensor = checkpoint.tensors[name][1]
        columns[name] = (tensor.dtype, targets[name].product(np.concatenate(parts), slice(None), tensor))
    about = {
        "kbne_delta": 1, "edit": {**edit.to_dict(), "base": checkpoint.fingerprint()}, "files": files, "source": source,
    }  # fmt: skip
    write_tensors(part / DELTA, columns, {"kbne": json.dumps(about)})
    found = stored_columns(part / DELTA, targets, checkpoint)
    again, _ = _hashes(checkpoint, {n: replace(t, values=found[n]) for n, t in targets.items()}, progress)
    if again != files:
        raise ProofError("the delta that was written does not give the folded weights: nothing was published")


def _hashes(checkpoint: Checkpoint, targets: dict[str, Target], progress: Progress) -> tuple[dict, dict]:
    """({file: SHA-256 in and out}, undo) of a fold that is written nowhere."""
    files, undo = {}, {}
    with ThreadPoolExecutor(2) as pool, open(os.devnull, "wb") as nowhere:
        for shard in checkpoint.shards:
            before, after = rewrite(shard, targets, nowhere, undo, pool, progress)
            files[shard.path.name] = {"in": before, "out": after}
    return files, undo


def apply(
    delta: str | Path,
    base_dir: str | Path,
    out_dir: str | Path,
    *,
    source: dict | None = None,
    shard_size: int | str | None = None,
    behaviour: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write `base_dir` with a delta's columns put in to `out_dir`, weights byte for byte as `bake` would have.

    source: {"id", "commit"} of the base, as manifest and card name it (default: the name of `base_dir`, and none).
    shard_size: as in `fold`; then it is the tensors that are those of `bake`, in other files.
    behaviour: False leaves the second proof out. Both hold before the output appears; it can be verified, reverted and
    pushed as one of `bake`. What the delta says that its own run measured is not repeated: this run did not see it.
    Raises CheckpointError for a damaged delta, EditError for another base, ProofError, OutputError.
    """
    path = Path(delta) / DELTA if Path(delta).is_dir() else Path(delta)
    forbid_overlap(out_dir, base_dir, delta)
    checkpoint, about = Checkpoint.open(base_dir), _about(path)
    edit = Edit.from_dict(about["edit"], str(path))
    targets = plan(checkpoint, edit)
    columns = stored_columns(path, targets, checkpoint)
    targets = {name: replace(target, values=columns[name]) for name, target in targets.items()}
    cuts = cut(checkpoint, shard_size)
    with staged(out_dir, overwrite) as part:
        manifest = fold_into(checkpoint, edit, targets, part, progress, cuts)
        # Cut anew, no file is one that the delta knows: what it promises is then computed, and written nowhere.
        hashes = _hashes(checkpoint, targets, progress)[0] if cuts else manifest["files"]
        for name in (shard.path.name for shard in checkpoint.shards):
            if hashes[name]["in"] != about["files"].get(name, {}).get("in"):
                raise EditError(
                    f"{path} was made from another {name} (SHA-256 differs): apply it to {_origin(about)} as published"
                )
        report = file_proof(checkpoint, Checkpoint.open(part), manifest, None, progress, rehash=False)
        report.faults += [
            f"{shard.path.name} is not what the delta promises (SHA-256 differs)"
            for shard in checkpoint.shards
            if hashes[shard.path.name]["out"] != about["files"][shard.path.name]["out"]
        ]
        if behaviour and not report.faults:
            report.behaviour = behaviour_proof(checkpoint, Checkpoint.open(part), edit)
        if not report.ok:
            which, why = ("first", report.faults[0]) if report.faults else ("second", "behaviour differs")
            raise ProofError(f"the {which} proof failed, {out_dir} was not written: {why}", report)
        manifest |= {"source": source or {"id": checkpoint.path.resolve().name, "commit": None}}
        manifest |= {"proofs": report.to_dict(), "summary": {}}
        add_card(part, manifest)
        write_manifest(part, manifest)
    return report


def _about(path: Path) -> dict:
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


def _origin(about: dict) -> str:
    commit = about["source"].get("commit")
    return shown(about["source"]["id"] + (f"@{commit}" if commit else ""))
