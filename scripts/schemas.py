"""JSON schemas of what the commands print with `--json`, made from the types that `to_dict` belongs to.

How a type is read:
- a TypedDict: an object with these keys and no others;
- a dataclass: what its `to_dict` returns. A TypedDict is the whole object. `dict` stands for the fields (but those
  whose metadata have json=False), and `Annotated[dict, T]` for the fields and the keys of the TypedDict T;
- a NamedTuple: an array, or an object where it has `to_dict`;
- `Annotated[A, J]`: J, which is how JSON has it; a NamedTuple as an object where A is a dict.
  `Annotated[dict, T, V]`: the keys of T, and others whose values are V.
"""

from __future__ import annotations

import inspect
import types
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Required,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

DIALECT = "https://json-schema.org/draft/2020-12/schema"
PLAIN = {str: "string", Path: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
Schema = dict[str, Any]
FILES = {"results": "results.json of kbne-edit"}


def outputs() -> dict[str, Any]:
    """The type of what each command prints, by the command's name; "error": of what any of them prints instead.

    FILES: of a file that commands write.
    """
    from kbne_edit.applying import ApplyResult
    from kbne_edit.asking import AskJSON
    from kbne_edit.attribution.answers import AttributionSummary
    from kbne_edit.baking import BakeResult
    from kbne_edit.comparing import Comparison
    from kbne_edit.errors import ErrorJSON
    from kbne_edit.evaluation.evaluate import Evaluation
    from kbne_edit.fitting.result import Fit
    from kbne_edit.fitting.unit_check import UnitsReport
    from kbne_edit.fitting.units import UnitsJSON
    from kbne_edit.folding.undo import RevertResult
    from kbne_edit.models.doctor import Diagnosis
    from kbne_edit.proofs.outcome import Proofs
    from kbne_edit.pushing import PushResult
    from kbne_edit.recipe.checking import RecipeCheck
    from kbne_edit.recipe.types import RecipeJSON, RecipeListJSON
    from kbne_edit.reporting.types import Report
    from kbne_edit.results import Collected, Results
    from kbne_edit.selection.stability import StabilityJSON
    from kbne_edit.selection.summary import SelectionSummary
    from kbne_edit.tuning.result import Tuning

    return {
        "apply": ApplyResult,
        "ask": AskJSON,
        "bake": BakeResult,
        "compare": Comparison,
        "compare-results": Collected,
        "doctor": Diagnosis,
        "error": ErrorJSON,
        "evaluate": Evaluation,
        "fit": Fit,
        "locate": AttributionSummary,
        "push": PushResult,
        "recipes-check": RecipeCheck,
        "recipes-check-pairs": UnitsReport,
        "recipes-list": RecipeListJSON,
        "recipes-show": RecipeJSON,
        "recipes-show-pairs": UnitsJSON,
        "report": Report,
        "results": Results,
        "revert": RevertResult,
        "select": SelectionSummary,
        "stability": StabilityJSON,
        "tune": Tuning,
        "verify": Proofs,
    }


def schema_of(name: str, kind: Any) -> Schema:
    """The schema of what a command prints: the type's, and the version that `options.show` writes first.

    A file (FILES) has its own version, and no other.
    """
    definitions: Schema = {}
    _schema(kind, definitions)
    whole = definitions.pop(_name(kind))
    if name in FILES:
        return {"$schema": DIALECT, "title": FILES[name]} | whole | {"$defs": dict(sorted(definitions.items()))}
    version = {"version": {"type": "integer", "minimum": 1}}
    head = {"$schema": DIALECT, "title": f"kbne-edit {name.replace('-', ' ')} --json"}
    whole["properties"] = version | whole["properties"]
    whole["required"] = ["version", *(key for key in whole["required"] if key != "version")]
    return head | whole | {"$defs": dict(sorted(definitions.items()))}


def _schema(kind: Any, definitions: Schema) -> Schema:
    """The schema of an annotation. Types with a name go to `definitions`."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _annotated(args, definitions)
    if kind in (Any, object, dict):
        return {} if kind is not dict else {"type": "object"}
    if kind in PLAIN:
        return {"type": PLAIN[kind]}
    if origin in (NotRequired, Required):
        return _schema(args[0], definitions)
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(arg, definitions) for arg in args]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(args[1], definitions)}
    if origin is list or (origin is tuple and args[-1] is Ellipsis):
        return {"type": "array", "items": _schema(args[0], definitions)}
    if origin is tuple:
        return _array([_schema(arg, definitions) for arg in args])
    return _named(kind, definitions)


def _annotated(args: tuple[Any, ...], definitions: Schema) -> Schema:
    base, form, *others = args
    if not others and get_origin(base) is dict and issubclass(form, tuple):
        return _object(None, _hints(form), definitions)
    if not others:
        return _schema(form, definitions)
    keys = _object(form, _hints(form), definitions)
    return keys | {"additionalProperties": _schema(others[0], definitions)}


def _named(kind: type, definitions: Schema) -> Schema:
    """A reference to a class, whose schema is put with the definitions."""
    name = _name(kind)
    if name not in definitions:
        definitions[name] = {}  # so that a type that holds itself ends
        definitions[name] = _class(kind, definitions)
    return {"$ref": f"#/$defs/{name}"}


def _name(kind: type) -> str:
    """Module and name: some modules have a type of the same name."""
    return f"{kind.__module__.removeprefix('kbne_edit.')}.{kind.__qualname__}"


def _class(kind: type, definitions: Schema) -> Schema:
    if is_typeddict(kind):
        return _described(kind) | _object(kind, _hints(kind), definitions)
    to_dict = getattr(kind, "to_dict", None)
    returned = get_type_hints(to_dict, include_extras=True)["return"] if to_dict else dict
    if is_typeddict(returned):
        return _class(returned, definitions)
    hints = _hints(kind)
    if issubclass(kind, tuple) and not to_dict:
        return _described(kind) | _array([_schema(hint, definitions) | {"title": name} for name, hint in hints.items()])
    if not is_dataclass(kind) and not issubclass(kind, tuple):
        raise TypeError(f"{kind} has no form in JSON")
    names = [entry.name for entry in fields(kind) if entry.metadata.get("json", True)] if is_dataclass(kind) else hints
    result = _described(kind) | _object(None, {name: hints[name] for name in names}, definitions)
    if get_origin(returned) is Annotated:
        more = _object(get_args(returned)[1], _hints(get_args(returned)[1]), definitions)
        result["properties"] |= more["properties"]
        result["required"] += more["required"]
    return result


def _object(kind: Any, hints: dict[str, Any], definitions: Schema) -> Schema:
    """kind: a TypedDict, some of whose keys may be left out; None: all keys are there."""
    optional = {
        *(kind.__optional_keys__ if kind else ()),
        *(n for n, h in hints.items() if get_origin(h) is NotRequired),
    }
    return {
        "type": "object",
        "properties": {name: _schema(hint, definitions) for name, hint in hints.items()},
        "required": [name for name in hints if name not in optional],
        "additionalProperties": False,
    }


def _array(items: list[Schema]) -> Schema:
    return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}


def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _described(kind: type) -> Schema:
    """The docstring, which says what the fields or keys mean."""
    text = inspect.cleandoc(kind.__doc__ or "")
    return {"description": text} if text and not text.startswith((f"{kind.__name__}(", "dict(")) else {}
