"""Apply: from a delta and its base to the checkpoint that `bake` would have written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from .disk.checkpoint import Checkpoint
from .disk.manifest import FileRecord, Manifest, Origin, RecipeRecord
from .disk.publishing import staged
from .errors import EditError, InputError, ProofError, shown
from .evaluation.impact import NOT_MEASURED, Impact, ImpactJSON, impact_of, recipe_of
from .evaluation.verdict import Verdict, VerdictJSON, verdict_of
from .files import forbid_overlap
from .folding.columns import Columns, delta_path
from .folding.delta import DeltaRecord, fold_hashes, weights_hashes
from .folding.fold import fold_into
from .folding.plan import Plan
from .hub.source import local_path, resolved
from .progress import progress, say
from .proofs.behaviour import behaviour_proof
from .proofs.files import file_proof
from .proofs.outcome import Proofs, ProofsJSON
from .recipe import load_recipe
from .reporting.card import add_card
from .settings import Checks, Output

VERSION = 1


class ApplyJSON(ProofsJSON, ImpactJSON):
    """What `apply --json` prints: the proofs, effect and cost if measured, and the verdict."""

    version: int
    model: str
    commit: str | None
    out: str
    verdict: VerdictJSON


@dataclass(frozen=True)
class ApplyResult:
    """What `apply` did. source: the base; out: the new checkpoint; plan: what was folded; proofs: both held.

    impact: effect and cost, None where they were not measured.
    """

    source: Origin
    out: Path
    plan: Plan
    proofs: Proofs
    impact: Impact = NOT_MEASURED

    def __repr__(self) -> str:
        return f"ApplyResult({self.out}, {self.plan.edit.num_neurons} neurons)"

    @property
    def ok(self) -> bool:
        return self.proofs.ok

    @property
    def verdict(self) -> Verdict:
        """The verdict on the edit, part by part."""
        return verdict_of(effect=self.impact.effect, cost=self.impact.cost, proofs=self.proofs)

    def to_dict(self) -> ApplyJSON:
        """JSON form: what `apply --json` prints."""
        return {
            "version": VERSION,
            "model": self.source.id,
            "commit": self.source.commit,
            "out": str(self.out),
            **self.proofs.to_dict(),
            **self.impact.to_dict(),
            "verdict": self.verdict.to_dict(),
        }


def apply(
    delta: str | Path,
    source: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | None = None,
    output: Output | None = None,
    checks: Checks | None = None,
) -> ApplyResult:
    """Write the base of a delta, with the delta's columns, to the directory `out`, as `bake` would have written it.

    source: the base, as a directory, ORG/NAME[@REVISION], or "demo".
    recipe: its probes and questions measure effect and cost (default: the edit's recipe if it is in the package, else
    social-bias).
    output: `shard_size` and `overwrite` alone. checks: which of proof, effect and cost are left out.
    The proofs must hold before the output appears. It can be verified, reverted and pushed like an output of `bake`.
    Figures that the delta's own run measured are not copied.
    Raises CheckpointError for a damaged delta, EditError for another base, ProofError, OutputError.
    """
    source, path = str(source), delta_path(delta)
    output = output or Output()
    checks = checks or Checks()
    if output != Output(shard_size=output.shard_size, overwrite=output.overwrite):
        raise InputError("apply writes a checkpoint: its output takes shard_size and overwrite alone")
    forbid_overlap(out, delta, *filter(None, [local_path(source)]))
    record = DeltaRecord.read(path)  # before the base is downloaded
    output.check()
    probed = load_recipe(recipe or recipe_of(record.edit) or "social-bias")
    with resolved(source, say) as base:
        forbid_overlap(out, base.origin)
        checkpoint = Checkpoint.open(base.path)
        if checkpoint.fingerprint() != record.edit.base:
            raise EditError(f"{path} was made for another model than {source}: apply it to {shown(str(record.source))}")
        plan = Plan.of(checkpoint, record.edit, output.shard_size)
        origin = Origin(base.label, base.commit)
        with staged(out, output.overwrite, base.origin) as part:
            manifest, proofs = _folded(plan, path, record, part, checks.behaviour)
            if not proofs.ok:
                raise ProofError(f"the {proofs.failed} proof failed, {out} was not written: {proofs.fault}", proofs)
            result = ApplyResult(origin, Path(out), plan, proofs)
            if checks.measure:
                result = replace(result, impact=impact_of(checkpoint, plan.edit, probed))
            manifest = replace(
                manifest,
                source=origin,
                recipe=RecipeRecord(probed.name, probed.sha256) if checks.measure else None,
                proofs=proofs.to_dict(),
                summary={**result.impact.to_dict(), "verdict": result.verdict.to_dict()},
            )
            add_card(part, manifest).write(part)
    return result


def _folded(plan: Plan, path: Path, record: DeltaRecord, part: Path, behaviour: bool) -> tuple[Manifest, Proofs]:
    """Write the base with the delta's columns to `part`. Returns the manifest and both proofs."""
    with_columns = plan.with_columns(Columns.open(path).arrays(plan))
    total = 3 * sum(shard.size for shard in plan.checkpoint.shards)
    with progress("apply", total, "B") as update:
        manifest = fold_into(with_columns, part, update)
        faults = _broken_promises(path, record, with_columns, None if plan.files else manifest.files)
        baked = Checkpoint.open(part)
        proof = file_proof(plan, baked, manifest, "manifest", update, rehash=False)
    for fault in faults:
        proof = proof.with_fault(fault)
    return manifest, Proofs(proof, behaviour_proof(plan, baked) if behaviour and proof.holds else None)


def _broken_promises(
    path: Path, record: DeltaRecord, plan: Plan, files: dict[str, FileRecord] | None
) -> tuple[str, ...]:
    """Where the folded weights differ from the hashes in the delta. Raises EditError if the delta has another base.

    files: hashes of the weights if they were written with the base's sharding; None: compute them. If the base is
    sharded differently than the delta's, its tensors are compared.
    """
    names = [shard.path.name for shard in plan.checkpoint.shards]
    files = files or fold_hashes(plan, None)[0]
    if all(name in record.files and files[name].before == record.files[name].before for name in names):
        wrong = [name for name in names if files[name].after != record.files[name].after]
        return tuple(f"{name} is not what the delta promises (SHA-256 differs)" for name in wrong)
    hashes = weights_hashes(plan) if record.weights else None
    if hashes is None or record.weights is None or hashes.before != record.weights.before:
        raise EditError(
            f"{path} was made from other weights than those of {plan.checkpoint.path} (SHA-256 differs): apply it to "
            f"{shown(str(record.source))} as published"
        )
    return () if hashes.after == record.weights.after else ("the weights are not what the delta promises",)
