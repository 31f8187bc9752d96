"""What a task's file holds, whatever the task: one JSON object a line, checked field by field, with its place for errors.

`read_records` reads `.jsonl`, `.jsonl.gz` and `.jsonl.zst`, and a `.zip` of `.jsonl` files, whose names are then the records' groups.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data.readers import JSONL_SUFFIXES, lines

RECORD_SUFFIXES = (*JSONL_SUFFIXES, ".zip")

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Record:
    """An object of a file."""

    fields: dict[str, Any]
    where: str  # for errors: "line 3 of 'arc.jsonl'"
    group: str  # the file in a zip it came from, without suffix; "" where there is one file

    def text(self, name: str) -> str:
        """A field that must be a text with something in it."""
        value = self.fields.get(name)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{self.where}: `{name}` must be a text that is not blank, {self._came(name)}")
        return value

    def texts(self, name: str, at_least: int) -> tuple[str, ...]:
        """A field that must be a list of such texts."""
        value = self.fields.get(name)
        if not isinstance(value, list) or len(value) < at_least or not all(isinstance(v, str) and v.strip() for v in value):
            raise ValueError(f"{self.where}: `{name}` must be a list of at least {at_least} texts that are not blank, {self._came(name)}")
        return tuple(value)

    def index(self, name: str, of: Sequence[Any]) -> int:
        """A field that must be a place in `of`, counted from 0."""
        value = self.fields.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(of):
            raise ValueError(f"{self.where}: `{name}` must be a whole number from 0 to {len(of) - 1}, {self._came(name)}")
        return value

    def _came(self, name: str) -> str:
        if name not in self.fields:
            return f"and is missing; the fields are {', '.join(sorted(self.fields)) or 'none'}"
        shown = json.dumps(self.fields[name], ensure_ascii=False)
        return f"got {shown if len(shown) <= 80 else shown[:77] + '...'}"


def read_records(path: str | Path) -> list[Record]:
    """Every object of a file, in order; blank lines are passed over.

    **Raises:** `ValueError`, in words, for a file that is not there, of another kind, damaged or empty.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"'{path}' is no file: expected {', '.join(RECORD_SUFFIXES)} with one JSON object a line")
    if file.suffix.lower() == ".zip":
        records = list(_of_zip(file))
    elif file.name.lower().endswith(JSONL_SUFFIXES):
        records = [_record(line, f"line {number} of '{file}'", "") for number, line in lines(file) if line.strip()]
    else:
        raise ValueError(f"'{path}' has the unknown suffix '{file.suffix}': expected {', '.join(RECORD_SUFFIXES)}")
    if not records:
        raise ValueError(f"'{path}' has no records: expected one JSON object a line")
    return records


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with Path(path).expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def drawn(things: Sequence[Thing], limit: int | None, seed: int) -> list[Thing]:
    """`limit` of them at random, in their own order; all where there are no more, or `limit` is `None`."""
    if limit is None or limit >= len(things):
        return list(things)
    chosen = np.random.default_rng(seed).permutation(len(things))[:limit]
    return [things[i] for i in sorted(chosen.tolist())]


def _of_zip(file: Path) -> Iterator[Record]:
    try:
        with zipfile.ZipFile(file) as archive:
            for name in sorted(name for name in archive.namelist() if name.endswith(".jsonl")):
                for number, line in enumerate(archive.read(name).split(b"\n"), start=1):
                    if line.strip():
                        yield _record(line, f"line {number} of {name} in '{file}'", Path(name).stem)
    except zipfile.BadZipFile as error:
        raise ValueError(f"'{file}' is not a whole zip file: {error}. Check it with `unzip -t` and fetch it again") from error


def _record(line: bytes, where: str, group: str) -> Record:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{where} is not JSON: {error}. Expected one object a line") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where} is a {type(fields).__name__}: expected one object a line")
    return Record(fields, where, group)
