"""Where text comes from: one function a source, each giving a `Source` of training and held-out documents.

`open_source` picks the function from what the user typed. A document is `{"text": str, "name": str}`. Everything left
out, replaced or dropped on the way is counted in `Source.record`.
"""

import gzip
import json
import os
import platform
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data.documents import Documents, OnInvalidUTF8, Part, Source
from data.mixture import mixed_source, parse_mixture

_PROSE = "txt text md markdown rst org adoc tex bib html htm xml csv tsv json yaml yml toml ini cfg log"
_CODE = "py pyi c h cc cpp hpp cu rs go java kt scala swift js jsx ts tsx css rb pl php lua jl r hs ml sql sh"
TEXT_SUFFIXES = tuple(f".{suffix}" for suffix in f"{_PROSE} {_CODE}".split())
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
ACCEPTED = (
    "'stdlib' (the source of this Python), a folder of text files, "
    f"a .jsonl or .jsonl.gz file with a `text` field, or a text file ({' '.join(TEXT_SUFFIXES)})"
)
STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "lib2to3", "ensurepip", "site-packages", "__pycache__"}


def open_source(spec: str, *, on_invalid_utf8: OnInvalidUTF8 = "error") -> Source:
    """The source that `spec` names: `stdlib`, a folder, a `.jsonl` or `.jsonl.gz` file, a text file, or a mixture of such
    (`A:0.7,B:0.3`, see `data.mixture`).

    **Arguments:**

    - `spec`: what the user typed. A folder called `stdlib` is `./stdlib`.
    - `on_invalid_utf8`: stop with the file and the byte, put U+FFFD in place of bad bytes, or leave the document out.

    **Raises:** `ValueError`, in words, for anything that cannot be read or gives no documents.
    """
    if (parts := parse_mixture(spec)) is not None:
        opened = [Part(name, open_source(name, on_invalid_utf8=on_invalid_utf8), weight) for name, weight in parts]
        return mixed_source(spec, opened)
    path = Path(spec).expanduser()
    if spec == "stdlib":
        return stdlib(on_invalid_utf8=on_invalid_utf8)
    if path.is_dir():
        return folder(spec, on_invalid_utf8=on_invalid_utf8)
    if path.exists() and path.name.lower().endswith(JSONL_SUFFIXES):
        return jsonl(spec, on_invalid_utf8=on_invalid_utf8)
    if path.exists() and path.suffix.lower() in TEXT_SUFFIXES:
        return text_file(spec, on_invalid_utf8=on_invalid_utf8)
    if path.exists():
        raise ValueError(f"'{spec}' has the unknown suffix '{path.suffix}'. Accepted: {ACCEPTED}")
    if scheme := re.match(r"[A-Za-z][\w+.-]+:", spec):
        raise ValueError(f"unknown scheme '{scheme[0]}' in '{spec}'. Accepted: {ACCEPTED}")
    raise _missing(spec)


def stdlib(*, on_invalid_utf8: OnInvalidUTF8 = "error") -> Source:
    """The standard library this Python runs on: every `.py` but tests, `lib2to3`, `ensurepip` and installed packages.

    Real text on every machine with no download. It differs between Python versions; the record says which one it was.
    """
    root = Path(sysconfig.get_path("stdlib"))
    kept = Documents("stdlib", on_invalid_utf8)
    for path in sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py")):
        if STDLIB_LEFT_OUT.isdisjoint(path.split("/")[:-1]):
            kept.add(path, (root / path).read_bytes(), f"'{root / path}'")
    if not kept.names:
        raise ValueError(f"this Python keeps no .py files in '{root}'; give a file or folder of your own instead")
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return kept.source("stdlib", {"kind": "stdlib", "python": python})


def text_file(path: str | Path, *, on_invalid_utf8: OnInvalidUTF8 = "error") -> Source:
    """One file as one document, line ends as they are. Its last twentieth, from a line break on, is held out."""
    file = _existing_file(path)
    kept = Documents(str(path), on_invalid_utf8)
    kept.add(_printable(file.name), file.read_bytes(), f"'{path}'")
    return kept.source(file.name, {"kind": "text_file"})


