"""What an edit does to a preference, beside random neurons of the same number and layers.

m = mean log-probability per token of a probe's first sentence (the stereotyped or the unwanted one) minus that of its
second. With the aim "balance" |m| should fall, neither sentence preferred; with "avoid", m itself. Items are paired
before and after; intervals are 95 % bootstrap intervals over items (percentile, seeded).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .edit import Edit
from .hooks import hooked
from .recipe import Probe

if TYPE_CHECKING:
    from torch import nn

RANDOM_DRAWS = 5
_RESAMPLES = 2000


def margins(model: nn.Module, tokenizer, probes: Sequence[Probe]) -> np.ndarray:
    """m of every probe, [n]."""
    return np.array(
        [_score(model, tokenizer, p.first) - _score(model, tokenizer, p.second) for p in probes]
    )


def _score(model: nn.Module, tokenizer, text: str) -> float:
    import torch

    ids = torch.tensor([tokenizer(text)["input_ids"]], device=model.get_input_embeddings().weight.device)
    with torch.no_grad():
        logp = model(ids).logits[0, :-1].float().log_softmax(-1)
    return float(logp.gather(1, ids[0, 1:, None]).mean())


def random_edit(edit: Edit, neurons: Sequence[int], seed: int) -> Edit:
    """The same number of other neurons in each layer, with the same factors. neurons: how many each layer has, [L]."""
    rng = np.random.default_rng(seed)
    factors = {}
    for layer, found in edit.factors.items():
        free = np.setdiff1d(np.arange(neurons[layer]), list(found))
        if len(free) < len(found):  # more than half of a layer is edited: overlap cannot be avoided
            free = np.arange(neurons[layer])
        factors[layer] = dict(zip(rng.choice(free, len(found), False).tolist(), found.values(), strict=True))
    return Edit(edit.site, factors)


def effect(
    model: nn.Module, tokenizer, probes: Sequence[Probe], edit: Edit, neurons: Sequence[int], aim: str = "balance"
) -> dict:
    """The edit's effect on m, and that of random neurons. neurons: as of `random_edit`. aim: of the recipe's probes.

    Computed with hooks, which the fold equals.
    """
    before = margins(model, tokenizer, probes)
    with hooked(model, edit):
        after = margins(model, tokenizer, probes)
    draws = []
    for seed in range(RANDOM_DRAWS):
        with hooked(model, random_edit(edit, neurons, seed)):
            draws.append(margins(model, tokenizer, probes))
    size, what = (np.abs, "bias") if aim == "balance" else (np.asarray, "of what is unwanted")
    result = {
        "aim": aim,
        "probes": len(before),
        "stereotype_share": [float((m > 0).mean()) for m in (before, after)],
        "mean_margin": [float(before.mean()), float(after.mean())],
        "mean_abs_margin": [float(np.abs(before).mean()), float(np.abs(after).mean())],
        "change_abs": _interval(np.abs(after) - np.abs(before)),
        "change_signed": _interval(after - before),
        "random_change_abs": _interval(np.mean([np.abs(d) for d in draws], 0) - np.abs(before)),
        "random_change_signed": _interval(np.mean(draws, 0) - before),
        "random_draws": RANDOM_DRAWS,
        "versus_random": _interval(size(after) - np.mean([size(d) for d in draws], 0)),
    }
    low, high = result["versus_random"][1:]
    result["found"] = (
        f"less {what} than random neurons"
        if high < 0
        else (f"more {what} than random neurons" if low > 0 else "no effect found beyond random neurons")
    )
    return result


def _interval(values: np.ndarray) -> list[float]:
    """[mean, low, high], 95 % by bootstrap over items."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (_RESAMPLES, len(values)))].mean(1)
    return [float(values.mean()), *(float(q) for q in np.quantile(means, [0.025, 0.975]))]
