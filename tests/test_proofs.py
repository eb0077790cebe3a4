"""What the proofs compute, by hand: routes, divergences, the size of the noise, and factors of every kind of neuron."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kbne_edit import Edit, fold, hooked, verify
from kbne_edit.proofs.behaviour import Outcome, kl_divergence, logit_difference, same_route
from kbne_edit.proofs.noise import rounding_noise
from kbne_edit.proofs.outcome import BehaviourProof, FileProof, Proofs
from tiny import tiny_model


def test_after_a_router_turned_nothing_is_compared():
    """Two probes of four and two positions; each position's row of experts, and where another one was chosen."""
    routes = [np.array([[0, 1], [2, 3], [0, 2], [1, 3]]), np.array([[0, 1], [1, 2]])]
    other = [np.array([[0, 1], [2, 1], [0, 2], [1, 3]]), np.array([[0, 1], [1, 2]])]
    logits = np.zeros((6, 3), np.float32)
    logits[:, 0] = (1, 2, 3, 4, 5, 6)
    moved = logits + np.array([0.5, 9, 9, 9, 0.25, 0], np.float32)[:, None]
    reference, got = Outcome(logits, [], routes), Outcome(moved, [], other)
    assert same_route(got, reference).tolist() == [True, False, False, False, True, True]
    assert logit_difference(got, reference) == pytest.approx(0.5 / logits.std(), rel=1e-6)


def test_the_divergence_is_from_the_reference():
    p, q = np.array([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]]), np.array([[0.1, 0.3, 0.6], [0.5, 0.25, 0.25]])
    expected = sum(a * np.log(a / b) for a, b in zip(p[0], q[0], strict=True)) / 2
    assert kl_divergence(np.log(p) + 3, np.log(q) - 40) == pytest.approx(expected, rel=1e-9)
    assert kl_divergence(np.log(q), np.log(p)) != pytest.approx(expected, rel=0.05)


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
