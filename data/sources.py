"""Where text comes from: one function a source, each giving a `Source` of training and held-out documents.

`open_source` picks the function from what the user typed. A document is `{"text": str, "name": str}`. Everything left
out, replaced or dropped on the way is counted in `Source.record`.
"""

import os
import platform
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.documents import Documents, OnInvalidUTF8, Part, Source
from data.hub import hub_dataset
from data.mixture import mixed_source, parse_mixture
from data.readers import (
    ARRAY_RECORD_SUFFIXES,
    JSONL_SUFFIXES,
    LIST_SUFFIXES,
    MANY_SUFFIXES,
    PARQUET_SUFFIXES,
    TEXT_SUFFIXES,
    WHOLE_ROW,
    is_readable,
    read_array_record,
    read_file,
    read_json_list,
    read_jsonl,
    read_parquet,
    read_text,
)

ACCEPTED = (
    "'stdlib' (the source of this Python), hf://owner/name/split, a folder of text files, "
    f"a {', '.join(MANY_SUFFIXES)} file with a `text` field (another: FILE#column=NAME), "
    f"a text file ({' '.join(TEXT_SUFFIXES)}), or a mixture of such as SOURCE:0.7,SOURCE:0.3"
)
ACCEPTED_ROWS = (
    "hf://owner/name/split, a folder of such files, "
    f"a {', '.join(MANY_SUFFIXES + LIST_SUFFIXES)} file with a conversation a row, or a mixture of such as SOURCE:0.7,SOURCE:0.3"
)
STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "lib2to3", "ensurepip", "site-packages", "__pycache__"}


def open_source(spec: str, *, on_invalid_utf8: OnInvalidUTF8 = "error", whole_rows: bool = False) -> Source:
    """The source that `spec` names: `stdlib`, a folder, a file with one text or with many, or a mixture of such
    (`A:0.7,B:0.3`, see `data.mixture`).

    **Arguments:**

    - `spec`: what the user typed. A folder called `stdlib` is `./stdlib`. `FILE#column=body` takes the texts from the field
        or column `body` in place of `text`.
    - `on_invalid_utf8`: stop with the file and the byte, put U+FFFD in place of bad bytes, or leave the document out.
    - `whole_rows`: a document's text is its whole row as JSON, for files of conversations (`data.conversations`). `.json` files are
        then lists of rows, and files of plain text are refused.

    **Raises:** `ValueError`, in words, for anything that cannot be read or gives no documents.
    """
    if (parts := parse_mixture(spec)) is not None:
        opened = [Part(name, open_source(name, on_invalid_utf8=on_invalid_utf8, whole_rows=whole_rows), weight) for name, weight in parts]
        return mixed_source(spec, opened)
    if not spec.strip():
        raise ValueError(f"no source is named: expected one of {ACCEPTED}")
    try:
        return _rows_source(spec, on_invalid_utf8) if whole_rows else _single_source(spec, on_invalid_utf8)
    except PermissionError as error:
        raise ValueError(
            f"no permission to read '{error.filename}': change it (`chmod u+r`, for a folder `u+rx`), or leave that out"
        ) from error


def _single_source(spec: str, on_invalid_utf8: OnInvalidUTF8) -> Source:
    place, text_field = _column(spec)
    path = _expanded(place)
    name = path.name.lower()
    if spec == "stdlib":
        return stdlib(on_invalid_utf8=on_invalid_utf8)
    if place.startswith("hf:"):
        return hub_dataset(place, text_field=text_field, on_invalid_utf8=on_invalid_utf8)
    if path.is_dir():
        return folder(place, text_field=text_field, on_invalid_utf8=on_invalid_utf8)
    if path.exists() and name.endswith(JSONL_SUFFIXES):
        return jsonl(place, text_field=text_field, on_invalid_utf8=on_invalid_utf8)
    if path.exists() and name.endswith(PARQUET_SUFFIXES):
        return parquet(place, text_field=text_field, on_invalid_utf8=on_invalid_utf8)
    if path.exists() and place != spec:
        raise ValueError(f"'{place}' has no columns, but '{spec}' names one: leave out #column={text_field}")
    if path.exists() and name.endswith(ARRAY_RECORD_SUFFIXES):
        return array_record(place, on_invalid_utf8=on_invalid_utf8)
    if path.exists() and path.suffix.lower() in TEXT_SUFFIXES:
        return text_file(place, on_invalid_utf8=on_invalid_utf8)
    if path.exists():
        _existing_file(place)
        raise ValueError(f"'{spec}' has the unknown suffix '{path.suffix}'. Accepted: {ACCEPTED}")
    if scheme := re.match(r"[A-Za-z][\w+.-]+:", spec):
        raise ValueError(f"unknown scheme '{scheme[0]}' in '{spec}'. Accepted: {ACCEPTED}")
    raise _missing(place)


