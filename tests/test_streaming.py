"""Attribution with the weights read layer by layer: the same scores as with the model in memory."""

import pytest
import torch

from kbne_edit import Integral
from kbne_edit.attribution.gradients import attributions, packs
from kbne_edit.disk.checkpoint import Checkpoint
from kbne_edit.errors import InputError
from kbne_edit.models import devices
from kbne_edit.models.streamed import Streamed
from tiny import FAMILIES, MIXTURES, MULTIMODAL, MULTIMODAL_MIXTURES, tiny_model

PROMPTS = [[5, 17, 40, 8, 22, 31], [5, 17, 40, 9], [5, 17, 40, 8, 60, 3, 7]]
ANSWERS = [[11, 12], [13], [11]]
PLENTY = 64e9


ALL = [*FAMILIES, *MIXTURES, *MULTIMODAL, *MULTIMODAL_MIXTURES]


@pytest.mark.parametrize("name, positions", [*((name, 1) for name in ALL), ("gemma3", 3)])
def test_same_scores_as_in_memory(name, positions, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    streamed = Streamed(Checkpoint.open(tmp_path), PLENTY)
    both = (attributions(layers, PROMPTS, ANSWERS, Integral(positions=positions)) for layers in (streamed, model))
    for got, want in zip(*both, strict=True):
        assert (got.scores - want.scores).abs().max() <= 1e-6 * want.scores.abs().max()
        assert got.p == pytest.approx(want.p, rel=1e-6)
        assert (got.nodes == want.nodes).all()


@pytest.mark.parametrize("name", ["llama-tied", "gemma3_text"])
def test_layers_that_are_sent_to_a_device_give_the_same_scores(name, tmp_path):
    """`cpu:0` is to torch another device than `cpu`, so that every tensor is sent; tied weights stay tied."""
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    sent = Streamed(Checkpoint.open(tmp_path), PLENTY, "cpu:0")
    assert (sent.model.lm_head.weight is sent.model.model.embed_tokens.weight) == model.config.tie_word_embeddings
    both = (attributions(layers, PROMPTS, ANSWERS, Integral(quadrature="gauss-4")) for layers in (sent, model))
    for got, want in zip(*both, strict=True):
        assert (got.scores - want.scores).abs().max() <= 1e-6 * want.scores.abs().max()


@pytest.mark.parametrize(
    "count, processes, rank, expected",
    [(1, 1, 0, "cuda"), (4, 1, 0, "spread"), (4, 4, 2, "cuda:2"), (2, 4, 3, "cuda:1"), (0, 1, 0, "cpu")],
)
def test_auto_takes_the_accelerator(count, processes, rank, expected, monkeypatch, caplog):
    """A machine with so many GPUs, as torch would describe it."""
    caplog.set_level("INFO", "kbne_edit")
    result = torch.device("cuda") if count else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: result)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(devices, "LOCAL_SIZE", processes)
    monkeypatch.setattr(devices, "LOCAL_RANK", rank)
    assert devices.chosen_device("auto") == expected and devices.chosen_device("mps") == "mps"
    assert any("computing on" in line for line in caplog.messages) == bool(count)


def test_weights_are_read_twice_for_all_questions(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    streamed = Streamed(checkpoint, PLENTY)
    outer = streamed.bytes_read
    list(attributions(streamed, PROMPTS, ANSWERS, Integral(quadrature="gauss-4")))
    total = sum(t.end - t.start for _, t in checkpoint.tensors.values())
    assert streamed.bytes_read - outer == 2 * (total - outer)
    assert all(p.is_meta for layer in streamed.model.model.layers for p in layer.parameters())


def test_whatever_is_wanted_and_however_grouped_the_bytes_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("kbne_edit.attribution.gradients.ROWS", 70)  # two questions of three layers go side by side
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    assert packs(model, PROMPTS) == [range(0, 2), range(2, 3)]
    streamed = Streamed(Checkpoint.open(tmp_path), PLENTY)
    together = [a.scores for a in attributions(streamed, PROMPTS, ANSWERS)]
    streamed.group = lambda packs, rows, bare: 1
    assert all(
        torch.equal(a.scores, b) for a, b in zip(attributions(streamed, PROMPTS, ANSWERS), together, strict=True)
    )
    for q in range(3):
        (alone,) = attributions(streamed, PROMPTS, ANSWERS, only=[q])
        assert torch.equal(alone.scores, together[q])


def test_too_small_a_budget_is_said(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="at least .* GB"):
        next(attributions(Streamed(Checkpoint.open(tmp_path), 1e6), PROMPTS, ANSWERS))


def test_a_budget_half_a_question_short_is_refused(tmp_path):
    """What one question keeps, counted in float32 by hand: its tokens, and its rows' inputs and gradients."""
    from kbne_edit.models import memory

    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    tokens, rows, bare, size, neurons, layers = 40, [3, 3, 3], 1, 32, 48, 3
    held = sum((n + bare) * (layers - index) for index, n in enumerate(rows)) * size
    question = 4 * (held + (sum(rows) + 3 * layers * bare) * neurons + 2 * tokens * size * layers)
    layer = 4 * sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    outside = 4 * sum(parameter.numel() for parameter in model.parameters()) - layers * layer
    other = memory.streamed(outside, layer, tokens + sum(rows) + bare, size)
    for share, fit in ((1.01, 1), (1.5, 1), (2.01, 2)):
        assert Streamed(checkpoint, other + share * question).group([[tokens]] * 3, rows, bare) == fit
    with pytest.raises(InputError, match="at least"):
        Streamed(checkpoint, other + 0.5 * question).group([[tokens]] * 3, rows, bare)
