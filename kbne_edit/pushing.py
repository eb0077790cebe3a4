"""Push: checks an output against its manifest, and sends it to the Hub.

It makes one commit (`create_commit`). Rejected: `upload_folder`, which commits a large folder in parts, so that others
could load half a model. With one commit only the files of the manifest are sent, and a pull request is opened only when
all of them are there. An interrupted push can still be resumed: weights go to the Hub's store before the commit, by
hash, and files that the store has are not sent again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from .disk.checkpoint import Checkpoint
from .disk.hashing import file_hash
from .disk.manifest import Manifest
from .disk.names import MANIFEST, is_weights
from .errors import CheckpointError, OutputError, ProofError
from .folding.adapter import adapter_fault
from .folding.delta import delta_fault
from .folding.plan import Plan
from .hub.client import TIMEOUT, hub_address, talking, without_password
from .hub.licences import metadata_in, notices
from .hub.source import resolved
from .progress import progress, say
from .proofs.record import check_hashes, recorded_hashes, recorded_proofs
from .reporting.card import card_fault
from .verifying import verify

VERSION = 1
Progress = Callable[[int], None]  # called with the number of bytes checked since the last call


class PushJSON(TypedDict):
    """What `push --json` prints. files: {name: bytes}. proofs: computed in this run, or on record.

    A dry run sends nothing, so it has no commit and no url.
    """

    version: int
    repo: str
    private: bool
    create_pr: bool
    files: dict[str, int]
    bytes: int
    notices: list[str]
    form: str
    proofs: Literal["computed", "on record"]
    dry_run: NotRequired[bool]
    commit: NotRequired[str]
    url: NotRequired[str | None]


@dataclass(frozen=True)
class PushResult:
    """What `push` sent, or for a dry run would send.

    proven: True if it was proven against its base in this run; False: its proofs are on record.
    repo: ORG/NAME; form: as of the manifest; files: {name: bytes}; notices: what to consider before publishing;
    commit, url: on the Hub, None for a dry run.
    """

    repo: str
    form: str
    private: bool
    create_pr: bool
    files: dict[str, int]
    notices: tuple[str, ...]
    proven: bool = False
    commit: str | None = None
    url: str | None = None

    def __repr__(self) -> str:
        return f"PushResult({self.repo}, {len(self.files)} files{'' if self.commit else ', dry run'})"

    @property
    def dry_run(self) -> bool:
        return self.commit is None

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    def to_dict(self) -> PushJSON:
        """JSON form: what `push --json` prints."""
        data: PushJSON = {
            "version": VERSION,
            "repo": self.repo,
            "private": self.private,
            "create_pr": self.create_pr,
            "files": self.files,
            "bytes": self.bytes,
            "notices": list(self.notices),
            "form": self.form,
            "proofs": "computed" if self.proven else "on record",
        }
        if self.commit is None:
            return {**data, "dry_run": True}
        return {**data, "commit": self.commit, "url": self.url}


def push(
    baked: str | Path,
    name: str,
    *,
    source: str | Path | None = None,
    private: bool = False,
    create_pr: bool = False,
    dry_run: bool = False,
) -> PushResult:
    """Send an output of `bake` or `apply` to the model repository `name`, ORG/NAME, which is created if it is missing.

    Refused unless every file matches the manifest, there are no other files, and both proofs of a checkpoint held (an
    adapter or a delta was read back before it appeared).
    source: the base, as a directory, ORG/NAME[@REVISION], or "demo": then `baked` is proven again before anything is
    sent. Without it, the proofs on record count, which whoever wrote the directory could have forged.
    private: for a new repository. create_pr: open a pull request in an existing repository. dry_run: check only.
    Raises CheckpointError, ProofError, OutputError. huggingface_hub handles tokens.
    """
    directory = Path(baked)
    if name.count("/") != 1 or not all(name.split("/")):
        raise OutputError(f"{name!r} is not a name on the Hub: give ORG/NAME, or your user name and a name")
    manifest = _manifest(directory)
    if manifest.source and name == manifest.source.id and not create_pr:
        raise OutputError(f"{name} is the base itself: push to a name of your own, or propose with --create-pr")
    total = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    with progress("checking hashes", total, "B") as update:
        hashes = _checked(directory, manifest, update)
    if source is not None:
        _prove_again(directory, manifest, source)
    result = PushResult(
        repo=name,
        form=manifest.form,
        private=private,
        create_pr=create_pr,
        files={file: (directory / file).stat().st_size for file in hashes},
        proven=source is not None,
        notices=(*_of_the_base(manifest), *notices(metadata_in(directory), name)),
    )
    if dry_run:
        return result
    if not result.proven:
        say(f"note: nothing was proven here; if {directory} is not of your own making, stop and give --in BASE")
    for notice in result.notices:
        say(f"note: {notice}")
    with talking(name, OutputError, writing=True):
        return _send(result, directory, hashes, _message(manifest))


def _manifest(directory: Path) -> Manifest:
    """The manifest, which for a checkpoint must record both proofs. Raises CheckpointError, ProofError."""
    manifest = Manifest.read(directory)
    if manifest is None:
        raise CheckpointError(f"{directory} has no {MANIFEST}: only what kbne-edit baked can be pushed")
    if not manifest.sealed:
        raise CheckpointError(f"{directory / MANIFEST} was changed after baking: bake again, and push the result")
    if not manifest.is_checkpoint:
        return manifest
    Checkpoint.open(directory)
    proofs = recorded_proofs(directory, manifest)
    held = (proofs is not None and proofs.files.holds, proofs is not None and proofs.both_held)
    for holds, proof in zip(held, ("the files hold the edit", "the model behaves as the hooks"), strict=True):
        if not holds:
            raise ProofError(
                f"{directory / MANIFEST} does not record the proof that {proof}: "
                "`kbne-edit bake`, without --no-behaviour, proves and records both"
            )
    return manifest


def _checked(directory: Path, manifest: Manifest, progress: Progress) -> dict[str, str]:
    """{file: SHA-256} of all files of the manifest, after checking them. Raises CheckpointError."""
    if faults := check_hashes(directory, manifest, progress):
        raise CheckpointError(f"{directory}/{faults[0]}: remove what does not belong to the output, or bake again")
    if fault := card_fault(directory, manifest):
        raise CheckpointError(f"{directory}: {fault}: bake again, and push the result")
    known = recorded_hashes(directory, manifest)
    return dict(sorted((known | {MANIFEST: file_hash(directory / MANIFEST)}).items()))


def _prove_again(directory: Path, manifest: Manifest, source: str | Path) -> None:
    """Run both proofs of a checkpoint, or check that an adapter or a delta is its edit. Raises ProofError."""
    if manifest.is_checkpoint:
        proofs = verify(source, directory)
        if not proofs.ok:
            raise ProofError(f"the {proofs.failed} proof failed, nothing was sent: {proofs.fault}", proofs)
        return
    with resolved(str(source), say) as base:
        plan = Plan.of(Checkpoint.open(base.path), manifest.edit)
        fault = delta_fault(directory, plan) if manifest.form == "delta" else adapter_fault(directory, plan)
        fault = fault or card_fault(directory, manifest, base.path)
    if fault:
        raise ProofError(f"{directory} does not match its manifest and {source}, nothing was sent: {fault}")


def _of_the_base(manifest: Manifest) -> list[str]:
    """A notice for an adapter or a delta whose base nobody else can find."""
    if manifest.is_checkpoint or manifest.source is None or manifest.source.commit:
        return []
    return [f"its base was a local directory, {manifest.source.id}: nobody else can tell which model it is for"]


def _message(manifest: Manifest) -> str:
    return f"{manifest.tool}: {manifest.edit.num_neurons} neurons scaled at site {manifest.edit.site}"


def _send(result: PushResult, directory: Path, files: dict[str, str], message: str) -> PushResult:
    """Create the repository if it is missing, upload and commit, and compare what the Hub holds with what was sent."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise OutputError("you are not logged in to the Hub: run `hf auth login` with a token that may write")
    api = HfApi()
    name, private, create_pr = result.repo, result.private, result.create_pr
    if not create_pr:
        api.create_repo(name, private=private or None, exist_ok=True)
    there = api.model_info(name, timeout=TIMEOUT)
    if private and not there.private:
        raise OutputError(f"{name} exists and is public: make it private on its page first, or choose another name")
    held = {file.rfilename for file in there.siblings or ()}
    if other := sorted(file for file in held - set(files) if is_weights(file)):
        raise OutputError(
            f"{name} holds other weights already ({other[0]}), which a loader could take instead: "
            "choose another name, or delete them there"
        )
    say(f"sending {len(files)} files to {name}; files that the Hub's store already has are skipped")
    commit = api.create_commit(
        name,
        [CommitOperationAdd(file, directory / file) for file in files],
        commit_message=message,
        create_pr=create_pr,
    )
    if wrong := _differing(api, name, commit.oid, directory, files):
        raise OutputError(f"{name}: the Hub does not hold {wrong[0]} as it was sent: push again")
    url = (commit.pr_url if create_pr else None) or f"{hub_address()}/{name}"
    return replace(result, commit=commit.oid, url=without_password(url))


def _differing(api: Any, name: str, commit: str, directory: Path, files: dict[str, str]) -> list[str]:
    """Files that differ from what was sent, by the Hub's hashes: SHA-256 for large files, git's for others."""
    listed = api.list_repo_tree(name, recursive=True, revision=commit)
    held = {e.path: e.lfs.sha256 if e.lfs else e.blob_id for e in listed if hasattr(e, "blob_id")}
    return [f for f, sha in files.items() if held.get(f) != sha and held.get(f) != _git_hash(directory / f)]


def _git_hash(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
