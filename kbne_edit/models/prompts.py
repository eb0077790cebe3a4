"""Question to token ids, answer to the set of its surface tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from ..recipe import Question, Recipe


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
    """The next tokens that say each answer: {answer: {surface: id}}.

    Every vocabulary entry that reads as the answer once case and surrounding space are dropped; and where a common way
    to write it takes several tokens, the first of them ("Ne…" of "Nein"), unless it begins another answer as well.
    Rejected: P of all the tokens, which needs a pass of its own for each of them. `fixed` gives the surfaces by hand
    instead: {answer: [token text, …]}. Raises InputError if an answer has none.
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
    for answer, surfaces in _beginnings(tokenizer, found).items():
        found[answer] |= surfaces
        if not found[answer]:
            raise InputError(
                f"the tokenizer has no token that begins the answer {answer!r} and no other: use other answers, or "
                "name its tokens with --answers"
            )
    return found


def _beginnings(tokenizer, whole: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """First tokens of surfaces that take several, of each answer. whole: the answers' single tokens."""
    starts: dict[str, dict[str, int]] = {answer: {} for answer in whole}
    for answer, found in starts.items():
        written = answer.strip()
        for surface in (written, written[:1].upper() + written[1:]):
            for text in (surface, f" {surface}"):
                first, *more = tokenizer(text, add_special_tokens=False)["input_ids"] or [None]
                read = tokenizer.decode([first]).strip() if more else ""
                if read and surface.startswith(read):  # not a mere space, nor part of a character
                    found[f"{tokenizer.convert_ids_to_tokens(first)}…"] = first
    every = [{*found.values(), *whole[answer].values()} for answer, found in starts.items()]
    shared = {index for ids in every for index in ids if sum(index in other for other in every) > 1}
    return {answer: {s: i for s, i in found.items() if i not in shared} for answer, found in starts.items()}


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
