"""`kbne-edit recipes show` and `check` for pairs, from which the units of a fit are made."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from . import options

if TYPE_CHECKING:
    from ..fitting.unit_check import UnitsReport
    from ..fitting.units import Unit


def is_pairs(source: str) -> bool:
    """True if a recipe's argument means pairs: `pairs`, `pairs/LANGUAGE`, `pairs/LANGUAGE/TYPE`, or a file of pairs."""
    if source == "pairs" or source.startswith("pairs/"):
        return True
    from ..errors import InputError
    from ..yamlfile import read_yaml

    path = Path(source)
    if path.suffix not in (".yaml", ".yml", ".json") or not path.is_file():
        return False
    try:
        document, _ = read_yaml(path)
    except InputError:
        return False
    return isinstance(document, dict) and "kbne_pairs" in document


def units_of(source: str) -> list[Unit]:
    """The units of every language, one language, one type or one file."""
    from ..fitting.units import load_units, pair_languages

    if source != "pairs" and not source.startswith("pairs/"):
        return list(load_units([source]))
    parts = source.split("/", 2)[1:]
    types = parts[1:] or None
    return [unit for language in parts[:1] or pair_languages() for unit in load_units(types, language=language)]


def show(source: str, count: int | None, as_json: bool) -> None:
    """Every sentence of the first `count` units (None: of all)."""
    units = units_of(source)[:count]
    result = []
    for unit in units:
        names = ("ax", "ay", "bx", "by", *["unrelated"] * len(unit.unrelated), *["unknown"] * len(unit.unknown))
        for name, sentence in zip(names, unit.sentences, strict=True):
            result.append("\t".join((unit.type, unit.format, name, sentence.text.replace("\n", "\\n"))))
    options.show({"name": source, "units": [asdict(unit) for unit in units]}, as_json, result)


def check(source: str, data: Path | None, as_json: bool) -> None:
    """Check units. Raises RecipeError with their faults."""
    from ..errors import RecipeError
    from ..fitting.unit_check import check_units

    report = check_units(units_of(source), data)
    options.show(report.to_dict(), as_json, lines(report))
    if report.faults:
        raise RecipeError(source, report.faults)


def lines(report: UnitsReport) -> list[str]:
    """The report in words."""
    counts: str | list[str]
    result = []
    for language in dict.fromkeys(row.language for row in report.types):
        rows = [row for row in report.types if row.language == language]
        counts = ", ".join(f"{row.type} {row.facts}" for row in rows)
        result.append(f"{language}: {sum(row.facts for row in rows)} facts ({counts})")
    formats = dict.fromkeys(name for row in report.types for name in row.formats)
    counts = [f"{name} {sum(row.formats.get(name, 0) for row in report.types)}" for name in formats]
    uneven = sum(group.uneven for group in report.groups)
    result += [
        f"units by format: {', '.join(counts)}",
        f"tones of both attributes alike: {report.same_tone} of {report.facts} facts",
        f"groups: {len(report.groups)}, of which {uneven} stand mostly on one side",
        f"contexts of both groups: A first {report.first_a}, B first {report.first_b}",
        f"characters: X {report.length_x:.1f}, Y {report.length_y:.1f} on average; "
        f"one more than twice as long as the other in {len(report.long_pairs)} facts",
        f"stereotypes in more than one fact: {len(report.repeated)}; sentences twice: {len(report.duplicates)}",
    ]
    for overlap in report.overlaps:
        result.append(
            f"{overlap.benchmark}, {overlap.sentences} sentences: {len(overlap.verbatim)} verbatim; "
            f"{overlap.grams} sequences of five words in {overlap.units} units; "
            f"{len(overlap.facts)} stereotypes, {overlap.near_facts} with the group and two words"
        )
        result += [f"  {fact}" for fact in overlap.facts]
    return result
