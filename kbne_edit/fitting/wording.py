"""How facts become sentences in a language: forms of verbs, templates, nonsensical attributes.

One file per language, `recipes/pairs/LANGUAGE.yaml`; `recipes/pairs/en.yaml` is the annotated example.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import shown
from ..yamlfile import has_lone_surrogate

FORMATS = ("sentence", "continuation", "question", "dialogue")
GROUP_FORMS = ("plural", "one", "the")
_LONGEST_TEXT, _MOST_TEXTS, _FEWEST_TEMPLATES = 300, 2_000, 3
_SLOT = re.compile(r"\{([A-Za-z]*)(?:\.([A-Za-z]*))?\}")
_GROUPS = ("group", "first", "second")
_PARTS = {
    "sentence": ("continuation",),
    "continuation": ("context", "continuation"),
    "question": ("question", "answer", "unknown"),
    "dialogue": ("context", "continuation"),
}


@dataclass(frozen=True)
class Template:
    """One wording of a format. `unknown` and `wrappers` are empty except for questions.

    context, continuation: texts with slots `{group.FORM}`, `{first.FORM}`, `{second.FORM}` (both groups in the order in
    which they are mentioned), `{attribute.FORM}`, `{thing}`; a capital letter in the slot's name capitalises.
    unrelated: a nonsensical continuation; empty if the attribute is replaced by a nonsensical one instead.
    """

    format: str
    context: str
    continuation: str
    unknown: str = ""
    unrelated: str = ""
    wrappers: tuple[str, ...] = ()

    @property
    def names_both(self) -> bool:
        """True if the context names both groups."""
        return {"first", "second"} <= _slots(self.context)


@dataclass(frozen=True)
class Wording:
    """What a language needs to turn facts into sentences. space: between a context and its continuation."""

    language: str
    space: str
    attribute_forms: tuple[str, ...]
    verb_first: bool
    verbs_listed: bool
    verbs: Mapping[str, tuple[str, ...]]
    fillers: tuple[str, ...]
    things: tuple[str, ...]
    templates: Mapping[str, tuple[Template, ...]]

    def inflect(self, attribute: str, form: str) -> str:
        """An attribute in one of `attribute_forms`. Raises LookupError for a verb that should be listed and is not."""
        index = self.attribute_forms.index(form)
        if index == 0:
            return attribute
        words = attribute.split(" ")
        for count in (2, 1):  # a reflexive verb is two words
            verb = " ".join(words[:count] if self.verb_first else words[-count:])
            if verb in self.verbs:
                inflected = self.verbs[verb][index - 1]
                return inflected + attribute[len(verb) :] if self.verb_first else attribute[: -len(verb)] + inflected
        if self.verbs_listed:
            raise LookupError(f"the verb of {shown(attribute)} is not among the language's verbs")
        return attribute


def fill(text: str, values: Mapping[tuple[str, str], str]) -> str:
    """A template's text with its slots replaced; values: by slot and form."""

    def value(match: re.Match) -> str:
        name, form = match.group(1), match.group(2) or ""
        result = values[name.lower(), form]
        return result[:1].upper() + result[1:] if name[:1].isupper() else result

    return _SLOT.sub(value, text)


@dataclass
class Reader:
    """Checks the values of a document and collects all faults."""

    where: str
    faults: list[str] = field(default_factory=list)

    def text(self, value: object, where: str, longest: int = _LONGEST_TEXT) -> str:
        if not isinstance(value, str) or not value.strip() or has_lone_surrogate(value):
            self.faults.append(f"{where} must be text, not {shown(value)}")
            return ""
        if len(value) > longest:
            self.faults.append(f"{where} has {len(value)} characters; {longest} are the most")
            return ""
        return value

    def texts(self, value: object, where: str, fewest: int = 1) -> tuple[str, ...]:
        if not isinstance(value, list) or not fewest <= len(value) <= _MOST_TEXTS:
            self.faults.append(f"{where} must be a list of {fewest} to {_MOST_TEXTS} texts")
            return ()
        return tuple(self.text(v, f"{where}[{i}]") for i, v in enumerate(value))

    def mapping(self, value: object, where: str) -> dict:
        if not isinstance(value, dict) or len(value) > _MOST_TEXTS:
            self.faults.append(f"{where} must be a mapping of at most {_MOST_TEXTS} keys")
            return {}
        return value

    def keys(self, data: dict, known: tuple[str, ...], where: str) -> None:
        self.faults += [f"{where}: unknown key {shown(key)}" for key in data if key not in known]


_KEYS = ("kbne_pairs", "language", "space", "attributes", "verbs", "fillers", "things", "wrappers", "templates")


