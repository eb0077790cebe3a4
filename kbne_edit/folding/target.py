"""What happens to one tensor: products with factors, or values that replace them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..disk.slots import Slot
from ..disk.tensors import TensorInfo
from ..errors import EditError


@dataclass(frozen=True)
class Target:
    """What happens to one tensor. index: neurons along the slot's axis, [k]; factors: float32 [k] ([k, 2] where two
    neurons share a byte).

    expert: the expert of each, [k], where the tensor stacks all experts. values: what replaces the products, in the
    layout of the undo file (for a delta). unit: the largest relative error of a product in a quantised checkpoint, 0
    where all are exact.
    """

    slot: Slot
    index: np.ndarray
    factors: np.ndarray
    expert: np.ndarray | None = None
    values: np.ndarray | None = None
    unit: float = 0.0

    @property
    def neurons(self) -> np.ndarray:
        """Indices of the slot's neurons that change, [k]."""
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
        """The shape of this tensor in the undo file: [D, k], [k, D] or [k]."""
        shape = list(self.slot.shape(tensor))
        if self.expert is None:
            shape[self.slot.axis] = len(self.index)
            return tuple(shape)
        return (len(self.index), *(size for axis, size in enumerate(shape) if axis not in (0, self.slot.axis)))

    def product(self, old: np.ndarray, kept: slice | np.ndarray, tensor: TensorInfo) -> np.ndarray:
        """The float32 products of stored values with their factors, rounded once. Raises EditError if one overflows.

        old: rows of this tensor in the undo file, [D, k] or [k, …]; kept: which rows.
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
