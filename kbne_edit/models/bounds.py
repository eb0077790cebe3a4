"""What a model can be asked: token ids that it has, positions that it has, and outputs that are numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")


def check_tokens(model: Any, ids: Sequence[int], positions: Sequence[int]) -> None:
    """Raise InputError where the model has no embedding for a token, or none for its position. Both: [N]."""
    known, largest = len(model.get_input_embeddings().weight), max(ids, default=0)
    if largest >= known:
        raise InputError(
            f"the tokenizer gives token {largest}, but the model has embeddings for {known} tokens (0 to {known - 1}): "
            "the tokenizer is of another model, or tokens were added without resizing the embeddings"
        )
    config = model.config.get_text_config()
    most = next((value for key in _POSITIONS if isinstance(value := getattr(config, key, None), int)), None)
    if most and max(positions, default=0) >= most:
        raise InputError(
            f"a text has {max(positions) + 1} tokens, the model takes {most}: shorten the text, or use another model"
        )


def check_numbers(logits: Tensor, model: Any, whose: str = "the model") -> None:
    """Raise InputError where logits are NaN or infinite: of this model, in the dtype that it computes in."""
    import torch

    from .widening import computed_in

    if not torch.isfinite(logits).all():
        kind = "NaN" if torch.isnan(logits).any() else "infinite values"
        dtype = str(computed_in(model)).removeprefix("torch.")
        cure = "its weights are damaged, or too large" if dtype == "float32" else "float32 may hold its activations"
        raise InputError(f"{whose} gives {kind} in place of logits, in {dtype}: {cure}")
