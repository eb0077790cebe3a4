"""Attribution against independent oracles: published scores, Captum, completeness."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kbne_edit import Integral, attribute
from kbne_edit.attribution.gradients import attributions
from kbne_edit.attribution.quadrature import NodeValues, Path, quadrature
from kbne_edit.errors import InputError
from kbne_edit.models.places import decoder_layers
from tiny import FAMILIES, MULTIMODAL, tiny_model

PROMPT, ANSWER = [5, 17, 40, 8, 22, 31], [11, 12]


def test_published_scores(shared):
    golden = shared / "golden"
    model = AutoModelForCausalLM.from_pretrained(golden / "tiny-llama", dtype=torch.float32)
    prompts = json.loads((golden / "prompts.json").read_text())
    expected = load_file(golden / "scores.safetensors")
    scores = attribute(
        model,
        [p["input_ids"] for p in prompts],
        [[p["target_id"]] for p in prompts],
        Integral(site="gate", quadrature="riemann-20"),
    )
    for i, got in enumerate(scores):
        want = expected[f"scores_{i}"]
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("name", [*FAMILIES, *MULTIMODAL])
def test_captum(name, positions):
    """Captum scales h of one layer in the whole model's forward pass: no cache, no rows, one layer at a time."""
    from captum.attr import IntegratedGradients

    from kbne_edit.models.places import places

    model = tiny_model(name)
    prompts = [PROMPT, PROMPT[2:]]  # the other one stands beside it, and makes no difference
    scores = attribute(model, prompts, [ANSWER, ANSWER], Integral(quadrature="gauss-16", positions=positions))[0]
    for layer, ((module, *_),) in enumerate(places(model, "down")):
        seen = []
        handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach()))
        with torch.no_grad():
            model(torch.tensor([PROMPT]))
        handle.remove()

        def probability(h, module=module):
            def put(_, args):
                new = args[0].clone().reshape(len(h), len(PROMPT), -1)
                new[:, -positions:] = h
                return (new.reshape(args[0].shape), *args[1:])

            handle = module.register_forward_pre_hook(put)
            logits = model(torch.tensor([PROMPT] * len(h))).logits[:, -1]
            handle.remove()
            return logits.softmax(-1)[:, ANSWER].sum(-1)

        h = seen[0].reshape(1, len(PROMPT), -1)[:, -positions:]
        want = IntegratedGradients(probability).attribute(h, n_steps=16, method="gausslegendre")[0].sum(0)
        assert (scores[layer] - want).abs().max() <= 1e-5 * scores.abs().max()


def test_completeness_reaches_the_tolerance():
    model = tiny_model("llama")
    with torch.no_grad():  # a first layer that dominates the residual stream: the hard case
        decoder_layers(model)[0].mlp.down_proj.weight.mul_(300)
    (fixed,) = attributions(model, [PROMPT], [ANSWER], Integral(quadrature="gauss-4"))
    (refined,) = attributions(model, [PROMPT], [ANSWER], Integral(tolerance=1e-3))
    (reference,) = attributions(model, [PROMPT], [ANSWER], Integral(quadrature="gauss-256"))
    assert fixed.residual.max() > 1e-2  # the case is hard indeed
    assert refined.residual.max() <= 1e-3
    assert refined.nodes[0] > refined.nodes[-1]
    assert (refined.scores - reference.scores).abs().max() <= 5e-3 * reference.scores.abs().max()


NORMED = (
    "gemma2",
    "gemma3_text",
    "olmo2",
    "olmo3",
    "exaone4",
    "glm4",
    "hyperclovax",
)  # a norm follows the down-projection


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("name", NORMED)
def test_blocks_that_end_in_a_norm(name, scale):
    """Along gamma all happens near 0: at most 8 nodes a layer (the first apart) reach 1 % of 512 nodes' scores.

    scale: of the block's output before its norm; at 1 its mean square is near 1. At 100, 512 nodes are too few.
    """
    model = tiny_model(name)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
                parameter.mul_(scale if "down_proj" in key else 1.0)
    (result,) = attributions(model, [PROMPT], [ANSWER])
    (reference,) = attributions(model, [PROMPT], [ANSWER], Integral(quadrature="gauss-512"))
    (published,) = attributions(model, [PROMPT], [ANSWER], Integral(quadrature="riemann-20"))
    largest = reference.scores.abs().max()
    assert (published.scores - reference.scores).abs().max() > 2 * largest  # the case is hard indeed
    assert (result.scores - reference.scores).abs().max() <= 0.01 * largest
    assert result.nodes[1:].mean() <= 8 and result.nodes[0] <= 24


