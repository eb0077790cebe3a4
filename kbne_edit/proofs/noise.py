"""The rounding noise of a fold, simulated as noise on the outputs of the edited projections.

Rounding factor * w to the stored dtype has an error of at most u |factor * w|, where u is half the dtype's epsilon,
independently for each weight. So output j of an edited projection moves by approximately a normal variable of variance
(u^2 / 3) sum_i (w_ji factor_i h_i)^2 over the edited neurons i. This variable is added, drawn from a seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..edit import Edit
from ..families import Site
from ..models.experts import projection
from ..models.hooks import replaced
from ..models.places import Place, places


@contextmanager
def rounding_noise(model: nn.Module, edit: Edit, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Within the context (and within `hooked`) `model` has the noise of weights rounded to `dtype`."""
    with ExitStack() as stack:
        for layer, factors in edit.factors.items():
            for place in places(model, edit.site)[layer]:
                size = place.neurons * (place.experts or 1)
                edited = {n - place.offset: f for n, f in factors.items() if 0 <= n - place.offset < size}
                if edited:
                    noise = _Noise(place, edit.site, edited, torch.finfo(dtype).eps / 2, 1000 * seed + layer)
                    stack.enter_context(noise.added())
        yield


class _Noise:
    """Noise on the output of one place. factors: {neuron of the place: factor}; unit: u."""

    def __init__(self, place: Place, site: Site, factors: dict[int, float], unit: float, seed: int):
        self._place, self._site, self._unit = place, site, unit / 3**0.5
        self._index, self._scale = torch.tensor(list(factors)), torch.tensor(list(factors.values()))
        self._generator = torch.Generator().manual_seed(seed)

    @contextmanager
    def added(self) -> Iterator[None]:
        if self._place.experts:
            with self._added_to_experts():
                yield
            return
        handle = self._place.module.register_forward_hook(lambda _, args, output: self._dense(args[0], output))
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _added_to_experts(self) -> Iterator[None]:
        """The hooks replace the experts' forward pass: use the same one, with access to its inputs and outputs."""
        hooks = vars(self._place.module)["forward"]
        with replaced([self._place.module], partial(hooks.func, *hooks.args, **hooks.keywords, after=self._expert)):
            yield

    def _dense(self, x: Tensor, output: Tensor) -> Tensor:
        module: Any = self._place.module
        weight = module.weight.float() if hasattr(module, "nf") else module.weight.float().T  # [in, out]
        index = self._index if self._site == "down" else self._index + self._place.start
        return self._moved(output, self._deviation((x, output), weight, index, self._scale))

    def _expert(self, expert: int, x: Tensor, output: Tensor) -> Tensor:
        weight = projection(self._place.module, expert, self._site).float()
        mine = self._index // self._place.neurons == expert
        index = self._index[mine] % self._place.neurons
        return self._moved(output, self._deviation((x, output), weight, index, self._scale[mine]))

    def _deviation(self, passed: tuple[Tensor, Tensor], weight: Tensor, index: Tensor, scale: Tensor) -> Tensor:
        """Standard deviation of each output, in units of u. passed: input and output of the projection; weight: [in,
        out]; index: of the neurons among its inputs (site down) or outputs; scale: their factors.
        """
        x, output = passed[0].float(), passed[1]
        if self._site == "down":  # x is scaled already
            return (x[..., index].square() @ weight[index].square()).sqrt()
        deviation = torch.zeros_like(output, dtype=torch.float32)
        deviation[..., index] = (x.square() @ weight[:, index].square()).sqrt() * scale.abs()
        return deviation

    def _moved(self, output: Tensor, deviation: Tensor) -> Tensor:
        noise = torch.randn(deviation.shape, generator=self._generator) * self._unit
        return (output.float() + deviation * noise).to(output.dtype)
