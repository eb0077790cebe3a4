"""Push what this tool wrote to the Hub: first what would be sent, checked against the manifest; then the sending.

In one commit (`create_commit`), not by `upload_folder`, which commits a large folder in parts: whoever loads the model
meets the whole of it or none, the files are the manifest's and not whatever lies in the folder, and a pull request is
opened only when all is there. It goes on where it was cut all the same: weights go to the Hub's store before the
commit, by their hash, and what the store has is not sent again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from .disk.checkpoint import MANIFEST, UNDO, Checkpoint, is_weights, other_files
from .disk.manifest import is_sealed, read_manifest
from .errors import CheckpointError, OutputError, ProofError
from .folding.fold import file_hash
from .hub.client import TIMEOUT, talking
from .hub.licences import metadata_in, notices
from .progress import say

Progress = Callable[[int], None]  # called with the number of bytes checked since the last call


def push(
    directory: str | Path,
    name: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> dict:
    """Send what `bake` or `apply` wrote to the model repository `name`, ORG/NAME, which is made if need be.

    Refused unless every file is as the manifest says, nothing unknown lies beside them, and both proofs of a checkpoint
    held (an adapter or a delta was read back before it appeared). Returns the summary.
    private: of a repository that is made. create_pr: propose to a repository that exists. dry_run: check, send nothing.
    Raises CheckpointError, ProofError, OutputError. Tokens are huggingface_hub's business.
    """
    directory = Path(directory)
    if name.count("/") != 1 or not all(name.split("/")):
        raise OutputError(f"{name!r} is no name on the Hub: give ORG/NAME, or your user name and a name")
    manifest = _manifest(directory)
    if name == (manifest.get("source") or {}).get("id") and not create_pr:
        raise OutputError(f"{name} is the base itself: push to a name of your own, or propose with --create-pr")
    files = _checked(directory, manifest, progress)
    sizes = {file: (directory / file).stat().st_size for file in files}
    summary = {
        "repo": name,
        "private": private,
        "create_pr": create_pr,
        "files": sizes,
        "bytes": sum(sizes.values()),
        "notices": [*_of_the_base(manifest), *notices(metadata_in(directory), name)],
        "form": manifest.get("form", "checkpoint"),
    }
    if dry_run:
        return summary | {"dry_run": True}
    for notice in summary["notices"]:
        say(f"note: {notice}")
    with talking(name, OutputError, writing=True):
        return summary | _send(directory, name, files, _message(manifest), private, create_pr)


def _manifest(directory: Path) -> dict:
    """The manifest; that of a checkpoint with both proofs in it. Raises CheckpointError, ProofError."""
    manifest = read_manifest(directory)
    if manifest is None:
        raise CheckpointError(f"{directory} has no {MANIFEST}: only what kbne-edit baked can be pushed")
    if not is_sealed(directory, manifest):
        raise CheckpointError(f"{directory / MANIFEST} was changed after baking: bake again, and push the result")
    if "form" in manifest:
        return manifest
    Checkpoint.open(directory)
    try:
        proofs = manifest.get("proofs") or {}
        held = proofs.get("file_proof"), all(entry["ok"] for entry in proofs.get("behaviour") or [{"ok": False}])
    except (AttributeError, KeyError, TypeError):
        raise CheckpointError(f"{directory / MANIFEST} is damaged (proofs)") from None
    for holds, proof in zip(held, ("the file is the edit", "the model behaves as the hooks"), strict=True):
        if not holds:
            raise ProofError(
                f"{directory / MANIFEST} does not say that the proof held that {proof}: "
                "`kbne-edit bake`, without --no-behaviour, proves and records both"
            )
    return manifest


def _checked(directory: Path, manifest: dict, progress: Progress | None) -> dict[str, str]:
    """{file: SHA-256} of all that the manifest knows, each as it says. Raises CheckpointError."""
    weights, others = other_files(directory)
    known = {name: hashes["out"] for name, hashes in manifest["files"].items()}
    known |= {UNDO: manifest["undo"]} if "undo" in manifest else {}
    # The Hub adds .gitattributes to whatever it holds: it may lie there, and is not sent.
    if unknown := sorted({*weights, *others} - set(known) - {".gitattributes"}):
        raise CheckpointError(f"{directory}/{unknown[0]} is not in the manifest: take it out, or bake again")
    for name, digest in known.items():
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory}/{name} is missing: bake again")
        if file_hash(directory / name) != digest:
            raise CheckpointError(f"{directory}/{name} was changed after baking: bake again, and push the result")
        if progress:
            progress((directory / name).stat().st_size)
    return dict(sorted((known | {MANIFEST: file_hash(directory / MANIFEST)}).items()))


def _of_the_base(manifest: dict) -> list[str]:
    """What to consider before an adapter or a delta is published whose base nobody else can find."""
    source = manifest["source"]
    if "form" not in manifest or source["commit"]:
        return []
    return [f"its base was a local directory, {source['id']}: nobody else can tell which model it is for"]


def _message(manifest: dict) -> str:
    neurons = sum(len(factors) for factors in manifest["edit"]["factors"].values())
    return f"{manifest.get('tool', 'kbne-edit')}: {neurons} neurons scaled at site {manifest['edit']['site']}"


def _send(directory: Path, name: str, files: dict[str, str], message: str, private: bool, create_pr: bool) -> dict:
    """Create the repository if need be, upload and commit, and compare what the Hub holds with what was sent."""
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

    if get_token() is None:
        raise OutputError("you are not logged in to the Hub: run `hf auth login` with a token that may write")
    api = HfApi()
    if not create_pr:
        api.create_repo(name, private=private or None, exist_ok=True)
    there = api.model_info(name, timeout=TIMEOUT)
    if private and not there.private:
        raise OutputError(f"{name} exists and is public: make it private on its page first, or choose another name")
    held = {file.rfilename for file in there.siblings}
    if other := sorted(file for file in held - set(files) if is_weights(file)):
        raise OutputError(
            f"{name} holds other weights already ({other[0]}), which a loader could take instead: "
            "choose another name, or delete them there"
        )
    say(f"sending {len(files)} files to {name}; what the Hub's store has already is left out")
    commit = api.create_commit(
        name,
        [CommitOperationAdd(file, directory / file) for file in files],
        commit_message=message,
        create_pr=create_pr,
    )
    if wrong := _differing(api, name, commit.oid, directory, files):
        raise OutputError(f"{name}: the Hub does not hold {wrong[0]} as it was sent: push again")
    return {"commit": commit.oid, "url": (commit.pr_url if create_pr else None) or f"{constants.ENDPOINT}/{name}"}


def _differing(api, name: str, commit: str, directory: Path, files: dict[str, str]) -> list[str]:
    """Files that are not as they were sent, by the Hub's own hashes: SHA-256 of large files, git's of the others."""
    listed = api.list_repo_tree(name, recursive=True, revision=commit)
    held = {e.path: e.lfs.sha256 if e.lfs else e.blob_id for e in listed if hasattr(e, "blob_id")}
    return [f for f, sha in files.items() if held.get(f) != sha and held.get(f) != _git_hash(directory / f)]


def _git_hash(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
