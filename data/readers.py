"""One function a file format: each hands the documents of a file to `Documents`. `read_file` picks it by the suffix.

A document of a file with many is named `file:number`, counted from 1 as editors count lines. Its text is one field of the row, or
the whole row as JSON (`WHOLE_ROW`), for whoever reads more of it (`data.conversations`).
"""

import gzip
import importlib
import io
import json
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data.documents import Documents
from data.store import Place

_PROSE = "txt text md markdown rst org adoc tex bib html htm xml csv tsv json yaml yml toml ini cfg log"
_CODE = "py pyi c h cc cpp hpp cu rs go java kt scala swift js jsx ts tsx css rb pl php lua jl r hs ml sql sh"
TEXT_SUFFIXES = tuple(f".{suffix}" for suffix in f"{_PROSE} {_CODE}".split())
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET_SUFFIXES = (".parquet",)
ARRAY_RECORD_SUFFIXES = (".array_record", ".arrayrecord")
LIST_SUFFIXES = (".json", ".json.gz")  # one JSON list of rows; only where whole rows are read, else `.json` is a text
WHOLE_ROW = "*"  # in place of the name of a field
MANY_SUFFIXES = JSONL_SUFFIXES + PARQUET_SUFFIXES + ARRAY_RECORD_SUFFIXES  # many documents a file
ROWS_AT_ONCE = 64  # of a parquet file in memory


def is_readable(name: str, text_field: str = "text") -> bool:
    """Whether the suffix is one that `read_file` knows."""
    return name.lower().endswith(MANY_SUFFIXES + (LIST_SUFFIXES if text_field == WHOLE_ROW else TEXT_SUFFIXES))


def read_file(kept: Documents, file: Path, name: str, text_field: str) -> None:
    """Add every document of `file` under `name`. `text_field`: the field of a JSON line or the column of a parquet file."""
    lower = file.name.lower()
    if lower.endswith(JSONL_SUFFIXES):
        read_jsonl(kept, file, name, text_field)
    elif lower.endswith(PARQUET_SUFFIXES):
        read_parquet(kept, file, name, text_field)
    elif lower.endswith(ARRAY_RECORD_SUFFIXES):
        read_array_record(kept, file, name)
    elif text_field == WHOLE_ROW:
        read_json_list(kept, file, name)
    else:
        read_text(kept, file, name)


