"""The model card of a baked directory, and what the base's licence asks of whoever passes a changed model on."""

from __future__ import annotations

import re

# Notices, not legal advice: what the texts say about names and about what must travel with a changed model.
_DUTIES = {
    "llama2": "the Llama 2 licence asks that a copy of it, and its notice of Meta's copyright, travel with the model",
    "llama3": "the Llama 3 licence asks that the model's name begin with “Llama 3”, that “Built with Meta Llama 3” be "
    "displayed with it, and that a copy of the licence travel with the model",
    "llama": "the Llama licence asks that the model's name begin with “Llama”, that “Built with Llama” be displayed "
    "with it, and that a copy of the licence travel with the model",
    "gemma": "Gemma's terms ask that their restrictions of use bind whoever receives the model, that a copy of them "
    "and a NOTICE file that names them travel with it, and that changed files be marked as changed",
}  # fmt: skip


def base_metadata(card: str) -> dict:
    """The metadata of a base's card; {} where it has none that can be read."""
    import yaml

    block = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", card, re.DOTALL)
    try:
        data = yaml.safe_load(block[1]) if block else {}
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def licence_of(metadata: dict) -> str:
    """The licence's id, e.g. llama3.1; "" if none is named. Where `license` is other, its name."""
    named = metadata.get("license_name") if metadata.get("license") == "other" else None
    licence = named or metadata.get("license") or ""
    return licence.lower() if isinstance(licence, str) else ""


def duties(licence: str) -> str | None:
    """What a licence asks of a changed model, as far as this tool knows; None if it knows of nothing."""
    return _DUTIES.get("llama" if re.match(r"llama[-_]?(3[.\-_]|4)", licence) else licence)


def notices(metadata: dict, name: str) -> list[str]:
    """What to consider before a model with this base is published as `name`."""
    licence = licence_of(metadata)
    if not licence:
        return ["the base's card names no licence: make sure that you may publish a changed version of it"]
    found = [duty] if (duty := duties(licence)) else []
    prefix = re.search("begin with “([^”]+)”", duty or "")
    if prefix and not _plain(name.rpartition("/")[2]).startswith(_plain(prefix[1])):
        found.append(f"the name {name.rpartition('/')[2]} does not begin with “{prefix[1]}”, as the licence asks")
    return found


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())
