"""The manifest as its file is, read and written without the project: tests forge it."""

import hashlib
import json
from pathlib import Path

NAME = "kbne_edit.json"


def text(data):
    return json.dumps(data, indent=1) + "\n"


def read_manifest(folder):
    return json.loads((Path(folder) / NAME).read_text(encoding="utf-8"))


def seal(data):
    return hashlib.sha256(text({k: v for k, v in data.items() if k != "sha256"}).encode()).hexdigest()


def write_manifest(folder, data):
    """Sealed anew: whoever can write the file can compute its hash."""
    (Path(folder) / NAME).write_text(text({**data, "sha256": seal(data)}), encoding="utf-8")


def is_sealed(folder, data):
    return data["sha256"] == seal(data) and (Path(folder) / NAME).read_text(encoding="utf-8") == text(data)


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
