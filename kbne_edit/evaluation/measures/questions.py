"""Short stories about two people of different groups, in BBQ's design (arXiv:2110.08193), with stories of the package.

A block is a story in both orders of the people, with and without the deciding fact, with a negative and a positive
question: eight items, on which a model without errors has a bias score of 0. The order of the three options changes
from item to item. The answer is the most probable option.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from ..benchmark import Answer, Benchmark, sample
from ..figures import bbq_columns, bbq_figures
from .content import Prompt, capital, fill, mapping, read_content, require_readable, text, texts

BLOCK = 8
FIGURES = bbq_figures(
    0,
    "",
    "the two people and UNKNOWN are listed in changing order",
    "kbne-edit, docs/measures/questions.md; scores of BBQ, arXiv:2110.08193",
)


@dataclass(frozen=True)
class Story:
    """groups: the one that the stereotype links to the negative question, and the other."""

    type: str
    groups: tuple[str, str]
    facts: str
    tells: str
    negative: str
    positive: str

    @classmethod
    def from_dict(cls, data: object, where: str) -> Story:
        """Raises InputError where the story is not of this form."""
        fields = mapping(data, where)
        first, second = texts(fields.get("groups"), f"{where}.groups", 2)[:2]
        words = {
            key: text(fields.get(key), f"{where}.{key}") for key in ("type", "facts", "tells", "negative", "positive")
        }
        return cls(groups=(first, second), **words)


@dataclass(frozen=True)
class Item:
    """A question about a story. right, biased: indices in `options`."""

    story: str
    question: str
    options: tuple[str, str, str]
    right: int
    biased: int
    clear: bool
    type: str
    cluster: str


def questions_benchmark(language: str, tokenizer: Any, limit: int | None) -> Benchmark:
    """The stories of a language in whole blocks, at most `limit` items (but at least one block). Raises NoDataError."""
    data = read_content("questions", language)
    prompt, unknowns = Prompt.from_dict(data.get("prompt")), texts(data.get("unknown"), "unknown")
    stories = [Story.from_dict(story, f"stories {i + 1}") for i, story in enumerate(data["stories"])]
    require_readable("questions", tokenizer, [story.facts for story in stories])
    chosen = sample(len(stories), None if limit is None else max(limit // BLOCK, 1))
    items = [item for i in chosen for item in block(stories[i], unknowns[i % len(unknowns)], i)]
    pairs = []
    for item in items:
        listed = "; ".join(item.options)
        context = prompt.encode(tokenizer, {"story": item.story, "question": item.question, "options": listed})
        pairs += [(context, prompt.reply(tokenizer, option)) for option in item.options]

    def read(i: int, answers: list[Answer]) -> list[float]:
        item = items[i]
        answer = int(np.argmax([answer.logprob for answer in answers]))
        return bbq_columns(
            right=float(answer == item.right),
            biased=float(answer == item.biased),
            answered=float(item.options[answer] not in unknowns),
            clear=float(item.clear),
        )

    return Benchmark(
        name="questions",
        kind="bias",
        pairs=pairs,
        sizes=[3] * len(items),
        groups=[item.type for item in items],
        read=read,
        figures=FIGURES,
        clusters=[item.cluster for item in items],
    )


def block(story: Story, unknown: str, number: int) -> list[Item]:
    """The eight items of a story. number: of the story; it rotates the order of the options, as does the item."""
    items: list[Item] = []
    for order, clear, positive in product((0, 1), (False, True), (False, True)):
        first, second = story.groups[order], story.groups[1 - order]
        fields: Mapping[str, str] = {"a": first, "b": second, "A": capital(first), "B": capital(second)}
        told = f"{story.facts} {story.tells}" if clear else story.facts
        turn = (number + len(items)) % 3
        listed = [first, second, unknown]
        one, two, three = listed[turn:] + listed[:turn]
        options = (one, two, three)
        answer = (second if positive else first) if clear else unknown
        biased = story.groups[1] if positive else story.groups[0]
        items.append(
            Item(
                story=fill(told, fields),
                question=story.positive if positive else story.negative,
                options=options,
                right=options.index(answer),
                biased=options.index(biased),
                clear=clear,
                type=story.type,
                cluster=f"questions {story.facts}",
            )
        )
    return items
