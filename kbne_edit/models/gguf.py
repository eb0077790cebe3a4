"""Models and tokenizers out of GGUF files, by transformers and the gguf package."""

from __future__ import annotations

import io
import tempfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

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


def gguf_config(file: Path) -> Any:
    """transformers' configuration of a GGUF file. Raises InputError where the gguf package is missing."""
    from transformers import AutoConfig

    _require_gguf(file)
    header = read_header(file)
    with tempfile.TemporaryDirectory(prefix="kbne-") as folder, redirect_stderr(io.StringIO()):
        without_vocabulary(header, file, Path(folder) / file.name, weights=False)
        config = AutoConfig.from_pretrained(folder, gguf_file=file.name)
    for entry in header.entries:
        if entry.name == "token_embd.weight":  # else it is counted in the vocabulary
            config.vocab_size = entry.shape[0]
    return config


class GGUFTensors:
    """The tensors of a GGUF file as transformers has them, read one by one.

    Not of mixtures of experts: transformers puts their tensors together from several.
    """

    def __init__(self, file: Path, model: Any):
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        header = read_header(file)
        self._file = file
        kind = TENSOR_PROCESSORS.get(str(header.metadata["general.architecture"]), TensorProcessor)
        self._processor = kind(config=model.config.to_dict())
        self._names = get_gguf_hf_weights_map(model, self._processor)
        self._entries = {self._names[entry.name]: entry for entry in header.entries if entry.name in self._names}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._entries.items()}

    def size(self, name: str) -> int:
        """Bytes in the file."""
        return self._entries[name].size

    def read(self, name: str) -> np.ndarray:
        """float32, dequantised by the gguf package."""
        from gguf import GGMLQuantizationType, dequantize

        entry = self._entries[name]
        raw = np.fromfile(self._file, np.uint8, entry.size, offset=entry.start).reshape(*entry.shape[:-1], -1)
        weights = dequantize(raw, GGMLQuantizationType[entry.kind.name])
        result = self._processor.process(
            weights=weights, name=entry.name, tensor_key_mapping=self._names, parsed_parameters={"tensors": {}}
        )
        return np.ascontiguousarray(result.weights, np.float32)


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
