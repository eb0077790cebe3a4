"""Gradients of the factors against finite differences of the hooked model; the metric against dense algebra."""

import numpy as np
import pytest
import torch

from kbne_edit import Edit, hooked
from kbne_edit.errors import InputError
from kbne_edit.fitting.gram import Shrinkage, diagonal, direction, gram, scale
from kbne_edit.fitting.passes import Neutral, Scored, gradients, layer_sizes, objectives
from tiny import FAMILIES, MIXTURES, tiny_model

SEQUENCES = [
    Scored((5, 17, 40, 8, 22), (0.0, 1.0, 1.0, 0.5)),
    Scored((3, 9, 60), (1.0, -1.0)),
    Scored((31, 9, 60, 12, 4, 7), (0.0, 0.0, 0.0, 0.25, 2.0)),
]
DENSE = ["llama", "gpt2", "opt", "gemma2", "gemma3_text", "phi3", "gpt_neox", "falcon", "cohere", "granite"]


def objective(model, sequence):
    """By the model's own pass on this sequence alone."""
    with torch.no_grad():
        logits = model(torch.tensor([sequence.ids])).logits[0, :-1].log_softmax(-1)
    picked = logits[range(len(sequence.ids) - 1), list(sequence.ids[1:])]
    return float((picked * torch.tensor(sequence.weights)).sum())


def collected(model, sequences, **options):
    values, rows = np.zeros(len(sequences)), torch.zeros(len(sequences), sum(layer_sizes(model, "down")))
    for batch in gradients(model, sequences, **options):
        values[batch.index], rows[batch.index] = batch.values, batch.gradients
    return values, rows


@pytest.mark.parametrize("name", [name for name in DENSE if name in FAMILIES] + list(MIXTURES)[:4])
def test_gradients_are_those_of_the_hooked_model(name):
    """In a batch with padding, along a random direction, at factors that are not 1."""
    model = tiny_model(name, torch.float64).requires_grad_(False)
    sizes = layer_sizes(model, "down")
    generator = torch.Generator().manual_seed(1)
    at = 1 + 0.2 * torch.randn(sum(sizes), generator=generator)
    direction = torch.randn(sum(sizes), generator=generator)
    values, rows = collected(model, SEQUENCES, at=at)

    def moved(step, sequence):
        parts = (at + step * direction).split(sizes)
        edit = Edit("down", {la: dict(enumerate(part.tolist())) for la, part in enumerate(parts)})
        with hooked(model, edit):
            return objective(model, sequence)

    for i, sequence in enumerate(SEQUENCES):
        assert values[i] == pytest.approx(moved(0, sequence), abs=1e-5)
        slope = (moved(1e-3, sequence) - moved(-1e-3, sequence)) / 2e-3
        assert float(rows[i] @ direction) == pytest.approx(slope, rel=2e-3, abs=2e-4)


def test_drawn_tokens_follow_the_model():
    """Over many draws the values are those of tokens drawn from the model: their mean is minus the entropy."""
    model = tiny_model("llama", torch.float64).requires_grad_(False)
    sequence = Scored((5, 17), (1.0,))
    draw = torch.Generator().manual_seed(0)
    values, rows = collected(model, [sequence] * 600, draw=draw)
    with torch.no_grad():
        p = model(torch.tensor([[5]])).logits[0, -1].double().softmax(-1)
    entropy = float(-(p * p.log()).sum())
    spread = float(((p * p.log() ** 2).sum() - entropy**2).sqrt())
    assert abs(values.mean() + entropy) < 4 * spread / np.sqrt(600)
    assert len(set(np.round(values, 9))) > 20
    # The expected gradient of a log-probability under the model itself is 0.
    assert rows.mean(0).abs().max() < 5 * rows.std(0).max() / np.sqrt(600)


