"""Pairs of public benchmarks for a fit: only the dev split of StereoSet, and the stories of one half of CrowS-Pairs, so
that the rest can test the edit.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from ..files import open_input, parse_json
from .units import Fact, Sentence, Square, Unit

NAMES = ("stereoset", "crows_pairs")


def public_pairs(names: Sequence[str], data: Path | None) -> tuple[Unit, ...]:
    """Units with only ax (stereotyped) and ay. data: folder of the files.

    Raises InputError if no folder is named, NoDataError if it does not hold the files.
    """
    if not names:
        return ()
    if data is None:
        raise InputError(f"--pairs {names[0]} needs --data: the folder that holds the benchmark's file")
    return tuple(unit for name in names for unit in (_stereoset(data) if name == "stereoset" else _crows(data)))


def _stereoset(data: Path) -> list[Unit]:
    from ..evaluation.datafiles import rows
    from ..evaluation.public import PUBLIC

    name = "stereoset_intrasentence"
    patterns = PUBLIC[name].patterns
    test = _of_test_split(data, patterns[0])
    dev = [row for row in rows(name, data, patterns) if row["context"] not in test]
    if not dev:
        raise InputError(f"{data} holds no item of StereoSet's dev split: a fit does not read the test split")
    return [_pair("stereoset", row, row["target"], (row["stereotype"], row["anti_stereotype"])) for row in dev]


def _of_test_split(data: Path, pattern: str) -> set[str]:
    """Contexts of rows whose `split` is not dev. The published dev.json is the dev split and does not say so."""
    contexts = set()
    for file in sorted(data.glob(pattern)):
        with open_input(file, InputError) as lines:
            for line in lines:
                row = parse_json(line, f"a row of {file}", InputError) if line.strip() else None
                if isinstance(row, dict) and row.get("split", "dev") != "dev":
                    contexts.add(str(row.get("context")))
    return contexts


def _crows(data: Path) -> list[Unit]:
    from ..evaluation.datafiles import rows
    from ..evaluation.public import PUBLIC, exchanged_words

    every = rows("crows_pairs", data, PUBLIC["crows_pairs"].patterns)
    result = []
    for row in every:
        story = exchanged_words(row["sent_more"], row["sent_less"])
        if zlib.crc32(story.encode()) % 2 == 0:
            result.append(_pair("crows_pairs", row, story, (row["sent_more"], row["sent_less"])))
    return result


def _pair(name: str, row: dict, story: str, sentences: tuple[str, str]) -> Unit:
    """sentences: the stereotyped one, the other one. story: what pairs of the same fold share."""
    fact = Fact(f"{name} {row['bias_type']}", "en", story, "", story, story, "neutral", "neutral", "")
    first, second = (Sentence("", text) for text in sentences)
    return Unit(fact, name, 0, Square(first, second, first, second), (first, first))
