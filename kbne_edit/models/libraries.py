"""A quantised checkpoint loaded by the library of its format: a reader that is not ours, for the behaviour proof."""

from __future__ import annotations

import importlib.util
import warnings
from typing import TYPE_CHECKING, Any

from ..disk.checkpoint import Checkpoint
from ..disk.layouts.layout import quantisation
from .loading import complete, foreign, load_config, model_class

if TYPE_CHECKING:
    import torch

# Of each method the module that transformers reads it with ("": transformers itself). GPTQ and AWQ need kernels that a
# CPU has not, and HQQ an accelerator.
_MODULES = {
    "compressed-tensors": "compressed_tensors",
    "fp8": "",
    "mxfp4": "",
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
}


def library(checkpoint: Checkpoint) -> str | None:
    """The library that reads this checkpoint on a CPU, if it is installed; None if there is none."""
    if checkpoint.gguf is not None:
        return "gguf"
    settings = quantisation(checkpoint.config) or {}
    module = _MODULES.get(str(settings.get("quant_method")))
    if module is None or (module and importlib.util.find_spec(module) is None):
        return None
    return module.replace("_", "-") or "transformers"


def activations(checkpoint: Checkpoint) -> str | None:
    """How the format quantises activations at run time: "static", "dynamic", or None."""
    settings = quantisation(checkpoint.config) or {}
    schemes = [group.get("input_activations") for group in (settings.get("config_groups") or {}).values()]
    if any(schemes):
        return "dynamic" if all(scheme.get("dynamic") for scheme in schemes if scheme) else "static"
    scheme = settings.get("activation_scheme")
    return scheme if scheme in ("static", "dynamic") else None


def load_by_library(checkpoint: Checkpoint, dtype: torch.dtype, native: bool) -> Any:
    """The causal model, by the library that `library` names. Raises CheckpointError.

    native: as the library runs it where activations are quantised as well, not with its weights as numbers.
    """
    path = checkpoint.path
    with foreign(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers says that our options add to those of config.json
        config = load_config(path)
        model, report = model_class(config).from_pretrained(
            path,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            experts_implementation="eager",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **_options(checkpoint, native),
        )
        model = complete(model, {**report, "unexpected_keys": set()}, path)
        return model if _quantised(checkpoint, native) else model.to(dtype)  # stacked experts come in bfloat16


def _quantised(checkpoint: Checkpoint, native: bool) -> bool:
    """True if the loaded model's weights are still codes."""
    method = (quantisation(checkpoint.config) or {}).get("quant_method")
    return method in ("bitsandbytes", "torchao") or (native and activations(checkpoint) is not None)


def _options(checkpoint: Checkpoint, native: bool) -> dict[str, Any]:
    import transformers

    method = (quantisation(checkpoint.config) or {}).get("quant_method")
    if method == "compressed-tensors" and not (native and activations(checkpoint)):
        return {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    if method == "fp8":
        return {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)}
    if method == "mxfp4":
        return {"quantization_config": transformers.Mxfp4Config(dequantize=True)}  # type: ignore[attr-defined]
    return {"device_map": "cpu"} if method in ("bitsandbytes", "torchao") else {}
