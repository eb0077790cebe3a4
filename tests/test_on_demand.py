"""A model whose layers are read when they run: the same proofs, effect and cost as with the model in memory."""

import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from kbne_edit import Edit, Integral, fold, verify
from kbne_edit.attribution.gradients import attributions
from kbne_edit.disk.checkpoint import Checkpoint
from kbne_edit.errors import CheckpointError
from kbne_edit.evaluation import batched
from kbne_edit.evaluation.impact import impact_of
from kbne_edit.folding.plan import Plan
from kbne_edit.hub.source import DEMO
from kbne_edit.models import memory
from kbne_edit.models.loading import load_model
from kbne_edit.models.on_demand import on_demand, supply_of
from kbne_edit.models.places import is_recurrent
from kbne_edit.proofs.behaviour import behaviour_proof
from kbne_edit.recipe import load_recipe
from tiny import tiny_model

IDS = torch.tensor([[5, 17, 40, 8, 22, 31], [9, 60, 3, 7, 1, 2]])
NAMES = ["llama", "llama-tied", "gpt2", "gemma3_text", "mixtral", "qwen3_vl", "qwen3_5_text", "lfm2", "nemotron_h"]


def _edit(factor):
    return Edit("down", {0: {3: factor, 47: factor}, 1: {7: factor}})


def _empty(model):
    return all(p.is_meta for layer in model.get_submodule("model.layers") for p in layer.parameters())


@pytest.fixture
def no_room(monkeypatch):
    monkeypatch.setattr(memory, "way", lambda checkpoint, free=None: "layer by layer")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_same_bits_as_in_memory(name, dtype, tmp_path):
    tiny_model(name, dtype).save_pretrained(tmp_path)
    resident, streamed = load_model(tmp_path, dtype), on_demand(Checkpoint.open(tmp_path), dtype)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(streamed(IDS, use_cache=False).logits, resident(IDS, use_cache=False).logits)


