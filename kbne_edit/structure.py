"""Infers where an architecture outside the table has its feed-forward neurons, from the modules of transformers.

transformers builds the model without weights. Its decoder is the longest list of layers. In each layer, the one linear
projection to the hidden size that is not part of attention is the down-projection.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from .errors import FamilyError, short, shown

if TYPE_CHECKING:
    from torch import nn

# Classes whose projections to the hidden size are not down-projections.
_MIXERS = re.compile(r"Attention|Attn|Mamba|Mixer|Conv(?!1D)|SSM|DeltaNet|Recurrent|RWKV|Retention|Router|Gate$|Norm")


_MOST, _MOST_WIDE = 4096, 1 << 24  # of layers, heads, experts; of sizes and vocabularies


class Structure(NamedTuple):
    """layers: path of the layer list below the causal model; down: path of the down-projection below a layer; conv1d:
    it is GPT-2's Conv1D, [in, out].
    """

    layers: str
    down: str
    conv1d: bool


def structure_of(config: dict) -> Structure:
    """The structure of a causal model that transformers can build. config: what config.json holds.

    Raises FamilyError with the reason if transformers cannot build it, or it has another structure.
    """
    return _structure(json.dumps(config, sort_keys=True))


@lru_cache(maxsize=8)
def _structure(config: str) -> Structure:
    model = _built(json.loads(config))
    if any(hasattr(module, "build_alibi_tensor") for module in model.modules()):
        raise FamilyError("its table of positions (ALiBi) is made for the prompt's batch, and ours is larger")
    lists = _layer_lists(model)
    if not lists:
        raise FamilyError("it has no list of decoder layers")
    path, layers = max(lists.items(), key=lambda item: len(item[1]))
    closing = [_closing(layer) for layer in layers]
    if len(set(closing)) != 1 or len(closing[0]) != 1:
        candidates = sorted({name for names in closing for name, _ in names})
        raise FamilyError(
            "its layers do not close with the same single projection in all of them; candidates: "
            f"{', '.join(candidates) or 'none'}"
        )
    ((down, conv1d),) = closing[0]
    if path.endswith("encoder.layer"):
        raise FamilyError("it is an encoder, as BERT's family spells it")
    return Structure(path, down, conv1d)


def _built(config: dict) -> nn.Module:
    """The model without weights, from transformers' own classes: no code from a checkpoint."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    for key, value in config.items():  # each layer, head and expert is built: a forged count would take forever
        most = _MOST if re.search(r"layer|block|head|expert|depth|group", key) else _MOST_WIDE
        if isinstance(value, int) and value > most:
            raise FamilyError(f"config.json says {shown(key)}: {shown(value)}, which no model has")
    try:
        settings = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings))
    except Exception as error:  # a configuration from outside can make transformers raise nearly anything
        raise FamilyError(f"transformers cannot build it: {short(error)}") from None


def _layer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Lists of layers that contain attention (or another mixer): {path: list}."""
    from torch import nn

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and any(_mixes(layer) for layer in module)
        and not re.search(r"vision|visual|audio", name)
    }


def _mixes(layer: nn.Module) -> bool:
    return any(_MIXERS.search(type(inner).__name__) for inner in layer.modules() if inner is not layer)


def _closing(layer: nn.Module) -> tuple[tuple[str, bool], ...]:
    """(path, is Conv1D) of the projections back to the hidden size that belong to no mixer. Raises FamilyError."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if stacked := [name for name, parameter in layer.named_parameters() if parameter.ndim == 3 and "conv" not in name]:
        raise FamilyError(f"it stacks experts in one tensor ({shown(stacked[0])}), in a way that is not known")
    mixers = [name for name, module in layer.named_modules() if name and _MIXERS.search(type(module).__name__)]
    projections = []
    for name, module in layer.named_modules():
        if any(name == mixer or name.startswith(f"{mixer}.") for mixer in mixers):
            continue
        if isinstance(module, nn.Linear):
            projections.append((name, False, module.in_features, module.out_features))
        elif isinstance(module, Conv1D):
            projections.append((name, True, module.nx, module.nf))
    return tuple(
        (name, conv) for name, conv, size_in, size_out in projections if _closes(size_in, size_out, projections)
    )


def _closes(size_in: int, size_out: int, projections: list[tuple[str, bool, int, int]]) -> bool:
    """True if other projections of the layer lead from `size_out` to `size_in` (or to twice that: gate and up)."""
    opens = [other_out for _, _, other_in, other_out in projections if other_in == size_out]
    return size_in > size_out and (size_in in opens or 2 * size_in in opens)
