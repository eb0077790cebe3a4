"""Models and tokenizers of a directory, by plain transformers. No code from a checkpoint is ever run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..disk.checkpoint import Checkpoint
from ..disk.refusals import gguf_file
from ..errors import CheckpointError, KbneError, one_line, short, shown
from ..families import auto_class
from ..files import open_input, read_json, real
from .devices import SPREAD, chosen_device
from .tokenizers import Tokenizer

if TYPE_CHECKING:
    import torch


@contextmanager
def quiet() -> Iterator[None]:
    """No chatter of transformers while it loads a model."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def foreign(path: Path) -> Iterator[None]:
    """Around transformers at work on files from outside: whatever it stumbles over becomes a CheckpointError.

    Such files can make it raise nearly anything, so this is the one place that catches everything.
    """
    try:
        with quiet():
            yield
    except (KbneError, MemoryError):
        raise
    except BaseException as error:
        # A panic of a Rust library is no Exception, so that nobody catches it by accident.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise CheckpointError(f"transformers cannot use {path}: {short(error)}") from error
        raise


def load_model(path: Path, dtype: torch.dtype, device: str = "cpu") -> Any:
    """The causal model of a directory, by plain transformers. Never runs code from the checkpoint.

    device: of torch, or "auto" (`chosen_device`).

    Raises CheckpointError, also where weights are missing or of other shapes: transformers would make up random ones.
    """
    device = chosen_device(device)
    spread = {"device_map": "auto"} if device == SPREAD else {}
    with foreign(path):
        with _conversions():
            model, report = _load(path, dtype, spread)
        model = complete(model, report, path)
        return model if spread else model.to(device)


def complete(model: Any, report: dict, path: Path) -> Any:
    """The model, ready for use. report: transformers' of the load. Raises CheckpointError if weights are missing."""
    if faults := _faults(report):
        raise CheckpointError(f"{path} does not hold this model's weights: {faults}")
    _forget_sampling(model, path)
    return model.eval().requires_grad_(False)


