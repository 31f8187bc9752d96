"""The record of a folder of files, and the sums that tell whether it is still what was written.

`record.json` says what the files hold and how large they are, `SHA256SUMS` sums them all, the record too; `sha256sum -c` checks it as well.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

SUMMED_BELOW = 1 << 30  # bytes; a larger file is checked by its size alone


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """The last files of a folder whose others are written: its record, with their sizes added to it, and the sums."""
    record["sizes"] = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    (folder / "record.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    summed = [file for file in sorted(folder.iterdir()) if file.stat().st_size < SUMMED_BELOW]
    (folder / "SHA256SUMS").write_text("".join(f"{_sha256(file)}  {file.name}\n" for file in summed), encoding="utf-8")


def checked_record(folder: Path) -> dict[str, Any]:
    """The record of a folder whose files all have the sizes and sums they were written with. **Raises:** `ValueError`, `OSError`."""
    sums = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines())
    for name, expected in sums.items():
        if _sha256(folder / name) != expected:
            raise ValueError(f"{name} is not what was written (its SHA-256 differs)")
    if "record.json" not in sums:
        raise ValueError("SHA256SUMS has no line for record.json")
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    for name, size in record["sizes"].items():
        if (found := (folder / name).stat().st_size) != size:
            raise ValueError(f"{name} has {found} bytes where {size} were written")
        if name not in sums and size < SUMMED_BELOW:
            raise ValueError(f"SHA256SUMS has no line for {name}")
    return record


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
