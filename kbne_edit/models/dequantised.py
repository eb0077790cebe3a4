"""A quantised checkpoint as the plain model that it stands for, its matrices dequantised by their layouts.

Every projection is then an ordinary linear layer: hooks, gradients and noise work as on any other model, and no
library of the format is needed. What a format does to activations at run time is not part of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..disk.checkpoint import Checkpoint
from ..families import auto_class, text_part

if TYPE_CHECKING:
    import torch


def plain_config(config: Any) -> Any:
    """transformers' configuration without its quantisation."""
    for part in (config, getattr(config, "text_config", None)):
        for key in ("quantization_config", "compression_config"):
            if part is not None and getattr(part, key, None) is not None:
                delattr(part, key)
    return config


def load_dequantised(checkpoint: Checkpoint, config: Any, dtype: torch.dtype) -> tuple[Any, dict]:
    """The plain model, and transformers' report of what it loaded. config: transformers' configuration."""
    import torch
    from transformers.models.auto import modeling_auto

    together = auto_class(config.to_dict()) == "AutoModelForImageTextToText"
    classes = (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if together else modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    )
    weights = {name: torch.from_numpy(checkpoint.read_plain(name)).to(dtype) for name in checkpoint.plain_shapes}
    kind: Any = classes[type(config)]
    return kind.from_pretrained(
        None,
        config=plain_config(config),
        state_dict=weights,
        dtype=dtype,
        experts_implementation="eager",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )


def own_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that a quantised model computes in, as torch calls it."""
    for part in (checkpoint.config, text_part(checkpoint.config)):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) in ("bfloat16", "float16", "float32"):
                return part[key]
    return "bfloat16"
