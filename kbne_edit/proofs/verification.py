"""Two proofs, never mixed.

1. The file is the edit: every edited weight is the rounded product of the original and its factor, everything else
   is identical to the bit. Streaming, no model in memory.
2. The model behaves as the hooks: original with hooks against the baked directory loaded by plain transformers.
   Bit-equal where every factor is a power of two; otherwise within the rounding noise, which is computed (see `noise`).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..disk.checkpoint import (
    INDEX,
    MANIFEST,
    UNDO,
    Checkpoint,
    Shard,
    TensorInfo,
    from_float,
    read_array,
    storage,
    to_float,
)
from ..disk.manifest import base_names, is_sealed, read_manifest
from ..disk.sharding import head_of
from ..edit import Edit
from ..errors import CheckpointError, FamilyError
from ..families import SITES, by_neuron, slots
from ..files import open_input
from ..folding.fold import Progress, Target, TwoDigests, chunks, file_hash, pieces, plan, scaled
from ..models.loading import foreign, load_model, load_tokenizer
from ..models.memory import SHARE, available, in_memory

if TYPE_CHECKING:
    import torch

NOISE_FACTOR = 4  # the largest of some 10^5 near-normal differences varies by less than this between two draws
_NOISE_DRAWS = 3
# Of each stored dtype: the smallest number of full precision, and how many bits that is.
_NORMAL = {"BF16": (2.0**-126, 8), "F16": (2.0**-14, 11), "F32": (2.0**-126, 24), "F64": (2.0**-1022, 53)}
_TEXTS = (
    "The committee read both applications twice before it",
    "Water boils sooner on a mountain because",
    "She asked the engineer what he thought of the plan, and he said",
    "In the morning the two neighbours met at the market and",
)


@dataclass
class Report:
    """faults: empty if the first proof holds. behaviour: one entry per dtype, None if not asked for."""

    edit: Edit
    source: str  # where the edit comes from: "manifest", "given", or "recovered from the weights"
    tensors: int = 0
    edited: int = 0
    files: int = 0
    faults: list[str] = field(default_factory=list)
    behaviour: list[dict] | None = None

    @property
    def ok(self) -> bool:
        return not self.faults and all(entry["ok"] for entry in self.behaviour or [])

    def to_dict(self) -> dict:
        data = asdict(self) | {"ok": self.ok, "file_proof": not self.faults}
        data["edit"] = {"site": self.edit.site, "neurons": self.edit.num_neurons, "factors": self.edit.distinct_factors}
        return data


def verify(
    base_dir: str | Path,
    baked_dir: str | Path,
    *,
    edit: Edit | None = None,
    behaviour: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Both proofs that `baked_dir` is `base_dir` with an edit folded in; also for a directory made elsewhere.

    The edit is `edit`, or the manifest's, or else recovered from the weights themselves. behaviour: False skips the
    second proof. Raises CheckpointError if a directory cannot be read; a failed proof is in the report.
    """
    base, baked = Checkpoint.open(base_dir), Checkpoint.open(baked_dir)
    manifest = read_manifest(baked_dir)
    report = file_proof(base, baked, manifest, edit, progress)
    if manifest and not is_sealed(baked_dir, manifest):
        report.faults.append(f"{MANIFEST} was changed after baking (its own SHA-256 differs)")
    if behaviour and not report.faults:
        report.behaviour = behaviour_proof(base, baked, report.edit)
    return report


# ------------------------------------------------------------------------------------------------- first proof: files


def file_proof(
    base: Checkpoint,
    baked: Checkpoint,
    manifest: dict | None,
    edit: Edit | None,
    progress: Progress | None = None,
    *,
    rehash: bool = True,
) -> Report:
    """The first proof. Memory is bounded by a chunk, however the directories are cut into files.

    rehash: False leaves out the hashes of the shards, for a manifest whose hashes this very run has computed: the
    bytes are compared all the same, so hashing them again could say nothing new.
    """
    source = "given" if edit else "manifest" if manifest else "recovered from the weights"
    edit = edit or (Edit.from_dict(manifest["edit"]) if manifest else _recover(base, baked))
    report = Report(edit, source)
    targets = plan(base, edit)
    report.tensors, report.edited = len(base.tensors), len(targets)
    matching = _matching(base, baked, manifest)
    if matching:
        for old, new in zip(base.shards, baked.shards, strict=True):
            _compare_files(old, new, targets, manifest, rehash and manifest is not None, report, progress)
    else:
        _compare_tensors(base.tensors, baked.tensors, targets, report, progress)
        report.files += len(base.shards)
    _compare_others(base, baked, manifest, matching, rehash, report)
    if manifest and "resharded" in manifest:
        _check_resharded(base, baked, manifest, rehash, report)
    return report


