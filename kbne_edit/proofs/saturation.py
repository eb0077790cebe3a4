"""Static activation scales: the edited h must fit the range that the quantiser was calibrated for.

A format with static activation scales divides the input of the down-projection by a fixed scale and clips the result.
So clipping can undo a factor above 1. The second proof cannot see that, because a hook before the quantiser is clipped
just the same. So h is measured on the proof's texts and the recipe's probes, and compared with the range.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..disk.checkpoint import Checkpoint
from ..disk.slots import slots
from ..errors import EditError

if TYPE_CHECKING:
    import torch

    from ..folding.plan import Plan

_PARTS = ("input_scale", "activation_scale")
_LARGEST = {"F8_E4M3": 448.0, "I8": 127.0}


def limits(checkpoint: Checkpoint) -> dict[int, dict[int, float]]:
    """The largest |h| that a static quantiser does not clip: {layer: {first neuron of a down-projection: limit}}."""
    layout = checkpoint.layout
    if layout is None:
        return {}
    result: dict[int, dict[int, float]] = {}
    for layer, places in slots(layout.shapes, checkpoint.config, "down").items():
        for place in places:
            matrix = layout.matrices.get(place.tensor)
            for part in _PARTS if matrix else ():
                if matrix and part in matrix.parts and "weight" in matrix.about:
                    scale = float(checkpoint.read_number(matrix.parts[part]))
                    largest = _LARGEST.get(matrix.about["weight"].dtype, 448.0)
                    result.setdefault(layer, {})[place.offset] = scale * largest
    return result


def check_activations(plan: Plan, texts: list[list[int]]) -> None:
    """Raise EditError if a factor pushes a neuron out of the range of a static quantiser. texts: token ids of prompts.

    Loads no model if no activation scale is static or no factor is above 1.
    """
    allowed = limits(plan.checkpoint)
    raised = any(abs(factor) > 1 for factor in plan.edit.distinct_factors)
    if not raised or not allowed.keys() & plan.edit.factors.keys():
        return
    import torch

    from ..models.loading import load_model

    largest = _largest(load_model(plan.checkpoint.path, torch.float32), plan, texts)
    faults = []
    for layer, factors in plan.edit.factors.items():
        for neuron, factor in factors.items():
            limit = _limit(allowed.get(layer, {}), neuron)
            reached = abs(factor) * float(largest[layer][neuron])
            if abs(factor) > 1 and limit is not None and reached > limit:
                faults.append(f"{layer}.{neuron} ({reached:.3g} of {limit:.3g})")
    if faults:
        raise EditError(
            f"{plan.checkpoint.path} clips the inputs of its down-projections at a static scale, and {len(faults)} "
            f"neurons (layer.neuron) leave that range on the probes: {', '.join(faults[:10])}. Pass a smaller "
            "--factor, or edit the unquantised model and calibrate it again"
        )


def _limit(by_offset: dict[int, float], neuron: int) -> float | None:
    below = [offset for offset in by_offset if offset <= neuron]
    return by_offset[max(below)] if below else None


def _largest(model: torch.nn.Module, plan: Plan, texts: list[list[int]]) -> dict[int, torch.Tensor]:
    """The largest |h| of each neuron of the edited layers over the texts, {layer: [F]}."""
    from contextlib import ExitStack

    import torch

    from ..families import end
    from ..models.hooks import tapped
    from ..models.places import places

    layers = places(model, "down")
    largest = {layer: torch.zeros(end(layers[layer])) for layer in plan.edit.factors}
    with ExitStack() as stack, torch.no_grad():
        for layer, record in largest.items():

            def tap(h: torch.Tensor, tokens: object, offset: int, record: torch.Tensor = record) -> None:
                if h.numel():
                    part = record[offset : offset + h.shape[-1]]
                    part.copy_(torch.maximum(part, h.abs().reshape(-1, h.shape[-1]).amax(0).float()))

            stack.enter_context(tapped(layers[layer], "down", tap))
        for ids in texts:
            model(torch.tensor([ids]))
    return largest
