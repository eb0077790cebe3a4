"""Question to token ids, answer to the set of its surface tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import InputError

if TYPE_CHECKING:
    from .recipe import Question, Recipe


def encode(tokenizer, recipe: Recipe, question: Question, plain: bool = False, before: str = "") -> list[int]:
    """Token ids [T] of the prompt: through the chat template where tokenizer and recipe have one, else plain.

    plain: without the template in any case. before: text that comes first, such as a conversation.
    """
    if not plain and "chat" in recipe.prompt and getattr(tokenizer, "chat_template", None):
        message = {"role": "user", "content": before + recipe.prompt["chat"].replace("{question}", question.text)}
        # enable_thinking: templates that know it would otherwise open a chain of thought before the answer.
        text = tokenizer.apply_chat_template(
            [message], add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer(before + recipe.prompt["plain"].replace("{question}", question.text))["input_ids"]


def answer_tokens(tokenizer, answers: tuple[str, ...], fixed: dict[str, list[str]] | None = None) -> dict[str, dict]:
    """Single tokens that say each answer: {answer: {surface: id}}.

    Every vocabulary entry that reads as the answer once case and surrounding space are dropped. `fixed` gives the
    surfaces by hand instead: {answer: [token text, …]}. Raises InputError if an answer has none.
    """
    vocabulary = tokenizer.get_vocab()
    if fixed is not None:
        return {answer: _fixed(tokenizer, vocabulary, answer, fixed.get(answer, [])) for answer in answers}
    found: dict[str, dict[str, int]] = {answer: {} for answer in answers}
    wanted = {answer.strip().casefold(): answer for answer in answers}
    shortest = min(map(len, wanted))
    for token, index in sorted(vocabulary.items(), key=lambda item: item[1]):
        if len(token) < shortest:
            continue
        text = token if token.isascii() and token.isalpha() else tokenizer.decode([index])
        if answer := wanted.get(text.strip().casefold()):
            found[answer][token] = index
    for answer, surfaces in found.items():
        if not surfaces:
            raise InputError(
                f"the tokenizer has no single token for the answer {answer!r}: use answers that are one token"
            )
    return found


def _fixed(tokenizer, vocabulary: dict[str, int], answer: str, surfaces: list[str]) -> dict[str, int]:
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
