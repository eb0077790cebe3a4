"""Scoring StereoSet items: this package's scorer against lm-eval's own HFLM, with the same numbers.

    python benchmarks/evaluate.py MODEL_DIR DATA_DIR [--items 200] [--blocks 4] [--batch-sizes 1 16]

The items are cut into blocks; on each, both scorers run in turn, so that a change of the machine's load meets both.
Printed are the seconds, the median of the ratios block by block, and the largest differences per token: to HFLM as it
is, and to HFLM with its softmax in float64. What remains is the model's float32 noise: compare with the same model in
float64 before blaming either scorer.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from kbne_edit.evaluation.benchmark import sample
from kbne_edit.evaluation.datafiles import rows
from kbne_edit.evaluation.public import PUBLIC
from kbne_edit.evaluation.scoring import Scorer, quiet_lm_eval
from kbne_edit.models.loading import load_model, read_tokenizer


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    arguments = parser.parse_args()
    name = "stereoset_intrasentence"
    every = rows(name, arguments.data, PUBLIC[name].patterns)
    items = [every[i] for i in sample(len(every), arguments.items)]
    requests = [("", item[key]) for item in items for key in ("stereotype", "anti_stereotype", "unrelated")]
    model, tokenizer = load_model(arguments.model, torch.float32), read_tokenizer(arguments.model)
    with quiet_lm_eval():
        scorers = {"this package": Scorer(model, tokenizer)}
        for size in arguments.batch_sizes:
            scorers[f"HFLM, batch_size={size}"] = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size)
        exact = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16, softmax_dtype="float64")
    for scorer in scorers.values():
        run(scorer, requests[:6])  # warm-up
    step = 3 * -(-len(items) // arguments.blocks)
    seconds, answers = {n: [] for n in scorers}, {n: [] for n in scorers}
    for start in range(0, len(requests), step):
        for n, scorer in scorers.items():
            taken, result = run(scorer, requests[start : start + step])
            seconds[n].append(taken)
            answers[n] += result
    reference = run(exact, requests)[1]
    tokens = [len(pair[1]) for pair in scorers["this package"].encode_pairs(requests)]
    ours = "this package"
    print(f"{len(items)} StereoSet items, {torch.get_num_threads()} threads; {ours}: {sum(seconds[ours]):.1f} s")
    for n in list(scorers)[1:]:
        ratio = statistics.median(b / a for a, b in zip(seconds[ours], seconds[n], strict=True))
        print(f"{n}: {sum(seconds[n]):.1f} s, ratio {ratio:.2f}, {compared(answers[ours], answers[n], tokens)}")
    print(f"HFLM, softmax in float64: {compared(answers[ours], reference, tokens)}")


def run(scorer, requests):
    """(seconds, [(log-probability, greedy)])."""
    instances = [Instance("loglikelihood", {}, request, i) for i, request in enumerate(requests)]
    start = time.perf_counter()
    result = scorer.loglikelihood(instances, disable_tqdm=True)
    return time.perf_counter() - start, result


def compared(ours, theirs, tokens):
    """Differences, and whether the same sentence of an item is preferred."""
    largest = max(abs(a[0] - b[0]) / n for a, b, n in zip(ours, theirs, tokens, strict=True))
    items = range(0, len(ours), 3)
    same = sum((ours[i][0] > ours[i + 1][0]) == (theirs[i][0] > theirs[i + 1][0]) for i in items)
    return f"largest difference {largest:.1e} nats per token, same preference in {same} of {len(items)} items"


if __name__ == "__main__":
    main()
