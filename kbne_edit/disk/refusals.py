"""What is no checkpoint that can be edited, and the way out of it."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import CheckpointError, shown
from ..files import read_json
from .names import INDEX


def read_config(path: Path) -> dict:
    """config.json of a checkpoint that can be edited. Raises CheckpointError for everything else, with the way out."""
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
    if not (path / "config.json").is_file():
        if list(path.glob("*.gguf")):
            raise CheckpointError(f"{path} holds GGUF weights: use the unquantised transformers checkpoint instead")
        if list(path.glob("*.pth")):
            raise CheckpointError(
                f"{path} holds Meta's own .pth files: convert them with transformers' convert_llama_weights_to_hf.py, "
                "or take the '-hf' sibling from the Hub, e.g. --in meta-llama/Llama-2-7b-hf"
            )
        raise CheckpointError(f"{path} has no config.json: it does not hold a transformers checkpoint")
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path / 'config.json'} is not a JSON object")
    if quantised := config.get("quantization_config"):
        method = shown(quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown")
        raise CheckpointError(
            f"{path / 'config.json'} has quantization_config ({method}): kbne-edit needs full-precision weights. "
            "Edit the unquantised model and quantise the result"
        )
    return config


def no_weights(path: Path) -> str:
    if any(path.glob("pytorch_model*.bin*")):
        return f"{path} holds .bin weights only: they are converted on the way (resolve the source first)"
    if any(path.glob("*.gguf")):
        return f"{path} holds GGUF weights: use the unquantised transformers checkpoint instead"
    if any(path.glob("*.pth")):
        return (
            f"{path} holds Meta's own .pth files and no transformers weights: convert them with transformers' "
            "convert_llama_weights_to_hf.py, or take the '-hf' sibling from the Hub"
        )
    return f"{path} has no weights: neither model.safetensors nor {INDEX} is there"
