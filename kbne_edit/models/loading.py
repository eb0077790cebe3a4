"""Models and tokenizers of a directory, by plain transformers. No code from a checkpoint is ever run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError, KbneError, short
from ..families import TEXT_ALONE, text_part

if TYPE_CHECKING:
    import torch


@contextmanager
def quiet() -> Iterator[None]:
    """No chatter of transformers while it loads a model."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def foreign(path: Path) -> Iterator[None]:
    """Around transformers at work on files from outside: whatever it stumbles over becomes a CheckpointError.

    Such files can make it raise nearly anything, so this is the one place that catches everything.
    """
    try:
        with quiet():
            yield
    except (KbneError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(f"transformers cannot use {path}: {short(error)}") from error


def load_model(path: Path, dtype: torch.dtype, device: str = "cpu"):
    """The causal model of a directory, by plain transformers. Never runs code from the checkpoint.

    Raises CheckpointError.
    """
    spread = {"device_map": "auto"} if device == "auto" else {}
    with foreign(path):
        config = load_config(path)
        # experts: the hooks run them one by one, as "eager" does; other kernels add in another order.
        model = model_class(config).from_pretrained(
            path,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            experts_implementation="eager",
            **spread,
        )
        model = model.eval().requires_grad_(False)
        return model if spread else model.to(device)


def load_config(path: Path):
    """transformers' configuration of a directory. Never runs code from it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def model_class(config):
    """transformers' class that has a language model's head for this configuration; of multimodal models, theirs."""
    import transformers

    return getattr(transformers, auto_class(config.to_dict()))


def auto_class(config: dict) -> str:
    """The name of that class. config: what config.json holds."""
    together = text_part(config) and config["model_type"] not in TEXT_ALONE
    return "AutoModelForImageTextToText" if together else "AutoModelForCausalLM"


def load_tokenizer(path: Path):
    """The tokenizer of a directory. Never runs code from it. Raises CheckpointError."""
    from transformers import AutoTokenizer

    with foreign(path):
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
