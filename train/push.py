"""A published folder to the Hugging Face Hub, as one commit.

The rules, all in `push`:

- The files go up before the commit, so a repository never holds half a model. What is cut off is sent again by the same command; large
  files that are there already are not.
- A repository that holds something else, or whose files somebody changed since we wrote them, is left alone unless `overwrite` is said.
  Ours is known by its `evidence.json`.
- The commit names the one it follows. Where somebody else was faster, it is refused and nothing is lost.
- A folder that holds a token, or a path of this machine, is not sent.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from loguru import logger

from train.hub import Hub, HubError
from train.publish import CARD_FILE, EVIDENCE_FILE, digests, files_of, leaks

HUBS_OWN = {".gitattributes"}  # made with every repository
LARGE = (".safetensors", ".bin", ".gguf", ".png", ".h5", ".onnx", ".pt", ".pth", ".npz", ".parquet", ".arrow", ".zip", ".gz", ".zst")
LARGE_BYTES = 10 << 20  # a file that a repository takes without LFS is smaller


@dataclass(frozen=True)
class Pushed:
    """What a push came to."""

    url: str  # of the repository
    commit: str
    revision: str
    changed: bool  # False: the repository held these very files


def lfs_expected(file: Path) -> bool:
    """Whether the Hub is likely to keep a file in large storage: by its ending or its size. It decides itself when it is asked."""
    return file.suffix in LARGE or file.stat().st_size > LARGE_BYTES


def check_free(repository: str, hub: Hub, *, revision: str = "main") -> None:
    """Whether `push` will find the repository empty, ours, or not there: asked before the work that a push needs.

    **Raises:** `HubError` where it holds what others wrote.
    """
    try:
        there = _look(hub, hub.full_name(repository), revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return
    _check_ours(hub, hub.full_name(repository), there)


def push(
    folder: Path,
    repository: str,
    hub: Hub,
    *,
    private: bool = False,
    revision: str = "main",
    message: str = "Publish the model",
    overwrite: bool = False,
    places: Sequence[str | Path] = (),
) -> Pushed:
    """Send a folder that `recipes.publish` has written.

    **Arguments:**

    - `repository`: `owner/name`, or a name of ours. Made if it is not there.
    - `private`: of a repository that is made; one that is there stays as it is.
    - `revision`: the branch; made from `main` if it is not there.
    - `overwrite`: take over a repository that holds other things: its files become those of the folder. Git keeps the old ones.
    - `places`: folders of this machine whose names may stand in no file.

    **Raises:** `HubError`; the repository's files are then as they were, and one that was made stays, empty.
    """
    if found := leaks(folder, [hub.token], [Path.home(), folder.resolve(), *places]):
        raise HubError(f"{folder} is not sent, it holds what is of this machine alone:\n  " + "\n  ".join(found))
    repository = hub.full_name(repository)
    _make(hub, repository, revision, private)
    there = _look(hub, repository, revision)
    if not overwrite:
        _check_ours(hub, repository, there)
    sent = files_of(folder)
    gone = there.files if overwrite else set() if there.ours is None else set(there.ours["files"]) & there.files
    dropped = sorted(gone - set(sent) - HUBS_OWN)
    for name in dropped:
        logger.info(f"no longer there: {name}")

    def commit() -> Any:
        operations: list[Any] = [CommitOperationAdd(name, folder / name) for name in sent]
        operations += [CommitOperationDelete(name) for name in dropped]
        return hub.api.create_commit(repository, operations, commit_message=message, revision=revision, parent_commit=there.commit)

    made = hub.ask(f"the commit to {repository}", commit)
    _check_arrived(hub, repository, made.oid, folder)
    return Pushed(f"{hub.api.endpoint}/{repository}", made.oid, revision, changed=made.oid != there.commit)


# ------------------------------------------------------------------------------------------- the repository as it is


@dataclass(frozen=True)
class _There:
    """The head of a branch: its commit, its files, and the evidence among them if we wrote them."""

    commit: str
    files: set[str]
    ours: dict[str, Any] | None


def _look(hub: Hub, repository: str, revision: str) -> _There:
    info = hub.ask(repository, lambda: hub.api.model_info(repository, revision=revision))
    commit, files = str(info.sha), {file.rfilename for file in info.siblings or []}
    return _There(commit, files, _ours(hub, repository, commit) if EVIDENCE_FILE in files else None)


def _make(hub: Hub, repository: str, revision: str, private: bool) -> None:
    """Repository and branch, where they are not there."""
    try:
        hub.ask(repository, lambda: hub.api.model_info(repository))
    except RepositoryNotFoundError:
        logger.info(f"making the {'private ' if private else ''}repository {repository}")
        hub.ask(f"the repository {repository}", lambda: hub.api.create_repo(repository, private=private, exist_ok=True))
    try:
        hub.ask(repository, lambda: hub.api.model_info(repository, revision=revision))
    except RevisionNotFoundError:
        logger.info(f"making the branch {revision} of {repository}")
        hub.ask(f"the branch {revision}", lambda: hub.api.create_branch(repository, branch=revision, exist_ok=True))


def _ours(hub: Hub, repository: str, head: str) -> dict[str, Any] | None:
    """The evidence we wrote there, if it is ours."""
    text = _file(hub, repository, head, EVIDENCE_FILE)
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("files"), dict) else None


def _file(hub: Hub, repository: str, head: str, name: str) -> bytes:
    return Path(hub.ask(name, lambda: hub.api.hf_hub_download(repository, name, revision=head))).read_bytes()


def _check_ours(hub: Hub, repository: str, there: _There) -> None:
    """**Raises:** `HubError` where a commit would write over what others wrote."""
    others = sorted(there.files - HUBS_OWN)
    if others and there.ours is None:
        listed = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        raise HubError(
            f"the repository {repository} holds other things, not written from here: {listed}. "
            "Choose another name, or say --overwrite to replace them (its history keeps them)"
        )
    if changed := _changed_by_others(hub, repository, there):
        raise HubError(
            f"in {repository} somebody changed {', '.join(changed)} since it was written from here. "
            "Look at it there, then say --overwrite to replace it (its history keeps it), or choose another name"
        )


def _changed_by_others(hub: Hub, repository: str, there: _There) -> list[str]:
    """Files we wrote that are others by now: large ones by the digest the Hub tells, the card, which people edit, by its text."""
    if there.ours is None:
        return []
    digest = _large(hub, repository, there.commit)
    if CARD_FILE in there.files:
        digest[CARD_FILE] = hashlib.sha256(_file(hub, repository, there.commit, CARD_FILE)).hexdigest()
    return sorted(name for name, known in there.ours["files"].items() if name in digest and digest[name] != known)


def _check_arrived(hub: Hub, repository: str, commit: str, folder: Path) -> None:
    """The Hub's digests of the large files beside ours."""
    ours = digests(folder)
    wrong = sorted(name for name, digest in _large(hub, repository, commit).items() if ours.get(name, digest) != digest)
    if wrong:
        raise HubError(f"{repository} holds other bytes than were sent, in {', '.join(wrong)}: look at it there, and run again")


def _large(hub: Hub, repository: str, commit: str) -> dict[str, str]:
    """The sha256 of each file in large storage."""
    tree = hub.ask(repository, lambda: list(hub.api.list_repo_tree(repository, revision=commit, recursive=True)))
    return {entry.path: entry.lfs.sha256 for entry in tree if isinstance(entry, RepoFile) and entry.lfs}
