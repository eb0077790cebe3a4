"""Seconds per question and quadrature error on a real model.

    python benchmarks/attribution.py MODEL_DIR [--questions 3]

Prints, per quadrature: seconds per question, and the largest error against 64 Gauss-Legendre nodes on each of the
graded intervals [0, 1/64, 1/16, 1/4, 1] for the layers that were refined, plain 64 nodes for the others, relative to
the question's largest score.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from kbne_edit.attribution import Prompt, attributions
from kbne_edit.prompts import answer_tokens, encode
from kbne_edit.recipe import load_recipe
from kbne_edit.verification import load_model, load_tokenizer


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--questions", type=int, default=3)
    arguments = parser.parse_args()
    recipe = load_recipe("social-bias")
    tokenizer = load_tokenizer(arguments.model)
    model = load_model(arguments.model, torch.float32)
    tokens = answer_tokens(tokenizer, recipe.answers)
    asked = recipe.questions[: arguments.questions]
    ids = [encode(tokenizer, recipe, q) for q in asked]
    answers = [list(tokens[q.answer].values()) for q in asked]
    next(attributions(model, ids, answers))  # warm-up
    results = {}
    for quadrature in ("gauss", "riemann-20"):
        start = time.perf_counter()
        results[quadrature] = list(attributions(model, ids, answers, quadrature=quadrature))
        seconds = (time.perf_counter() - start) / len(asked)
        print(
            f"{quadrature}: {seconds:.2f} s per question, {len(asked)} questions, "
            f"{np.mean(list(map(len, ids))):.0f} tokens"
        )
    errors = {name: [] for name in results}
    for i, (prompt_ids, answer) in enumerate(zip(ids, answers, strict=True)):
        reference = _reference(Prompt(model, prompt_ids, answer, "down"), results["gauss"][i].nodes)
        largest = reference.abs().max()
        for name, found in results.items():
            errors[name].append(((found[i].scores - reference).abs().max() / largest).item())
    for name, values in errors.items():
        print(f"{name}: largest error {max(values):.2%} of the question's largest score (each: "
              + ", ".join(f"{v:.2%}" for v in values) + ")")  # fmt: skip


def _reference(prompt, nodes):
    scores = torch.zeros_like(prompt.h)
    x, w = np.polynomial.legendre.leggauss(64)
    x, w = (x + 1) / 2, w / 2
    edges = (0, 1 / 64, 1 / 16, 1 / 4, 1)
    for layer, count in enumerate(nodes):
        parts = list(zip(edges, edges[1:], strict=False)) if count > 4 else [(0, 1)]
        for a, b in parts:
            gradient = prompt.rows({layer: torch.tensor(a + (b - a) * x, dtype=torch.float32)})[layer].gradient
            scores[layer] += (
                (b - a) * prompt.h[layer] * (torch.tensor(w, dtype=torch.float32)[:, None] * gradient).sum(0)
            )
    return scores


if __name__ == "__main__":
    main()
