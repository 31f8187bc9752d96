"""Datasets of the Hugging Face Hub: `hf://owner/name[@revision]/split`, one file after another into the library's cache.

The revision (a branch, a tag or a commit; `main` if none is named) is resolved to a commit, which stands in the record: write
that commit into the spec and the text is the same for ever. Interrupted downloads go on where they stopped, files that are
there are not fetched again, and with `HF_HUB_OFFLINE=1` nothing is asked of the network. Private datasets need the library's
usual token.
"""

import fnmatch
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from data.documents import Documents, OnInvalidUTF8, Source
from data.readers import JSONL_SUFFIXES, PARQUET_SUFFIXES, read_file

SPEC = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^@/]+))?/(?P<split>[\w.-]+)")


def hub_dataset(spec: str, *, text_field: str = "text", on_invalid_utf8: OnInvalidUTF8 = "error") -> Source:
    """The documents of one split: those of its `.parquet` or `.jsonl[.gz|.zst]` files, in the order of their paths.

    A file belongs to the split `train` if a part of its path is `train`, or begins with `train` and one of `-._`
    (`data/train-00000-of-00002.parquet`, `en/train/0.jsonl`).

    **Raises:** `ValueError`, in words, if the dataset, its revision or the split is not there or cannot be reached.
    """
    if (asked := SPEC.fullmatch(spec)) is None:
        raise ValueError(f"expected hf://owner/name/split or hf://owner/name@revision/split, got '{spec}'")
    repo, revision, split = asked["repo"], asked["revision"] or "main", asked["split"]
    root = _fetch(spec, repo, revision, split)
    files = sorted(path for path in _paths(root) if _belongs(path, split))
    if not files:
        raise ValueError(f"no split '{split}' in the dataset {repo}: {_what_there_is(repo, revision)}")
    kept = Documents(spec, on_invalid_utf8)
    for path in files:
        read_file(kept, root / path, path, text_field)
    record = {"kind": "hub", "repo": repo, "revision": revision, "commit": root.name, "split": split, "files": files}
    return kept.source(f"{repo.split('/')[1]}-{split}", record)


def _fetch(spec: str, repo: str, revision: str, split: str) -> Path:
    """The cached folder of that commit with all files of the split in it."""
    try:
        # One file at a time: a download that is cut off leaves whole files and the part of one.
        root = huggingface_hub.snapshot_download(
            repo, repo_type="dataset", revision=revision, allow_patterns=_patterns(split), max_workers=1
        )
    except RevisionNotFoundError as error:
        raise ValueError(f"the dataset {repo} has no revision '{revision}' (asked for as '{spec}')") from error
    except GatedRepoError as error:
        raise ValueError(f"the dataset {repo} asks for consent: give it on its page, then log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"no dataset {repo} on the Hub, or it is private: check '{spec}', or log in with `hf auth login`") from error
    except (HfHubHTTPError, FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"'{spec}' could not be fetched, and not all of it is in the cache: {' '.join(str(error).split())} "
            "Files that came stay; run again to go on (without HF_HUB_OFFLINE, if that is set)"
        ) from error
    return Path(root)


def _patterns(split: str) -> list[str]:
    """As `fnmatch` has them, where `*` takes slashes, too."""
    ends = [f"*{suffix}" for suffix in PARQUET_SUFFIXES + JSONL_SUFFIXES]
    stems = [f"{split}/{end}" for end in ends] + [f"{split}[-._]{end}" for end in ends] + [split + end[1:] for end in ends]
    return stems + [f"*/{stem}" for stem in stems]


def _belongs(path: str, split: str) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in _patterns(split))


def _paths(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]


def _what_there_is(repo: str, revision: str) -> str:
    """Words about the files of a dataset, for an error."""
    try:
        files = huggingface_hub.HfApi().list_repo_files(repo, repo_type="dataset", revision=revision)
    except (HfHubHTTPError, ConnectionError):
        return "none of its files is in the cache"
    return f"it holds {', '.join(sorted(files)[:20])}{' ...' if len(files) > 20 else ''}"
