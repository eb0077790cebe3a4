"""What the proofs compute, by hand: routes, divergences, the size of the noise, and factors of every kind of neuron."""

import gc
import shutil
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from kbne_edit import Edit, fold, hooked, verify
from kbne_edit.disk.checkpoint import Checkpoint
from kbne_edit.disk.dtypes import from_float
from kbne_edit.errors import InputError
from kbne_edit.folding.plan import Plan
from kbne_edit.models import memory
from kbne_edit.models.loading import load_model
from kbne_edit.models.widening import float32_model, widened
from kbne_edit.proofs import behaviour
from kbne_edit.proofs.behaviour import behaviour_proof
from kbne_edit.proofs.noise import rounding_noise
from kbne_edit.proofs.outcome import BehaviourProof, FileProof, Proofs
from kbne_edit.proofs.passes import Outcome, Texts, kl_divergence, logit_difference, same_route
from tiny import tiny_model


def test_after_a_router_turned_nothing_is_compared():
    """Two probes of four and two positions; each position's row of experts, and where another one was chosen."""
    routes = [np.array([[0, 1], [2, 3], [0, 2], [1, 3]]), np.array([[0, 1], [1, 2]])]
    other = [np.array([[0, 1], [2, 1], [0, 2], [1, 3]]), np.array([[0, 1], [1, 2]])]
    logits = np.zeros((6, 3), np.float32)
    logits[:, 0] = (1, 2, 3, 4, 5, 6)
    moved = logits + np.array([0.5, 9, 9, 9, 0.25, 0], np.float32)[:, None]
    reference, got = Outcome(logits, routes), Outcome(moved, other)
    assert same_route(got, reference).tolist() == [True, False, False, False, True, True]
    assert logit_difference(got, reference) == pytest.approx(0.5 / logits.std(), rel=1e-6)


def test_the_divergence_is_from_the_reference():
    p, q = np.array([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]]), np.array([[0.1, 0.3, 0.6], [0.5, 0.25, 0.25]])
    expected = sum(a * np.log(a / b) for a, b in zip(p[0], q[0], strict=True)) / 2
    assert kl_divergence(np.log(p) + 3, np.log(q) - 40) == pytest.approx(expected, rel=1e-9)
    assert kl_divergence(np.log(q), np.log(p)) != pytest.approx(expected, rel=0.05)


def _shift(tensors, name):
    """The smallest change of one number: the last bit of its significand."""
    tensors[name].view(torch.int16)[1, 2] ^= 1


def _unscale(tensors, layer, neuron, factor):
    tensors[f"model.layers.{layer}.mlp.down_proj.weight"][:, neuron] *= factor


_DOWN = "model.layers.1.mlp.down_proj.weight"
FAULTS = {
    "a bit of an unedited weight": lambda t: _shift(t, "model.layers.1.self_attn.q_proj.weight"),
    "a bit of the head": lambda t: _shift(t, "lm_head.weight"),
    "a bit of a norm": lambda t: t["model.norm.weight"].view(torch.int16)[3:4].bitwise_xor_(1),
    "a neuron missed": lambda t: _unscale(t, 1, 5, 0.5),
    "another factor": lambda t: _unscale(t, 1, 5, 1.0078125),
    "another layer": lambda t: (_unscale(t, 1, 5, 0.5), _unscale(t, 2, 5, 2.0)),
    "another neuron": lambda t: (_unscale(t, 1, 5, 0.5), _unscale(t, 1, 6, 2.0)),
    "through a narrower dtype": lambda t: t.update({_DOWN: t[_DOWN].to(torch.float8_e5m2).to(torch.bfloat16)}),
}


