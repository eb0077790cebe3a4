"""What a fold does, before it is done: which neurons of which tensors, by which factors, in which files.

W_down (factor_i h_i) = (W_down with column i scaled by factor_i) h. Each stored weight becomes the float32 product,
rounded once to its own dtype (arXiv:2601.21864 scales h at run time; here the weights are).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..disk.checkpoint import Checkpoint
from ..disk.dtypes import from_float, storage, to_float
from ..disk.sharding import NewShard, reshard
from ..disk.slots import Slot
from ..disk.tensors import TensorInfo
from ..edit import Edit
from ..errors import EditError
from ..families import end


@dataclass(frozen=True)
class Target:
    """What happens to one tensor. index: neurons along the slot's axis, [k]; factors: float32 [k].

    expert: which expert each belongs to, [k], where the tensor stacks all experts. values: what is put in place of the
    products, in the layout of the undo file (a delta brings its own).
    """

    slot: Slot
    index: np.ndarray
    factors: np.ndarray
    expert: np.ndarray | None = None
    values: np.ndarray | None = None

    @property
    def neurons(self) -> np.ndarray:
        """Which of the slot's neurons change, [k]."""
        return self.index if self.expert is None else self.expert * self.slot.neurons + self.index

    @property
    def by_column(self) -> bool:
        """True if a neuron is a column of a matrix, so that every row of it changes."""
        return self.expert is None and self.slot.axis == 1

    def kept_shape(self, tensor: TensorInfo) -> tuple[int, ...]:
        """Shape of what the undo file keeps of this tensor: [D, k], [k, D] or [k]."""
        shape = list(tensor.shape)
        if self.expert is None:
            shape[self.slot.axis] = len(self.index)
            return tuple(shape)
        return (len(self.index), *(size for axis, size in enumerate(shape) if axis not in (0, self.slot.axis)))

    def product(self, old: np.ndarray, kept: slice | np.ndarray, tensor: TensorInfo) -> np.ndarray:
        """The float32 product of stored values with their factors, rounded once. Raises EditError where it overflows.

        old: a part of what the undo file keeps, [D, k] or [k, …]; kept: which of its rows those are.
        """
        if self.by_column:
            factors = self.factors[None, :]
        else:
            factors = self.factors[kept].reshape(-1, *[1] * (old.ndim - 1))
        wide = to_float(old, tensor.dtype)
        with np.errstate(over="ignore"):
            new = from_float(wide * factors.astype(wide.dtype), tensor.dtype)
        if not np.isfinite(to_float(new, tensor.dtype)[np.isfinite(wide)]).all():
            raise EditError(f"a factor makes weights of {tensor.name} overflow {tensor.dtype}: pass a smaller --factor")
        return new


@dataclass(frozen=True)
class Step:
    """One tensor of a plan, in numbers to print. file: that it will stand in; neurons: of their layer."""

    tensor: str
    file: str
    axis: int
    neurons: tuple[int, ...]
    factors: tuple[float, ...]

    def to_dict(self) -> dict:
        return {
            "tensor": self.tensor,
            "file": self.file,
            "axis": self.axis,
            "neurons": list(self.neurons),
            "factors": list(self.factors),
        }


@dataclass(frozen=True)
class Plan:
    """An edit of a checkpoint, worked out: a dry run prints it, the fold executes it, the proofs receive it.

    targets: {tensor: what happens to it}. files: to be written in place of the checkpoint's, () to keep its own.
    """

    checkpoint: Checkpoint
    edit: Edit
    targets: dict[str, Target]
    files: tuple[NewShard, ...] = ()

    @classmethod
    def of(cls, checkpoint: Checkpoint, edit: Edit, shard_size: int | str | None = None) -> Plan:
        """Work it out. shard_size: bytes a file, or text such as "5GB".

        Raises EditError if the edit does not fit, FamilyError, CheckpointError, InputError.
        """
        edit.check(checkpoint.layer_sizes(edit.site), checkpoint.fingerprint())
        return cls(checkpoint, edit, _targets(checkpoint, edit), reshard(checkpoint, shard_size))

    def __repr__(self) -> str:
        return f"Plan({self.edit.num_neurons} neurons in {len(self.targets)} tensors of {self.checkpoint.path})"

    @property
    def steps(self) -> tuple[Step, ...]:
        """The plan tensor by tensor."""
        files = {name: shard.path.name for name, (shard, _) in self.checkpoint.tensors.items()}
        files |= {name: file.name for file in self.files for name in file.tensors}
        return tuple(
            Step(
                tensor=name,
                file=files[name],
                axis=target.slot.axis,
                neurons=tuple((target.slot.offset + target.neurons).tolist()),
                factors=tuple(target.factors.tolist()),
            )
            for name, target in self.targets.items()
        )

    def with_columns(self, columns: dict[str, np.ndarray]) -> Plan:
        """The same, with these values put in place of products. columns: as `stored_columns` reads them."""
        targets = {name: replace(target, values=columns[name]) for name, target in self.targets.items()}
        return replace(self, targets=targets)

    def to_dict(self) -> dict:
        return {"steps": [step.to_dict() for step in self.steps], "files": [file.name for file in self.files]}


def _targets(checkpoint: Checkpoint, edit: Edit) -> dict[str, Target]:
    slots = checkpoint.slots(edit.site)
    targets = {}
    for layer, factors in edit.factors.items():
        neurons = np.fromiter(factors, np.int64)
        values = np.fromiter(factors.values(), np.float32)
        for slot in slots[layer]:
            inside = (neurons >= slot.offset) & (neurons < end([slot]))
            if inside.any():
                storage(checkpoint.tensors[slot.tensor][1].dtype, slot.tensor)
                expert, index = np.divmod(neurons[inside] - slot.offset, slot.neurons)
                targets[slot.tensor] = Target(slot, index, values[inside], expert if slot.experts else None)
    return targets
