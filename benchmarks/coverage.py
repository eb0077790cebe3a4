"""Do 95 % intervals hold the truth in 95 of 100 cases, and do tests keep their level, where items hang together?

Items come in clusters (a question asked in eight ways, twins of one target): an item's change is the sum of its
cluster's and its own part, whose shares of the variance are the intra-cluster correlation and the rest. Intervals and
tests are those of `kbne_edit.statistics`, by cluster, as `evaluate` and `tune` call them; beside them, what they would
say if every item were taken for one of its own.

    python benchmarks/coverage.py --runs 2000
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import NormalDist

import numpy as np

from kbne_edit.statistics import beyond_draws, change, permutation

CORRELATIONS = (0.0, 0.1, 0.3)
CLUSTERS, EACH = 30, 8  # clusters, and items in each


def part(rng: np.random.Generator, correlation: float, skewed: bool) -> np.ndarray:
    """One draw for each item, mean 0 and variance 1, [CLUSTERS * EACH]."""

    def values(count: int) -> np.ndarray:
        return rng.standard_exponential(count) - 1 if skewed else rng.standard_normal(count)

    own, shared = values(CLUSTERS * EACH), np.repeat(values(CLUSTERS), EACH)
    return np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own


def margins(rng: np.random.Generator, correlation: float, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Margins before and after, columns [n, 1]; their changes are skewed, as those of log-probabilities are."""
    before = part(rng, correlation, False)
    return before[:, None], (before + shift + part(rng, correlation, True))[:, None]


def shares(rng: np.random.Generator, correlation: float, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """0/1 columns: is a hidden value above 0? A third of the items are as they were; the others are drawn anew."""
    hidden = part(rng, correlation, False)
    fresh = np.where(np.arange(len(hidden)) % 3 == 0, hidden, part(rng, correlation, False))
    return (hidden > 0).astype(float)[:, None], (fresh + shift > 0).astype(float)[:, None]


KINDS: dict[str, Callable] = {"mean of a margin": margins, "share of items": shares}


def measure(kind: str, correlation: float, runs: int) -> dict:
    """Coverage of the interval of a change that is there, and level of the permutation test where there is none."""
    draw, clusters = KINDS[kind], [i // EACH for i in range(CLUSTERS * EACH)]
    shift = 0.3
    truth = NormalDist().cdf(shift) - 0.5 if kind == "share of items" else shift
    held, blind, reply, blind_said = [], [], [], []
    for run in range(runs):
        rng = np.random.default_rng([run, int(100 * correlation)])
        before, after = draw(rng, correlation, shift)
        for result, by in ((held, clusters), (blind, None)):
            interval = change([before], [after], clusters=by)
            result.append(interval.low <= truth <= interval.high)
        before, after = draw(rng, correlation, 0.0)
        reply.append(permutation(before, after, clusters=clusters) <= 0.05)
        blind_said.append(permutation(before, after) <= 0.05)
    return {
        "figure": kind,
        "correlation": correlation,
        "coverage": float(np.mean(held)),
        "level": float(np.mean(reply)),
        "coverage_by_item": float(np.mean(blind)),
        "level_by_item": float(np.mean(blind_said)),
    }


def few(count: int, runs: int) -> dict:
    """Coverage with few clusters of one item, where a plain percentile interval is too narrow."""
    held = []
    for run in range(runs):
        values = np.random.default_rng([run, count]).standard_normal(count)[:, None]
        interval = change([np.zeros_like(values)], [values])
        held.append(interval.low <= 0 <= interval.high)
    return {"clusters": count, "coverage": float(np.mean(held))}


def beyond(figures: int, runs: int, draws: int = 24) -> dict:
    """How often an edit that is no other than its draws is said to go beyond them in one figure or more."""
    rng = np.random.default_rng(figures)
    reply = [beyond_draws(rng.standard_t(4, (1 + draws, figures))).any() for _ in range(runs)]
    return {"figures": figures, "draws": draws, "said": float(np.mean(reply))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--json", action="store_true", dest="as_json")
    arguments = parser.parse_args()
    start = time.perf_counter()
    result = {
        "items": CLUSTERS * EACH,
        "clusters": CLUSTERS,
        "runs": arguments.runs,
        "cells": [measure(kind, rho, arguments.runs) for kind in KINDS for rho in CORRELATIONS],
        "few": [few(count, arguments.runs) for count in (6, 10, 20)],
        "beyond": [beyond(figures, arguments.runs) for figures in (1, 4, 16)],
    }
    result["seconds"] = round(time.perf_counter() - start, 1)
    if arguments.as_json:
        print(json.dumps(result))
        return
    print("figure, correlation within clusters: coverage of 95 % intervals, level of the test at 5 % (by item)")
    for cell in result["cells"]:
        print(
            f"  {cell['figure']}, {cell['correlation']:g}: {cell['coverage']:.1%}, {cell['level']:.1%} "
            f"({cell['coverage_by_item']:.1%}, {cell['level_by_item']:.1%})"
        )
    print("few clusters: " + ", ".join(f"{cell['clusters']}: {cell['coverage']:.1%}" for cell in result["few"]))
    print(
        "beyond every draw, said of an edit that is one of them: "
        + ", ".join(f"{cell['figures']} figures {cell['said']:.1%}" for cell in result["beyond"])
    )
    print(f"{result['runs']} runs, {result['items']} items in {result['clusters']} clusters, {result['seconds']} s")


if __name__ == "__main__":
    main()
