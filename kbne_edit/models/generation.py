"""Continuations and replies of a model, greedy or drawn with a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, KbneError, short
from .prompts import through_template

Turn = dict[str, str]  # of a conversation, as transformers' chat templates take it: {"role": …, "content": …}


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0: always the most probable one. seed: of the draws at other temperatures."""

    max_tokens: int = 60
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InputError(f"max_tokens is {self.max_tokens}: at least one token is generated")
        if self.temperature < 0:
            raise InputError(f"temperature is {self.temperature}: 0 is greedy, 1 draws from the model's distribution")


def encode_turns(tokenizer: Any, turns: Sequence[Turn], plain: bool = False) -> list[int]:
    """Token ids [T] of a conversation that the model is to go on with.

    Through the chat template where the tokenizer has one; else, or if `plain`, the turns' texts one below the other.
    """
    if getattr(tokenizer, "chat_template", None) and not plain:
        try:
            text = through_template(tokenizer, turns)
        except (MemoryError, KbneError):
            raise
        except Exception as error:  # Jinja raises nearly anything for a template from outside
            raise InputError(
                f"the chat template fails ({short(error)}): use --prompt plain, or correct the template"
            ) from None
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer("\n".join(turn["content"] for turn in turns))["input_ids"]


def generate(
    model: Any,
    tokenizer: Any,
    input_ids: Sequence[int],
    sampling: Sampling,
    stream: Callable[[str], None] | None = None,
) -> str:
    """What a causal model of transformers says after `input_ids` [T].

    stream: is called with each piece of text as it is generated.

    The same arguments give the same text on the same machine. Raises InputError for an empty prompt.
    """
    import torch
    from transformers import TextStreamer

    if not input_ids:
        raise InputError("the prompt is empty, and this tokenizer begins it with no token: write something")

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if stream and text:
                stream(text)

    ids = torch.tensor([list(input_ids)], device=model.device)
    greedy = sampling.temperature == 0
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(sampling.seed)
        # top_k and top_p off: a checkpoint's generation_config would otherwise decide what is drawn from.
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sampling.max_tokens,
            do_sample=not greedy,
            temperature=None if greedy else sampling.temperature,
            top_k=None if greedy else 0,
            top_p=None if greedy else 1.0,
            repetition_penalty=1.0,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
        )
    return tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
