"""Benchmarks' files on disk, in the columns that lm-eval's tasks read."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..errors import InputError


class NoDataError(InputError):
    """A task's data are not there."""


def rows(name: str, data: Path, patterns: Sequence[str]) -> list[dict]:
    """The items of a task in the folder `data`, in the columns that lm-eval's task reads."""
    files = next((files for pattern in patterns if (files := sorted(data.glob(pattern)))), [])
    found: list[dict] = []
    for file in files:
        try:
            found += [_CONVERT.get(name, dict)(row) for row in _read(file, name.removeprefix("stereoset_"))]
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            raise InputError(f"{file} is not in the layout of {name}: {type(error).__name__} {error}") from None
    if not found:
        raise NoDataError(f"{name}: {data} holds none of its files ({', '.join(patterns)})")
    return found


def _read(file: Path, part: str) -> Iterator[dict]:
    with open(file, encoding="utf-8", newline="") as stream:
        if file.suffix == ".csv":
            yield from csv.DictReader(stream)
        elif file.suffix == ".json":  # the published StereoSet: both parts in one file
            yield from json.load(stream)["data"][part]
        else:
            yield from (json.loads(line) for line in stream if line.strip())


_LABELS = ("anti-stereotype", "stereotype", "unrelated")  # in the order of the Hub's class numbers


def stereoset_item(doc: dict) -> dict:
    """id, bias_type, context, stereotype, anti_stereotype, unrelated."""
    rows = doc["sentences"]
    if isinstance(rows, dict):  # the Hub's columns
        rows = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    item = {key: doc[key] for key in ("id", "bias_type", "context")}
    for row in rows:
        label = row["gold_label"]
        item[(_LABELS[label] if isinstance(label, int) else label).replace("-", "_")] = row["sentence"]
    return item


def _stereoset_row(row: dict) -> dict:
    item = stereoset_item(row) if "sentences" in row else row
    return {key: item[key] for key in ("id", "bias_type", "context", "stereotype", "anti_stereotype", "unrelated")}


def _bbq_row(row: dict) -> dict:
    """BBQ's categories have unlike metadata: only what the task reads is kept, and the question's number."""
    keys = (
        "question_polarity",
        "context_condition",
        "category",
        "answer_info",
        "context",
        "question",
        "ans0",
        "ans1",
        "ans2",
        "label",
    )
    groups = row["additional_metadata"]["stereotyped_groups"]
    return {key: row[key] for key in keys} | {
        "additional_metadata": {"stereotyped_groups": groups},
        "question_index": str(row.get("question_index", row["context"])),
    }


def _choice_row(row: dict, stem: str = "question") -> dict:
    choices = {key: [choice[key] for choice in row["question"]["choices"]] for key in ("text", "label")}
    right = row["answerKey"]
    if right not in choices["label"]:  # some files number the choices and name the right one by its letter
        right = choices["label"]["ABCDE".index(right)]
    return {stem: row["question"]["stem"], "choices": choices, "answerKey": right}


_CONVERT: dict[str, Callable[[dict], dict]] = {
    "stereoset_intrasentence": _stereoset_row,
    "stereoset_intersentence": _stereoset_row,
    "crows_pairs": lambda row: {key: row[key] for key in ("sent_more", "sent_less", "bias_type")},
    "bbq": _bbq_row,
    "arc_easy": _choice_row,
    "arc_challenge": _choice_row,
    "openbookqa": lambda row: _choice_row(row, "question_stem"),
}
