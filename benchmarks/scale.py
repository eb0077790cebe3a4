"""Attribution at scale: layer by layer against in memory, two processes against one, and a model of Llama-2-7B's shape.

    python benchmarks/scale.py real MODEL_DIR [--questions 8] [--shared 45]
    python benchmarks/scale.py large FOLDER [--questions 45] [--memory 10GB] [--layers 32] [--keep]

`real` prints the ratio of times and the largest difference of scores, then the ratio of two processes with one thread
each to one process with one thread, for `shared` questions and as many controls. `large` writes 13.5 GB of seeded
weights into FOLDER (unless they are there), attributes the recipe's questions, and prints wall time, peak memory and
bytes read; it deletes the weights afterwards.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from kbne_edit.attribution.gradients import attributions
from kbne_edit.disk.checkpoint import Checkpoint
from kbne_edit.files import parse_size
from kbne_edit.models.loading import load_model, load_tokenizer
from kbne_edit.models.prompts import answer_tokens, encode
from kbne_edit.models.streamed import Streamed
from kbne_edit.recipe import load_recipe

LLAMA_2_7B = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    hidden_size=4096,
    intermediate_size=11008,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32000,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    tie_word_embeddings=False,
    dtype="bfloat16",
)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["real", "large"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=int)
    parser.add_argument("--shared", type=int, default=45)
    parser.add_argument("--memory", default="10GB")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    if arguments.what == "real":
        against_memory(arguments.folder, arguments.questions or 8)
        processes(arguments.folder, arguments.shared)
    else:
        large(arguments)


def against_memory(folder, count):
    recipe, tokenizer = load_recipe("social-bias"), load_tokenizer(folder)
    tokens = answer_tokens(tokenizer, recipe.answers)
    requests = recipe.questions[:count]
    ids = [encode(tokenizer, recipe, q) for q in requests]
    answers = [list(tokens[q.answer].values()) for q in requests]
    actual, seconds = {}, {}
    for name in ("layer by layer", "in memory"):
        start = time.perf_counter()
        layers = (
            Streamed(Checkpoint.open(folder), 64e9) if name == "layer by layer" else load_model(folder, torch.float32)
        )
        actual[name] = [result.scores for result in attributions(layers, ids, answers)]
        seconds[name] = time.perf_counter() - start
        print(f"{name}: {seconds[name] / count:.2f} s per question, loading included, {count} questions")
    pairs = zip(*actual.values(), strict=True)
    worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    ratio = seconds["layer by layer"] / seconds["in memory"]
    print(f"layer by layer / in memory: {ratio:.2f}; largest difference {worst:.1e} of a question's largest score")


def processes(folder, count):
    """The whole of `locate`, loading included, with so many questions and controls."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    seconds = []
    with tempfile.TemporaryDirectory() as out:
        for number, start in enumerate(([sys.executable], launch)):
            command = [*start, "-m", "kbne_edit", "locate", "--in", folder.resolve(), "--questions", count]
            command += ["--out", Path(out) / f"{number}.safetensors"]
            begun = time.perf_counter()
            subprocess.run(list(map(str, command)), check=True, env=environment, capture_output=True)
            seconds.append(time.perf_counter() - begun)
        one, two = (path.read_bytes() for path in sorted(Path(out).iterdir()))
    print(
        f"one process {seconds[0]:.1f} s, two {seconds[1]:.1f} s (one thread each): {seconds[0] / seconds[1]:.2f} "
        f"times as fast, scores {'the same bytes' if one == two else 'DIFFERENT'}"
    )


def large(arguments):
    folder = arguments.folder
    if not (folder / "config.json").exists():
        write(folder, arguments.layers)
    recipe = load_recipe("social-bias")
    requests = recipe.questions[: arguments.questions or 45]
    # One id per word: the plain prompt's length and common beginning, without a tokenizer.
    texts = [recipe.prompt["plain"].replace("{question}", q.text).split() for q in requests]
    words = {word: 100 + n for n, word in enumerate(sorted({w for text in texts for w in text}))}
    ids = [[1, *(words[w] for w in text)] for text in texts]
    layers, start = Streamed(Checkpoint.open(folder), parse_size(arguments.memory)), time.perf_counter()
    results = list(attributions(layers, ids, [[n % 32000] for n in range(7, 7 + len(ids))]))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    size = sum(shard.size for shard in layers._checkpoint.shards) / 1e9
    print(
        f"{len(results)} questions of {sum(map(len, ids)) / len(ids):.0f} tokens, {arguments.layers} layers: "
        f"{seconds / 60:.1f} min ({seconds / len(results):.1f} s per question), peak memory {peak:.1f} GB, "
        f"{layers.bytes_read / 1e9:.1f} GB read of {size:.1f} GB, largest residual "
        f"{max(r.residual.max() for r in results):.2%}"
    )
    if not arguments.keep:
        shutil.rmtree(folder)


def write(folder, layers):
    """Seeded bf16 weights of Llama-2-7B's shape, one shard per layer."""
    folder.mkdir(parents=True)
    config = LLAMA_2_7B | {"num_hidden_layers": layers}
    hidden, inner, vocabulary = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    generator, weight_map = torch.Generator().manual_seed(0), {}

    def tensor(*shape):
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(torch.bfloat16)

    def save(name, tensors):
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    outer = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    save(
        "model-outer.safetensors", {name: tensor(*shape) for name, shape in outer.items()} | {"model.norm.weight": ones}
    )
    for layer in range(layers):
        stem = f"model.layers.{layer}."
        square = {f"self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        shapes = square | {f"mlp.{p}_proj.weight": (inner, hidden) for p in ("gate", "up")}
        shapes["mlp.down_proj.weight"] = (hidden, inner)
        norms = {f"{stem}{n}_layernorm.weight": ones.clone() for n in ("input", "post_attention")}
        save(f"model-{layer:05}.safetensors", {stem + name: tensor(*shape) for name, shape in shapes.items()} | norms)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
