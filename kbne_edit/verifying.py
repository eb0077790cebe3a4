"""Verify: both proofs that a directory is its base with an edit, and a check of its card."""

from __future__ import annotations

from pathlib import Path

from .disk.checkpoint import Checkpoint
from .disk.manifest import Manifest
from .edit import Edit
from .folding.plan import Plan
from .hub.source import resolved
from .progress import progress, say
from .proofs.outcome import Proofs
from .proofs.verify import verify as prove
from .reporting.card import card_fault


def verify(
    source: str | Path,
    baked: str | Path,
    *,
    edit: Edit | None = None,
    behaviour: bool = True,
) -> Proofs:
    """Both proofs that `baked` is the base `source` with an edit folded in; also for a directory made elsewhere.

    source: a directory, ORG/NAME[@REVISION], or "demo".

    The edit is `edit`, or the manifest's, or else recovered from the weights. The output is not trusted: rules say
    which files it may hold, and their content is compared with the base. What its own run measured (effect, cost,
    figures of the second proof) is on record: it is compared with the card, and not measured again. behaviour: False
    skips the second proof. Raises CheckpointError if a directory cannot be read, EditError if the edit was made for
    another base; a failed proof is in the result.
    """

    def card(plan: Plan, manifest: Manifest) -> tuple[str, ...]:
        fault = card_fault(Path(baked), manifest, plan.checkpoint.path)
        return (fault,) if fault else ()

    with resolved(str(source), say) as origin:
        base = Checkpoint.open(origin.path)
        with progress("verify", 2 * sum(shard.size for shard in base.shards), "B") as update:
            return prove(base, baked, edit=edit, behaviour=behaviour, progress=update, also=card)