def _forget_sampling(model: Any, path: Path) -> None:
    """Of generation_config.json keep the special tokens alone: beams, penalties and the like are not part of a greedy
    continuation. Raises CheckpointError where a special token is none."""
    from transformers import GenerationConfig

    if getattr(model, "generation_config", None) is None:
        return
    kept = {
        key: getattr(model.generation_config, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    for key, value in kept.items():
        ids = value if isinstance(value, list) else [value] if value is not None else []
        if any(isinstance(number, bool) or not isinstance(number, int) for number in ids):
            raise CheckpointError(
                f"{path}: {key} of generation_config.json is {shown(value)}: it must be a token's number, or a list of "
                "such numbers"
            )
    model.generation_config = GenerationConfig(**kept)


def _load(path: Path, dtype: torch.dtype, spread: dict) -> tuple:
    """The model, and transformers' report. A quantised checkpoint is loaded as the plain model it stands for."""
    from .dequantised import load_dequantised
    from .gguf import load_gguf

    if (file := gguf_file(path)) is not None:
        return load_gguf(file, dtype)
    config = load_config(path)
    checkpoint = Checkpoint.open(path)
    if checkpoint.layout is not None:
        return load_dequantised(checkpoint, config, dtype)
    # experts: the hooks run them one by one, as "eager" does; other kernels add in another order.
    # ignore_mismatched_sizes: the error that it suppresses does not say which tensor; ours does.
    return model_class(config).from_pretrained(
        path,
        config=config,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        experts_implementation="eager",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **spread,
    )


@contextmanager
def _conversions() -> Iterator[None]:
    """transformers says only in its log which tensors it could not put together: put that into the error."""
    import logging

    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    log, keep = logging.getLogger("transformers.modeling_utils"), Keep()
    level, propagate = log.level, log.propagate
    log.setLevel(logging.WARNING)
    log.propagate = False
    log.addHandler(keep)
    try:
        yield
    except RuntimeError as error:
        text = " ".join(record.getMessage() for record in records)
        if "CONVERSION" not in text:
            raise
        rows = [line.split("|")[0].strip() for line in text.splitlines() if "CONVERSION" in line and "|" in line]
        raise CheckpointError(f"transformers cannot put these tensors together: {_some(rows)}") from error
    finally:
        log.removeHandler(keep)
        log.setLevel(level)
        log.propagate = propagate


def _faults(report: dict) -> str:
    """What transformers' report of a load says against using the model; "" if nothing does."""
    faults = []
    missing, unknown = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing:
        faults.append(f"it lacks {_some(missing)}, which transformers would fill with random numbers")
        prefixes = {name.removesuffix(key) for key in missing for name in unknown if name.endswith(f".{key}")}
        if len(prefixes) == 1:
            faults.append(f"its names begin with {shown(prefixes.pop())}: save the model again without that wrapper")
        elif unknown:
            faults.append(f"it has {_some(unknown)}, which the model does not: is it a reward model or a classifier?")
        else:
            faults.append("take the complete checkpoint")
    for name, on_disk, expected in sorted(report["mismatched_keys"])[:3]:
        faults.append(
            f"{one_line(name)} has shape {list(on_disk)}, but config.json makes it {list(expected)}: one of the two is "
            "of another model"
        )
    return "; ".join(faults)


def _some(names: list[str]) -> str:
    """The first three of some names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return one_line(", ".join(name[:80] for name in names[:3])) + more


def load_config(path: Path) -> Any:
    """transformers' configuration of a directory. Never runs code from it.

    Raises CheckpointError where transformers would load something else than the directory's own weights.
    """
    from transformers import AutoConfig

    if (path / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{path} holds a PEFT adapter beside the weights, and transformers would load both: merge it first "
            "(merge_and_unload), or move adapter_config.json away"
        )
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if other := getattr(config, "transformers_weights", None):
        raise CheckpointError(
            f"{path / 'config.json'} names other weights (transformers_weights: {shown(other)}), which transformers "
            "would load: remove that line"
        )
    return config


def model_class(config: Any) -> Any:
    """transformers' class that has a language model's head for this configuration; of multimodal models, theirs."""
    import transformers

    return getattr(transformers, auto_class(config.to_dict()))


_loaded: dict[tuple, Tokenizer] = {}  # the last one that was asked for, by its files


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a directory, at work in a child process within limits. Never runs code from the directory.

    Raises CheckpointError where there is none that works.
    """
    prepare()
    key = _files(path)
    if key not in _loaded:
        tokenizer = Tokenizer(path, read_tokenizer)
        _loaded.clear()  # one is enough: base and output have the same
        _loaded[key] = tokenizer
    return _loaded[key]


def prepare() -> None:
    """Import what reads tokenizers, before a child process is forked that would have to."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401


def read_tokenizer(path: Path) -> Any:
    """transformers' tokenizer of a directory, without a limit: see `load_tokenizer`."""
    from transformers import AutoTokenizer

    from .gguf import gguf_tokenizer

    file: Any  # a path, later what is open
    if (file := gguf_file(path)) is not None and not (path / "tokenizer.json").is_file():
        return gguf_tokenizer(file)
    for name in _TOKENIZER_FILES:
        if (path / name).is_file():
            with open_input(path / name) as file:
                if file.read(40).startswith(b"version https://git-lfs"):
                    raise CheckpointError(f"{path / name} is a pointer of Git LFS, not the file: run `git lfs pull`")
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    alone = path / "chat_template.json"  # processors of multimodal models keep it there, out of the tokenizer's sight
    if not getattr(tokenizer, "chat_template", None) and alone.is_file():
        template = read_json(alone)
        if isinstance(template, dict) and isinstance(template.get("chat_template"), str):
            tokenizer.chat_template = template["chat_template"]
    return tokenizer


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "chat_template.json")


def _files(path: Path) -> tuple:
    """What tells one tokenizer's files from another's: name, size and time of every small file."""
    files = []
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file() and not file.name.endswith((".safetensors", ".bin")):
            status = file.stat()
            files.append((file.name, status.st_size, status.st_mtime_ns, status.st_ino))
    return (real(path), *files)