def parse_wording(data: object, reader: Reader) -> Wording | None:
    """A language's wording from a document; None if it has faults, which are in the reader."""
    before = len(reader.faults)
    data = reader.mapping(data, "wording")
    reader.keys(data, _KEYS, "wording")
    attributes = reader.mapping(data.get("attributes"), "attributes")
    reader.keys(attributes, ("forms", "verb", "unlisted"), "attributes")
    forms = reader.texts(attributes.get("forms"), "attributes.forms")
    for key, choices in (("verb", ("first", "last")), ("unlisted", ("same", "fault"))):
        if attributes.get(key) not in choices:
            reader.faults.append(f"attributes.{key} must be {' or '.join(choices)}")
    verbs = {
        verb: reader.texts(values, f"verbs.{verb}", 0)
        for verb, values in reader.mapping(data.get("verbs"), "verbs").items()
    }
    reader.faults += [
        f"verbs.{verb} must list {len(forms) - 1} forms" for verb, v in verbs.items() if len(v) != len(forms) - 1
    ]
    space = data.get("space", " ")
    if space not in ("", " "):
        reader.faults.append("space must be one blank or nothing")
    wording = Wording(
        language=reader.text(data.get("language"), "language"),
        space=space,
        attribute_forms=forms,
        verb_first=attributes.get("verb") == "first",
        verbs_listed=attributes.get("unlisted") == "fault",
        verbs=verbs,
        fillers=reader.texts(data.get("fillers"), "fillers"),
        things=reader.texts(data.get("things"), "things"),
        templates=_templates(data, forms, reader),
    )
    reader.faults += _uninflected(wording, wording.fillers) if len(reader.faults) == before else []
    return wording if len(reader.faults) == before else None


def _uninflected(wording: Wording, attributes: tuple[str, ...]) -> list[str]:
    """Faults of attributes whose verb the wording cannot inflect."""
    faults = []
    for attribute in attributes:
        try:
            wording.inflect(attribute, wording.attribute_forms[-1])
        except LookupError as error:
            faults.append(str(error))
    return faults


def _templates(data: dict, forms: tuple[str, ...], reader: Reader) -> dict[str, tuple[Template, ...]]:
    documents = reader.mapping(data.get("templates"), "templates")
    reader.keys(documents, FORMATS, "templates")
    wrappers = reader.texts(data.get("wrappers"), "wrappers")
    reader.faults += [f"wrappers[{i}] lacks {{question}}" for i, w in enumerate(wrappers) if "{question}" not in w]
    templates = {}
    for name in FORMATS:
        rows = documents.get(name)
        if not isinstance(rows, list) or not _FEWEST_TEMPLATES <= len(rows) <= _MOST_TEXTS:
            reader.faults.append(f"templates.{name} must list {_FEWEST_TEMPLATES} templates at least")
            continue
        read = [_template(name, row, wrappers, forms, reader, f"templates.{name}[{i}]") for i, row in enumerate(rows)]
        templates[name] = tuple(read)
    return templates


def _template(
    name: str, row: object, wrappers: tuple[str, ...], forms: tuple[str, ...], reader: Reader, where: str
) -> Template:
    row = {"continuation": row} if name == "sentence" else reader.mapping(row, where)
    reader.keys(row, (*_PARTS[name], "unrelated"), where)
    parts = {key: reader.text(row.get(key), f"{where}.{key}") for key in _PARTS[name]}
    unrelated = reader.text(row["unrelated"], f"{where}.unrelated") if "unrelated" in row else ""
    for key, text in {**parts, "unrelated": unrelated}.items():
        reader.faults += [f"{where}.{key}: {fault}" for fault in _slot_faults(text, forms)]
    context = parts.get("question", parts.get("context", ""))
    continuation = parts.get("answer", parts.get("continuation", ""))
    if len(_slots(context) & {"first", "second"}) == 1:
        reader.faults.append(f"{where}: {{first.FORM}} and {{second.FORM}} stand together")
    if not {"group", "attribute"} <= _slots(context) | _slots(continuation):
        reader.faults.append(f"{where} needs a {{group.FORM}} and an {{attribute.FORM}}")
    if context and not {"group", "attribute"} & _slots(continuation):
        reader.faults.append(f"{where}: the continuation needs a slot for the group or the attribute")
    if "attribute" not in _slots(continuation) and not unrelated:
        reader.faults.append(f"{where} needs `unrelated`, since its continuation has no attribute to replace")
    return Template(
        name, context, continuation, parts.get("unknown", ""), unrelated, wrappers if name == "question" else ()
    )


def _slots(text: str) -> set[str]:
    return {match.group(1).lower() for match in _SLOT.finditer(text)}


def _slot_faults(text: str, forms: tuple[str, ...]) -> list[str]:
    known = {f"{name}.{form}" for name in _GROUPS for form in GROUP_FORMS} | {f"attribute.{f}" for f in forms}
    known.add("thing")
    faults = []
    for match in _SLOT.finditer(text):
        slot = match.group(0)[1:-1]
        if slot[:1].lower() + slot[1:] not in known:
            faults.append(f"unknown slot {shown(match.group(0))}")
    if "{" in _SLOT.sub("", text) or "}" in _SLOT.sub("", text):
        faults.append("a brace that belongs to no slot")
    return faults
