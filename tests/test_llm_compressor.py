"""Checkpoints that llm-compressor itself writes, tiny, on a CPU: the fold against hooks, through compressed-tensors.

Skipped where it is not installed: it wants an older transformers than the rest of the suite.
`pip install --no-deps llmcompressor loguru` beside the project's own environment is enough to run this file.
"""

import numpy as np
import pytest
import torch

from kbne_edit import Edit, fold, verify
from kbne_edit.disk.checkpoint import Checkpoint
from kbne_edit.errors import EditError

llmcompressor = pytest.importorskip("llmcompressor")
SCHEMES = ["W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP4A16", "NVFP4A16"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Written once for each scheme."""
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import LlamaConfig, LlamaForCausalLM

    folders = {}

    def write(scheme):
        if scheme not in folders:
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=97,
                hidden_size=256,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
            )
            folder, plain = tmp_path_factory.mktemp(scheme), tmp_path_factory.mktemp("plain")
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(plain)
            model = LlamaForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)  # it reads the configuration there
            recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
            llmcompressor.oneshot(model=model, recipe=recipe)
            model.save_pretrained(folder, save_compressed=True)
            folders[scheme] = folder
        return folders[scheme]

    return write


@pytest.mark.parametrize("scheme", SCHEMES)
def test_powers_of_two(scheme, written, tmp_path):
    base = written(scheme)
    neurons = {0: {3: 2.0, 200: 2.0}, 1: {17: 2.0}}
    try:
        fold(base, Edit("down", neurons), tmp_path / "out")
    except EditError as error:  # a scale that would leave its range
        assert scheme == "NVFP4A16", error
        neurons = {layer: dict.fromkeys(of_layer, 0.5) for layer, of_layer in neurons.items()}
        fold(base, Edit("down", neurons), tmp_path / "out")
    proofs = verify(base, tmp_path / "out")
    assert proofs.ok and all(entry.bit_equal for entry in proofs.behaviour if entry.dtype == "bfloat16")
    old, new = Checkpoint.open(base), Checkpoint.open(tmp_path / "out")
    for layer, of_layer in neurons.items():
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        before, after = old.read_plain(name), new.read_plain(name)
        for row, factor in of_layer.items():
            assert np.array_equal(after[row], before[row] * factor)
