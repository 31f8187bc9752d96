"""Where a model lies: a folder here, or a repository of the Hugging Face Hub, which is fetched into that library's cache.

The revision (a branch, a tag or a commit) is resolved to a commit once, and all files are of that commit; a commit given is the same for
ever. Fetched are `config.json`, the tokenizer's files, of models published from here `lineage.json` and a reward model's head, and the
model's safetensors, nothing else. Interrupted downloads go on where they stopped, files that are there are not fetched again, and with
`HF_HUB_OFFLINE=1` nothing is asked of the network. Private and gated repositories need the library's usual token (`HF_TOKEN`, or
`hf auth login`).
"""

import glob
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from lm.hf_files import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, no_safetensors, weight_map_of

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # not ./folder or ../folder
_SMALL_FILES = [
    CONFIG_FILE, INDEX_FILE, "generation_config.json", "lineage.json", "reward_head.safetensors",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.json", "merges.txt",
]  # fmt: skip


def folder_of(source: str | Path, revision: str | None = None) -> Path:
    """The folder a model lies in, fetched if `source` is a repository.

    **Arguments:**

    - `source`: a folder, or `"owner/name"`. What is there as a folder is taken as one.
    - `revision`: of the repository: a branch, a tag or a commit; `None` is `main`.

    **Raises:** `FileNotFoundError` or `ValueError`, in words, if it is neither, not there, or out of reach.
    """
    path = Path(source)
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"{path} is a folder here, which has no revision {revision!r}: leave it out, or name a repository of the Hub")
        return path
    if path.exists():
        raise ValueError(f"{path} is a file: expected the folder of a model, with config.json and {WEIGHTS_FILE}, or owner/name of the Hub")
    if isinstance(source, str) and REPOSITORY.fullmatch(source):
        return _fetch(source, revision or "main")
    raise FileNotFoundError(f"{source} does not exist: expected the folder of a model, or owner/name of a repository on the Hub")


def _fetch(repo: str, revision: str) -> Path:
    """The cached folder of that commit with the model in it."""
    folder = _snapshot(repo, revision, _SMALL_FILES)
    index = folder / INDEX_FILE
    weights = sorted(set(weight_map_of(index).values())) if index.is_file() else [WEIGHTS_FILE]
    _snapshot(repo, folder.name, [glob.escape(name) for name in weights])
    if not index.is_file() and not (folder / WEIGHTS_FILE).is_file():
        raise no_safetensors(f"the repository {repo}", _names(repo, folder.name))
    return folder


def _snapshot(repo: str, revision: str, patterns: list[str]) -> Path:
    try:
        # One file at a time: a download that is cut off leaves whole files and the part of one.
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns, max_workers=1))
    except RevisionNotFoundError as error:
        raise ValueError(f"the repository {repo} has no revision {revision!r}") from error
    except GatedRepoError as error:
        raise ValueError(
            f"the repository {repo} is gated: give your consent on its page, then set HF_TOKEN or log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{repo} is no folder here and no repository on the Hub, or a private one: check the name, or set HF_TOKEN or log in with "
            "`hf auth login`"
        ) from error
    except (HfHubHTTPError, FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"{repo} is no folder here, and as a repository it could not be fetched, nor is all of it in the cache: "
            f"{' '.join(str(error).split())} Files that came stay; run again to go on (without HF_HUB_OFFLINE, if that is set)"
        ) from error


def _names(repo: str, commit: str) -> list[str]:
    """The files of a repository, as far as they can be known."""
    try:
        return huggingface_hub.HfApi().list_repo_files(repo, revision=commit)
    except (HfHubHTTPError, ConnectionError):
        return []
