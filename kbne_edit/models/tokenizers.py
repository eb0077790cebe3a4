"""A foreign tokenizer at work in a child process, within limits, for as long as it is needed.

Rejected: a trial in a child before the use in this process. A normaliser may explode at one word, a pattern at one
text, and no trial has them all. A request takes about .1 ms.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, short
from .confined import BYTES, SECONDS, Worker

_MOST_TOKENS = 100  # a character: it has four bytes at most, and its compatibility form 18 characters
_ATTRIBUTES = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "unk_token_id",
    "eos_token",
    "unk_token",
    "chat_template",
    "vocab_size",
    "model_max_length",
)


class _Calendar(datetime.datetime):
    """For chat templates that write today's date (strftime_now): always the same, or a prompt changed every day."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> _Calendar:
        return cls(2025, 1, 1, tzinfo=tz)


class Tokenizer:
    """What this package needs of a tokenizer of transformers, under the same names.

    Every method raises CheckpointError where the child exceeds a limit (`Worker`) or fails, and the next call starts
    another child.
    """

    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    unk_token_id: int | None
    eos_token: str | None
    unk_token: str | None
    chat_template: Any
    vocab_size: int
    model_max_length: int

    def __init__(self, path: Path, read: Callable[[Path], Any], *, seconds: int = SECONDS, memory: int = BYTES) -> None:
        """read: gives transformers' tokenizer of `path`; it is called in the child."""
        self._path = path
        self._start = lambda: Worker(path, lambda: _Answers(read(path)), seconds=seconds, memory=memory)
        self._worker = self._start()
        for name, value in self._ask("attributes").items():
            setattr(self, name, value)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """{"input_ids": [T]}."""
        ids = self._ask("encode", text, add_special_tokens)
        if len(ids) > _MOST_TOKENS * (len(text) + 1):
            raise CheckpointError(
                f"the tokenizer of {self._path} makes {len(ids)} tokens of {len(text)} characters (the limit is "
                f"{_MOST_TOKENS} a character): use another model, or repair it"
            )
        return {"input_ids": ids}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids [T]."""
        return self(text, add_special_tokens)["input_ids"]

    def decode(self, ids: Any, skip_special_tokens: bool = False, **_: object) -> str:
        """The text of token ids [T], a list or a tensor, or of one."""
        if ids is None:
            raise CheckpointError(
                f"the tokenizer of {self._path} has no token that begins or ends a text: name one in "
                "tokenizer_config.json (bos_token, eos_token)"
            )
        return self.batch_decode([[ids] if isinstance(ids, int) else ids], skip_special_tokens)[0]

    def batch_decode(self, rows: Sequence[Any], skip_special_tokens: bool = False) -> list[str]:
        """The texts of rows of token ids, [N]."""
        return self._ask("decode", [list(map(int, row)) for row in rows], skip_special_tokens)

    def apply_chat_template(self, messages: Sequence[Mapping], **settings: object) -> str:
        """The rendered text. settings: transformers'; its `tokenize` must be False.

        Raises ValueError where the template fails, in place of anything that Jinja may raise.
        """
        text, error = self._ask("render", list(messages), settings)
        if error:
            raise ValueError(error)
        return text

    def add_special_tokens(self, tokens: Mapping[str, str]) -> None:
        """Nothing: lm-eval wants a token to pad with, and no row is padded here."""

    def get_vocab(self) -> dict[str, int]:
        return self._ask("vocabulary")

    def convert_ids_to_tokens(self, index: int) -> str:
        return self._ask("token", int(index))

    def _ask(self, *request: object) -> Any:
        if not self._worker.usable:
            self._worker = self._start()
        return self._worker.ask(*request)


class _Answers:
    """The child's side of it."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers.utils import chat_template_utils

        # The only way in: values that a caller gives to a template are made text, functions too. This process is ours.
        chat_template_utils.datetime = _Calendar  # type: ignore[attr-defined, misc]
        self.tokenizer = tokenizer

    def __call__(self, what: str, *args: Any) -> Any:
        return getattr(self, what)(*args)

    def attributes(self) -> dict:
        return {name: getattr(self.tokenizer, name, None) for name in _ATTRIBUTES}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(map(int, self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]))

    def decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [self.tokenizer.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]

    def render(self, messages: list[dict], settings: dict) -> tuple[str, str]:
        """The text, and the error of a template that fails."""
        try:
            return self.tokenizer.apply_chat_template(messages, **settings), ""
        except MemoryError:
            raise
        except Exception as error:  # Jinja raises nearly anything for a template from outside
            return "", short(error)

    def vocabulary(self) -> dict[str, int]:
        return self.tokenizer.get_vocab()

    def token(self, index: int) -> str:
        return self.tokenizer.convert_ids_to_tokens(index)