def read_json_list(kept: Documents, file: Path, name: str) -> None:
    """A document from each object of the one list that the file is: the object as JSON. The whole file is in memory meanwhile."""
    raw = b"".join(line for _, line in lines(file))
    try:
        rows = json.loads((kept.decode(raw, f"'{file}'") or "[]").removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        hint = " If it holds one object a line, name it .jsonl" if raw.lstrip()[:1] == b"{" else ""
        raise ValueError(f"'{file}' is not JSON: {error}. Expected a list of objects.{hint}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"'{file}' holds {type(rows).__name__}: expected a JSON list of objects, one a row")
    for number, row in enumerate(rows, start=1):
        kept.add(f"{name}:{number}", json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass"), f"row {number} of '{file}'")


def read_text(kept: Documents, file: Path, name: str) -> None:
    """The whole file is one document."""
    raw = file.read_bytes()
    kept.add(name, raw, f"'{file}'", Place(kept.store.file(file), 0, len(raw)))


def read_jsonl(kept: Documents, file: Path, name: str, text_field: str) -> None:
    """A document a line. Blank lines are left out and counted; other fields are not read."""
    packed = file.suffix.lower() in (".gz", ".zst")
    number_of_file = -1 if packed else kept.store.file(file, lambda line: text_of(line.decode(), f"'{file}'", text_field))
    at = 0
    unread = lines(file)
    try:
        for number, line in unread:
            where = f"line {number} of '{file}'"
            if not line.strip():
                kept.counts["blank_lines"] += 1
            elif (decoded := kept.decode(line, where)) is not None:
                # A lone \ud800 is legal JSON but not text: back to bytes, where the one rule for bad UTF-8 meets it.
                text = text_of(decoded, where, text_field).encode("utf-8", "surrogatepass")
                stays = not packed and "\ufffd" not in decoded
                kept.add(f"{name}:{number}", text, f"`{text_field}` in {where}", Place(number_of_file, at, len(line)) if stays else None)
            at += len(line)
    except ValueError:
        if packed:  # a bad line may be damage that its sums tell of: then that is what is said
            deque(unread, maxlen=0)
        raise


def read_parquet(kept: Documents, file: Path, name: str, text_field: str) -> None:
    """A document from each row, some rows at a time; only the one column is read. Rows without a text are counted."""
    arrow, parquet = needed("pyarrow", file), needed("pyarrow.parquet", file)
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            if text_field == WHOLE_ROW:
                for some in table.iter_batches(batch_size=ROWS_AT_ONCE):
                    for row in some.to_pylist():
                        number += 1
                        kept.add(f"{name}:{number}", json.dumps(row, ensure_ascii=False).encode(), f"row {number} of '{file}'")
                return
            for value in _column_of(table, arrow, file, text_field):
                number += 1
                if value.is_valid:
                    # As bytes: pyarrow checks no UTF-8 when it reads, and the rule for bad UTF-8 stands elsewhere.
                    kept.add(f"{name}:{number}", value.as_buffer().to_pybytes(), f"row {number} of '{file}'")
                else:
                    kept.counts["null_texts"] += 1
    except (arrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the disk, not the file
            raise
        raise ValueError(f"'{file}' is not a whole parquet file: {error} (after row {number}). Fetch it again") from error


def _column_of(table: Any, arrow: Any, file: Path, name: str) -> Iterator[Any]:
    """The values of a column of texts, some rows in memory at a time."""
    schema = table.schema_arrow
    if name not in schema.names:
        raise ValueError(f"'{file}' has no column '{name}': its columns are {schema.names}. Name one with {file.name}#column=NAME")
    kind = schema.field(name).type
    if not any(is_text(kind) for is_text in (arrow.types.is_string, arrow.types.is_large_string, arrow.types.is_string_view)):
        raise ValueError(f"column '{name}' of '{file}' holds {kind}: expected strings")
    for some in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=[name]):
        yield from some.column(0)


def read_array_record(kept: Documents, file: Path, name: str) -> None:
    """A document from each record of an ArrayRecord file: its bytes are the text."""
    import grain

    number = 0
    try:
        records = grain.sources.ArrayRecordDataSource(str(file))
        for number in range(1, len(records) + 1):
            kept.add(f"{name}:{number}", records[number - 1], f"record {number} of '{file}'")
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"'{file}' is not a whole ArrayRecord file: {error} (at record {number}). Fetch it again") from error


def needed(module: str, file: Path | str) -> Any:
    """A module of the extra `data`. **Raises:** `ValueError` saying how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        raise ValueError(f"reading '{file}' needs {package}, which is not installed: run `uv sync --extra data`") from error


def lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, unpacked if need be, with their numbers from 1."""
    number = 0
    suffix = file.suffix.lower()
    kind = {".gz": "gzip", ".zst": "zstd"}.get(suffix, "")
    damage: tuple[type[Exception], ...] = (gzip.BadGzipFile, EOFError, zlib.error)
    if kind == "zstd":
        damage = (needed("zstandard", file).ZstdError, EOFError)
    try:
        with file.open("rb") as raw, _unpacked(raw, kind) as unpacked:
            for number, line in enumerate(unpacked, start=1):
                yield number, line
    except damage as error:
        raise ValueError(
            f"'{file}' is not a whole {kind} file: {error} (after line {number}). Check it with `{kind} -t` and fetch it again"
        ) from error


def _unpacked(raw: BinaryIO, kind: str) -> Any:
    if kind == "gzip":
        return gzip.GzipFile(fileobj=raw)
    return io.BufferedReader(_Zstd(raw), 1 << 20) if kind == "zstd" else raw


class _Zstd(io.RawIOBase):
    """Frames of zstd as one stream. The library's own reader takes a file that was cut off for a whole one."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._ready, self._rest = raw, b"", b""
        self._new = importlib.import_module("zstandard").ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._rest or self._raw.read(1 << 16)
            self._rest = b""
            if not packed:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._new()
            self._ready = self._frame.decompress(packed)
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def text_of(line: str, where: str, text_field: str) -> str:
    """The text in a line of JSON, or all of the line. A byte order mark, as some programs write at the head of a file, is passed over."""
    try:
        row = json.loads(line.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:  # also for a number of too many digits, and for brackets nested too deep
        raise ValueError(f"{where} is not JSON: {error}. Expected one object a line with a `{text_field}` field") from error
    if text_field == WHOLE_ROW and isinstance(row, dict):
        return line.removeprefix("\ufeff").strip()
    if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
        found = f"the keys {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
        if text_field == WHOLE_ROW:
            raise ValueError(f"{where} has {found}: expected an object, one a line")
        if isinstance(row, dict) and text_field in row:
            found = f"`{text_field}` of type {type(row[text_field]).__name__}"
        raise ValueError(f"{where} has {found}: expected an object whose `{text_field}` is a string")
    return row[text_field]
