"""From `--in` (a path, a Hub id with revision, or the embedded `demo`) to a local checkpoint directory."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from glob import escape
from pathlib import Path

from ..disk.bins import BinTensor, read_bin
from ..disk.checkpoint import other_files
from ..disk.dtypes import DTYPES
from ..disk.names import INDEX, SINGLE, is_weights
from ..disk.refusals import gguf_file, read_config
from ..disk.tensors import header_bytes
from ..errors import OutputError, SourceError, shown
from ..files import forbid_links_out, read_json, real
from .client import TIMEOUT, passing, talking

DEMO = Path(__file__).parent.parent / "demo"
# All files of a checkpoint except weights, which are chosen by name, in one format.
_FILES = [
    "*.json",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "*.jinja",
    "*.md",
    "*.py",
    "LICEN[CS]E*",
    "NOTICE*",
    "Notice*",
    "USE_POLICY*",
]
_OTHER_FORMATS = ["original/*", "onnx/*", "openvino/*", "coreml/*", "gguf/*", "*.index.json"]


@dataclass(frozen=True)
class Source:
    """A resolved source. id: as the user named it; commit: on the Hub, None for a local directory.

    path: the directory of the safetensors; origin: the directory they come from, if path is temporary.
    """

    path: Path
    origin: Path
    id: str
    commit: str | None = None

    @property
    def label(self) -> str:
        """The id as it may be published: for a local directory only its name, not its path."""
        return self.id if self.commit or self.id == "demo" else real(os.path.expanduser(self.id)).name


def usual_recipe(source: str) -> str:
    """The default recipe for a source."""
    return "demo" if source == "demo" else "social-bias"


def local_path(source: str) -> Path | None:
    """The local path of a source; None for the demo and for models on the Hub."""
    path = Path(source).expanduser()
    return path if source != "demo" and path.exists() else None


@contextmanager
def resolved(source: str, say: Callable[[str], None] = lambda _: None) -> Iterator[Source]:
    """A local directory of safetensors for `source`. Converted .bin weights exist only within the context.

    source: a directory, ORG/NAME[@revision], or "demo". say: called with lines for the user. Raises SourceError,
    CheckpointError.
    """
    if source == "demo":
        yield Source(DEMO, DEMO, "demo")
        return
    path = Path(os.path.expanduser(source))
    local = Source(path, path, source)
    with ExitStack() as stack:
        if not path.exists() and _hub_like(source):
            local = stack.enter_context(_view(download(source, say)))
        if gguf_file(local.path) is not None:
            yield local
            return
        read_config(local.path)
        if bins := _bins(local.path):
            say(f"{source} holds .bin weights: converting them to safetensors, without running any code")
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kbne-"))
            local = replace(local, path=_converted(local.path, bins, Path(folder)))
        yield local


def _hub_like(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "~"))


def download(source: str, say: Callable[[str], None]) -> Source:
    """Download a model's small files, and its weights in one format, to the Hub's cache."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError

    name, _, revision = source.partition("@")
    with talking(name, SourceError, revision):
        try:
            info = HfApi().model_info(name, revision=revision or None, files_metadata=True, timeout=TIMEOUT)
        except (HTTPError, OSError) as failure:
            if not passing(failure) or (folder := _cached(name, revision)) is None:
                raise
            say(f"{name}: the Hub does not answer; taking the copy in the cache, commit {folder.name}")
            return Source(folder, folder, name, folder.name)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        weights = _weights(sizes, lambda index: _index(name, str(info.sha), index))
        if not weights:
            return _instead(name, revision, sizes, say)
        wanted = _wanted(weights, sizes)
        say(f"{name} at {info.sha}: {len(wanted)} files, {sum(sizes[n] for n in wanted) / 1e6:.1f} MB")
        # By revision, not by commit: then the cache can serve the same command without a network.
        patterns = [escape(n) for n in wanted]
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    return Source(folder, folder, name, folder.name)


@contextmanager
def _view(local: Source) -> Iterator[Source]:
    """A view of a snapshot with only the files of `download`: other programs may have cached more of the model."""
    held = {path.relative_to(local.path).as_posix() for path in local.path.rglob("*") if path.is_file()}
    wanted = _wanted(_weights(held, local.path.joinpath), held)
    if held == wanted:
        yield local
        return
    with tempfile.TemporaryDirectory(prefix="kbne-") as folder:
        for name in wanted:
            if is_weights(name):
                Path(folder, name).symlink_to((local.path / name).resolve())
            else:
                _copy(local.path / name, Path(folder, name))
        yield replace(local, path=Path(folder))


def _wanted(weights: Collection[str], files: Collection[str]) -> set[str]:
    """The files to download of a model with these files."""
    from huggingface_hub.utils import filter_repo_objects

    return {*weights, *filter_repo_objects(files, allow_patterns=_FILES, ignore_patterns=_OTHER_FORMATS)}