def folder(path: str | Path, *, on_invalid_utf8: OnInvalidUTF8 = "error") -> Source:
    """A document from every file below `path` with a suffix in `TEXT_SUFFIXES`, named and sorted by relative path.

    Hidden files and folders (`.git`), linked folders and files with other suffixes are left out and counted.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise _missing(path)
    if not root.is_dir():
        raise ValueError(f"expected a folder, but '{path}' is a file")
    left_out: Counter[str] = Counter()
    kept = Documents(str(path), on_invalid_utf8)
    for file in sorted(_walk(root, left_out), key=lambda file: file.relative_to(root).as_posix()):
        kept.add(_printable(file.relative_to(root).as_posix()), file.read_bytes(), f"'{file}'")
    if not kept.names and not kept.counts:
        found = ", ".join(f"{count} {what}" for what, count in sorted(left_out.items())) or "nothing at all"
        raise ValueError(f"no text files in '{path}'; it holds {found}. Taken are {' '.join(TEXT_SUFFIXES)}")
    return kept.source(root.resolve().name, {"kind": "folder", "left_out": dict(sorted(left_out.items()))})


def jsonl(path: str | Path, *, on_invalid_utf8: OnInvalidUTF8 = "error") -> Source:
    """A document from the field `text` of each line of a `.jsonl` or `.jsonl.gz` file, named `file:line` (from 1).

    Other fields are not read. Blank lines are left out and counted.
    """
    file = _existing_file(path)
    kept = Documents(str(path), on_invalid_utf8)
    for number, line in _lines(file):
        where = f"line {number} of '{path}'"
        if not line.strip():
            kept.counts["blank_lines"] += 1
        elif (decoded := kept.decode(line, where)) is not None:
            # A lone \ud800 is legal JSON but not text: back to bytes, where the one rule for bad UTF-8 meets it.
            text = _text_field(decoded, where).encode("utf-8", "surrogatepass")
            kept.add(f"{_printable(file.name)}:{number}", text, f"`text` in {where}")
    return kept.source(file.name, {"kind": "jsonl"})


def _walk(root: Path, left_out: Counter[str]) -> Iterator[Path]:
    def stop(error: OSError) -> None:
        raise error  # os.walk would pass over an unreadable folder without a word

    for at, folders, files in os.walk(root, onerror=stop):
        left_out["hidden"] += sum(name.startswith(".") for name in folders + files)
        folders[:] = [name for name in folders if not name.startswith(".")]
        left_out["linked folders"] += sum((Path(at) / name).is_symlink() for name in folders)
        for file in (Path(at) / name for name in files if not name.startswith(".")):
            if file.suffix.lower() in TEXT_SUFFIXES and file.is_file():
                yield file
            else:
                left_out[f"*{file.suffix}" if file.is_file() else "not a regular file"] += 1
    for what in ("hidden", "linked folders"):
        if not left_out[what]:
            del left_out[what]


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with gzip.open(file, "rb") if file.suffix.lower() == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"'{file}' is not a whole gzip file: {error} (after line {number}). Check it with `gzip -t` and fetch it again"
        ) from error


def _text_field(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}. Expected one object a line with a `text` field") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        found = f"the keys {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
        if isinstance(row, dict) and "text" in row:
            found = f"`text` of type {type(row['text']).__name__}"
        raise ValueError(f"{where} has {found}: expected an object whose `text` is a string")
    return row["text"]


def _existing_file(path: str | Path) -> Path:
    file = Path(path).expanduser()
    if not file.exists():
        raise _missing(path)
    if not file.is_file():
        raise ValueError(f"expected a regular file, but '{path}' is {'a folder' if file.is_dir() else 'not one'}")
    if file.stat().st_size == 0:
        raise ValueError(f"'{path}' is empty (0 bytes): there is nothing to train on")
    return file


def _missing(path: str | Path) -> ValueError:
    nearest = next(parent for parent in Path(path).expanduser().absolute().parents if parent.exists())
    return ValueError(f"'{path}' does not exist; its nearest existing parent is '{nearest}'. Accepted: {ACCEPTED}")


def _printable(name: str) -> str:
    """A file name as valid UTF-8: bytes that are not become `\\xff`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