@pytest.mark.parametrize("name", ["llama", "opt", list(MIXTURES)[0]])
def test_gradients_by_position_are_those_of_one_position(name):
    """By autograd on the model's own pass, one sequence, one layer's neurons scaled at one position."""
    model = tiny_model(name, torch.float64).requires_grad_(False)
    sizes = layer_sizes(model, "down")
    direction = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(4))
    _, rows = collected(model, SEQUENCES)
    for batch in gradients(model, SEQUENCES, by_position=True):
        for i, result in zip(batch.index, batch.gradients, strict=True):
            assert torch.allclose(result.sum(0) @ direction, rows[i] @ direction, rtol=1e-4, atol=1e-4)
            # What stands after a position cannot depend on the factors there, and the last one predicts nothing.
            assert not result[len(SEQUENCES[i].ids) - 1 :].any()
            assert result[0].any() and result[len(SEQUENCES[i].ids) - 2].any()


def test_a_sequence_has_one_weight_per_prediction():
    with pytest.raises(InputError, match="weights"):
        Scored((1, 2, 3), (1.0,))


def test_gram_solves_the_dense_metric():
    """(D + X' W X)^-1 y, with X of Fisher rows and others, and its effect on every row, against dense algebra."""
    generator = torch.Generator().manual_seed(2)
    fisher, units = torch.randn(7, 40, generator=generator), torch.randn(5, 40, generator=generator)
    weights = np.linspace(0.01, 0.02, 7)
    s = diagonal(fisher, weights)
    assert torch.allclose(s.double(), (torch.from_numpy(weights)[:, None] * fisher.double() ** 2).sum(0), rtol=1e-5)
    d = scale(s, Shrinkage(0.7, 0.2))
    assert torch.allclose(d, 0.3 * s + 0.2 * s.mean())
    among, w = np.array([0, 1, 2, 3, 4, 5, 6, 8, 9]), np.array([*(0.7 * weights), 3.0, 0.5])
    target = np.zeros(12)
    target[7:] = [0.2, -0.1, 0.4, 0, 1]
    result = gram([fisher, units], d)
    c = result.solve(target, among, w)
    rows = torch.cat([fisher, units]).double()
    dense = torch.diag(d.double()) + rows[among].T @ torch.diag(torch.from_numpy(w)) @ rows[among]
    expected = torch.linalg.solve(dense, rows.T @ torch.from_numpy(target))
    assert np.allclose(
        direction([fisher, units], d, c).double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
    )
    assert np.allclose(result.changes(c), rows @ expected, rtol=1e-3, atol=1e-4)


def test_real_cost_and_values_are_those_of_the_hooked_model():
    model = tiny_model("gemma2", torch.float64).requires_grad_(False)
    sizes = layer_sizes(model, "down")
    at = 1 + 0.5 * torch.randn(sum(sizes), generator=torch.Generator().manual_seed(1))
    edit = Edit("down", {la: dict(enumerate(part.tolist())) for la, part in enumerate(at.split(sizes))})
    texts = [[5, 17, 40, 8], [3, 9, 60, 11, 7, 2]]

    def logits():
        with torch.no_grad():
            return torch.cat([model(torch.tensor([ids])).logits[0, :-1] for ids in texts])

    base = logits().log_softmax(-1)
    with hooked(model, edit):
        expected = [objective(model, sequence) for sequence in SEQUENCES]
        edited = (logits() / 1.5).log_softmax(-1)
    targets = torch.tensor([token for ids in texts for token in ids[1:]])
    result = Neutral(model, texts).measure(at, temperature=1.5)
    assert result.kl == pytest.approx(float((base.exp() * (base - edited)).sum(-1).mean()), rel=1e-5)
    assert result.perplexity == pytest.approx(float((-edited.gather(1, targets[:, None]).mean()).exp()), rel=1e-5)
    assert Neutral(model, texts).measure().kl == pytest.approx(0, abs=1e-12)
    assert objectives(model, SEQUENCES, at=at) == pytest.approx(expected, abs=1e-5)
