"""Many edits in one batch against one at a time, through the run-time hooks and plain forward passes."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from kbne_edit import Edit, hooked
from kbne_edit.errors import EditError
from kbne_edit.evaluation import batched, states
from kbne_edit.evaluation.batched import margins_of_edits, score_edits
from kbne_edit.models.places import decoder_layers, num_neurons
from kbne_edit.recipe import Probe
from tiny import FAMILIES, MIXTURES, MULTIMODAL, MULTIMODAL_MIXTURES, tiny_model

PER_TOKEN = 1e-5  # see test_evaluation.py


def _plain(model, context, continuation, temperature=1.0):
    """(log-probabilities [tokens] in float64, greedy?) of one pair, the whole sentence alone."""
    ids = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(context) - 1 : -1].double() / temperature
    target = ids[0, len(context) :]
    logp = logits.log_softmax(-1).gather(1, target[:, None])[:, 0].numpy()
    return logp, bool((logits.argmax(-1) == target).all())


def _pairs():
    """Pairs that share beginnings, answers of one token, and one that shares nothing."""
    rng = np.random.default_rng(0)

    def draw(n):
        return rng.integers(3, 97, n).tolist()

    context, stem = draw(4), draw(2)
    pairs = [(context, stem + draw(int(n))) for n in (1, 3, 5)]
    return pairs + [(context, [token]) for token in draw(3)] + [(draw(1), draw(9))]


def _edits(model, rng):
    """The model itself, and edits that begin at different layers, one of them of many neurons."""
    size, last = num_neurons(model), len(decoder_layers(model)) - 1
    layer = {"low": 1, "high": last}
    few = {name: dict.fromkeys(rng.choice(40, 3, False).tolist(), f) for name, f in (("low", -2.0), ("high", 4.0))}
    wide = dict.fromkeys(range(min(size, 40)), 0.25)
    return [
        None,
        Edit("down", {layer["low"]: few["low"]}),
        Edit("down", {layer["high"]: few["high"]}),
        Edit("down", {layer["low"]: wide, layer["high"]: few["high"]}),
    ]


@pytest.mark.parametrize("name", [*FAMILIES, *MIXTURES, *MULTIMODAL, *MULTIMODAL_MIXTURES])
def test_every_edit_is_as_if_it_were_alone(name):
    model, rng = tiny_model(name), np.random.default_rng(1)
    edits, pairs = _edits(model, rng), _pairs()
    got = score_edits(model, pairs, edits)
    assert got.logprobs.shape == got.greedy.shape == (len(edits), len(pairs))
    for row, edit in enumerate(edits):
        with hooked(model, edit) if edit else nullcontext():
            for i, (context, continuation) in enumerate(pairs):
                logp, greedy = _plain(model, context, continuation)
                assert got.logprobs[row, i] == pytest.approx(logp.sum(), abs=PER_TOKEN * len(continuation))
                assert got.greedy[row, i] == greedy
    moved = np.abs(got.logprobs - got.logprobs[0]).max(1)
    assert (moved[1:] > 100 * PER_TOKEN).all()  # the edits do something, so that agreement means something


@pytest.mark.parametrize("block", [7, 40, 2048])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_the_vocabulary_in_blocks(block, temperature, monkeypatch):
    """97 tokens in 14 blocks, in three, in one: the same sums, and the same likeliest token."""
    monkeypatch.setattr(batched, "VOCABULARY_BLOCK", block)
    model, rng = tiny_model("llama"), np.random.default_rng(1)
    edits, pairs = _edits(model, rng), _pairs()
    greedy = [int(model(torch.tensor([context])).logits[0, -1].argmax()) for context, _ in pairs[:3]]
    pairs += [(context, [token]) for (context, _), token in zip(pairs, greedy, strict=False)]
    got = score_edits(model, pairs, edits, temperature=temperature)
    for row, edit in enumerate(edits):
        with hooked(model, edit) if edit else nullcontext():
            want = [_plain(model, *pair, temperature) for pair in pairs]
        np.testing.assert_allclose(got.logprobs[row], [logp.sum() for logp, _ in want], atol=1e-4)
        assert got.greedy[row].tolist() == [hit for _, hit in want]
    assert got.greedy[0, -3:].all() and not got.greedy[0].all()


def test_a_flattening_takes_what_the_model_made_before(monkeypatch):
    model = tiny_model("llama")
    edits, kept = _edits(model, np.random.default_rng(1)), {}
    wanted = score_edits(model, _pairs(), [None], temperature=1.7).logprobs
    score_edits(model, _pairs(), edits[::-1], kept=kept)
    monkeypatch.setattr(states, "last_states", None)  # no further pass
    assert np.array_equal(score_edits(model, _pairs(), [None], temperature=1.7, kept=kept).logprobs, wanted)


def test_gate_and_down_in_one_batch():
    model, pairs = tiny_model("llama"), _pairs()
    edits = [Edit("gate", {0: {5: -3.0}}), Edit("down", {2: {7: 5.0}}), None]
    got = score_edits(model, pairs, edits)
    for row, edit in enumerate(edits):
        with hooked(model, edit) if edit else nullcontext():
            want = [_plain(model, *pair)[0].sum() for pair in pairs]
        np.testing.assert_allclose(got.logprobs[row], want, atol=1e-4)


def test_more_edits_and_texts_than_a_pass_holds(monkeypatch):
    """Small passes and one large one give the same figures, and say how much is done."""
    from kbne_edit.evaluation import batched

    model, pairs = tiny_model("qwen2"), _pairs()
    edits = [Edit("down", {1: {neuron: 3.0}}) for neuron in range(7)]
    whole, done = score_edits(model, pairs, edits), []
    for name, value in (("TREE_TOKENS", 8), ("_BATCH_TOKENS", 20), ("_HEAD_ROWS", 3)):
        monkeypatch.setattr(batched, name, value)
    parts = score_edits(model, pairs, edits, update=done.append)
    np.testing.assert_allclose(parts.logprobs, whole.logprobs, atol=9 * PER_TOKEN)
    assert (parts.greedy == whole.greedy).all() and sum(done) == len(pairs) * len(edits) and len(done) > 10


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])  # with the head in blocks, and where it caps the logits
def test_margins_and_temperature_against_a_plain_loop(name):
    model, rng = tiny_model(name), np.random.default_rng(0)
    rows = [rng.integers(3, 60, 14).tolist() for _ in range(6)]
    pairs = [
        (row, row[:cut] + [2] + row[cut + 1 : cut + 9]) for cut, row in zip((1, 3, 5, 8, 11, 13), rows, strict=True)
    ]
    probes = [Probe(*(" ".join(map(str, row)) for row in pair), "") for pair in pairs]
    edit = Edit("down", {1: {3: -2.0}})

    def tokenizer(text):
        return {"input_ids": [int(t) for t in text.split()]}

    for temperature in (1.0, 1.7):
        got = margins_of_edits(model, tokenizer, probes, [None, edit], temperature=temperature)
        for row, context in ((0, nullcontext()), (1, hooked(model, edit))):
            with context:
                want = [
                    np.subtract(*(_plain(model, row[:1], row[1:], temperature)[0].mean() for row in pair))
                    for pair in pairs
                ]
            np.testing.assert_allclose(got[row], want, rtol=0, atol=PER_TOKEN)
            assert np.abs(want).min() > 10 * PER_TOKEN


def test_layers_below_the_first_edited_one_are_computed_once():
    model = tiny_model("llama")
    seen = {}

    def note(index, output):
        if output.shape[1] > 1:  # the head goes by single positions
            seen.setdefault(index, []).append(len(output))

    handles = [
        layer.register_forward_hook(lambda _, __, output, i=i: note(i, output))
        for i, layer in enumerate(decoder_layers(model))
    ]
    try:
        score_edits(model, _pairs(), [Edit("down", {1: {0: 2.0}}), Edit("down", {2: {0: 2.0}}), None])
    finally:
        for handle in handles:
            handle.remove()
    assert seen == {0: [1], 1: [3], 2: [3]}


def test_the_neuron_after_the_last_is_refused():
    model = tiny_model("llama")  # 3 layers of 48 neurons
    for factors, reply in (({0: {48: 2.0}}, "names neuron 48 of layer 0"), ({3: {0: 2.0}}, "names layer 3")):
        with pytest.raises(EditError, match=reply), hooked(model, Edit("down", factors)):
            pass
    with hooked(model, Edit("down", {2: {47: 2.0}})):
        pass


def test_a_hook_rounds_the_product_once():
    """The factor itself is not rounded to the activation's dtype: .3 is not a bfloat16."""
    model, seen = tiny_model("llama", torch.bfloat16), []
    down = decoder_layers(model)[1].mlp.down_proj

    def look(_, args):
        seen.append(args[0].clone())

    down.register_forward_pre_hook(look)
    with hooked(model, Edit("down", {1: {3: 0.3, 5: -1.7}})), torch.no_grad():
        down.register_forward_pre_hook(look)  # behind the edit's own
        model(torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]]))
    before, after = seen
    expected = before.clone()
    for neuron, factor in ((3, 0.3), (5, -1.7)):
        expected[..., neuron] = (before[..., neuron].float() * factor).bfloat16()
    assert torch.equal(after, expected) and not torch.equal(after, before)
