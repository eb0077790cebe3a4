"""Models and tokenizers out of GGUF files, by transformers and the gguf package."""

from __future__ import annotations

import io
import tempfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..disk.layouts.gguf import read_header, without_vocabulary
from ..errors import InputError

if TYPE_CHECKING:
    import torch


def load_gguf(file: Path, dtype: torch.dtype) -> tuple[Any, dict]:
    """The causal model of a GGUF file, dequantised, and transformers' report of what it loaded.

    Raises InputError where the gguf package is missing.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    _require_gguf(file)
    header = read_header(file)
    with (
        tempfile.TemporaryDirectory(prefix="kbne-") as folder,
        redirect_stderr(io.StringIO()),
    ):  # it has a bar of its own
        without_vocabulary(header, file, Path(folder) / file.name)
        config = AutoConfig.from_pretrained(folder, gguf_file=file.name)
        for entry in header.entries:
            if entry.name == "token_embd.weight":  # else it is counted in the vocabulary
                config.vocab_size = entry.shape[0]
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=file.name,
            config=config,
            dtype=dtype,
            experts_implementation="eager",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        return loaded


def gguf_tokenizer(file: Path) -> Any:
    """The tokenizer in a GGUF file."""
    from transformers import PreTrainedTokenizerFast

    _require_gguf(file)
    return PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)


def _require_gguf(file: Path) -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise InputError(f"reading {file} needs the gguf package: pip install 'kbne-edit[quantised]'") from None
