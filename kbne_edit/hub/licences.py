"""What the licence of a base requires of a changed model, from the metadata of its card. Not legal advice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from ..disk.names import CARD


class Duty(NamedTuple):
    """What a licence requires, as far as kbne-edit knows. asks: in words; prefix: how the model's name must begin;
    shown:
    what must be displayed."""

    asks: str
    prefix: str = ""
    shown: str = ""


_DUTIES = {  # notices, not legal advice
    "llama2": Duty("the Llama 2 licence asks that a copy of it and its notice of copyright travel with the model"),
    "llama3": Duty(
        "the Llama 3 licence asks that the model's name begin with “Llama 3”, that “Built with Meta Llama 3” be "
        "displayed with it, and that a copy of the licence travel with it",
        "Llama 3",
        "Built with Meta Llama 3.",
    ),
    "llama": Duty(
        "the Llama licence asks that the model's name begin with “Llama”, that “Built with Llama” be displayed with "
        "it, and that a copy of the licence travel with it",
        "Llama",
        "Built with Llama.",
    ),
    "gemma": Duty(
        "Gemma's terms ask that their restrictions of use bind whoever receives the model, that a copy of them and a "
        "NOTICE file that names them travel with it, and that changed files be marked as changed",
        shown="This is a changed version of Gemma; Gemma's terms (ai.google.dev/gemma/terms) bind whoever uses it.",
    ),
}


def base_metadata(card: str) -> dict:
    """The metadata of a base's card; {} if there is none, or it cannot be read."""
    import yaml

    block = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", card, re.DOTALL)
    try:
        data = yaml.safe_load(block[1]) if block else {}
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def metadata_in(directory: Path) -> dict:
    """The metadata of the card in a directory; {} if there is none."""
    path = directory / CARD
    return base_metadata(path.read_text(encoding="utf-8-sig", errors="replace")) if path.is_file() else {}


def licence_of(metadata: dict) -> str:
    """The licence's id, e.g. llama3.1; "" if none is named. If `license` is "other", `license_name`."""
    named = metadata.get("license_name") if metadata.get("license") == "other" else None
    licence = named or metadata.get("license") or ""
    return licence.lower() if isinstance(licence, str) else ""


def duty(licence: str) -> Duty | None:
    """What a licence requires of a changed model; None if kbne-edit knows of nothing."""
    return _DUTIES.get("llama" if re.match(r"llama[-_]?(3[.\-_]|4)", licence) else licence)


def notices(metadata: dict, name: str) -> list[str]:
    """What to consider before a model with this metadata is published as `name`, ORG/NAME."""
    licence, short = licence_of(metadata), name.rpartition("/")[2]
    if not licence:
        return ["the base's card names no licence: make sure that you may publish a changed version of it"]
    terms = duty(licence)
    if terms is None:
        return []
    if _plain(short).startswith(_plain(terms.prefix)):
        return [terms.asks]
    return [terms.asks, f"the name {short} does not begin with “{terms.prefix}”, as the licence asks"]


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())