@pytest.mark.parametrize("name", [name for name in FAMILIES if "gemma4" not in name])
def test_where_a_norm_follows_the_block(name):
    """By the layer's own output: with y ten times as large it stays the same, but for eps."""
    from kbne_edit.models.places import places, post_norm

    model, outputs = tiny_model(name), []
    module, layer = places(model, "down")[1][0].module, decoder_layers(model)[1]
    for factor in (1e4, 1e5):
        with (
            module.register_forward_hook(lambda _, args, output, factor=factor: factor * output),
            layer.register_forward_hook(lambda _, args, output: outputs.append(output)),
            torch.no_grad(),
        ):
            model(torch.tensor([PROMPT]))
    before, after = (output[0] if isinstance(output, tuple) else output for output in outputs)
    same = bool((after - before).abs().max() < 1e-2 * before.abs().max())
    assert same == bool(post_norm(model))


@pytest.mark.parametrize("turn", [None, 1e-4, 1e-2, 0.5])
def test_a_path_integrates_along_gamma(turn):
    """The integrals of polynomials of tanh(asinh(gamma / turn)), or of gamma, against a fine sum over gamma."""
    path, nodes = Path(turn), (0.1, 0.3, 0.45, 0.8)
    low, high = path.gamma(0.1), path.gamma(0.8)
    gammas = np.geomspace(low, high, 400_001)
    u = gammas if turn is None else gammas / np.hypot(gammas, turn)
    for degree in range(4):
        values = u**degree / (1 if turn is None else np.hypot(gammas, turn))
        want = float(np.sum((values[1:] + values[:-1]) / 2 * np.diff(gammas)))
        own = np.array([path.gamma(s) for s in nodes])
        integrand = (own if turn is None else own / np.hypot(own, turn)) ** degree
        factors = np.array([path.factor(s) for s in nodes])
        gradient = integrand / (1 if turn is None else np.hypot(own, turn))
        assert path.weights(nodes, 0.1, 0.8) @ (factors * gradient) == pytest.approx(want, rel=1e-6)
    assert (path.gamma(0.0), path.gamma(1.0)) == (0, 1)


def test_log_odds_against_captum():
    from captum.attr import IntegratedGradients

    model, other = tiny_model("llama"), [20, 21]
    scores = attribute(model, [PROMPT], [ANSWER], Integral(quadrature="gauss-16", other_ids=[other]))[0]
    module, seen = model.model.layers[1].mlp.down_proj, []
    with module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach())), torch.no_grad():
        model(torch.tensor([PROMPT]))

    def log_odds(h):
        def put(_, args):
            return (torch.cat([args[0][:, :-1], h[:, None]], 1), *args[1:])

        with module.register_forward_pre_hook(put):
            p = model(torch.tensor([PROMPT] * len(h))).logits[:, -1].softmax(-1)
        return torch.log(p[:, ANSWER].sum(-1) / p[:, other].sum(-1))

    want = IntegratedGradients(log_odds).attribute(seen[0][:, -1], n_steps=16, method="gausslegendre")[0]
    assert (scores[1] - want).abs().max() <= 1e-5 * scores.abs().max()


def test_more_positions_than_the_prompt_has():
    with pytest.raises(InputError, match="7 positions are to be scaled, and question 0 has 6 tokens"):
        attribute(tiny_model("llama"), [PROMPT], [ANSWER], Integral(positions=7))


def test_a_scale_that_goes_by_the_place_in_the_row():
    """Llama 4 scales queries from a token on; prompts that end before it must not meet it, whatever stands beside."""
    model = tiny_model("llama4_text")
    prompts, answers = [PROMPT, PROMPT[2:], PROMPT[:3]], [ANSWER] * 3
    want = attribute(model, prompts, answers, Integral(quadrature="gauss-4"))
    for layer in model.model.layers:
        layer.self_attn.floor_scale, layer.self_attn.attn_scale = 16, 5.0
    model.config.floor_scale = 16
    got = attribute(model, prompts, answers, Integral(quadrature="gauss-4"))
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()
    model.config.floor_scale = 11
    with pytest.raises(InputError, match="fit into 10 tokens"):
        attribute(model, prompts, answers, Integral(quadrature="gauss-4"))


