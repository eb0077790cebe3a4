"""A model in memory: hooks, weights scaled in place, the whole search without a file."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from kbne_edit import Edit, Rule, Settings, debias, fold, hooked, locate, select
from kbne_edit.errors import EditError
from kbne_edit.families import end, family_of
from kbne_edit.models.places import places
from tiny import FAMILIES, MIXTURES, MULTIMODAL, tiny_model

IDS = torch.tensor([[5, 17, 40, 8, 22, 31, 9, 60]])
ALL = [*FAMILIES, *MIXTURES, *MULTIMODAL]


def _edit(model, site, factor):
    """Of the last layer also the last neuron: of the last expert, or of the one that every token takes."""
    last = end(places(model, site)[2]) - 1
    return Edit(site, {0: {3: factor, 40: factor}, 2: {0: factor, 11: 1.7 * factor, last: factor}})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("site", ["down", "gate"])
@pytest.mark.parametrize("name", ALL)
def test_in_place_is_what_fold_writes(name, site, dtype, tmp_path):
    """To the bit, with a factor that rounds: the weights of the folded checkpoint, loaded by plain transformers."""
    model = tiny_model(name, dtype)
    family = family_of(model.config.to_dict())
    if site == "gate" and (family.gate is None or family.experts):
        pytest.skip("no gate to scale")
    model.save_pretrained(tmp_path / "base")
    edit = _edit(model, site, 0.3)
    fold(tmp_path / "base", edit, tmp_path / "baked")
    loader = AutoModelForImageTextToText if name in MULTIMODAL else AutoModelForCausalLM
    model, baked = (loader.from_pretrained(tmp_path / name, dtype=dtype) for name in ("base", "baked"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert edit.apply_(model) is model
    after, want = model.state_dict(), baked.state_dict()
    assert any(not torch.equal(after[key], before[key]) for key in before)
    assert all(torch.equal(after[key], want[key]) for key in want)


def test_hooks_are_a_context():
    model = tiny_model("llama")
    with torch.no_grad():
        before = model(IDS).logits
        edit = Edit("down", {1: {4: 2.0}})
        with edit.hooks(model) as same:
            assert same is model
            within = model(IDS).logits
        with hooked(model, edit):
            assert torch.equal(within, model(IDS).logits)
        assert torch.equal(before, model(IDS).logits) and not torch.equal(before, within)
        edit.apply_(model)
        assert torch.equal(within, model(IDS).logits)  # a power of two


def test_hooks_round_the_product_once():
    """bf16, factor .3: in float32, then rounded; a factor rounded to bf16 first (.30078125) gives other bits."""
    model = tiny_model("llama", torch.bfloat16)
    module, seen = model.model.layers[1].mlp.down_proj, []
    record = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    model(IDS)
    record.remove()
    with Edit("down", {1: {4: 0.3, 7: 0.3}}).hooks(model):
        record = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        model(IDS)
        record.remove()
    want = seen[0].clone()
    want[..., [4, 7]] = (seen[0][..., [4, 7]].float() * 0.3).bfloat16()
    assert torch.equal(seen[1], want)
    assert not torch.equal(want[..., [4, 7]], seen[0][..., [4, 7]] * torch.tensor(0.3).bfloat16())


def test_an_edit_that_does_not_fit_changes_nothing():
    model = tiny_model("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for factors in ({0: {3: 2.0}, 9: {0: 2.0}}, {0: {3: 2.0, 48: 2.0}}):
        with pytest.raises(EditError):
            Edit("down", factors).apply_(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_search_in_memory_is_the_search_on_disk(chatty, tmp_path):
    settings = Settings(questions=24, quadrature="gauss-2", tau=0.3)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(chatty), AutoTokenizer.from_pretrained(chatty)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = debias(model, tokenizer, "social-bias", settings)
    requests = Settings(recipe="social-bias", questions=24, quadrature="gauss-2")
    scores = locate(str(chatty), tmp_path / "s.safetensors", requests)
    assert torch.equal(torch.tensor(result.scores.values), torch.tensor(scores.values))
    assert (result.scores.p_answers == scores.p_answers).all() and (result.scores.nodes == scores.nodes).all()
    assert result.edit.factors == select(scores, Rule(tau=0.3)).factors and result.edit.base is None
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    result.edit.apply_(model)
    assert not all(torch.equal(before[key], value) for key, value in model.state_dict().items())
