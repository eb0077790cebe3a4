"""The plan of a fold: which neurons of which tensors, by which factors, in which files.

W_down (factor_i h_i) = (W_down with column i scaled by factor_i) h. Each stored weight becomes the float32 product,
rounded once to its dtype (arXiv:2601.21864 scales h at run time; the fold scales the weights).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict

import numpy as np

from ..disk.checkpoint import Checkpoint
from ..disk.sharding import NewShard, reshard
from ..edit import Edit
from ..errors import EditError
from ..families import end
from .exact import quantised_targets
from .target import Target

Inexact = dict[int, set[int]]  # {layer: neurons that cannot take their factor}


class StepJSON(TypedDict):
    """One tensor of a plan. file: the output file that holds it; axis: of the neurons; neurons: of their layer."""

    tensor: str
    file: str
    axis: int
    neurons: list[int]
    factors: list[float]


@dataclass(frozen=True)
class Step:
    """One tensor of a plan, in numbers to print. file: the output file that holds it; neurons: of their layer."""

    tensor: str
    file: str
    axis: int
    neurons: tuple[int, ...]
    factors: tuple[float, ...]

    def to_dict(self) -> StepJSON:
        return {
            "tensor": self.tensor,
            "file": self.file,
            "axis": self.axis,
            "neurons": list(self.neurons),
            "factors": list(self.factors),
        }


@dataclass(frozen=True)
class Plan:
    """An edit, worked out for a checkpoint. A dry run prints it, the fold executes it, the proofs receive it.

    targets: {tensor: what happens to it}. files: the new sharding, () to keep the checkpoint's.
    """

    checkpoint: Checkpoint
    edit: Edit
    targets: dict[str, Target]
    files: tuple[NewShard, ...] = ()

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        edit: Edit,
        shard_size: int | str | None = None,
        inexact: Literal["refuse", "skip", "ignore"] = "refuse",
    ) -> Plan:
        """Work out an edit. shard_size: bytes per file, or text such as "5GB".

        inexact: what to do if neurons of a quantised checkpoint cannot take their factors exactly: refuse the edit,
        skip them, or ignore it (for an undo file, whose values are not products).
        Raises EditError if the edit does not fit, FamilyError, CheckpointError, InputError.
        """
        edit.check(checkpoint.layer_sizes(edit.site), checkpoint.fingerprint())
        targets, bad = _targets(checkpoint, edit)
        if bad and inexact == "skip":
            edit = edit.without(bad)
            edit.check(checkpoint.layer_sizes(edit.site))
            targets, bad = _targets(checkpoint, edit)
        if bad and inexact != "ignore":
            raise _refused(bad, checkpoint)
        return cls(checkpoint, edit, targets, reshard(checkpoint, shard_size))

    @property
    def exact(self) -> bool:
        """True if hooks and fold agree bit for bit: every factor is a power of two, and no product is rounded."""
        return self.edit.exact and not any(target.unit for target in self.targets.values())

    def __repr__(self) -> str:
        return f"Plan({self.edit.num_neurons} neurons in {len(self.targets)} tensors of {self.checkpoint.path})"

    @property
    def steps(self) -> tuple[Step, ...]:
        """The plan, tensor by tensor."""
        files = {name: shard.path.name for name, (shard, _) in self.checkpoint.tensors.items()}
        files |= {name: file.name for file in self.files for name in file.tensors}
        return tuple(
            Step(
                tensor=name,
                file=files[name],
                axis=target.slot.axis,
                neurons=tuple((target.slot.offset + target.neurons).tolist()),
                factors=tuple(target.changes.tolist()),
            )
            for name, target in self.targets.items()
        )

    def with_columns(self, columns: dict[str, np.ndarray]) -> Plan:
        """A copy in which these values replace the products. columns: as of `Columns.arrays`."""
        targets = {name: replace(target, values=columns[name]) for name, target in self.targets.items()}
        return replace(self, targets=targets)

    def to_dict(self) -> dict[str, Any]:
        return {"steps": [step.to_dict() for step in self.steps], "files": [file.name for file in self.files]}


def _targets(checkpoint: Checkpoint, edit: Edit) -> tuple[dict[str, Target], Inexact]:
    """The targets, and the neurons of a quantised checkpoint that cannot take their factors."""
    slots = checkpoint.slots(edit.site)
    targets: dict[str, Target] = {}
    inexact: Inexact = {}
    for layer, factors in edit.factors.items():
        neurons = np.fromiter(factors, np.int64)
        values = np.fromiter(factors.values(), np.float32)
        for slot in slots[layer]:
            inside = (neurons >= slot.offset) & (neurons < end([slot]))
            if inside.any():
                slot.numbers(checkpoint.tensors[slot.tensor][1])
                expert, index = np.divmod(neurons[inside] - slot.offset, slot.neurons)
                target = Target(
                    slot, slot.start + index * slot.stride, values[inside], expert if slot.experts else None
                )
                if checkpoint.quantised:
                    made, bad = quantised_targets(checkpoint, target)
                    targets |= {each.slot.tensor: each for each in made}
                    inexact.setdefault(layer, set()).update(neurons[inside][bad].tolist())
                else:
                    targets[slot.tensor] = target
    return targets, {layer: bad for layer, bad in inexact.items() if bad}


def _refused(inexact: Inexact, checkpoint: Checkpoint) -> EditError:
    listed = [f"{layer}.{neuron}" for layer, neurons in sorted(inexact.items()) for neuron in sorted(neurons)]
    more = f" and {len(listed) - 20} more" if len(listed) > 20 else ""
    return EditError(
        f"{checkpoint.path} is quantised ({', '.join(checkpoint.formats)}), and {len(listed)} neurons cannot take "
        f"their factor exactly (layer.neuron): {', '.join(listed[:20])}{more}. Pass --skip-inexact to "
        "leave them out, or a factor that is a power of two"
    )