def _matching(base: Checkpoint, baked: Checkpoint, manifest: dict | None) -> bool:
    """True if weights can be compared file by file. A directory made elsewhere may say the same in other headers."""
    if [shard.path.name for shard in base.shards] != [shard.path.name for shard in baked.shards]:
        return False
    if manifest:
        return "resharded" not in manifest
    return all(head_of(old) == head_of(new) for old, new in zip(base.shards, baked.shards, strict=True))


def _compare_files(
    old: Shard,
    new: Shard,
    targets: dict[str, Target],
    manifest: dict | None,
    rehash: bool,
    report: Report,
    progress: Progress | None,
) -> None:
    """Fold the base once more, chunk by chunk, and compare with what is there; hash both on the way."""
    name = new.path.name
    with open_input(old.path) as a, open_input(new.path) as b, ThreadPoolExecutor(2) as pool:
        digests = TwoDigests(pool)
        for tensor, start, end in chunks(old.path, old.tensors, targets):
            before, after = a.read(end - start), b.read(end - start)
            if rehash:
                digests.update(before, before if before == after else after)
            expected = before if tensor is None else scaled(before, tensor, start, targets[tensor.name], {})
            if expected != after:
                what = tensor.name if tensor else _tensor_at(old, start, before, after)
                report.faults.append(f"{name}: {what} is not what the edit gives")
            if progress:
                progress(2 * len(before))
        if b.read(1):
            report.faults.append(f"{name}: longer than the base's file")
        if rehash:
            _check_hashes(name, *digests.hexdigests(), manifest, report)
    report.files += 1


def _tensor_at(shard: Shard, start: int, before: bytes, after: bytes) -> str:
    position = start + next((i for i, (x, y) in enumerate(zip(before, after, strict=False)) if x != y), len(after))
    return next((t.name for t in shard.tensors if t.start <= position < t.end), "the header")


def _check_hashes(name: str, before: str, after: str, manifest: dict, report: Report) -> None:
    recorded = manifest["files"].get(name)
    if recorded is None:
        report.faults.append(f"{name} is not in the manifest")
    elif recorded["in"] != before:
        report.faults.append(f"{name} of the base is not the file that was baked (SHA-256 differs)")
    elif recorded["out"] != after:
        report.faults.append(f"{name} was changed after baking (SHA-256 differs from the manifest)")


def _compare_tensors(old: dict, new: dict, targets, report: Report, progress: Progress | None) -> None:
    """Tensor by tensor, for directories whose files are cut or ordered differently."""
    for name in sorted(set(old) ^ set(new)):
        report.faults.append(f"tensor {name} is {'missing' if name in old else 'new'}")
    for name in sorted(set(old) & set(new), key=lambda name: (old[name][0].path, old[name][1].start)):
        a, b = old[name][1], new[name][1]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            report.faults.append(f"tensor {name} is {b.dtype} {list(b.shape)}; it was {a.dtype} {list(a.shape)}")
        elif not _same_tensor(old[name], new[name], targets.get(name), progress):
            report.faults.append(f"{name} is not what the edit gives")


def _same_tensor(
    old: tuple[Shard, TensorInfo], new: tuple[Shard, TensorInfo], target: Target | None, progress: Progress | None
) -> bool:
    (shard, tensor), (other, place), same = old, new, True
    with open_input(shard.path) as a, open_input(other.path) as b:
        a.seek(tensor.start)
        b.seek(place.start)
        for start, end in pieces(tensor, target is not None):
            before, after = a.read(end - start), b.read(end - start)
            same &= (scaled(before, tensor, start, target, {}) if target else before) == after
            if progress:
                progress(2 * len(before))
    return same


