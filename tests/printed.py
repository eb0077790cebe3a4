"""What a command prints with --json, held against its schema in docs/schemas/."""

import json
from pathlib import Path

import jsonschema

SCHEMAS = Path(__file__).resolve().parent.parent / "docs" / "schemas"


def parsed(name: str, text: str) -> dict:
    """The JSON that the command `name` printed. Fails if its schema does not allow it."""
    data = json.loads(text)
    schema = json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(data)
    return data