@pytest.fixture(scope="module")
def doubled(tmp_path_factory):
    """A base and its output with four neurons doubled."""
    folder = tmp_path_factory.mktemp("doubled")
    tiny_model("llama", torch.bfloat16).save_pretrained(folder / "base")
    fold(folder / "base", Edit("down", {1: {5: 2.0, 7: 2.0}, 2: {0: 2.0, 9: 2.0}}), folder / "out")
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_the_second_proof_alone_finds(fault, doubled, tmp_path):
    """One load and one pass in each dtype hide none of these; each is in the weights, and no hash is asked."""
    shutil.copytree(doubled / "out", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    FAULTS[fault](tensors)
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    base, edit = Checkpoint.open(doubled / "base"), Edit("down", {1: {5: 2.0, 7: 2.0}, 2: {0: 2.0, 9: 2.0}})
    sound = behaviour_proof(Plan.of(base, edit), Checkpoint.open(doubled / "out"))
    assert all(proof.bit_equal for proof in sound) and [proof.greedy for proof in sound] == [1.0, None]
    result = behaviour_proof(Plan.of(base, edit), Checkpoint.open(tmp_path / "out"))
    assert not result[0].holds and result[0].dtype == "float32"


def test_two_models_are_never_in_memory(doubled, monkeypatch):
    """Base, then output: as many loads, and each finds the one before gone."""
    alive = []

    def load(*args):
        gc.collect()
        assert all(model() is None for model in alive)
        model = load_model(*args)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(behaviour, "load_model", load)
    assert verify(doubled / "base", doubled / "out").ok and len(alive) == 2


def test_what_both_models_continue(doubled):
    """Greedy, by a plain loop over the base with hooks, text by text."""
    prompts = [[5, 9, 30, 2], [7, 7, 41]]
    model = tiny_model("llama")
    result = Texts.continued(model, prompts)
    for row, ids in zip(result.rows, prompts, strict=True):
        assert row[: len(ids)] == ids
        for length in range(len(ids), len(row)):
            assert row[length] == int(model(torch.tensor([row[:length]])).logits[0, -1].argmax())
    assert [where.tolist() for where in result.written] == [list(range(3, 11)), list(range(14, 22))]


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2", "gemma3_text", "phi3"])
def test_a_widened_model_is_one_loaded_in_float32(name, tmp_path):
    """Vocabularies of one block, so that nothing is added in another order; the weights stay what they are."""
    tiny_model(name, torch.bfloat16).save_pretrained(tmp_path)
    wanted, ids = load_model(tmp_path, torch.float32), torch.tensor([[5, 9, 30, 2], [7, 7, 41, 3]])
    with torch.no_grad(), float32_model(Checkpoint.open(tmp_path)) as model:
        assert torch.equal(model(ids).logits, wanted(ids).logits)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    edit = Edit("down", {1: {3: 3.5}})
    with torch.inference_mode(), float32_model(Checkpoint.open(tmp_path)) as model, hooked(model, edit):
        with hooked(wanted, edit):
            assert torch.equal(model(ids).logits, wanted(ids).logits)


@pytest.mark.parametrize("rows", [1, 127, 128, 200])
def test_a_widened_projection_of_many_blocks_is_the_product_in_float32(rows):
    """A head, and projections within a layer, of more blocks than one; few rows and many."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=1024, intermediate_size=1100, vocab_size=1200, num_hidden_layers=1)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8)).bfloat16().eval()
    ids = torch.randint(3, 90, (1, rows), generator=torch.Generator().manual_seed(rows))
    with torch.no_grad():
        with widened(model):
            result = model(ids, use_cache=False).logits
        assert model.lm_head.weight.dtype == torch.bfloat16 and result.dtype == torch.float32
        wanted = model.double()(ids, use_cache=False).logits
    assert float((result - wanted).abs().max() / wanted.std()) < 1e-5


def test_a_limit_of_memory_says_how_models_run(tmp_path):
    """The limit is of the whole process; it ends with its context, and the inner one counts."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=48, vocab_size=90, num_hidden_layers=6, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "base")
    checkpoint = Checkpoint.open(tmp_path / "base")
    whole, layers = memory.OVERHEAD + memory.forward(checkpoint), memory.OVERHEAD + memory.forward_by_layer(checkpoint)
    assert layers < whole and memory.way(checkpoint) == "whole model"
    fold(tmp_path / "base", Edit("down", {0: {3: 2.0}}), tmp_path / "out")
    with memory.limited(whole + 1):
        assert memory.way(checkpoint) == "whole model"
        with memory.limited(whole - 1), memory.limited(None):
            assert memory.way(checkpoint) == "layer by layer"
            proof, *_ = verify(tmp_path / "base", tmp_path / "out").behaviour
            assert proof.holds and proof.how == "whole model, layer by layer"
        with memory.limited("1MB"):
            assert memory.way(checkpoint) == "too large"
            assert verify(tmp_path / "base", tmp_path / "out").behaviour[0].how == "site by site"
            with pytest.raises(InputError, match=r"--memory allows 0\.0 GB: pass a larger --memory"):
                memory.require_room(checkpoint, 4)
        assert memory.way(checkpoint) == "whole model"
    memory.require_room(checkpoint, 4)
    with pytest.raises(InputError, match="--memory 'much' is not a size"), memory.limited("much"):
        pass


@pytest.mark.parametrize("site", ["down", "gate"])
def test_the_noise_is_as_large_as_roundings_are(site):
    """Measured: what rounding factor * w to bfloat16 does to the outputs of the edited projection.

    The noise takes u |w| for the largest error of one weight. An error is uniform within u times the power of two below
    |w|, so it is smaller by the root of the mean square of a mantissa in [1, 2), which is 3 / (2 ln 2) = 1.47 squared
    where mantissas are spread evenly on a logarithmic scale.
    """
    torch.manual_seed(0)
    model = tiny_model("llama", torch.bfloat16).float()
    edit = Edit(site, {1: {neuron: 3.3 for neuron in range(48)}})
    module = model.model.layers[1].mlp.down_proj if site == "down" else model.model.layers[1].mlp.gate_proj
    ids = torch.randint(3, 90, (4, 60))
    held = []
    handle = module.register_forward_hook(lambda _, args, output: held.append((args[0].detach(), output.detach())))
    with torch.no_grad(), hooked(model, edit):
        model(ids)
    handle.remove()
    x, _ = held[0]
    exact = module.weight.detach().double() * np.float32(3.3).item()
    rounded = (module.weight.detach() * np.float32(3.3)).bfloat16().double()
    x = x.double() / (3.3 if site == "down" else 1.0)  # the hook has scaled it
    measured = (x @ (rounded - exact).T).float().std().item()
    noisy = []
    for seed in range(3):
        with torch.no_grad(), hooked(model, edit), rounding_noise(model, edit, torch.bfloat16, seed):
            handle = module.register_forward_hook(lambda _, args, output: noisy.append(output.detach()))
            model(ids)
            handle.remove()
    with torch.no_grad(), hooked(model, edit):
        handle = module.register_forward_hook(lambda _, args, output: noisy.append(output.detach()))
        model(ids)
        handle.remove()
    spread = torch.stack([output - noisy[-1] for output in noisy[:-1]]).std().item()
    scale = 3.3 if site == "gate" and spread < measured / 2 else 1.0  # hooks that come first see the output unscaled
    assert measured / (spread * scale) == pytest.approx(1 / 1.47, rel=0.15)


def test_each_expert_and_the_shared_one_have_factors_of_their_own(tmp_path):
    """In plain loops over the tensors of the file; powers of two, so that each product is exact."""
    tiny_model("qwen2_moe", torch.bfloat16).save_pretrained(tmp_path / "base")
    before = load_file(tmp_path / "base" / "model.safetensors")
    stem = "model.layers.0.mlp."
    experts = sorted(
        name for name in before if name.startswith(f"{stem}experts.") and name.endswith("down_proj.weight")
    )
    inside = before[experts[0]].shape[1]
    factors, expected = {}, {}
    for expert in range(len(experts)):
        name = f"{stem}experts.{expert}.down_proj.weight"
        expected[name] = before[name].clone()
        for turn, neuron in enumerate((2 + expert, inside - 1)):
            factors[expert * inside + neuron] = 2.0 ** (expert + 1 - 5 * turn)
            expected[name][:, neuron] *= 2.0 ** (expert + 1 - 5 * turn)
    shared = f"{stem}shared_expert.down_proj.weight"
    expected[shared] = before[shared].clone()
    for neuron, factor in ((1, 0.5), (before[shared].shape[1] - 1, 0.25)):
        factors[len(experts) * inside + neuron] = factor
        expected[shared][:, neuron] *= factor
    fold(tmp_path / "base", Edit("down", {0: factors}), tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in before.items():
        assert torch.equal(after[name], expected.get(name, value)), name
    for name in ("kbne_edit.json", "kbne_undo.kbne"):
        (tmp_path / "out" / name).unlink()
    assert verify(tmp_path / "base", tmp_path / "out", behaviour=False).edit.factors == {0: factors}


def test_proofs_come_back_from_their_record():
    files = FileProof(Edit("down", {0: {1: 2.0}}), "manifest", 9, 1, 4, (), ("a note",))
    dtypes = (
        BehaviourProof("float32", "whole model", True, False, 1e-6, 1e-3, 40, kl=1e-9, top1=1.0, greedy=0.75),
        BehaviourProof("bfloat16", "whole model", True, True, 0.0, 0.0, 40, rerouted=0.125),
    )
    proofs = Proofs(files, dtypes)
    data = proofs.to_dict()
    assert Proofs.from_dict(data, files.edit) == proofs and proofs.both_held and data["ok"] and data["file_proof"]
    assert data["behaviour"][0]["greedy"] == 0.75 and "rerouted" not in data["behaviour"][0]
    failed = Proofs(files.with_fault("x differs"), None)
    assert (failed.ok, failed.failed, failed.fault) == (False, "first", "x differs")
    second = Proofs(files, (BehaviourProof("float32", "whole model", False, False, 1.0, 0.1, 40),))
    assert (second.ok, second.failed, second.both_held) == (False, "second", False)
    assert not Proofs.from_dict(data | {"file_proof": False}, files.edit).files.holds
    with pytest.raises(ValueError):
        Proofs.from_dict(data | {"faults": ["x differs"]}, files.edit)


@pytest.mark.parametrize("name, dtype", [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_rounding_equals_torch_s_for_every_kind_of_number(name, dtype):
    """Ties, subnormals, infinities and NaNs of every payload, which an addition of bits would carry into the sign."""
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32)
    bits = np.concatenate(
        [bits, bits & 0xFFFF8000, np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800000, 0x7F800001], np.uint32)]
    )
    values = bits.view(np.float32)
    got = torch.from_numpy(from_float(values, name).view(np.int16)).view(dtype)
    expected = torch.from_numpy(values).to(dtype)
    assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.nan_to_num(7), expected.nan_to_num(7))


def test_a_factor_that_is_off_by_a_hundred_thousandth_is_more_than_rounding(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    neurons = dict.fromkeys(range(0, 48, 2), 3.5)
    fold(tmp_path / "base", Edit("down", {0: neurons, 2: neurons}), tmp_path / "out")
    for factor, holds in ((3.5, True), (3.5 * (1 + 1e-5), False)):
        edit = Edit("down", {layer: dict.fromkeys(neurons, factor) for layer in (0, 2)})
        plan = Plan.of(Checkpoint.open(tmp_path / "base"), edit)
        (proof,) = behaviour_proof(plan, Checkpoint.open(tmp_path / "out"))
        assert proof.holds == holds and not (holds and proof.bit_equal and proof.noise == 0), proof


def test_powers_of_two_alone_are_exact():
    for factor, exact in ((0.5, True), (4.0, True), (-2.0, True), (3.0, False), (0.3, False), (0.0, False)):
        assert Edit("down", {0: {1: factor, 2: 2.0}}).exact == exact