def _weights(files: Collection[str], index_path: Callable[[str], str | Path]) -> list[str]:
    """The weights (with their index) among `files`, in one format: safetensors, else .bin. [] if there are neither."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = f"{single}.index.json"
        if single in files:
            return [single]
        if index in files:
            return [index, *(shard for shard in _shards(Path(index_path(index))) if shard in files)]
    return []


def _shards(index: Path) -> list[str]:
    """The files that an index names. Raises SourceError."""
    try:
        return sorted(set(read_json(index, SourceError)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError):
        raise SourceError(f"{index} has no weight_map {{tensor: file}}: download it again") from None


def _index(name: str, commit: str, index: str) -> str:
    from huggingface_hub import hf_hub_download

    return hf_hub_download(name, index, revision=commit)


def _cached(name: str, revision: str) -> Path | None:
    """The snapshot in the cache, if it is complete."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision or None,
                local_files_only=True,
                allow_patterns=_FILES,
                ignore_patterns=_OTHER_FORMATS,
            )
        )
    except OSError:
        return None
    held = {path.name for path in folder.iterdir()}
    weights = _weights(held, folder.joinpath)
    index = [_shards(folder / name) for name in weights if name.endswith(".index.json")]
    return folder if weights and all(held.issuperset(shards) for shards in index) else None


def _instead(name: str, revision: str, files: Collection[str], say: Callable[[str], None]) -> Source:
    """A replacement for a model without transformers weights: Meta's first releases have a sibling with them."""
    if any(fnmatch(file, "consolidated.*.pth") for file in files) and not name.endswith("-hf"):
        say(f"{name} holds Meta's own .pth files: taking {name}-hf, the same weights for transformers")
        return download(f"{name}-hf" + (f"@{revision}" if revision else ""), say)
    if "adapter_config.json" in files:
        raise SourceError(f"{name} holds an adapter: merge it into its base model first (PEFT: merge_and_unload)")
    if any(file.endswith(".gguf") for file in files):
        raise SourceError(
            f"{name} holds GGUF weights only: download one of its files and pass it (--in FILE.gguf), or use the "
            "unquantised transformers checkpoint"
        )
    raise SourceError(f"{name} has no transformers weights: neither model.safetensors nor pytorch_model.bin is there")


def _bins(path: Path) -> list[Path]:
    """The .bin files that transformers would load from a directory, in its order; [] if it loads safetensors.

    Copies under other names (EMA, fp16, shards of an earlier save) are never loaded.
    Raises SourceError.
    """
    index = path / "pytorch_model.bin.index.json"
    if any((path / name).is_file() for name in (SINGLE, INDEX)):
        return []
    if (path / "pytorch_model.bin").is_file():
        return [path / "pytorch_model.bin"]
    if not index.is_file():
        return []
    names = _shards(index)
    for name in names:
        if Path(name).name != name or not (path / name).is_file():
            raise SourceError(f"{index} names {shown(name)}, which is missing: download it again")
    return [path / name for name in names]


def _converted(path: Path, bins: list[Path], folder: Path) -> Path:
    """The checkpoint at `path` with its .bin weights as safetensors, in `folder`."""
    tables = [read_bin(file) for file in bins]
    # As in transformers, the last file that holds a tensor wins.
    last = {name: number for number, table in enumerate(tables) for name in table}
    weight_map: dict[str, str] = {}
    for number, (file, table) in enumerate(zip(bins, tables, strict=True)):
        name = SINGLE if len(bins) == 1 else f"model-{number + 1:05}-of-{len(bins):05}.safetensors"
        kept = {tensor: place for tensor, place in table.items() if last[tensor] == number}
        try:
            _write(file, kept, folder / name)
            shutil.copymode(file, folder / name)
        except OSError as error:
            raise OutputError(f"cannot write {folder / name}: {error.strerror}") from None
        weight_map |= dict.fromkeys(kept, name)
    if len(bins) > 1:
        text = json.dumps({"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
        (folder / INDEX).write_text(text)
    carry, _ = other_files(path)
    forbid_links_out(path, carry)
    for name in carry:
        _copy(path / name, folder / name)
    return folder


def _copy(file: Path, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, out)  # with its mode: private files stay private


def _write(file: Path, tensors: dict[str, BinTensor], out: Path) -> None:
    """Write a .bin file's tensors as safetensors, with the bytes of `save_file`, one tensor in memory at a time.

    Tensors that share storage are written under each name. Raises OSError.
    """
    order = list(DTYPES)
    ordered = sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0]))
    entries = ((name, tensor.dtype, tensor.shape, tensor.nbytes) for name, tensor in ordered)
    with open(out, "wb") as target:
        target.write(header_bytes(entries, {"format": "pt"}))
        for _, tensor in ordered:
            target.write(tensor.read(file))
