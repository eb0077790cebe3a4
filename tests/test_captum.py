"""Captum on one model of each kind beside the dense transformer: it scales values of one layer in the model's own pass.

Both evaluate the same 16 nodes, so what separates them is rounding.
"""

from functools import partial

import pytest
import torch

from kbne_edit import Integral
from kbne_edit.attribution.gradients import attributions
from kbne_edit.models.places import places
from tiny import tiny_model

captum = pytest.importorskip("captum.attr")

PROMPT, ANSWER = [5, 9, 40, 7, 8], [11, 12]
# Mamba 2 beside attention in a layer, and in turns; a gated delta net; a short convolution; a norm that ends the block
DENSE = ["falcon_h1", "bamba", "qwen3_5_text", "lfm2", "olmo2"]


def _scores(model, site="down"):
    (found,) = attributions(model, [PROMPT], [ANSWER], Integral(site=site, quadrature="gauss-16"))
    return found.scores


def _integrated(probability, h):
    return captum.IntegratedGradients(probability).attribute(h, n_steps=16, method="gausslegendre")[0]


def _p(model, count):
    logits = model(torch.tensor([PROMPT] * count), use_cache=False).logits[:, -1]
    return logits.softmax(-1)[:, ANSWER].sum(-1)


@pytest.mark.parametrize("name", DENSE)
def test_layers_that_hand_on_a_state_and_blocks_that_end_in_a_norm(name):
    model = tiny_model(name)
    scores = _scores(model)
    for layer, (place,) in enumerate(places(model, "down")):
        seen = []
        with place.module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach())):
            _p(model, 1)

        def probability(h, module=place.module):
            def put(_, args):
                return (torch.cat([args[0][:, :-1], h[:, None]], 1), *args[1:])

            with module.register_forward_pre_hook(put):
                return _p(model, len(h))

        want = _integrated(probability, seen[0][:, -1])
        assert want.abs().max() > 0
        assert (scores[layer] - want).abs().max() <= 1e-5 * scores.abs().max()


def _experts(module, values, hidden, top_k_index, top_k_weights):
    """A mixture's forward pass, token by token. values: what takes the place of each row's last token's outputs of all
    up-projections, [rows, E, F]; or a list, which is given them.
    """
    result = []
    for token, (x, chosen, weights) in enumerate(zip(hidden, top_k_index, top_k_weights, strict=True)):
        row, last = token // len(PROMPT), token % len(PROMPT) == len(PROMPT) - 1
        gate, up = torch.einsum("efd,d->ef", module.gate_up_proj, x).chunk(2, -1)
        if last and isinstance(values, list):
            taken = torch.zeros_like(up)
            taken[chosen] = up[chosen].detach()
            values.append(taken)
        elif last:
            up = values[row]
        h = module.act_fn(gate) * up
        result.append(sum(w * (module.down_proj[e] @ h[e]) for e, w in zip(chosen.tolist(), weights, strict=True)))
    return torch.stack(result)


def test_the_up_projections_of_a_mixture_of_experts():
    model = tiny_model("mixtral")
    scores = _scores(model, "up")
    for layer, (place,) in enumerate(places(model, "up")):
        experts, seen = place.module, []

        def run(values, count, experts=experts):
            experts.forward = partial(_experts, experts, values)
            try:
                return _p(model, count)
            finally:
                del experts.forward

        run(seen, 1)
        want = _integrated(lambda h, run=run: run(h, len(h)), seen[0][None])
        assert want.abs().max() > 0
        assert (scores[layer] - want.flatten()).abs().max() <= 1e-5 * scores.abs().max()
