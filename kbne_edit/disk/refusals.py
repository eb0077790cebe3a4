"""Refuses directories that are not an editable checkpoint, with advice."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, shown
from ..files import LFS_POINTER, open_input, read_json
from .names import INDEX


def gguf_file(path: Path) -> Path | None:
    """The GGUF file at a path, or the only one in a directory without config.json; None if there is none."""
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    files = sorted(path.glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def read_config(path: Path) -> dict[str, Any]:
    """config.json of an editable checkpoint. Raises CheckpointError with advice for everything else."""
    try:
        if not os.listdir(path):
            raise CheckpointError(f"{path} is empty: a checkpoint directory holds config.json and the weights")
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except NotADirectoryError:
        raise CheckpointError(f"{path} is a file: give the directory that holds config.json and the weights") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise CheckpointError(f"{path} holds an adapter: merge it into its base model first (PEFT: merge_and_unload)")
    if (path / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{path} holds a PEFT adapter beside the weights, and transformers loads both: merge it first "
            "(merge_and_unload), or move adapter_config.json away"
        )
    if not (path / "config.json").is_file():
        if files := sorted(path.glob("*.gguf")):
            raise CheckpointError(f"{path} holds {len(files)} GGUF files: give one of them, e.g. --in {files[0]}")
        if list(path.glob("*.pth")):
            raise CheckpointError(
                f"{path} holds Meta's own .pth files: convert them with transformers' convert_llama_weights_to_hf.py, "
                "or take the '-hf' sibling from the Hub, e.g. --in meta-llama/Llama-2-7b-hf"
            )
        raise CheckpointError(f"{path} has no config.json: it does not hold a transformers checkpoint")
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path / 'config.json'} is not a JSON object")
    if other := config.get("transformers_weights"):
        raise CheckpointError(
            f"{path / 'config.json'} names other weights (transformers_weights: {shown(other)}), which transformers "
            "loads in place of the model's: remove that line"
        )
    _forbid_pointers(path)
    return config


def _forbid_pointers(path: Path) -> None:
    """Raise CheckpointError if a small file of the directory is a Git LFS pointer: the output would inherit it."""
    for file in sorted(path.iterdir()):
        if not file.is_file() or not 100 < file.stat().st_size < 300 or file.suffix == ".safetensors":
            continue
        with open_input(file) as opened:
            if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                raise CheckpointError(f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull`")


def no_weights(path: Path) -> str:
    """The message for a directory with config.json and no safetensors weights."""
    if any(path.glob("pytorch_model*.bin*")):
        return f"{path} holds .bin weights only: resolve the source first, which converts them"
    if any(path.glob("*.gguf")):
        return f"{path} holds config.json and GGUF weights: give the file itself, e.g. --in {next(path.glob('*.gguf'))}"
    if any(path.glob("*.pth")):
        return (
            f"{path} holds Meta's own .pth files and no transformers weights: convert them with transformers' "
            "convert_llama_weights_to_hf.py, or take the '-hf' sibling from the Hub"
        )
    return f"{path} has no weights: neither model.safetensors nor {INDEX} is there"
