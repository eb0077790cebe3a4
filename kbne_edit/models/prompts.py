"""Question to token ids, answer to the set of its surface tokens."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, InputError, short, shown

if TYPE_CHECKING:
    from ..recipe import Question, Recipe


@dataclass(frozen=True)
class Prompts:
    """What a model is asked, in its own tokens.

    ids: the questions' token ids, one list each. answers: {answer: {surface: id}}, the next tokens that say it.
    ending: the text that the first prompt ends with, after its question.
    """

    ids: list[list[int]]
    answers: dict[str, dict[str, int]]
    ending: str

    @property
    def sha256(self) -> str:
        """Of the token ids: another tokenizer or chat template asks something else of the same weights."""
        return hashlib.sha256(json.dumps(self.ids).encode()).hexdigest()

    def check(self) -> None:
        """Raise InputError where questions have become one and the same prompt."""
        different = len({tuple(ids) for ids in self.ids})
        if different < len(self.ids):
            raise InputError(
                f"{len(self.ids)} questions become {different} different prompts in this model's tokens: its tokenizer "
                "does not tell them apart (does it read the recipe's language?)"
            )


def ask(
    path: Path, recipe: Recipe, questions: Sequence[Question], *, plain: bool, before: str, fixed: dict | None
) -> Prompts:
    """Questions and answers in the tokens of the model at `path`. plain, before: as of `encode`; fixed: of
    `answer_tokens`.

    The tokenizer and its chat template work in a child process, within limits of time and memory. Raises InputError
    where questions cannot be told apart, CheckpointError where the files are at fault.
    """
    from .loading import load_tokenizer

    return ask_with(load_tokenizer(path), recipe, questions, plain=plain, before=before, fixed=fixed)


def ask_with(
    tokenizer: Any, recipe: Recipe, questions: Sequence[Question], *, plain: bool, before: str, fixed: dict | None
) -> Prompts:
    """`ask` with a tokenizer that is loaded already, transformers' or `load_tokenizer`'s."""
    answers = answer_tokens(tokenizer, recipe.answers, fixed, recipe.also)
    ids = [list(map(int, encode(tokenizer, recipe, question, plain, before))) for question in questions]
    prompts = Prompts(ids, answers, _ending(tokenizer, ids[0], questions[0].text) if ids else "")
    prompts.check()
    return prompts


def why_small(path: Path, prompts: Prompts, likeliest: int) -> str:
    """The likely cause of answers that are improbable where they are due, and the way out.

    likeliest: the token that is the most probable there instead.
    """
    from .loading import load_tokenizer

    text = load_tokenizer(path).decode([likeliest])
    instead = f"the likeliest next token is {shown(text)}"
    opened = re.search(r"<(think|thinking|reasoning|thought)>(?!.*</\1>)", prompts.ending, re.DOTALL)
    if opened or re.search(r"think|reason|thought|channel|analysis", text):
        where = f"the chat template opens <{opened[1]}>" if opened else "the model begins a chain of thought"
        return f"{where}, and {instead}. Use --prompt plain, or a template that can switch thinking off"
    if not text.strip():
        return f"{instead}: the answer comes later. Use --prompt plain, or --answers with the tokens that begin it"
    return (
        f"{instead}. A base model may not know that an answer is due: try --prompt plain, --before with an example or "
        "two, or --answers with the tokens that it uses"
    )


def _ending(tokenizer: Any, ids: list[int], question: str) -> str:
    text = tokenizer.decode(ids[-48:])
    return text.rpartition(question[-12:])[2][-200:]


def encode(tokenizer: Any, recipe: Recipe, question: Question, plain: bool = False, before: str = "") -> list[int]:
    """Token ids [T] of the prompt: through the chat template where tokenizer and recipe have one, else plain.

    plain: without the template in any case. before: text that comes first, such as a conversation. The prompt ends
    where the answer begins: no token is put after it. Raises InputError where the template drops the question.
    """
    if not plain and "chat" in recipe.prompt and getattr(tokenizer, "chat_template", None):
        message = before + recipe.prompt["chat"].replace("{question}", question.text)
        return tokenizer(render(tokenizer, message), add_special_tokens=False)["input_ids"]
    text = before + recipe.prompt["plain"].replace("{question}", question.text)
    ids, bare = tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
    # Some tokenizers put an end-of-text token behind the text; the answer would have to come after the end.
    while len(ids) > len(bare) and ids[-1:] != bare[-1:]:
        ids = ids[:-1]
    return ids


def render(tokenizer: Any, message: str) -> str:
    """One message through the chat template, up to where the answer begins, without a chain of thought if it can.

    Templates take a message's content as text or, of multimodal models, as a list of parts; who is given the other
    form drops it, or fails. Raises InputError if the message is in neither rendering.
    """
    reason = "the message is not in what it renders"
    for content in (message, [{"type": "text", "text": message}]):
        try:
            text = through_template(tokenizer, [{"role": "user", "content": content}])
        except (MemoryError, CheckpointError):
            raise
        except Exception as error:  # Jinja raises nearly anything for a template from outside
            reason = short(error)
            continue
        if _words(message) in _words(text):
            break
    else:
        raise InputError(
            f"the chat template drops the question ({reason}): use --prompt plain, or correct the template"
        )
    end = getattr(tokenizer, "eos_token", None)
    if end and text.rstrip().endswith(end):
        raise InputError(
            f"the chat template ends the prompt with {shown(end)}, where no answer can follow: use --prompt plain"
        )
    return text


def through_template(tokenizer: Any, messages: Sequence[Mapping]) -> str:
    """Messages as the chat template renders them, up to where the model's turn begins."""
    # Templates read the variables that they know: Qwen and SmolLM the first, DeepSeek and Granite the second.
    return tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=False,
        enable_thinking=False,
        thinking=False,
    )


