"""Every causal architecture of the installed transformers, tiny and seeded: what works, and what is refused and why.

    python benchmarks/architectures.py              # all of them, about ten minutes on one core
    python benchmarks/architectures.py jamba zaya   # these

Of each: the checkpoint folded at every site against the hooked model (bit for bit), `verify`, `revert` against the
base's bytes, texts side by side against each alone, and attribution. Where rows can be packed, the scores are compared
with whole prompts; else the completeness residual is printed (a router turns along the path, so that no quadrature is
complete in a mixture of experts). Ends with status 1 if an architecture of the table fails.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
warnings.simplefilter("ignore")

import torch  # noqa: E402
from transformers import AutoConfig, logging  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL  # noqa: E402

import tiny  # noqa: E402
from kbne_edit import Edit, Integral, attribute, fold, hooked, revert, verify  # noqa: E402
from kbne_edit.attribution import gradients  # noqa: E402
from kbne_edit.evaluation.batched import score_edits  # noqa: E402
from kbne_edit.families import FAMILIES, end, family_of  # noqa: E402
from kbne_edit.models.loading import load_model  # noqa: E402
from kbne_edit.models.places import is_recurrent, places  # noqa: E402

PROMPTS, ANSWERS = [[5, 9, 40, 7, 8], [7, 8, 9, 10, 11, 30]], [[11, 12], [13]]
NAMES = {
    name.split("-")[0] if name not in tiny.MORE else name: name
    for name in [*tiny.FAMILIES, *tiny.MIXTURES, *tiny.HYBRIDS, *tiny.MORE_HYBRIDS, *tiny.MORE, *tiny.INFERRED][::-1]
}


def checked(name: str) -> str:
    """All checks of one architecture. Returns what is printed; raises AssertionError or what the tool raises."""
    model = tiny.tiny_model(name)
    sites = ["down", "gate", "up"] if family_of(model.config.to_dict()).gate else ["down"]
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        model.save_pretrained(base)
        model = load_model(base, torch.float32)  # ties what its configuration ties
        for site in sites:
            check_fold(model, base, site)
    edit = Edit("down", {layer: {3: 2.0} for layer, result in enumerate(places(model, "down")) if end(result)})
    check_scores(model, edit)
    return f"{', '.join(sites)}; {check_attribution(model)}"


def check_fold(model: torch.nn.Module, base: Path, site: str) -> None:
    sizes = [end(result) for result in places(model, site)]
    edit = Edit(site, {layer: {3: 2.0, size - 1: 4.0} for layer, size in enumerate(sizes) if size})
    out, again = base.parent / site, base.parent / f"{site}-again"
    fold(base, edit, out)
    ids = torch.tensor([[5, 17, 40, 8, 22, 31, 9, 60]])
    with torch.inference_mode():
        before = model(input_ids=ids, use_cache=False).logits
        with hooked(model, edit):
            expected = model(input_ids=ids, use_cache=False).logits
        assert not torch.equal(before, expected), f"{site}: the edit changes nothing"
        result = load_model(out, torch.float32)(input_ids=ids, use_cache=False).logits
    assert torch.equal(result, expected), f"{site}: fold and hooks differ by {(result - expected).abs().max():.1e}"
    assert verify(base, out).ok, f"{site}: verify fails"
    revert(out, again)
    name = "model.safetensors"
    assert (again / name).read_bytes() == (base / name).read_bytes(), f"{site}: revert gives other bytes"


def check_scores(model: torch.nn.Module, edit: Edit) -> None:
    pairs = [([5, 9], [40, 7]), ([5, 9], [40, 8, 3]), ([5, 9, 40], [11])]
    scored = score_edits(model, pairs, [None, edit])
    for i, (context, text) in enumerate(pairs):
        for row, which in enumerate((None, edit)):
            with torch.inference_mode(), hooked(model, which) if which else nullcontext():
                logp = model(input_ids=torch.tensor([context + text]), use_cache=False).logits[0].log_softmax(-1)
            expected = sum(float(logp[len(context) - 1 + k, token]) for k, token in enumerate(text))
            assert abs(scored.logprobs[row, i] - expected) < 1e-4, "a text side by side scores otherwise than alone"


def check_attribution(model: torch.nn.Module) -> str:
    if is_recurrent(model):
        residual = max(result.residual.max() for result in gradients.attributions(model, PROMPTS, ANSWERS))
        return f"whole prompts, residual {residual:.1%}"
    packed = attribute(model, PROMPTS, ANSWERS, Integral(quadrature="gauss-8"))
    with patch.object(gradients, "is_recurrent", lambda _: True):
        whole = attribute(model, PROMPTS, ANSWERS, Integral(quadrature="gauss-8"))
    difference = float((packed - whole).abs().max() / packed.abs().max())
    assert difference < 2e-5, f"packed rows and whole prompts differ by {difference:.1e}"
    return f"packed rows, {difference:.0e} from whole prompts"


def refusal(name: str) -> str:
    """Why an architecture without a tiny configuration is refused."""
    try:
        family_of(AutoConfig.for_model(name).to_dict())
    except Exception as error:
        return str(error)[:160]
    return "not tested"


def main() -> int:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    failed = 0
    for name in sys.argv[1:] or sorted({*CAUSAL, *FAMILIES}):
        start, state = time.perf_counter(), "works"
        try:
            about = checked(NAMES.get(name, name)) if name in NAMES else refusal(name)
            state = "works" if name in NAMES else "refused"
        except Exception as error:
            failed += 1
            state, about = "FAILS", f"{type(error).__name__}: {error}"[:200]
        print(f"{name:28} {state:8} {time.perf_counter() - start:5.1f} s  {about}", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
