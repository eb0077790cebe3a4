"""Ask: replies of an edited model and its base to the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from .disk.checkpoint import Checkpoint
from .edit import Edit
from .errors import InputError
from .hub.source import resolved
from .models.generation import Sampling, Turn, encode_turns, generate
from .models.hooks import hooked
from .models.loading import load_model, load_tokenizer
from .progress import say

if TYPE_CHECKING:
    from torch import nn

MOST_PROMPTS = 1000
Opener = Callable[[], AbstractContextManager["tuple[Speaker, ...]"]]


class ReplyJSON(TypedDict):
    """The models' replies to one prompt. base: null if only the edited model was asked."""

    prompt: str
    edited: str
    base: str | None


class AskJSON(TypedDict):
    """What `ask --json` prints."""

    replies: list[ReplyJSON]


@dataclass(frozen=True)
class Reply:
    """The models' replies to one prompt. base: None if only the edited model was asked."""

    prompt: str
    edited: str
    base: str | None

    def to_dict(self) -> ReplyJSON:
        return {"prompt": self.prompt, "edited": self.edited, "base": self.base}


@dataclass(frozen=True)
class Speaker:
    """A model and the name of its replies ("base" or "edited").

    edit: applied by hooks during generation; None: the model runs as it is.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    edit: Edit | None = None

    def reply(
        self,
        turns: Sequence[Turn],
        sampling: Sampling,
        plain: bool = False,
        stream: Callable[[str], None] | None = None,
    ) -> str:
        """The model's next turn in a conversation."""
        ids = encode_turns(self.tokenizer, turns, plain)
        with hooked(self.model, self.edit) if self.edit else nullcontext():
            return generate(self.model, self.tokenizer, ids, sampling, stream)


def ask(
    source: str,
    prompts: Sequence[str],
    *,
    against: str | None = None,
    edit: Edit | None = None,
    sampling: Sampling | None = None,
    plain: bool = False,
) -> tuple[Reply, ...]:
    """Replies of an edited model and of its base to each prompt, independently.

    source: an edited directory; with `edit`, the base, to which the edit is applied by hooks.
    against: the base of an edited directory (a path, ORG/NAME[@REVISION], or demo); None: no replies of the base.
    plain: skip the chat template. One model is in memory at a time.
    Raises InputError or a subclass.
    """
    if not prompts:
        raise InputError("there is no prompt to ask")
    if len(prompts) > MOST_PROMPTS:
        raise InputError(f"{len(prompts)} prompts are too many: at most {MOST_PROMPTS} are asked at once")
    sampling = sampling or Sampling()
    replies: dict[str, list[str]] = {}
    for open_speaker in openers(source, against, edit):
        with open_speaker() as speakers:
            for speaker in speakers:
                replies[speaker.name] = [
                    speaker.reply([{"role": "user", "content": prompt}], sampling, plain) for prompt in prompts
                ]
    base = replies.get("base", [None] * len(prompts))
    return tuple(Reply(*row) for row in zip(prompts, replies["edited"], base, strict=True))


def openers(source: str, against: str | None, edit: Edit | None) -> list[Opener]:
    """Contexts that load one model each; they yield the speakers that this model provides.

    Raises InputError if the arguments contradict each other.
    """
    if edit is not None:
        if against is not None:
            raise InputError("with an edit, the base is the model itself: leave out `against`")
        return [partial(_hooked_speakers, source, edit)]
    models = [] if against is None else [("base", against)]
    return [partial(_speaker, name, place) for name, place in [*models, ("edited", source)]]


@contextmanager
def _speaker(name: str, source: str) -> Iterator[tuple[Speaker, ...]]:
    with resolved(source, say) as place:
        yield (Speaker(name, *_loaded(place.path)),)


@contextmanager
def _hooked_speakers(source: str, edit: Edit) -> Iterator[tuple[Speaker, ...]]:
    with resolved(source, say) as place:
        model, tokenizer = _loaded(place.path)
        yield Speaker("base", model, tokenizer), Speaker("edited", model, tokenizer, edit)


def _loaded(path: Path) -> tuple[nn.Module, Any]:
    """The model in the dtype of its file, and its tokenizer."""
    import torch

    say(f"loading {path}")
    names = {tensor.dtype for _, tensor in Checkpoint.open(path).tensors.values()}
    dtype = torch.bfloat16 if "BF16" in names else torch.float16 if "F16" in names else torch.float32
    return load_model(path, dtype), load_tokenizer(path)
