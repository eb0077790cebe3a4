"""Two halves of the items: one to choose on (dev), one to confirm on (test).

Items that share a text (or a question, in BBQ) form a story, which is in one half, also across tasks. Each half has its
share of every group. Stories are ordered by a seeded hash, so the split does not depend on the order of the items.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InputError
from ..evaluation.benchmark import Benchmark


@dataclass(frozen=True)
class Half:
    """Tasks and neutral texts, each with its share of the items. texts: token ids of each text."""

    benchmarks: list[Benchmark]
    texts: list[list[int]]

    def digests(self) -> dict[str, tuple[int, str]]:
        """{task: (number of items, SHA-256 of their requests)}."""
        content = {task.name: (len(task.sizes), [task.sizes, task.pairs]) for task in self.benchmarks}
        content["neutral text"] = (len(self.texts), self.texts)
        return {name: (n, _digest(what)) for name, (n, what) in content.items()}


def whole_data(benchmarks: Sequence[Benchmark], names: Sequence[str]) -> str:
    """SHA-256 of all requests of these tasks, independent of their order and split."""
    items = []
    for task in benchmarks:
        starts = [0]
        for size in task.sizes:
            starts.append(starts[-1] + size)
        if task.name in names:
            items += [_digest([task.name, task.pairs[a:b]]) for a, b in zip(starts, starts[1:], strict=False)]
    return _digest(sorted(items))


def _digest(what: object) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def halves(
    benchmarks: Sequence[Benchmark], stories: Sequence[str], texts: Sequence[list[int]], seed: int
) -> tuple[Half, Half]:
    """(dev, test). stories, texts: the neutral texts, and their token ids.

    Raises InputError where a half would be empty.
    """
    side: dict[str, int] = {}
    dealt = [_deal(task.name, task.clusters, task.groups, side, seed) for task in benchmarks]
    neutral = _deal("neutral text", stories, [""] * len(stories), side, seed)
    dev, test = (
        Half(
            [task.take(items[half]) for task, items in zip(benchmarks, dealt, strict=True)],
            [texts[i] for i in neutral[half]],
        )
        for half in (0, 1)
    )
    return dev, test


def _deal(
    name: str, stories: Sequence[str], groups: Sequence[str], side: dict[str, int], seed: int
) -> tuple[list[int], list[int]]:
    """Indices of the items of both halves. side: {story: half}, which is extended."""
    sizes: Counter[str]
    count: Counter[object]
    sizes, count = Counter(), Counter()
    for story, group in zip(stories, groups, strict=True):
        sizes[story] += 1
        if story in side:
            count[group, side[story]] += 1
            count[side[story]] += 1
    order = sorted({(group, _digest([seed, story]), story) for story, group in zip(stories, groups, strict=True)})
    for group, _, story in order:
        if story in side:
            continue
        half = min((0, 1), key=lambda half, group=group: (count[group, half], count[half], half))  # type: ignore[misc]
        side[story] = half
        count[group, half] += sizes[story]
        count[half] += sizes[story]
    dev, test = ([i for i, story in enumerate(stories) if side[story] == half] for half in (0, 1))
    if not dev or not test:
        raise InputError(f"{name}: its {len(stories)} items cannot be halved, since one half would be empty: take more")
    return dev, test
