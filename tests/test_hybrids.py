"""Models of which some layers hand a state from token to token: nothing is packed, and they are edited as ever."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from kbne_edit import Edit, Integral, attribute, fold, hooked, revert, verify
from kbne_edit.attribution import gradients
from kbne_edit.attribution.gradients import attributions
from kbne_edit.evaluation.batched import score_edits
from kbne_edit.families import end
from kbne_edit.models.loading import load_model
from kbne_edit.models.places import is_recurrent, places
from kbne_edit.models.trees import Tree, logits_at
from tiny import HYBRIDS, INFERRED, MORE_HYBRIDS, WHOLE_PROMPTS, tiny_model

PROMPTS, ANSWERS = [[5, 9, 40, 7, 8], [7, 8, 9, 10, 11, 30]], [[11, 12], [13]]


@pytest.fixture(params=[*HYBRIDS, *MORE_HYBRIDS, *INFERRED, *WHOLE_PROMPTS])
def hybrid(request, tmp_path):
    model = tiny_model(request.param)
    model.save_pretrained(tmp_path / "base")
    return model, tmp_path


def _edit(model):
    """Neurons of the first and the last layer that have a feed-forward block."""
    sizes = {layer: end(result) for layer, result in enumerate(places(model, "down")) if result}
    return Edit("down", {min(sizes): {3: 2.0, 17: 4.0}, max(sizes): {sizes[max(sizes)] - 1: 0.5}})


def test_the_fold_equals_the_hooks(hybrid):
    model, folder = hybrid
    assert is_recurrent(model)
    edit = _edit(model)
    fold(folder / "base", edit, folder / "out")
    ids = torch.tensor([PROMPTS[1]])
    with torch.inference_mode(), hooked(model, edit):
        expected = model(input_ids=ids, use_cache=False).logits
    baked = load_model(folder / "out", torch.float32)
    with torch.inference_mode():
        assert torch.equal(baked(input_ids=ids, use_cache=False).logits, expected)
        assert not torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
    assert verify(folder / "base", folder / "out").ok
    revert(folder / "out", folder / "again")
    name = "model.safetensors"
    assert (folder / "again" / name).read_bytes() == (folder / "base" / name).read_bytes()


def test_texts_side_by_side_are_scored_as_each_alone(hybrid):
    """They begin alike, so that a packed pass would mix their states."""
    model, _ = hybrid
    pairs = [([5, 9], [40, 7]), ([5, 9], [40, 8, 3]), ([5, 9, 40], [11])]
    changed = _edit(model)
    result = score_edits(model, pairs, [None, changed])
    tree = Tree([context + text for context, text in pairs])
    logits = logits_at(model, tree, range(len(tree.tokens)))
    for i, (context, text) in enumerate(pairs):
        for row, edit in enumerate((None, changed)):
            with torch.inference_mode(), hooked(model, edit) if edit else nullcontext():
                logp = model(input_ids=torch.tensor([context + text]), use_cache=False).logits[0].log_softmax(-1)
            expected = sum(float(logp[len(context) - 1 + k, token]) for k, token in enumerate(text))
            np.testing.assert_allclose(result.logprobs[row, i], expected, atol=2e-5)
            if edit is None:
                torch.testing.assert_close(logits[tree.paths[i]].log_softmax(-1), logp, atol=2e-5, rtol=0)


def test_attribution_is_complete(hybrid):
    """In a mixture of experts a router's choice turns along the path, and no quadrature is complete across a jump."""
    model, _ = hybrid
    dense = not any(place.experts for layer in places(model, "down") for place in layer)
    actual = attributions(model, PROMPTS, ANSWERS, Integral(quadrature="gauss" if dense else "gauss-4"))
    for result, ids, answer in zip(actual, PROMPTS, ANSWERS, strict=True):
        assert result.residual.max() < 0.01 or not dense
        with torch.inference_mode():
            p = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].softmax(-1)[answer].sum()
        assert result.p == pytest.approx(float(p), abs=1e-6)


@pytest.mark.parametrize("positions", [1, 2])
@pytest.mark.parametrize("name", ["llama", "qwen2_moe", "gpt2"])
def test_whole_prompts_give_what_packed_rows_give(name, positions, monkeypatch):
    """The same scores on a model that can be computed both ways, experts and Conv1D among them."""
    model = tiny_model(name)
    others = [[20, 21], [22]]
    for other_ids in (None, others):
        packed = attribute(
            model, PROMPTS, ANSWERS, Integral(quadrature="gauss-8", positions=positions, other_ids=other_ids)
        )
        with monkeypatch.context() as patch:
            patch.setattr(gradients, "is_recurrent", lambda _: True)
            whole = attribute(
                model,
                PROMPTS,
                ANSWERS,
                Integral(quadrature="gauss-8", positions=positions, other_ids=other_ids),
            )
        torch.testing.assert_close(whole, packed, atol=2e-5 * float(packed.abs().max()), rtol=0)
