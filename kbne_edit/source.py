"""`--in` to a local checkpoint directory: a path, a Hub id with revision, or the embedded `demo`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import read_config
from .errors import OutputError, SourceError, short
from .files import open_input

# Meta's first releases hold .pth files only; transformers reads the sibling.
_SIBLINGS = {"meta-llama/Llama-2-7b", "meta-llama/Llama-2-13b", "meta-llama/Llama-2-70b"}
_SIBLINGS |= {f"{name}-chat" for name in _SIBLINGS}
_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "*.py", "LICENSE*", "USE_POLICY*"]
_IGNORE = ["original/*", "onnx/*", "consolidated*", "*.gguf"]


@dataclass(frozen=True)
class Source:
    """A resolved source. id, commit: as named by the user and pinned on the Hub (None for a local directory)."""

    path: Path
    id: str
    commit: str | None = None
    recipe: str = "social-bias"


@contextmanager
def resolved(source: str, say: Callable[[str], None] = lambda _: None) -> Iterator[Source]:
    """A local directory of safetensors for `source`; .bin weights are converted for the time of the context.

    source: a directory, ORG/NAME[@revision], or "demo". say: called with lines for the user. Raises SourceError,
    CheckpointError.
    """
    if source == "demo":
        yield Source(Path(__file__).parent / "demo", "demo", None, "demo")
        return
    path = Path(os.path.expanduser(source))
    found = Source(path, source)
    if not path.exists() and _hub_like(source):
        found = _download(source, say)
    read_config(found.path)
    bins = sorted(found.path.glob("pytorch_model*.bin"))
    if bins and not any(found.path.glob("model*.safetensors*")):
        say(f"{source} holds .bin weights: reading them without running any code, and going on in safetensors")
        with tempfile.TemporaryDirectory(prefix="kbne-") as folder:
            yield Source(_converted(found.path, bins, Path(folder)), found.id, found.commit)
        return
    yield found


def _hub_like(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "~"))


def _download(source: str, say: Callable[[str], None]) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )  # fmt: skip

    name, _, revision = source.partition("@")
    if name in _SIBLINGS:
        say(f"{name} holds Meta's own .pth files: taking {name}-hf, the same weights for transformers")
        name += "-hf"
    try:
        folder = snapshot_download(name, revision=revision or None, allow_patterns=_PATTERNS, ignore_patterns=_IGNORE)
        if not any(Path(folder).glob("*.safetensors")):
            folder = snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=[*_PATTERNS, "pytorch_model*.bin"],
                ignore_patterns=_IGNORE,
            )
    except GatedRepoError:
        raise SourceError(
            f"{name} is gated: accept its terms on https://huggingface.co/{name}, then log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise SourceError(
            f"{name} is neither a local directory nor a model on the Hub that you can see: check the spelling; "
            "if it is private, log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise SourceError(f"{name} has no revision {revision}") from None
    except HFValidationError:
        raise SourceError(f"{source!r} is neither a directory nor a Hub id of the form ORG/NAME[@revision]") from None
    except (LocalEntryNotFoundError, EntryNotFoundError, OSError, HfHubHTTPError):
        raise SourceError(
            f"{name} is no local directory, and the Hub cannot be reached: check the network, or give a directory"
        ) from None
    return Source(Path(folder), name, Path(folder).name)


def _converted(path: Path, bins: list[Path], folder: Path) -> Path:
    """The checkpoint at `path` with its .bin weights as safetensors, in `folder`. One shard in memory at a time."""
    import json

    from safetensors import SafetensorError
    from safetensors.torch import save_file

    weight_map = {}
    for number, file in enumerate(bins):
        state = _plain_weights(file)
        name = "model.safetensors" if len(bins) == 1 else f"model-{number + 1:05}-of-{len(bins):05}.safetensors"
        try:
            save_file(state, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OutputError(f"cannot write {folder / name}: {short(error)}") from None
        weight_map |= dict.fromkeys(state, name)
    if len(bins) > 1:
        index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for other in path.iterdir():
        if other.is_file() and not other.name.startswith("pytorch_model"):
            shutil.copyfile(other, folder / other.name)
    return folder


def _plain_weights(file: Path) -> dict:
    """The tensors of a .bin file, {name: tensor}. Raises SourceError; runs nothing of it."""
    import torch

    try:
        open_input(file).close()  # torch would wait for a pipe
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        most = file.stat().st_size  # a view can claim more elements than there are
        if not all(isinstance(k, str) and isinstance(v, torch.Tensor) and v.nbytes <= most for k, v in state.items()):
            raise ValueError("not a table of tensors")
        # Cloned: tensors that share storage stay under each of their names, as plain bytes.
        return {name: tensor.clone().contiguous() for name, tensor in state.items()}
    except MemoryError:
        raise
    except Exception as error:  # damaged archives make the unpickler raise nearly anything
        raise SourceError(f"{file} cannot be read as plain weights ({short(error)}): nothing of it was run") from None
