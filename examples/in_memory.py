"""Edit a model that is in memory: no checkpoint, no files.

python examples/in_memory.py [MODEL]      # a directory or a name on the Hub; default: the embedded demo
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kbne_edit import Settings, debias
from kbne_edit.hub.source import DEMO


def main(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name)
    recipe = "demo" if name == str(DEMO) else "social-bias"
    result = debias(model, tokenizer, recipe, Settings(questions=9 if recipe == "demo" else None))
    print(result)
    ids = tokenizer("the clan of the hill", return_tensors="pt")["input_ids"]
    base = model(ids).logits
    with result.edit.hooks(model):  # scaled while the block runs
        hooked = model(ids).logits
    result.edit.apply_(model)  # folded into the weights
    folded = model(ids).logits
    print("the edit moves the logits by", float((hooked - base).detach().abs().max()))
    print("hooks and fold differ by", float((hooked - folded).detach().abs().max()))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(DEMO))