def _check_resharded(base: Checkpoint, baked: Checkpoint, manifest: dict, rehash: bool, report: Report) -> None:
    """The files of the base and those that their tensors went into, by what the manifest says of them."""
    recorded = manifest["resharded"]
    for name in sorted({shard.path.name for shard in baked.shards} - manifest["files"].keys()):
        report.faults.append(f"{name} is not in the manifest")
    for name in sorted({shard.path.name for shard in base.shards} ^ (recorded.keys() - {INDEX})):
        report.faults.append(f"{name} is {'not in' if name not in recorded else 'only in'} the manifest")
    for name, entry in recorded.items():
        path = base.path / name
        if rehash and path.is_file() and file_hash(path) != entry["in"]:
            report.faults.append(f"{name} of the base is not the file that was baked (SHA-256 differs)")


def _compare_others(
    base: Checkpoint, baked: Checkpoint, manifest: dict | None, matching: bool, rehash: bool, report: Report
) -> None:
    carried, stray = baked.other_files()
    names = base_names(manifest, carried)
    origins = {origin: name for name, origin in names.items() if origin is not None}
    old, new = set(base.other_files()[0]), set(origins)
    if not matching:  # each index is that of its own files
        old, new = old - {INDEX}, new - {INDEX}
    for name in sorted(old ^ new):
        report.faults.append(f"file {name} is {'missing' if name in old else 'new'}")
    for name in sorted(old & new):
        before, after = file_hash(base.path / name), file_hash(baked.path / origins[name])
        if before != after:
            report.faults.append(f"file {origins[name]} differs")
        elif manifest:
            _check_hashes(origins[name], before, after, manifest, report)
        report.files += 1
    shards = {shard.path.name for shard in baked.shards}
    present = {*names, *shards}
    for name, hashes in (manifest["files"] if manifest else {}).items():
        asked = rehash or name not in shards
        if hashes["in"] is None and (name not in present or (asked and file_hash(baked.path / name) != hashes["out"])):
            report.faults.append(f"file {name} is missing or was changed after baking")
        elif name not in present and hashes.get("base", name) not in old:  # those that the base has were named above
            report.faults.append(f"the manifest names a file that is not there: {name}")
    undo = baked.path / UNDO
    if manifest and (not undo.is_file() or file_hash(undo) != manifest["undo"]):
        report.faults.append(f"{UNDO} is missing or was changed")
    if not manifest and undo.exists():
        report.faults.append(f"{UNDO} is there without {MANIFEST}: the manifest was removed")
    if stray:
        report.faults.append(f"unedited weights lie beside the edited ones: {', '.join(stray[:3])}")


def _recover(base: Checkpoint, baked: Checkpoint) -> Edit:
    """The edit that turns `base` into `baked`, read off the weights. Raises CheckpointError if there is none."""
    for site in SITES:
        try:
            places = slots(base.shapes, base.config, site)
        except FamilyError:
            if site == "gate":  # plain feed-forward
                continue
            raise
        factors: dict[int, dict[int, float]] = {}
        for slot in (slot for found in places.values() for slot in found if len(base.shapes[slot.tensor]) > 1):
            if baked.shapes.get(slot.tensor) == base.shapes[slot.tensor]:
                found = _recover_slot(base.tensors[slot.tensor], baked.tensors[slot.tensor], slot)
                factors.setdefault(slot.layer, {}).update({slot.offset + n: factor for n, factor in found.items()})
        factors = {layer: found for layer, found in factors.items() if found}
        if factors:
            return Edit(site, factors)
    raise CheckpointError(
        f"{baked.path} has no {MANIFEST}, and no neuron of {base.path} is scaled in it: pass --edit edit.json"
    )


def _recover_slot(old, new, slot) -> dict[int, float]:
    kind = old[1].dtype
    storage(kind, slot.tensor)
    a, b = (by_neuron(read_array(*pair), slot) for pair in (old, new))
    found = {}
    for i in np.flatnonzero((a != b).any(1)).tolist():
        if (factor := _recover_factor(a[i], b[i], kind)) is not None:
            found[i] = factor
    return found