def _rows_source(spec: str, on_invalid_utf8: OnInvalidUTF8) -> Source:
    """As `_single_source`, with the whole row for a text."""
    path = _expanded(spec)
    name = path.name.lower()
    how: dict[str, Any] = {"on_invalid_utf8": on_invalid_utf8}
    if spec.startswith("hf:"):
        return hub_dataset(spec, text_field=WHOLE_ROW, **how)
    if path.is_dir():
        return folder(spec, text_field=WHOLE_ROW, **how)
    if path.exists() and name.endswith(JSONL_SUFFIXES):
        return jsonl(spec, text_field=WHOLE_ROW, **how)
    if path.exists() and name.endswith(PARQUET_SUFFIXES):
        return parquet(spec, text_field=WHOLE_ROW, **how)
    if path.exists() and name.endswith(ARRAY_RECORD_SUFFIXES):
        return array_record(spec, **how)
    if path.exists() and name.endswith(LIST_SUFFIXES):
        return json_list(spec, **how)
    if path.exists():
        _existing_file(spec)
        raise ValueError(f"'{spec}' is no file of conversations. Accepted: {ACCEPTED_ROWS}")
    raise ValueError(f"'{spec}' does not exist. Accepted: {ACCEPTED_ROWS}")


def _column(spec: str) -> tuple[str, str]:
    """`FILE#column=NAME` in two; the column is `text` where none is named."""
    place, mark, column = spec.rpartition("#column=")
    return (place, column) if mark and column and not _expanded(spec).exists() else (spec, "text")


def stdlib(*, on_invalid_utf8: OnInvalidUTF8 = "error") -> Source:
    """The standard library this Python runs on: every `.py` but tests, `lib2to3`, `ensurepip` and installed packages.

    Real text on every machine with no download. It differs between Python versions; the record says which one it was.
    """
    root = Path(sysconfig.get_path("stdlib"))
    kept = Documents("stdlib", on_invalid_utf8)
    for path in sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py")):
        if STDLIB_LEFT_OUT.isdisjoint(path.split("/")[:-1]):
            read_text(kept, root / path, path)
    if not len(kept):
        raise ValueError(f"this Python keeps no .py files in '{root}'; give a file or folder of your own instead")
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return kept.source("stdlib", {"kind": "stdlib", "python": python})


def text_file(path: str | Path, *, on_invalid_utf8: OnInvalidUTF8 = "error") -> Source:
    """One file as one document, line ends as they are. Its last twentieth, from a line break on, is held out."""
    file = _existing_file(path)
    kept = Documents(str(path), on_invalid_utf8)
    read_text(kept, file, _printable(file.name))
    return kept.source(file.name, {"kind": "text_file"})


def folder(path: str | Path, *, text_field: str = "text", on_invalid_utf8: OnInvalidUTF8 = "error") -> Source:
    """The documents of every file below `path`, named and sorted by relative path: one from a file with a suffix in
    `TEXT_SUFFIXES`, many from one with a suffix in `MANY_SUFFIXES`.

    Hidden files and folders (`.git`), linked folders and files with other suffixes are left out and counted.
    """
    root = _expanded(path)
    if not root.exists():
        raise _missing(path)
    if not root.is_dir():
        raise ValueError(f"expected a folder, but '{path}' is a file")
    left_out: Counter[str] = Counter()
    kept = Documents(str(path), on_invalid_utf8)
    for file in sorted(_walk(root, left_out, text_field), key=lambda file: file.relative_to(root).as_posix()):
        read_file(kept, file, _printable(file.relative_to(root).as_posix()), text_field)
    if not len(kept) and not kept.counts:
        found = ", ".join(f"{count} {what}" for what, count in sorted(left_out.items())) or "nothing at all"
        taken = MANY_SUFFIXES + LIST_SUFFIXES if text_field == WHOLE_ROW else TEXT_SUFFIXES + MANY_SUFFIXES
        raise ValueError(f"no text files in '{path}'; it holds {found}. Taken are {' '.join(taken)}")
    return kept.source(root.resolve().name, {"kind": "folder", "left_out": dict(sorted(left_out.items()))})


