"""Everyday texts that mention no group of people, by kind, for the cost of a factor and for its effect on likelihood.

Ordinary texts (`texts/LANGUAGE.txt`: descriptions, instructions, answers, code) come first, then sentences of a small
grammar (`sampling`). Both are the project's own.
"""

from __future__ import annotations

from pathlib import Path

from . import sampling

_GRAMMAR = "sentences"


def everyday(count: int, seed: int, language: str = "en") -> tuple[list[str], list[str]]:
    """(texts, the kind of each): ordinary ones of the language, if there are any, then sentences of the grammar."""
    texts, kinds = [], []
    kind = ""
    path = Path(__file__).with_name("texts") / f"{language}.txt"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        if line.startswith("## "):
            kind = line[3:]
        elif line and not line.startswith("#"):
            texts.append(line)
            kinds.append(kind)
    chosen = list(range(len(texts)))
    if count < len(texts):  # of every kind some
        chosen = [number * len(texts) // count for number in range(count)]
    missing = count - len(chosen)
    return (
        [texts[i] for i in chosen] + sampling.sentences(missing, seed),
        [kinds[i] for i in chosen] + [_GRAMMAR] * missing,
    )
