"""What happens to one tensor: the products, or what takes their place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..disk.slots import Slot
from ..disk.tensors import TensorInfo
from ..errors import EditError


@dataclass(frozen=True)
class Target:
    """What happens to one tensor. index: neurons along the slot's axis, [k]; factors: float32 [k] (of two neurons that
    share a byte: [k, 2]).

    expert: which expert each belongs to, [k], where the tensor stacks all experts. values: what is put in place of the
    products, in the layout of the undo file (a delta brings its own). unit: the largest relative error of a product in
    a quantised checkpoint, 0 where all are exact.
    """

    slot: Slot
    index: np.ndarray
    factors: np.ndarray
    expert: np.ndarray | None = None
    values: np.ndarray | None = None
    unit: float = 0.0

    @property
    def neurons(self) -> np.ndarray:
        """Which of the slot's neurons change, [k]."""
        if self.factors.ndim == 2:  # two neurons share a byte
            assert self.expert is not None
            both = 2 * self.index[:, None] + np.arange(2) + (self.expert * self.slot.neurons)[:, None]
            return both[self.factors != 1]
        index = (self.index - self.slot.start) // self.slot.stride
        return index if self.expert is None else self.expert * self.slot.neurons + index

    @property
    def changes(self) -> np.ndarray:
        """The factor of each of `neurons`, [k]."""
        return self.factors[self.factors != 1] if self.factors.ndim == 2 else self.factors

    @property
    def where(self) -> tuple[slice | np.ndarray, ...]:
        """The neurons in the whole tensor, as an index."""
        if self.expert is not None:
            return (self.expert, *(slice(None),) * (self.slot.axis - 1), self.index)
        return (slice(None), self.index) if self.by_column else (self.index,)

    @property
    def by_column(self) -> bool:
        """True if a neuron is a column of a matrix, so that every row of it changes."""
        return self.expert is None and self.slot.axis == 1

    def kept_shape(self, tensor: TensorInfo) -> tuple[int, ...]:
        """Shape of what the undo file keeps of this tensor: [D, k], [k, D] or [k]."""
        shape = list(self.slot.shape(tensor))
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
            factors = self.factors[kept]
            factors = factors.reshape(len(factors), *[1] * (old.ndim - 1), *factors.shape[1:])
        numbers = self.slot.numbers(tensor)
        new = numbers.times(old, factors)
        if not np.isfinite(numbers.values(new)[np.isfinite(numbers.values(old))]).all():
            raise EditError(f"a factor makes weights of {tensor.name} overflow {tensor.dtype}: pass a smaller --factor")
        return new