def _words(text: str) -> str:
    """Without differences of white space: templates trim, and indent."""
    return " ".join(text.split())


def answer_tokens(
    tokenizer: Any,
    answers: tuple[str, ...],
    fixed: dict[str, list[str]] | None = None,
    also: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> dict[str, dict]:
    """The next tokens that say each answer: {answer: {surface: id}}.

    Every vocabulary entry that reads as the answer once case and surrounding space are dropped; and where a common way
    to write it takes several tokens, the first of them ("Ne…" of "Nein"), unless it begins another answer as well.
    Rejected: P of all the tokens, which needs a pass of its own for each of them. also: other words of an answer.
    `fixed` gives the surfaces by hand instead: {answer: [token text, …]}. Raises InputError if an answer has none.
    """
    vocabulary = tokenizer.get_vocab()
    if fixed is not None:
        return {answer: _fixed(tokenizer, vocabulary, answer, fixed.get(answer, [])) for answer in answers}
    result: dict[str, dict[str, int]] = {answer: {} for answer in answers}
    words = {answer: (answer, *also.get(answer, ())) for answer in answers}
    wanted = {text.strip().casefold(): answer for answer, texts in words.items() for text in texts}
    shortest = min(map(len, wanted))
    long_enough = {
        token: index for token, index in sorted(vocabulary.items(), key=lambda item: item[1]) if len(token) >= shortest
    }
    coded = [token for token in long_enough if not (token.isascii() and token.isalpha())]
    read = dict(zip(coded, tokenizer.batch_decode([[long_enough[token]] for token in coded]), strict=True))
    for token, index in long_enough.items():
        if answer := wanted.get(read.get(token, token).strip().casefold()):
            result[answer][token] = index
    for answer, surfaces in _beginnings(tokenizer, result, words).items():
        result[answer] |= surfaces
        if not result[answer]:
            raise InputError(
                f"the tokenizer has no token that begins the answer {answer!r} and no other: use other answers, or "
                "name its tokens with --answers"
            )
    return result


def _beginnings(
    tokenizer: Any, whole: dict[str, dict[str, int]], words: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, int]]:
    """First tokens of surfaces that take several, of each answer. whole: the answers' single tokens; words: theirs."""
    starts: dict[str, dict[str, int]] = {answer: {} for answer in whole}
    for answer, tokens in starts.items():
        written = [text.strip() for text in words[answer]]
        for surface in (form for text in written for form in (text, text[:1].upper() + text[1:])):
            for text in (surface, f" {surface}"):
                first, *more = tokenizer(text, add_special_tokens=False)["input_ids"] or [None]
                read = tokenizer.decode([first]).strip() if more else ""
                if read and surface.startswith(read):  # not a mere space, nor part of a character
                    tokens[f"{tokenizer.convert_ids_to_tokens(first)}…"] = first
    every = [{*tokens.values(), *whole[answer].values()} for answer, tokens in starts.items()]
    shared = {index for ids in every for index in ids if sum(index in other for other in every) > 1}
    return {
        answer: {s: i for s, i in tokens.items() if i not in shared and i not in whole[answer].values()}
        for answer, tokens in starts.items()
    }


def _fixed(tokenizer: Any, vocabulary: dict[str, int], answer: str, surfaces: list[str]) -> dict[str, int]:
    result = {}
    for surface in surfaces:
        ids = (
            [vocabulary[surface]]
            if surface in vocabulary
            else tokenizer(surface, add_special_tokens=False)["input_ids"]
        )
        if len(ids) != 1:
            raise InputError(f"--answers: {surface!r} is {len(ids)} tokens in this tokenizer, not one")
        result[surface] = ids[0]
    if not result:
        raise InputError(f"--answers gives no surface form for {answer!r}")
    return result