def _recover_factor(x: np.ndarray, y: np.ndarray, kind: str) -> float | None:
    """The shortest decimal (a person's factor, not a regression's) that scales stored x [D] to exactly the stored y.

    Each weight confines the factor to the numbers that round to its y; the middle of what all of them allow is the
    factor to within a rounding step, and its decimals are tried from the shortest on. None: y is no multiple of x.
    """
    wide, after = (to_float(v, kind).astype(np.float64) for v in (x, y))
    use = np.isfinite(wide) & np.isfinite(after) & (np.abs(after) > _NORMAL[kind][0]) & (wide != 0)
    middle = 0.0
    if use.any():
        ratio = after[use] / wide[use]
        slack = np.ldexp(1.0, np.frexp(after[use])[1] - _NORMAL[kind][1] - 1) / np.abs(wide[use])
        middle = float((np.max(ratio - slack) + np.min(ratio + slack)) / 2)
    for digits in range(1, 10):  # nine tell every float32 from its neighbours
        factor = float(f"{middle:.{digits}g}")
        with np.errstate(over="ignore"):
            scaled = from_float(to_float(x, kind) * np.float32(factor), kind)
        if scaled.tobytes() == y.tobytes():
            return factor
    return None


# --------------------------------------------------------------------------------------------- second proof: behaviour


def behaviour_proof(base: Checkpoint, baked: Checkpoint, edit: Edit) -> list[dict]:
    """The second proof, in float32 and in the checkpoint's own dtype; site by site where the model is too large."""
    if in_memory(base) > SHARE * available():
        return [_site_by_site(base, baked, edit)]
    import torch

    stored = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
    own = stored[base.tensors[next(iter(plan(base, edit)))][1].dtype]
    return [_whole_model(base, baked, edit, dtype, own) for dtype in dict.fromkeys((torch.float32, own))]


def _probes(base: Checkpoint) -> list[list[int]]:
    try:
        tokenizer = load_tokenizer(base.path)
        with foreign(base.path):
            probes = [tokenizer(text)["input_ids"] for text in _TEXTS]
        if all(probes):
            return probes
    except CheckpointError:
        pass
    # A directory without a tokenizer (or with one that knows no word) can be proven all the same.
    size = base.config.get("vocab_size", 64)
    return np.random.default_rng(0).integers(0, size, (len(_TEXTS), 12)).tolist()


class _Outcome(NamedTuple):
    """logits: of all positions, [N, V] float32; routes: per probe which experts each position took, [T, any]."""

    logits: np.ndarray
    texts: list[list[int]]
    routes: list[np.ndarray]


def _run(model, probes: list[list[int]], tokens: int = 0) -> _Outcome:
    """Logits and routes of the probes, and greedy continuations of `tokens` tokens."""
    import torch

    from ..models.experts import chosen
    from ..models.places import places

    logits, texts, routes = [], [], []
    experts = [p.module for found in places(model, "down") for p in found if p.experts]
    with torch.no_grad():
        for ids in probes:
            routed: list[torch.Tensor] = []
            notes = [
                m.register_forward_pre_hook(lambda m, args, r=routed: r.append(chosen(*args, experts=m)))
                for m in experts
            ]
            logits.append(model(torch.tensor([ids])).logits[0].float().numpy())
            for note in notes:
                note.remove()
            routes.append(torch.cat(routed, -1).numpy() if routed else np.zeros((len(ids), 0)))
            ids = list(ids)
            for _ in range(tokens):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            texts.append(ids)
    return _Outcome(np.concatenate(logits), texts, routes)


def _whole_model(base: Checkpoint, baked: Checkpoint, edit: Edit, dtype: torch.dtype, own: torch.dtype) -> dict:
    from ..models.hooks import hooked
    from .noise import rounding_noise

    probes, tokens = _probes(base), 8 if str(dtype) == "torch.float32" else 0
    model = load_model(base.path, dtype)
    with hooked(model, edit):
        reference = _run(model, probes, tokens)
        noise = 0.0 if edit.exact else _last_rounding(reference.logits, dtype)
        for seed in range(0 if edit.exact else _NOISE_DRAWS):
            with rounding_noise(model, edit, own, seed):
                noise = max(noise, _difference(_run(model, probes), reference))
    del model
    got = _run(load_model(baked.path, dtype), probes, tokens)
    difference, equal = _difference(got, reference), np.array_equal(got.logits, reference.logits)
    same = got.logits.argmax(1) == reference.logits.argmax(1)
    entry = {
        "dtype": str(dtype).removeprefix("torch."),
        "how": "whole model",
        "bit_equal": bool(equal),
        "difference": difference,
        "noise": noise,
        "kl": _kl(reference.logits, got.logits),
        "top1": float(same.mean()),
        "positions": len(same),
    }
    if tokens:
        entry["greedy"] = float(np.mean([a == b for a, b in zip(reference.texts, got.texts, strict=True)]))
    if reference.routes[0].size:
        entry["rerouted"] = 1 - float(_same_route(got, reference).mean())
    entry["ok"] = bool(equal) if edit.exact else difference <= NOISE_FACTOR * noise
    return entry


