"""Seconds per question and quadrature error on a real model.

    python benchmarks/attribution.py MODEL_DIR [--questions 3]

Prints, per quadrature: seconds per question, and the largest error against 64 Gauss-Legendre nodes on each of the
graded intervals [0, 1/64, 1/16, 1/4, 1] for the layers that were refined, plain 64 nodes for the others, relative to
the question's largest score. Then the share of the time that its matrix products take by themselves: each shape that
the default quadrature multiplied, as often as it did, with operands at hand.
"""

import argparse
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kbne_edit import Integral
from kbne_edit.attribution.gradients import Resident, attributions, sweep
from kbne_edit.attribution.rows import Pack
from kbne_edit.models.loading import load_model, load_tokenizer
from kbne_edit.models.places import num_neurons
from kbne_edit.models.prompts import answer_tokens, encode
from kbne_edit.recipe import load_recipe


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--questions", type=int, default=3)
    arguments = parser.parse_args()
    recipe = load_recipe("social-bias")
    tokenizer = load_tokenizer(arguments.model)
    model = load_model(arguments.model, torch.float32)
    tokens = answer_tokens(tokenizer, recipe.answers)
    requests = recipe.questions[: arguments.questions]
    ids = [encode(tokenizer, recipe, q) for q in requests]
    answers = [list(tokens[q.answer].values()) for q in requests]
    next(attributions(model, ids, answers))  # warm-up
    results = {}
    for quadrature in ("gauss", "riemann-20"):
        start = time.perf_counter()
        results[quadrature] = list(attributions(model, ids, answers, Integral(quadrature=quadrature)))
        seconds = (time.perf_counter() - start) / len(requests)
        print(
            f"{quadrature}: {seconds:.2f} s per question, {len(requests)} questions, "
            f"{np.mean(list(map(len, ids))):.0f} tokens"
        )
    print(f"matrix products alone: {_products(model, ids, answers):.0%} of the time")
    references = [
        _reference(model, prompt_ids, answer, actual.nodes)
        for prompt_ids, answer, actual in zip(ids, answers, results["gauss"], strict=True)
    ]
    for name, actual in results.items():
        values = [
            ((result.scores - exact).abs().max() / exact.abs().max()).item()
            for result, exact in zip(actual, references, strict=True)
        ]
        print(
            f"{name}: largest error {max(values):.2%} of the question's largest score (each: "
            + ", ".join(f"{v:.2%}" for v in values)
            + ")"
        )


def _reference(model, ids, answer, nodes):
    """64 nodes for the layers that made do with one interval; for the others 64 on each of the graded intervals."""
    x, w = (torch.tensor(v, dtype=torch.float32) for v in np.polynomial.legendre.leggauss(64))
    x, w = (x + 1) / 2, w / 2
    edges = (0, 1 / 64, 1 / 16, 1 / 4, 1)
    parts = {la: list(zip(edges, edges[1:], strict=False)) if n > 4 else [(0, 1)] for la, n in enumerate(nodes)}
    resident, climbing = Resident(model), [pack := Pack(model, [ids], [answer], "down")]
    scores = torch.zeros(len(nodes), num_neurons(model))
    for number in range(max(map(len, parts.values()))):
        wanted = {la: p[number] for la, p in parts.items() if number < len(p)}
        request = {la: a + (b - a) * x for la, (a, b) in wanted.items()}
        ((result,),) = sweep(resident, climbing, [(pack, [request])], bare=False)
        climbing = []
        for la, (a, b) in wanted.items():
            scores[la] += (b - a) * pack.h[la, 0, 0] * (w @ result[la].gradient)
    return scores


class _Shapes(TorchDispatchMode):
    """Counts the shapes that are multiplied."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            a, b = args[-2:]
            self.seen[a.shape, b.shape, b.is_contiguous()] += 1
        return function(*args, **(kwargs or {}))


def _products(model, ids, answers):
    """Seconds of the matrix products alone over those of the attribution, in alternation."""
    with _Shapes() as shapes:
        list(attributions(model, ids, answers))
    start = time.perf_counter()
    list(attributions(model, ids, answers))
    whole, alone = time.perf_counter() - start, 0.0
    for (a, b, straight), count in shapes.seen.items():
        left, right = torch.randn(a), torch.randn(b if straight else b[::-1])
        right = right if straight else right.T
        left @ right
        start = time.perf_counter()
        for _ in range(min(count, 20)):
            left @ right
        alone += (time.perf_counter() - start) * count / min(count, 20)
    return alone / whole


if __name__ == "__main__":
    main()
