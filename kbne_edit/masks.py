"""What the tokens of a packed row may see: several sequences stand side by side in one row, and none sees another.

transformers takes such a mask as it is, for every architecture of `families`. Where a model attends within a sliding
window, the window is cut by position too.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn


def attention_mask(model: nn.Module, seen: np.ndarray, depth: np.ndarray, keys: np.ndarray) -> Tensor | dict:
    """The additive mask [1, 1, N, K], 0 or the least number; by kind of layer where a model has two.

    seen: [N, K], which keys each token may see, itself included; depth, keys: positions of the tokens, of the keys.
    """
    config = model.config.get_text_config()
    window, kinds = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or ())
    weight = model.get_input_embeddings().weight

    def additive(seen: np.ndarray) -> Tensor:
        mask = torch.zeros(seen.shape, dtype=weight.dtype, device=weight.device)
        return mask.masked_fill_(torch.from_numpy(~seen).to(weight.device), torch.finfo(weight.dtype).min)[None, None]

    if not window or (kinds and "sliding_attention" not in kinds):
        return additive(seen)
    near = seen & (np.subtract.outer(depth, keys) < window)
    if len(kinds) > 1:
        return {"full_attention": additive(seen), "sliding_attention": additive(near)}
    return additive(near)


def longest(model: nn.Module) -> float:
    """Keys that a packed row may have: GPT-Neo masks by index, beside the mask that it is given."""
    config = model.config.get_text_config()
    window = getattr(config, "window_size", None)
    return min(window, config.max_position_embeddings) if window else math.inf
