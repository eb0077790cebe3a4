"""The model card of an output, made from the manifest alone.

The base's card is kept as README.base.md. The same manifest gives the same bytes.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..disk.manifest import TOOL, FileRecord, Manifest
from ..disk.names import CARD, MANIFEST, OLD_DELTA, UNDO, base_card
from ..errors import InputError
from ..evaluation.effect import Effect
from ..evaluation.verdict import Verdict
from ..hub.licences import base_metadata, metadata_in
from .card_text import Card, text_of

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_CARRIED = ("license", "license_name", "license_link", "pipeline_tag")
_LINK = r"https://[^\s()<>\[\]]+|[\w.-]+(/[\w.-]+)*"  # link of a licence: an address, or a file in the directory
_LIBRARIES = {"checkpoint": "transformers", "peft": "peft", "delta": "kbne-edit"}


def add_card(directory: Path, manifest: Manifest, metadata: dict | None = None) -> Manifest:
    """Write README.md, and return the manifest that records it; the base's card becomes README.base.md.

    metadata: of the base's card, where that is not in the directory.
    """
    path = directory / CARD
    metadata = metadata_in(directory) if metadata is None else metadata
    files = dict(manifest.files)
    if path.exists():
        kept = base_card(files)
        path.rename(directory / kept)
        files[kept] = replace(files.pop(CARD), base_name=CARD)
    manifest = replace(manifest, files=dict(sorted(files.items())))
    card = _bytes(card_of(manifest, metadata))
    path.write_bytes(card)
    return manifest.with_file(CARD, FileRecord(None, hashlib.sha256(card).hexdigest()))


def _bytes(card: str) -> bytes:
    """Escape undecodable bytes in names from outside."""
    return card.encode("utf-8", errors="backslashreplace")


def card_of(manifest: Manifest, metadata: dict) -> str:
    """The card from a manifest, with the hash of the record it is made from. metadata: of the base's card."""
    manifest = replace(manifest, files={name: record for name, record in manifest.files.items() if name != CARD})
    manifest = manifest.as_read()
    return f"{build(manifest, metadata)}\n<!-- record: {manifest.record_sha256()} -->\n"


def card_fault(directory: Path, manifest: Manifest, base: Path | None = None) -> str:
    """What is wrong with the card of an output that `add_card` wrote; "" if nothing is.

    base: the base's directory; None: use the copy of its card in the output. A card of another version cannot be made
    again; there the hash of the record in the card is compared. Cards of earlier outputs, whose undo file has the
    earlier name, have no such hash, and are not compared.
    """
    earlier = manifest.is_checkpoint and not (directory / UNDO).is_file()
    if earlier or OLD_DELTA in manifest.files or CARD not in manifest.files:
        return ""
    if manifest.files[CARD].before is not None:  # the base's own: nothing was added
        return ""
    text = (directory / CARD).read_bytes().decode("utf-8", errors="replace")
    if f"<!-- record: {manifest.record_sha256()} -->" not in text:
        return f"{CARD} was not made from what {MANIFEST} records"
    if manifest.tool != TOOL or (base is None and not manifest.is_checkpoint):
        return ""
    try:
        expected = card_of(manifest, _metadata_kept(directory, manifest) if base is None else metadata_in(base))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, InputError):
        return f"{MANIFEST} has figures that kbne-edit did not write"
    return "" if text.encode() == _bytes(expected) else f"{CARD} is not the card that {MANIFEST} gives"


def _metadata_kept(directory: Path, manifest: Manifest) -> dict:
    """The metadata of the base's card, from the copy in an output."""
    for name, record in manifest.files.items():
        if record.base_name == CARD:
            return base_metadata((directory / name).read_text(encoding="utf-8-sig", errors="replace"))
    return {}


def build(manifest: Manifest, metadata: dict) -> str:
    """The card's text. metadata: of the base's card. Raises CheckpointError, KeyError, TypeError or ValueError for
    figures of another form."""
    from huggingface_hub import ModelCard, ModelCardData

    card = Card.of(manifest)
    # A search by tag or metric should find only models that passed.
    effect = card.measured.effect if _passes(card.measured.verdict) else None
    tags = [tag for tag in _listed(metadata.get("tags")) if not tag.startswith("base_model:")]
    languages = [code for code in _listed(metadata.get("language")) if re.fullmatch("[a-z]{2,3}|multilingual", code)]
    adapter = not manifest.is_checkpoint
    published = card.source.commit is not None
    data = ModelCardData(
        base_model=card.source.id if published else None,
        language=languages or None,
        library_name=_LIBRARIES[manifest.form],
        tags=[
            *tags,
            *(["ia3"] if manifest.form == "peft" else []),
            "kbne-edit",
            *(["bias-mitigation"] if effect else []),
        ],
        model_name=f"{card.name}, know-bias neurons scaled" if effect else None,
        eval_results=_results(effect, card.recipe) if effect else None,
        **_carried(metadata),
        **({"base_model_relation": "adapter" if adapter else "finetune"} if published else {}),  # type: ignore[arg-type]
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text_of(card, metadata)}\n"))


def _passes(verdict: Verdict) -> bool:
    """True if effect and cost pass, and no part fails. An adapter is not proven until it is applied."""
    return verdict.ship != "do not ship" and verdict.effect.state == verdict.cost.state == "PASS"


def _carried(metadata: dict) -> dict[str, Any]:
    """The base's metadata that also hold for this model. An invalid link is left out."""
    carried = {key: metadata[key] for key in _CARRIED if isinstance(metadata.get(key), str)}
    if not re.fullmatch(_LINK, carried.get("license_link", "")):
        carried.pop("license_link", None)
    return {"pipeline_tag": "text-generation"} | carried


def _listed(value: object) -> list[str]:
    """A metadata value that is one string or several. YAML reads a bare `no`, Norwegian, as false."""
    values = value if isinstance(value, list) else [value]
    return [v for v in ("no" if v is False else v for v in values) if isinstance(v, str)]


def _results(effect: Effect, recipe: str) -> list[EvalResult]:
    """The effect as entries of the card's model-index."""
    from huggingface_hub import EvalResult

    avoid = {
        "mean_score": ("mean score of the unwanted side, nats per token", effect.signed.after),
        "mean_score_change": ("its change by the edit", effect.change_signed.value),
        "mean_score_change_random": ("its change by random neurons", effect.random.signed.value),
    }
    balance = {
        "mean_absolute_score": ("mean absolute score of twins, nats per token", effect.absolute.after),
        "mean_absolute_score_change": ("its change by the edit", effect.change_absolute.value),
        "mean_absolute_score_change_random": ("its change by random neurons", effect.random.absolute.value),
        "stereotype_share": ("share of twins with the stereotype preferred", effect.preferred.after),
    }
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=recipe,
            dataset_name=f"{'unwanted' if effect.avoids else 'stereotype'} probes of the recipe {recipe}",
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 6),
        )
        for kind, (name, value) in (avoid if effect.avoids else balance).items()
    ]