def _difference(got: _Outcome, reference: _Outcome) -> float:
    """Largest logit difference, relative to the logits' standard deviation.

    A router's choice is not continuous: where rounding turned it, at this position or one before, another function is
    computed, and the difference says nothing about rounding. Such positions are left out, and counted ("rerouted").
    """
    kept = _same_route(got, reference)
    largest = np.abs(got.logits - reference.logits)[kept].max(initial=0)
    return float(largest / max(float(reference.logits.std()), 1e-30))


def _last_rounding(logits: np.ndarray, dtype: torch.dtype) -> float:
    """Deviation of the rounding of the largest logit, relative to the logits' standard deviation.

    It is there however little an edit changes: a few small draws of noise may move no logit over a rounding step, and
    the edit one.
    """
    import torch

    step = torch.finfo(dtype).eps * 2 ** np.floor(np.log2(max(float(np.abs(logits).max()), 1e-30)))
    return float(step / 12**0.5 / max(float(logits.std()), 1e-30))


def _same_route(got: _Outcome, reference: _Outcome) -> np.ndarray:
    """Positions up to which every router chose the same experts, [N]."""
    pairs = zip(got.routes, reference.routes, strict=True)
    return np.concatenate([np.logical_and.accumulate((a == b).all(1)) for a, b in pairs])


def _kl(reference: np.ndarray, got: np.ndarray) -> float:
    """Mean KL(reference || got) over positions, in nats."""
    a, b = (x.astype(np.float64) - x.max(1, keepdims=True) for x in (reference, got))
    a, b = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (a, b))
    return float((np.exp(a) * (a - b)).sum(1).mean())


def _site_by_site(base: Checkpoint, baked: Checkpoint, edit: Edit) -> dict:
    """Each edited projection on seeded inputs: W (factor h) from the base against W' h from the baked directory.

    All other tensors are identical by the first proof, so the projections are all that can differ.
    """
    worst, noise, equal, rows = 0.0, 0.0, True, 0
    for name, target in plan(base, edit).items():
        tensor, index = base.tensors[name][1], target.neurons
        old, new = (  # [neurons, D]
            to_float(by_neuron(read_array(*c.tensors[name]), target.slot), tensor.dtype).astype(np.float32)
            for c in (base, baked)
        )
        scale = np.ones(len(old), np.float32)
        scale[index] = target.factors
        x = np.random.default_rng(0).standard_normal((8, old.shape[edit.site == "gate"]), np.float32)
        if edit.site == "down":
            reference, got = (x * scale) @ old, x @ new
            spread = np.sqrt(((x * scale)[:, index] ** 2) @ (old[index] ** 2))
        else:
            reference, got = (x @ old.T) * scale, x @ new.T
            spread = np.sqrt((x**2) @ (old[index] ** 2).T) * np.abs(target.factors)
        unit = {"BF16": 2.0**-8, "F16": 2.0**-11}.get(tensor.dtype, 2.0**-24) / 3**0.5  # as in `noise`
        worst = max(worst, float(np.abs(got - reference).max() / max(float(reference.std()), 1e-30)))
        noise = max(noise, float(unit * spread.max() / max(float(reference.std()), 1e-30)))
        equal &= np.array_equal(got, reference)
        rows += len(x)
    return {
        "dtype": "float32",
        "how": "site by site",
        "bit_equal": bool(equal),
        "difference": worst,
        "noise": noise,
        "positions": rows,
        "ok": bool(equal) if edit.exact else worst <= NOISE_FACTOR * noise,
    }
