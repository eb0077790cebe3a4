"""Reads benchmark files into the columns of lm-eval's tasks. Every row is checked before any is scored."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError, shown
from ..files import open_input, parse_json, read_json

_MOST_FILE, _MOST_LINE = 256 << 20, 1 << 20  # bytes; the largest published file has 60 MB, its lines some kilobytes
_LABELS = ("anti-stereotype", "stereotype", "unrelated")  # in the order of the Hub's class numbers
_CURE = "mend or remove the row"


class NoDataError(InputError):
    """A task's data are missing."""


class _Row(NamedTuple):
    """A row of a file. where: file and line, for messages."""

    where: str
    values: dict


def rows(name: str, data: Path, patterns: Sequence[str]) -> list[dict]:
    """The items of a task in the folder `data`, in the columns that lm-eval's task reads.

    Raises NoDataError if none of its files is there, InputError with file and line for a row that is not an item.
    """
    files = next((files for pattern in patterns if (files := sorted(data.glob(pattern)))), [])
    result = [_item(name, row) for file in files for row in _read(file, name.removeprefix("stereoset_"))]
    if not result:
        raise NoDataError(f"{name}: {data} holds none of its items ({', '.join(patterns)})")
    return result


def _item(name: str, row: _Row) -> dict:
    try:
        return _CONVERT[name](row.values)
    except KeyError as error:
        raise InputError(f"{row.where}: {name} needs the column {error}: {_CURE}") from None
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"{row.where} is no item of {name} ({shown(str(error))[1:-1]}): {_CURE}") from None


# -------------------------------------------------------------------------------------------------------------- reading


def _read(file: Path, part: str) -> Iterator[_Row]:
    if file.suffix == ".json":  # the published StereoSet: both parts in one file
        yield from _published(file, part)
    elif file.suffix == ".csv":
        yield from _table(file)
    else:
        for number, line in _lines(file):
            if line.strip():
                where = f"{file}, line {number}"
                values = parse_json(line.encode(), where, InputError, _CURE)
                if not isinstance(values, dict):
                    raise InputError(f"{where} is no object: {_CURE}")
                yield _Row(where, values)


def _published(file: Path, part: str) -> Iterator[_Row]:
    data: Any = read_json(file, InputError)
    try:
        items = data["data"][part]
    except (KeyError, TypeError, IndexError):
        raise InputError(f"{file} has no data.{part}: it is not StereoSet's published layout") from None
    if not isinstance(items, list):
        raise InputError(f"{file}: data.{part} is no list: it is not StereoSet's published layout")
    for number, values in enumerate(items):
        yield _Row(f"{file}, data.{part}[{number}]", values)


def _table(file: Path) -> Iterator[_Row]:
    number = 0

    def texts() -> Iterator[str]:
        nonlocal number
        for number, line in _lines(file):  # noqa: B007 (read below)
            yield line

    reader = csv.DictReader(texts())
    while True:
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{file}, line {number} is not CSV ({error}): {_CURE}") from None
        if values is None:
            return
        if None in values:
            raise InputError(f"{file}, line {number} has more cells than the first line: {_CURE}")
        yield _Row(f"{file}, line {number}", values)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines in UTF-8, with or without a byte order mark, limited in length."""
    with open_input(file, InputError) as stream:
        number, size = 0, 0
        while raw := stream.readline(_MOST_LINE + 1):
            number, size = number + 1, size + len(raw)
            if len(raw) > _MOST_LINE or size > _MOST_FILE:
                what = f"a line of more than {_MOST_LINE >> 20} MB" if len(raw) > _MOST_LINE else "too large a file"
                raise InputError(f"{file}, line {number} is {what}: it is no benchmark's file")
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise InputError(f"{file}, line {number} is not UTF-8: save the file as UTF-8") from None


# ------------------------------------------------------------------------------------------------- checks of the values


def _text(row: dict, key: str) -> str:
    """A non-empty text."""
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} is {'empty' if value in (None, '') or isinstance(value, str) else 'no text'}")
    return value


def _one_of(row: dict, key: str, known: Sequence) -> object:
    value = row[key]
    if type(value) is bool or value not in list(known):
        raise ValueError(f"{key} is {shown(value)}; it must be one of {', '.join(map(str, known))}")
    return value


def _texts(values: object, key: str) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{key} must list texts")
    return values


def stereoset_item(doc: dict) -> dict:
    """id, bias_type, target, context, stereotype, anti_stereotype, unrelated: of the published layout or the Hub's."""
    sentences = doc["sentences"]
    if isinstance(sentences, dict):  # the Hub's columns
        sentences = [dict(zip(sentences, values, strict=True)) for values in zip(*sentences.values(), strict=True)]
    item = {key: doc[key] for key in ("id", "bias_type", "target", "context") if key in doc}
    for row in sentences:
        label = row["gold_label"]
        item[(_LABELS[label] if isinstance(label, int) else label).replace("-", "_")] = row["sentence"]
    return item


