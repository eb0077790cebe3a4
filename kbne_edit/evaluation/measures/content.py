"""The content of the measures: YAML of the package, and its encoding for a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from ...yamlfile import read_yaml
from ..datafiles import NoDataError

_FOLDER = Path(__file__).parent / "data"
_UNREAD = 0.1  # share of unknown tokens above which a tokenizer cannot read a text


@dataclass(frozen=True)
class Prompt:
    """A prompt. chat: the user's message; plain: the whole prompt for a base model."""

    chat: str
    plain: str

    @classmethod
    def from_dict(cls, data: object) -> Prompt:
        """Raises InputError unless both are texts."""
        if not isinstance(data, dict) or set(data) != {"chat", "plain"}:
            raise InputError("prompt needs exactly chat and plain")
        return cls(text(data["chat"], "prompt.chat"), text(data["plain"], "prompt.plain"))

    def encode(self, tokenizer: Any, fields: Mapping[str, str]) -> list[int]:
        """Token ids [T], with the chat template if the tokenizer has one."""
        from ...models.prompts import render

        if getattr(tokenizer, "chat_template", None):
            return tokenizer(render(tokenizer, fill(self.chat, fields)), add_special_tokens=False)["input_ids"]
        return tokenizer(fill(self.plain, fields))["input_ids"]

    def reply(self, tokenizer: Any, words: str) -> list[int]:
        """Token ids of a reply to the encoded prompt: after a plain prompt it begins with a space."""
        spaced = words if getattr(tokenizer, "chat_template", None) else f" {words}"
        return tokenizer(spaced, add_special_tokens=False)["input_ids"]


def read_content(name: str, language: str) -> dict:
    """The content of a measure in a language. Raises NoDataError if the package has none."""
    path = _FOLDER / f"{name}.{language}.yaml"
    if not path.is_file():
        raise NoDataError(f"{name}: there is none in the language {language}")
    data, _ = read_yaml(path)
    if not isinstance(data, dict):
        raise InputError(f"{path} is not a mapping")
    return data


def fill(template: str, fields: Mapping[str, str]) -> str:
    """The template with its {fields} filled in, without recursion."""
    pieces = template.split("{")
    result = [pieces[0]]
    for piece in pieces[1:]:
        name, brace, rest = piece.partition("}")
        result.append(f"{fields[name]}{rest}" if brace and name in fields else "{" + piece)
    return "".join(result)


def capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def text(value: object, where: str) -> str:
    """Raises InputError unless the value is text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where} must be text")
    return value


def texts(value: object, where: str, least: int = 1) -> tuple[str, ...]:
    """Raises InputError unless the value lists different texts, `least` of them or more."""
    if not isinstance(value, list) or len(value) < least or len(set(map(str, value))) < len(value):
        raise InputError(f"{where} must list {least} different texts or more")
    return tuple(text(item, f"{where}[{i}]") for i, item in enumerate(value))


def mapping(value: object, where: str) -> dict:
    """Raises InputError unless the value is a mapping that is not empty."""
    if not isinstance(value, dict) or not value:
        raise InputError(f"{where} must be a mapping")
    return value


def require_readable(name: str, tokenizer: Any, words: Sequence[str]) -> None:
    """Raise NoDataError for a tokenizer that does not know the words (the demo's knows few)."""
    if tokenizer.unk_token_id is None:
        return
    ids = [token for sentence in words for token in tokenizer(sentence, add_special_tokens=False)["input_ids"]]
    if ids.count(tokenizer.unk_token_id) > _UNREAD * len(ids):
        raise NoDataError(f"{name}: the model's tokenizer cannot read its texts")


def logsum(values: Sequence[float] | np.ndarray) -> float:
    """Log-sum-exp: the log-probability of any of several events."""
    return float(np.logaddexp.reduce(np.asarray(values, float)))