def test_a_pass_is_one_read_of_the_weights_and_leaves_the_layers_empty(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    model = on_demand(checkpoint, torch.float32)
    supply = supply_of(model)
    outer, total = supply.bytes_read, sum(t.end - t.start for _, t in checkpoint.tensors.values())
    for passes in (1, 2):
        with torch.no_grad():
            model(IDS, use_cache=False)
        assert supply.bytes_read - outer == passes * (total - outer) and _empty(model)
    assert supply_of(load_model(tmp_path, torch.float32)) is None


def test_a_layer_that_was_read_before_its_turn_is_let_go_of_too(tmp_path):
    """However fast the reading is beside the computing."""
    tiny_model("llama").save_pretrained(tmp_path)
    model = on_demand(Checkpoint.open(tmp_path), torch.float32)
    layers = model.get_submodule("model.layers")

    def wait(module, *_):
        following = next((b for a, b in pairwise(layers) if a.mlp is module), None)
        while following is not None and any(p.is_meta for p in following.parameters()):
            time.sleep(0.001)

    for layer in layers:
        layer.mlp.register_forward_hook(wait)
    with torch.no_grad():
        model(IDS, use_cache=False)
    assert _empty(model)


def test_a_pass_that_ends_early_harms_none_after_it(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    streamed = on_demand(Checkpoint.open(tmp_path), torch.float32)
    with torch.no_grad():
        for layer in (0, 1, 2):
            handle = streamed.model.layers[layer].mlp.register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                streamed(IDS)
            handle.remove()
        assert torch.equal(streamed(IDS).logits, model(IDS).logits) and _empty(streamed)


@pytest.mark.parametrize("name, factor", [("llama", 3.5), ("lfm2", 2.0)])
def test_the_second_proof_has_the_figures_of_the_model_in_memory(name, factor, tmp_path, monkeypatch):
    tiny_model(name).save_pretrained(tmp_path / "base")
    fold(tmp_path / "base", _edit(factor), tmp_path / "baked")
    resident = verify(tmp_path / "base", tmp_path / "baked").behaviour
    monkeypatch.setattr(memory, "way", lambda checkpoint, free=None: "layer by layer")
    streamed = verify(tmp_path / "base", tmp_path / "baked").behaviour
    assert {entry.how for entry in streamed} == {"whole model, layer by layer"}
    assert tuple(replace(entry, how="whole model") for entry in streamed) == resident
    assert all(entry.holds and entry.greedy == 1 for entry in streamed)
    if factor == 2:
        plan = Plan.of(Checkpoint.open(tmp_path / "base"), _edit(4.0))
        assert not any(entry.holds for entry in behaviour_proof(plan, Checkpoint.open(tmp_path / "baked")))


def test_the_second_proof_of_16_bits_holds(tmp_path, no_room):
    tiny_model("llama", torch.bfloat16).save_pretrained(tmp_path / "base")
    fold(tmp_path / "base", _edit(2.0), tmp_path / "baked")
    proofs = verify(tmp_path / "base", tmp_path / "baked").behaviour
    assert [(entry.dtype, entry.bit_equal) for entry in proofs] == [("float32", True), ("bfloat16", True)]


PAIRS = [([5, 17, 40], [8, 22]), ([5, 17, 40, 9], [3]), ([5, 17], [40, 2, 7]), ([60, 1, 2, 3, 4], [9, 31])]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mixtral", "xglm", "qwen3_5_text", "gemma3n_text"])
def test_many_edits_are_one_read_of_the_weights(name, tmp_path, monkeypatch):
    """Two trees under four edits: the bits of the model in memory; where a state is handed on, its numbers."""
    monkeypatch.setattr(batched, "TREE_TOKENS", 6)
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    streamed = on_demand(checkpoint, torch.float32)
    supply, edits = supply_of(streamed), [None, _edit(2.0), Edit("down", {1: {5: -3.0}}), Edit("gate", {2: {4: 0.5}})]
    edits = [edit for edit in edits if name != "xglm" or not edit or edit.site == "down"]
    before = supply.bytes_read
    got, want = (batched.score_edits(one, PAIRS, edits) for one in (streamed, load_model(tmp_path, torch.float32)))
    inside = sum(t.end - t.start for name, (_, t) in checkpoint.tensors.items() if ".layers." in name)
    if is_recurrent(model):
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=2e-5)
    else:
        assert np.array_equal(got.logprobs, want.logprobs)
        assert supply.bytes_read - before == inside
    assert np.array_equal(got.greedy, want.greedy) and (got.logprobs[1:] != got.logprobs[0]).any(1).all()
    assert _empty(streamed)


def test_what_does_not_fit_together_is_read_for_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(batched, "TREE_TOKENS", 6)
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    want = batched.score_edits(on_demand(Checkpoint.open(tmp_path), torch.float32), PAIRS, [None, _edit(2.0)])
    streamed = on_demand(Checkpoint.open(tmp_path), torch.float32)
    monkeypatch.setattr(memory, "available", lambda: 1.0)
    before = supply_of(streamed).bytes_read
    got = batched.score_edits(streamed, PAIRS, [None, _edit(2.0)])
    assert np.array_equal(got.logprobs, want.logprobs)
    layers = sum(p.numel() * p.element_size() for layer in model.model.layers for p in layer.parameters())
    assert supply_of(streamed).bytes_read - before == 2 * layers  # one for each tree


def test_effect_and_cost_are_those_of_the_model_in_memory(monkeypatch):
    checkpoint, recipe = Checkpoint.open(DEMO), load_recipe("demo")
    edit = Edit("down", {1: {3: 2.0, 7: 2.0}, 2: {5: 2.0}})
    resident = impact_of(checkpoint, edit, recipe)
    monkeypatch.setattr(memory, "way", lambda checkpoint, free=None: "layer by layer")
    streamed = impact_of(checkpoint, edit, recipe)
    assert streamed.effect == resident.effect and streamed.cost == resident.cost
    assert streamed.measures == resident.measures and resident.effect and resident.cost


@pytest.mark.parametrize("name", ["lfm2", "granitemoehybrid-moe", "gemma3n_text"])
def test_attribution_where_a_state_is_handed_on(name, tmp_path):
    """The backward pass reads each layer again, and computes it again."""
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    streamed = on_demand(Checkpoint.open(tmp_path), torch.float32)
    integral = Integral(quadrature="gauss-2", positions=2)
    both = (attributions(one, [[5, 17, 40, 8]], [[11, 12]], integral) for one in (streamed, model))
    for got, want in zip(*both, strict=True):
        assert (got.scores - want.scores).abs().max() <= 1e-6 * want.scores.abs().max()
        assert got.p == pytest.approx(want.p, rel=1e-6) and want.scores.abs().amax(1).min() > 0
    assert _empty(streamed)


def test_the_way_follows_the_memory(tmp_path):
    """The layers' weights in 32 bits: three of them, or two and a half at a time."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    outside = sum(p.numel() for p in model.parameters()) - 3 * layer
    for values, way in ((3.01, "whole model"), (2.99, "layer by layer"), (2.51, "layer by layer"), (2.49, "too large")):
        free = 4 * (outside + values * layer) / memory.SHARE
        assert memory.way(Checkpoint.open(tmp_path), free) == way


def test_layers_that_share_a_block_are_not_read_one_by_one(tmp_path):
    tiny_model("zamba2").save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert memory.way(checkpoint, memory.forward(checkpoint)) == "too large"
    with pytest.raises(CheckpointError, match="layer by layer"):
        on_demand(checkpoint, torch.float32)
