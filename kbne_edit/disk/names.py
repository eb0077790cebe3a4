"""Names of the files of a checkpoint, and of those that this tool adds."""

from __future__ import annotations

from collections.abc import Collection

MANIFEST = "kbne_edit.json"
# No file of an output but its shards ends like weights: loaders may take all that do (see folding/columns.py).
UNDO, DELTA = "kbne_undo.kbne", "kbne_delta.kbne"
OLD_UNDO, OLD_DELTA = "kbne_undo.safetensors", "kbne_delta.safetensors"  # what earlier versions called them
SINGLE = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
INDEX = f"model{INDEX_SUFFIX}"
CARD = "README.md"

_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot")


def is_weights(name: str) -> bool:
    """True if a file of this name holds weights, or says which files do, in some format."""
    return name.endswith(_WEIGHTS) or name.endswith((".bin.index.json", f"consolidated{INDEX_SUFFIX}"))


def base_card(carried: Collection[str]) -> str:
    """The name under which an output keeps the base's own card. carried: what is carried over from the base."""
    name = f"{CARD.removesuffix('md')}base.md"
    while name in carried:  # the base was baked itself
        name = f"{name.removesuffix('md')}base.md"
    return name
