"""Attribution on an accelerator: resident, streamed, and a loop as published code has it, on the same seeded weights.

    python benchmarks/gpu.py                       # 7B shape, bf16 and fp32, 45 questions; ends within 8 minutes
    python benchmarks/gpu.py --device cpu --tiny   # seconds; tries the script

Of each dtype: seconds of each way, the ratios, and how far scores differ. The plain loop takes every layer and question
by itself: 20 nodes as a batch through the whole model, h of one layer scaled by a hook (gamma = i / 19, sum / 20). It
runs a few questions, and its seconds are scaled to all of them. A part that would not end in time is left out, by name.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, logging  # noqa: E402

from kbne_edit import Integral  # noqa: E402
from kbne_edit.attribution.gradients import Resident, attributions  # noqa: E402
from kbne_edit.disk.checkpoint import Checkpoint  # noqa: E402
from kbne_edit.models.loading import load_model  # noqa: E402
from kbne_edit.models.streamed import Streamed  # noqa: E402

SHAPE = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000)
TINY = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4, vocab_size=320)
NODES = 20


class Clock:
    """Seconds of parts, within a limit for all of them together."""

    def __init__(self, device: str, limit: float):
        self._device, self._end = device, time.monotonic() + limit

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def seconds(self, part: Callable[[], Any]) -> tuple[float, Any]:
        self._wait()
        start = time.monotonic()
        result = part()
        self._wait()
        return time.monotonic() - start, result

    def _wait(self) -> None:
        if self._device != "cpu":
            getattr(torch, torch.device(self._device).type).synchronize()


def write_model(folder: Path, shape: dict, device: str, dtype: torch.dtype) -> None:
    """Seeded weights, wide enough that layers matter."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **shape, num_key_value_heads=shape["num_attention_heads"], max_position_embeddings=512, initializer_range=0.04
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder, max_shard_size="2GB")


def prompts(count: int, vocabulary: int) -> tuple[list[list[int]], list[list[int]]]:
    """Questions of 40 tokens, of which the first 12 are the same, and two answer tokens each."""
    drawn = torch.Generator().manual_seed(1)
    common = torch.randint(3, vocabulary, (12,), generator=drawn).tolist()
    ids = [common + torch.randint(3, vocabulary, (28,), generator=drawn).tolist() for _ in range(count)]
    return ids, [torch.randint(3, vocabulary, (2,), generator=drawn).tolist() for _ in range(count)]


def plain_loop(model: Any, ids: list[list[int]], answers: list[list[int]]) -> Tensor:
    """Scores [Q, L, F] by one forward and backward pass of the whole model for each layer of each question."""
    return torch.stack(
        [torch.stack([_layer(model, i, a, m) for m in _blocks(model)]) for i, a in zip(ids, answers, strict=True)]
    )


def _blocks(model: Any) -> list[Any]:
    return [layer.mlp.down_proj for layer in model.model.layers]


def _layer(model: Any, ids: list[int], answer: list[int], projection: Any) -> Tensor:
    gammas = torch.linspace(0, 1, NODES, device=model.device, dtype=model.dtype)[:, None]
    seen: dict[str, Tensor] = {}

    def scale(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        seen["h"] = args[0][:1, -1].detach()
        seen["scaled"] = (gammas * seen["h"]).requires_grad_()
        return (torch.cat([args[0][:, :-1], seen["scaled"][:, None]], 1),)

    handle = projection.register_forward_pre_hook(scale)
    try:
        tokens = torch.tensor([ids] * NODES, device=model.device)
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        (gradient,) = torch.autograd.grad(logits.softmax(-1)[:, answer].sum(), seen["scaled"])
    finally:
        handle.remove()
    return (seen["h"][0].float() * gradient.float().mean(0)).cpu()


def scores(layers: Any, ids: list, answers: list, quadrature: str = "gauss") -> Tensor:
    return torch.stack(
        [result.scores for result in attributions(layers, ids, answers, Integral(quadrature=quadrature))]
    )


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def in_memory(
    folder: Path, device: str, dtype: torch.dtype, clock: Clock, asked: tuple[list, list]
) -> tuple[dict, Tensor]:
    """Seconds of the plain loop and of the resident model, and the latter's scores."""
    ids, answers = asked
    result: dict[str, Any] = {}
    result["seconds to load"], model = clock.seconds(lambda: load_model(folder, dtype, device))
    few = 1
    first, loop = clock.seconds(lambda: plain_loop(model, ids[:few], answers[:few]))
    if first * 2 < clock.left / 8:  # the first run warms up
        few = 2
        first, loop = clock.seconds(lambda: plain_loop(model, ids[:few], answers[:few]))
    result |= {"plain loop, questions run": few, "plain loop": first * len(ids) / few}
    same = scores(Resident(model), ids[:few], answers[:few], f"riemann-{NODES}")
    result["plain loop against ours with its nodes, difference"] = difference(same, loop)
    # In bfloat16 rounding hides the residual that refinement goes by, so the nodes are fixed there.
    rule = "gauss" if dtype == torch.float32 else "gauss-4"
    result["quadrature"] = rule
    result["resident"], resident = clock.seconds(lambda: scores(Resident(model), ids, answers, rule))
    result["plain loop / resident"] = result["plain loop"] / result["resident"]
    return result, resident


def measured(folder: Path, device: str, dtype: torch.dtype, clock: Clock, asked: tuple[list, list]) -> dict:
    """Seconds and differences of one dtype."""
    result, resident = in_memory(folder, device, dtype, clock, asked)
    if device != "cpu":
        getattr(torch, torch.device(device).type).empty_cache()
    if dtype != torch.float32:
        return result | {"streamed": "computes in float32: see there"}
    if clock.left < 4 * result["seconds to load"] + result["resident"]:
        return result | {"streamed": "left out: no time"}
    supplier = Streamed(Checkpoint.open(folder), 64e9, device)
    result["streamed"], streamed = clock.seconds(lambda: scores(supplier, *asked))
    result["streamed / resident"] = result["streamed"] / result["resident"]
    result["gigabytes read while streaming"] = supplier.bytes_read / 1e9
    result["streamed against resident, difference"] = difference(streamed, resident)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of 200,000 parameters")
    parser.add_argument("--questions", type=int, default=45)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--dir", type=Path, help="where the checkpoint goes (14 GB); default: a temporary folder")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    clock, shape = Clock(options.device, 60 * options.minutes), TINY if options.tiny else SHAPE
    requests = prompts(options.questions, shape["vocab_size"])
    result: dict[str, Any] = {"device": options.device, "torch": torch.__version__, "questions": options.questions}
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        result["seconds to write"], _ = clock.seconds(
            lambda: write_model(folder, shape, options.device, torch.bfloat16)
        )
        for dtype in (torch.bfloat16, torch.float32):
            kind = str(dtype).removeprefix("torch.")
            if clock.left < 60 and not options.tiny:
                result[kind] = "left out: no time"
                continue
            try:
                result[kind] = measured(folder, options.device, dtype, clock, requests)
            except torch.OutOfMemoryError as error:
                result[kind] = f"out of memory: {error}"
            print(json.dumps({kind: result[kind]}, indent=1), flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