def _stereoset_row(row: dict) -> dict:
    item = stereoset_item(row) if "sentences" in row else row
    result = {key: _text(item, key) for key in ("bias_type", "context", "stereotype", "anti_stereotype", "unrelated")}
    if result["stereotype"] == result["anti_stereotype"]:
        raise ValueError("stereotype and anti_stereotype are the same sentence")
    # Files made by hand may lack the target: then items with the same context are one cluster.
    target = _text(item, "target") if "target" in item else result["context"]
    return result | {"id": str(item.get("id", "")), "target": target}


def _crows_pairs_row(row: dict) -> dict:
    result = {key: _text(row, key) for key in ("sent_more", "sent_less", "bias_type")}
    if result["sent_more"] == result["sent_less"]:
        raise ValueError("sent_more and sent_less are the same sentence")
    return result


def _bbq_row(row: dict) -> dict:
    """BBQ's categories differ in their metadata: keep only what the task reads and what identifies blocks."""
    from lm_eval.tasks.bbq.utils import UNKNOWN_RESPONSES

    answers = {key: _text(row, key) for key in ("ans0", "ans1", "ans2")}
    if sum(answer in UNKNOWN_RESPONSES for answer in answers.values()) != 1:
        raise ValueError("exactly one of its answers must be one of BBQ's ten phrasings of UNKNOWN")
    result: dict = {key: _text(row, key) for key in ("category", "context", "question")} | answers
    for key, known in (
        ("question_polarity", ("neg", "nonneg")),
        ("context_condition", ("ambig", "disambig")),
        ("label", (0, 1, 2)),
        ("category", BBQ_CATEGORIES),
    ):
        result[key] = _one_of(row, key, known)
    result["answer_info"] = {key: _texts(row["answer_info"][key], f"answer_info.{key}") for key in answers}
    groups = _texts(row["additional_metadata"]["stereotyped_groups"], "stereotyped_groups")
    number = row.get("example_id", -1)
    return result | {
        "additional_metadata": {"stereotyped_groups": groups},
        "question_index": str(row.get("question_index", row["context"])),
        "example_id": number if type(number) is int else -1,
    }


def _choice_row(row: dict, question_key: str = "question") -> dict:
    question = row["question"]
    listed = question["choices"]
    texts, labels = ([_text(choice, key) for choice in listed] for key in ("text", "label"))
    if len(texts) < 2 or len(set(labels)) != len(labels):
        raise ValueError("it needs two choices or more, with different labels")
    right = row["answerKey"]
    if right not in labels:  # some files number the choices and name the right one by its letter
        if right not in list("ABCDE")[: len(labels)]:
            raise ValueError(f"answerKey {shown(right)} is none of its {len(labels)} choices")
        right = labels["ABCDE".index(right)]
    return {question_key: _text(question, "stem"), "choices": {"text": texts, "label": labels}, "answerKey": right}


def _copa_row(row: dict) -> dict:
    result = {key: _text(row, key) for key in ("premise", "choice1", "choice2")}
    _one_of(row, "question", ("cause", "effect"))
    _one_of(row, "label", (0, 1))  # -1: the hidden answers of the published test split
    return result | {"question": row["question"], "label": row["label"], "idx": row.get("idx", 0)}


def _winogender_row(row: dict) -> dict:
    result = {key: _text(row, key) for key in ("sentence", "pronoun", "occupation", "participant", "gender")}
    return result | {"label": _one_of(row, "label", (0, 1))}


BBQ_CATEGORIES = (  # those that lm-eval knows
    "Age",
    "Disability_status",
    "Gender_identity",
    "Nationality",
    "Physical_appearance",
    "Race_ethnicity",
    "Race_x_gender",
    "Race_x_SES",
    "Religion",
    "SES",
    "Sexual_orientation",
)
_CONVERT: dict[str, Callable[[dict], dict]] = {
    "stereoset_intrasentence": _stereoset_row,
    "stereoset_intersentence": _stereoset_row,
    "crows_pairs": _crows_pairs_row,
    "bbq": _bbq_row,
    "winogender": _winogender_row,
    "arc_easy": _choice_row,
    "arc_challenge": _choice_row,
    "openbookqa": lambda row: _choice_row(row, "question_stem"),
    "copa": _copa_row,
}
