"""kbne-edit: edit neurons in a language model's checkpoint, measure the effect on social bias, and prove the edit.

Legend of shapes, everywhere: Q questions, L layers, F intermediate size (neurons per layer), D hidden size,
T positions, R rows of a batch, V vocabulary.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# {public name: module}, imported on first use, so that `import kbne_edit` and `--help` do not import torch.
_PUBLIC = {
    "Edit": "edit",
    "KbneError": "errors",
    "InputError": "errors",
    "ProofError": "errors",
    "attribute": "attribution.gradients",
    "Checks": "settings",
    "Controls": "evaluation.settings",
    "Criteria": "tuning.settings",
    "debias": "debiasing",
    "doctor": "diagnosing",
    "evaluate": "evaluation.evaluate",
    "Fit": "fitting.result",
    "FitSettings": "fitting.fit",
    "fit": "fitting.fit",
    "hooked": "models.hooks",
    "Scores": "attribution.scores",
    "Settings": "settings",
    "Integral": "attribution.names",
    "Measurement": "evaluation.settings",
    "Output": "settings",
    "Search": "tuning.settings",
    "Space": "tuning.search",
    "load_recipe": "recipe",
    "load_scores": "attribution.scores",
    "compare": "comparing",
    "locate": "locating",
    "report": "reporting.contents",
    "bake": "baking",
    "Rule": "rule",
    "select": "selection.select",
    "show_progress": "progress",
    "tune": "tuning.tune",
    "verify": "verifying",
    "fold": "folded",
    "apply": "applying",
    "ask": "asking",
    "push": "pushing",
    "revert": "folding.undo",
}

__all__ = sorted([*_PUBLIC, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