def test_completeness_at_several_positions():
    model = tiny_model("llama")
    for result in attributions(model, [PROMPT, PROMPT[1:]], [ANSWER, ANSWER], Integral(positions=4)):
        assert result.residual.max() <= 0.01


def test_the_model_is_left_as_it_was():
    model = tiny_model("llama").train()
    before = [p.requires_grad for p in model.parameters()]
    attribute(model, [PROMPT], [ANSWER])
    assert model.training and [p.requires_grad for p in model.parameters()] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def test_a_model_that_a_dispatcher_has_wrapped():
    from accelerate import dispatch_model

    want = attribute(tiny_model("llama"), [PROMPT], [ANSWER])
    model = dispatch_model(tiny_model("llama"), {"": "cpu"}, force_hooks=True)
    wrapped = model.model.layers[0].forward
    assert torch.equal(attribute(model, [PROMPT], [ANSWER]), want)
    assert model.model.layers[0].forward == wrapped


@pytest.mark.parametrize("bad", ["gauss-0", "simpson", "riemann", "gauss-x"])
def test_unknown_quadrature(bad):
    with pytest.raises(InputError, match="quadrature"):
        attribute(tiny_model("llama"), [PROMPT], [ANSWER], Integral(quadrature=bad))


def test_an_interval_is_exact_up_to_the_fifth_degree():
    """Gauss-Lobatto of four nodes: a gradient that is such a polynomial of gamma needs no second round."""
    rule, h, one = quadrature("gauss", 2, 1e-6), torch.ones(2, 1), torch.tensor([[6.0], [6.0]])
    result = {}
    for layer, gammas in rule.request().items():
        result[layer] = NodeValues(6 * gammas.double()[:, None] ** 5, gammas.double() ** 6)
    rule.accept(h.double(), one.double(), 1.0, result)
    assert rule.nodes[1] == 3 and rule.request() == {} and rule.gradients.flatten().tolist() == pytest.approx([1, 1])


