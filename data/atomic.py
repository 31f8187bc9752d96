"""Folders that are whole or not there: `building` fills one beside its place and renames it when it is finished.

A process killed half-way leaves only a hidden folder with its host and process id in the name, which the next build on
that machine removes.
"""

import errno
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def building(place: Path, check: Callable[[], object]) -> Iterator[Path]:
    """A new hidden folder to fill, which becomes `place` at the end of the `with` and is removed if that raises.

    **Arguments:**

    - `check`: raises `ValueError` or `OSError` if what stands at `place` is damaged. Where another process was first and
        its folder passes, that one stays; a damaged one is replaced.

    **Raises:** `OSError`, in words, if the disk is full.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(place.parent)
    beside = _hidden_beside(place)
    try:
        beside.mkdir()
        yield beside
        for file in beside.iterdir():  # on the disk before the rename makes them visible
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        _put_in_place(beside, place, check)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free_mb = shutil.disk_usage(place.parent).free / 1e6
        raise OSError(
            error.errno,
            f"could not write '{place.name}': {error.strerror} ({free_mb:.0f} MB free). Nothing is left of the attempt; "
            "free some space or choose another folder",
            str(place.parent),
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _put_in_place(beside: Path, place: Path, check: Callable[[], object]) -> None:
    while True:
        try:
            os.rename(beside, place)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        try:
            check()
            return
        except (OSError, ValueError):
            damaged = _hidden_beside(place)
            with suppress(FileNotFoundError):  # another process is replacing it, too
                os.rename(place, damaged)
            shutil.rmtree(damaged, ignore_errors=True)


def _hidden_beside(place: Path) -> Path:
    """A new name that says which process it belongs to."""
    return place.with_name(f".{place.name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.building")


def _remove_left_behind(folder: Path) -> None:
    """Remove what killed builds on this machine left. Those of live processes and of other machines stay."""
    pattern = re.compile(rf"\..+\.{re.escape(socket.gethostname())}\.(\d+)\.[0-9a-f]{{8}}\.building")
    for entry in folder.iterdir():
        if (match := pattern.fullmatch(entry.name)) and not _is_alive(int(match[1])):
            shutil.rmtree(entry, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 asks without doing anything
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, but alive
        return True
    return True
