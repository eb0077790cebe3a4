"""What docs/comparison.md measures: what an edit by kbne-edit, PEFT or mergekit leaves as it was, and undoing it.

    pip install -c constraints.txt '.[test]' mergekit
    python benchmarks/comparison.py

The base is the demo with one tensor more that its model class does not know, as checkpoints with a head for multi-token
prediction have. kbne-edit and PEFT (IA3) scale 17 neurons of each layer by 3.5; mergekit, whose unit is the tensor,
scales the whole down-projections.
"""

import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import kbne_edit
from kbne_edit.hub.source import resolved

UNKNOWN, FACTOR, LAYERS, NEURONS = "mtp.head.weight", 3.5, 4, 17


def main():
    with tempfile.TemporaryDirectory() as folder, resolved("demo") as demo:
        base = Path(folder) / "base"
        shutil.copytree(demo.path, base)
        before = load_file(base / "model.safetensors") | {UNKNOWN: torch.ones(4, 4, dtype=torch.bfloat16)}
        save_file(before, base / "model.safetensors", metadata={"format": "pt"})
        for name, edit in {"kbne-edit": ours, "PEFT": peft, "mergekit": mergekit}.items():
            try:
                reply = edit(base, Path(folder) / name)
            except ImportError as error:
                print(f"{name}: left out, {error}")
                continue
            after = load_file(Path(folder) / name / "model.safetensors")
            others = [tensor for tensor in before if "down_proj" not in tensor and tensor != UNKNOWN]
            equal = sum(torch.equal(before[tensor], after[tensor]) for tensor in others)
            kept = "kept" if UNKNOWN in after else "lost"
            print(f"{name} {reply}; {equal} of {len(others)} other tensors equal, the unknown one {kept}")


def ours(base, out):
    factors = {layer: dict.fromkeys(range(NEURONS), FACTOR) for layer in range(LAYERS)}
    kbne_edit.fold(base, kbne_edit.Edit("down", factors), out)
    restored = out.with_name("restored")
    kbne_edit.revert(out, restored)
    names = [path.name for path in base.iterdir()]
    same = sum((base / name).read_bytes() == (restored / name).read_bytes() for name in names)
    return f"{kbne_edit.__version__}: revert gives {same} of {len(names)} files back byte for byte"


def peft(base, out):
    from peft import IA3Config, get_peft_model

    config = IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            parameter.data.fill_(1).flatten()[:NEURONS] = FACTOR
    weights = {name: value.clone() for name, value in model.state_dict().items() if "down_proj.base" in name}
    model.merge_adapter()
    model.unmerge_adapter()
    same = sum(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())
    model.merge_and_unload().save_pretrained(out)
    return f"{version('peft')}: unmerge gives {same} of {len(weights)} edited tensors back"


def mergekit(base, out):
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    models = [{"model": str(base), "parameters": {"scale": [{"filter": "down_proj", "value": FACTOR}, {"value": 1.0}]}}]
    config = MergeConfiguration.model_validate({"merge_method": "passthrough", "models": models})
    run_merge(config, str(out), options=MergeOptions(quiet=True, write_model_card=False))
    return f"{version('mergekit')}: nothing to undo, the input stays"


if __name__ == "__main__":
    main()
