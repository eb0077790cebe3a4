"""What the tokens of a packed row may see: several sequences stand side by side in one row, and none sees another.

transformers applies such a mask unchanged for every architecture of `families`. Where a model attends within a sliding
window or within a token's chunk, the mask applies that limit by position as well.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .widening import computed_in


def attention_mask(model: Any, seen: np.ndarray, depth: np.ndarray, keys: np.ndarray) -> Tensor | dict:
    """The additive mask [1, 1, N, K], 0 or the least number; by kind of layer where a model has two.

    seen: [N, K], which keys each token may see, itself included; depth, keys: positions of the tokens, of the keys.
    """
    config = model.config.get_text_config()
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    weight, dtype = model.get_input_embeddings().weight, computed_in(model)

    def additive(seen: np.ndarray) -> Tensor:
        mask = torch.zeros(seen.shape, dtype=dtype, device=weight.device)
        return mask.masked_fill_(torch.from_numpy(~seen).to(weight.device), torch.finfo(dtype).min)[None, None]

    masks = {"full_attention": seen}
    if "sliding_attention" in kinds:
        masks["sliding_attention"] = seen & (np.subtract.outer(depth, keys) < (window or math.inf))
    if "chunked_attention" in kinds:
        masks["chunked_attention"] = seen & np.equal.outer(depth // chunk, keys // chunk)
    return {k: additive(m) for k, m in masks.items()} if len(kinds) > 1 else additive(masks[kinds.pop()])


def longest(model: Any) -> float:
    """Keys that a packed row may have, where attention goes by a token's index in the row and not by its position.

    GPT-Neo masks by index, beside the mask that it is given; Llama 4 scales the queries of layers without rotary
    positions, by 1 as long as the index plus one is below `floor_scale`.
    """
    config = model.config.get_text_config()
    if window := getattr(config, "window_size", None):
        return min(window, config.max_position_embeddings)
    scaled = getattr(config, "attn_temperature_tuning", False) and not all(config.no_rope_layers)
    return config.floor_scale - 1 if scaled else math.inf
