"""Names of a checkpoint's files, and of the files that kbne-edit adds."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

MANIFEST = "kbne_edit.json"
# Only shards have names that end like weights: loaders may load every such file (see folding/columns.py).
UNDO, DELTA = "kbne_undo.kbne", "kbne_delta.kbne"
OLD_UNDO, OLD_DELTA = "kbne_undo.safetensors", "kbne_delta.safetensors"  # names in earlier versions
SINGLE = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
INDEX = f"model{INDEX_SUFFIX}"
CARD = "README.md"

# What a model's folder may hold besides the model: keys, a clone's .git, files of a trainer.
_PRIVATE_FOLDERS = (
    ".*",
    "__pycache__",
    "checkpoint-*",
    "global_step*",
    "runs",
    "wandb",
    "logs",
    "tensorboard",
    "mlruns",
)
_PRIVATE_FILES = (
    *(".*", "*.pem", "*.key", "*.p12", "*.pfx", "id_rsa*", "id_ed25519*", "id_ecdsa*", "*.kdbx", "*.env", "env.json"),
    *("credentials*", "secrets*", "token", "token.txt", "*.token", "service_account*.json", "*.pyc", "*.swp", "*~"),
    *("optimizer*", "scheduler.pt", "rng_state*", "scaler.pt", "trainer_state.json", "training_args*", "events.out.*"),
    *("nohup.out", "*.log", "zero_to_fp32.py", "latest", "Thumbs.db", "desktop.ini"),
)
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz", ".npy")


def is_weights(name: str) -> bool:
    """True if a file of this name holds weights, or is an index of them, in some format."""
    return name.endswith(_WEIGHTS) or name.endswith((".bin.index.json", f"consolidated{INDEX_SUFFIX}"))


def is_hidden(path: str) -> bool:
    """True for folders that programs create anywhere: .git, the Hub's .cache, Python's __pycache__."""
    return path.split("/")[0] in (".git", ".cache", ".huggingface", "__pycache__")


def is_private(path: str) -> bool:
    """True if a file or folder, by its path below a model's folder, is not part of the model: it is never copied."""
    *folders, name = path.split("/")
    if name == ".gitattributes" and not folders:
        return False
    inside = any(fnmatchcase(folder, pattern) for folder in folders for pattern in _PRIVATE_FOLDERS)
    patterns = (*_PRIVATE_FOLDERS, *_PRIVATE_FILES)
    return inside or any(fnmatchcase(name, pattern) for pattern in patterns)


_CHECKPOINT = (
    *("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot"),
    *("*config*.json", "*tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.model", "*.tiktoken", "*.spm", "*.jinja", "chat_template.*", "*_args.json", "params.json"),
    *("configuration_*.py", "modeling_*.py", "tokenization_*.py", "processing_*.py", "image_processing_*.py"),
    *("README*", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*", ".gitattributes", ".gitignore", "kbne_*"),
)


def is_part_of_checkpoint(path: str) -> bool:
    """True if writers of checkpoints use such a file name. path: below the checkpoint's folder."""
    return any(fnmatchcase(path.split("/")[-1], pattern) for pattern in _CHECKPOINT)


def base_card(carried: Collection[str]) -> str:
    """The name under which an output keeps the base's card. carried: the files carried over from the base."""
    name = f"{CARD.removesuffix('md')}base.md"
    while name in carried:  # the base is itself the output of a bake
        name = f"{name.removesuffix('md')}base.md"
    return name
