"""Where texts are: `TextStore` keeps for each document the file, place and length of its text, itself in a file on disk.

Texts stay where they are if they stand there as they are (plain files, lines of JSON). What has to be unpacked first goes once
into an unnamed file in the temporary folder (`TMPDIR` chooses it), which vanishes with the process. Memory is some hundred
bytes a *file*, nothing a document.
"""

import errno
import os
import struct
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

_RECORD = struct.Struct("<iqqqqi")  # file (-1: the unnamed one), place, length there, bytes of the text, place and length of the name
_OPEN_FILES = 16


class Place(NamedTuple):
    """Bytes of a file that has been introduced with `TextStore.file`."""

    file: int
    at: int
    length: int


class TextStore:
    """Names and texts by number, appended once and then read in any order, from several threads if you like."""

    def __init__(self) -> None:
        self._index, self._texts, self._names = (_Unnamed() for _ in range(3))
        self._files: list[tuple[Path, tuple[int, int], Callable[[bytes], str]]] = []
        self._open: OrderedDict[int, IO[bytes]] = OrderedDict()
        self._lock = threading.Lock()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def file(self, path: Path, parse: Callable[[bytes], str] = bytes.decode) -> int:
        """Introduce a file that texts are left in; `parse` makes a text of the bytes at its place."""
        self._files.append((path, _stamp(path), parse))
        return len(self._files) - 1

    def append(self, name: str, text: bytes, place: Place | None = None) -> None:
        """One more document. `place` is where `text` can be read again; without it, a copy is kept."""
        file, at, length = place or (-1, self._texts.append(text), len(text))
        name_bytes = name.encode()
        name_at = self._names.append(name_bytes)
        self._index.append(_RECORD.pack(file, at, length, len(text), name_at, len(name_bytes)))
        self._count += 1

    def size(self, i: int) -> int:
        """UTF-8 bytes of text `i`."""
        return self._record(i)[3]

    def name(self, i: int) -> str:
        *_, at, length = self._record(i)
        return self._names.read(at, length).decode()

    def text(self, i: int) -> str:
        file, at, length, *_ = self._record(i)
        if file < 0:
            return self._texts.read(at, length).decode()
        path, stamp, parse = self._files[file]
        with self._lock:
            if file not in self._open:
                if _stamp(path) != stamp:
                    raise ValueError(f"'{path}' has changed since this run listed its documents: start again")
                self._open[file] = path.open("rb", buffering=0)
                if len(self._open) > _OPEN_FILES:
                    self._open.popitem(last=False)[1].close()
            self._open.move_to_end(file)
            raw = _read(self._open[file].fileno(), at, length)
        return parse(raw)

    def _record(self, i: int) -> tuple[int, ...]:
        if not 0 <= i < self._count:
            raise IndexError(f"document {i} of {self._count}")
        return _RECORD.unpack(self._index.read(i * _RECORD.size, _RECORD.size))


class _Unnamed:
    """A file without a name that grows at its end."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="texts-")  # noqa: SIM115 -- it lives as long as this object
        self._length = 0  # of what was appended
        self._flushed = 0

    def append(self, some: bytes) -> int:
        at = self._length
        with _full_disk_in_words():
            self._file.write(some)
        self._length += len(some)
        return at

    def read(self, at: int, length: int) -> bytes:
        if at + length > self._flushed:
            with _full_disk_in_words():
                self._file.flush()
            self._flushed = self._length
        return _read(self._file.fileno(), at, length)


class _full_disk_in_words:
    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            folder = tempfile.gettempdir()
            words = f"no room for the unpacked texts: {error.strerror}. Free some space there, or name another folder in TMPDIR"
            raise OSError(error.errno, words, folder) from error


def _read(descriptor: int, at: int, length: int) -> bytes:
    raw = os.pread(descriptor, length, at)
    while len(raw) < length:  # Linux gives 2 GB at once
        more = os.pread(descriptor, length - len(raw), at + len(raw))
        if not more:
            raise ValueError(f"a text file became shorter while it was being read (at byte {at + len(raw)}): start again")
        raw += more
    return raw


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