def jsonl(path: str | Path, *, text_field: str = "text", on_invalid_utf8: OnInvalidUTF8 = "error") -> Source:
    """A document from the field `text_field` of each line of a `.jsonl` file, plain or packed as `.gz` or `.zst`."""
    file = _existing_file(path)
    kept = Documents(str(path), on_invalid_utf8)
    read_jsonl(kept, file, _printable(file.name), text_field)
    return kept.source(file.name, {"kind": "jsonl"})


def json_list(path: str | Path, *, on_invalid_utf8: OnInvalidUTF8 = "error") -> Source:
    """A document, JSON itself, from each object of the list that a `.json` or `.json.gz` file is."""
    file = _existing_file(path)
    kept = Documents(str(path), on_invalid_utf8)
    read_json_list(kept, file, _printable(file.name))
    return kept.source(file.name, {"kind": "json_list"})


def parquet(path: str | Path, *, text_field: str = "text", on_invalid_utf8: OnInvalidUTF8 = "error") -> Source:
    """A document from the column `text_field` of each row of a `.parquet` file. Needs the extra `data`."""
    file = _existing_file(path)
    kept = Documents(str(path), on_invalid_utf8)
    read_parquet(kept, file, _printable(file.name), text_field)
    return kept.source(file.name, {"kind": "parquet", "column": text_field})


def array_record(path: str | Path, *, on_invalid_utf8: OnInvalidUTF8 = "error") -> Source:
    """A document from each record, UTF-8 text, of an `.array_record` file."""
    file = _existing_file(path)
    kept = Documents(str(path), on_invalid_utf8)
    read_array_record(kept, file, _printable(file.name))
    return kept.source(file.name, {"kind": "array_record"})


def _walk(root: Path, left_out: Counter[str], text_field: str) -> Iterator[Path]:
    def stop(error: OSError) -> None:
        raise error  # os.walk would pass over an unreadable folder without a word

    for at, folders, files in os.walk(root, onerror=stop):
        left_out["hidden"] += sum(name.startswith(".") for name in folders + files)
        folders[:] = [name for name in folders if not name.startswith(".")]
        left_out["linked folders"] += sum((Path(at) / name).is_symlink() for name in folders)
        for file in (Path(at) / name for name in files if not name.startswith(".")):
            if is_readable(file.name, text_field) and file.is_file():
                yield file
            else:
                left_out[f"*{file.suffix}" if file.is_file() else "not a regular file"] += 1
    for what in ("hidden", "linked folders"):
        if not left_out[what]:
            del left_out[what]


def _existing_file(path: str | Path) -> Path:
    file = _expanded(path)
    if not file.exists():
        raise _missing(path)
    if not file.is_file():
        kind = "a folder" if file.is_dir() else "a pipe or a device: write its text to a file first"
        raise ValueError(f"expected a regular file, but '{path}' is {kind}")
    if file.stat().st_size == 0:
        raise ValueError(f"'{path}' is empty (0 bytes): there is nothing to train on")
    return file


def _missing(path: str | Path) -> ValueError:
    nearest = next(parent for parent in _expanded(path).absolute().parents if parent.exists())
    mixture = " If a mixture is meant, each of its parts, two or more, needs a weight." if re.search(r",|:[\d.]+$", str(path)) else ""
    return ValueError(f"'{path}' does not exist; its nearest existing parent is '{nearest}'.{mixture} Accepted: {ACCEPTED}")


def _expanded(path: str | Path) -> Path:
    """With the home folder for `~`. A user who is not known stays as typed, where `Path.expanduser` raises `RuntimeError`."""
    return Path(os.path.expanduser(path))


def _printable(name: str) -> str:
    """A file name as valid UTF-8: bytes that are not become `\\xff`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