def test_half_the_rows_where_memory_runs_out(monkeypatch):
    from kbne_edit.attribution import rows

    model, whole = tiny_model("llama"), rows.objective
    sizes, failed = [], []

    def small_device(model, hidden, *rest):
        if hidden.shape[1] > 12:
            failed.append(hidden.shape[1])
            raise torch.OutOfMemoryError("no room")
        sizes.append(hidden.shape[1])
        return whole(model, hidden, *rest)

    monkeypatch.setattr(rows, "objective", small_device)
    got = attribute(model, [PROMPT, PROMPT[:3]], [ANSWER, ANSWER], Integral(quadrature="gauss-4"))
    monkeypatch.setattr(rows, "objective", whole)
    want = attribute(model, [PROMPT, PROMPT[:3]], [ANSWER, ANSWER], Integral(quadrature="gauss-4"))
    assert failed == sorted(failed, reverse=True) and len(set(failed)) == len(failed)  # no size is tried twice
    assert max(sizes) == 12 and (got - want).abs().max() <= 1e-6 * want.abs().max()
    monkeypatch.setattr(rows, "objective", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    with pytest.raises(InputError, match="rows of one layer"):
        attribute(model, [PROMPT], [ANSWER])


@pytest.mark.parametrize("name", ["llama", "cohere", "granite", "gemma2", "phi"])
def test_the_head_in_blocks(name, monkeypatch):
    """Value and gradient of both objectives against plain logits and autograd; some models scale or cap logits."""
    from kbne_edit.attribution import head

    monkeypatch.setattr(head, "BLOCK", 13)
    model, generator = tiny_model(name), torch.Generator().manual_seed(2)
    hidden = torch.randn(1, 9, 32, generator=generator)
    owner, answers, others = np.array([0, 1, 1, 0, 2, 2, 0, 1, 2]), [[11, 12, 50], [3], [40, 96]], [[5], [6, 7, 8], [0]]
    for wrong in (None, others):
        mine, plain = (hidden.clone().requires_grad_() for _ in range(2))
        value = head.objective(model, mine, owner, head.Surfaces(answers), wrong and head.Surfaces(wrong))
        p = head.head(model, plain).softmax(-1)
        right = torch.stack([p[row, answers[q]].sum() for row, q in enumerate(owner)])
        want = right
        if wrong:
            want = torch.log(right / torch.stack([p[row, wrong[q]].sum() for row, q in enumerate(owner)]))
        value.sum().backward()
        want.sum().backward()
        assert torch.allclose(value, want, rtol=1e-5)
        assert (mine.grad - plain.grad).abs().max() <= 1e-5 * plain.grad.abs().max()
    assert head.is_plain(model, hidden) == (name not in ("cohere", "gemma2"))


def test_answers_of_unequal_length_side_by_side():
    """As many surfaces as each has, no token more: side by side as alone."""
    model, prompts, answers = tiny_model("llama"), [PROMPT, PROMPT[:4], PROMPT[2:]], [[11, 12, 13], [20], [0, 7]]
    together = list(attributions(model, prompts, answers))
    for prompt, answer, got in zip(prompts, answers, together, strict=True):
        (alone,) = attributions(model, [prompt], [answer])
        with torch.no_grad():
            p = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
        assert got.p == pytest.approx(float(p[answer].sum()), rel=1e-5) and alone.p == pytest.approx(got.p, rel=1e-6)
        assert (got.scores - alone.scores).abs().max() <= 1e-5 * alone.scores.abs().max()


@pytest.mark.parametrize("quadrature", ["gauss", "gauss-5", "riemann-7"])
@pytest.mark.parametrize("other", [None, [[20, 21]]])
def test_the_value_at_zero_and_the_residual(quadrature, other):
    """p_zero against the model with h = 0 at the last position; the residual by its definition, from these."""
    from kbne_edit.models.places import places

    model = tiny_model("llama")
    (result,) = attributions(model, [PROMPT], [ANSWER], Integral(quadrature=quadrature, other_ids=other))

    def value():
        with torch.no_grad():
            p = model(torch.tensor([PROMPT])).logits[0, -1].double().softmax(-1)
        return float(torch.log(p[ANSWER].sum() / p[other[0]].sum())) if other else float(p[ANSWER].sum())

    def put(_, args):
        h = args[0].clone()
        h[:, -1] = 0
        return (h, *args[1:])

    whole, largest = value(), result.scores.abs().max().item()
    for layer, ((module, *_),) in enumerate(places(model, "down")):
        with module.register_forward_pre_hook(put):
            zero = value()
        assert result.p_zero[layer] == pytest.approx(zero, rel=1e-5)
        gap = abs(result.scores[layer].double().sum().item() - (whole - zero)) / largest
        assert result.residual[layer] == pytest.approx(gap, abs=2e-5)


@pytest.mark.parametrize("graphs", [0, 30_000, 1e9])
def test_layers_are_computed_again_where_graphs_take_too_much(graphs):
    """Whatever is held and whatever is computed twice, the scores have the same bytes."""
    from kbne_edit.attribution.gradients import Resident

    model, prompts, answers = tiny_model("qwen2_moe"), [PROMPT, PROMPT[:4]], [ANSWER, [13]]
    got = list(attributions(Resident(model, graphs), prompts, answers))
    want = attribute(model, prompts, answers)
    assert all(torch.equal(result.scores, scores) for result, scores in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"positions": 3},
        {"objective": "log-odds"},
        {"before": "Consider this. ", "quadrature": "gauss-4"},
    ],
)
def test_locate_attributes_what_its_settings_say(settings, tmp_path):
    """Question by question, from the prompts and answers as the library gives them."""
    from kbne_edit.hub.source import DEMO
    from kbne_edit.locating import Settings, locate
    from kbne_edit.models.loading import load_model, load_tokenizer
    from kbne_edit.models.prompts import answer_tokens, encode
    from kbne_edit.recipe import load_recipe

    scores = locate("demo", tmp_path / "scores.safetensors", Settings(recipe="demo", questions=9, **settings))
    recipe, model, tokenizer = load_recipe("demo"), load_model(DEMO, torch.float32), load_tokenizer(DEMO)
    tokens = {answer: sorted(ids.values()) for answer, ids in answer_tokens(tokenizer, recipe.answers).items()}
    prompts = [encode(tokenizer, recipe, q, before=settings.get("before", "")) for q in scores.questions]
    other = {"yes": "no", "no": "yes"}
    want = attribute(
        model,
        prompts,
        [tokens[q.answer] for q in scores.questions],
        Integral(
            quadrature=settings.get("quadrature", "gauss"),
            positions=settings.get("positions", 1),
            other_ids=[tokens[other[q.answer]] for q in scores.questions] if "objective" in settings else None,
        ),
    )
    assert torch.equal(torch.tensor(scores.values), want)
    plain = attribute(model, prompts, [tokens[q.answer] for q in scores.questions])
    assert torch.equal(plain, want) == (settings == {})
