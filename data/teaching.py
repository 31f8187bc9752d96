"""What a teacher says of training rows, kept on disk: the ids of its k likeliest tokens at each place, and k + 1 log-probabilities, the
last of all other tokens together.

Rows have numbers for ever (`data.rows`), so what belongs to row g can be written before training begins and be found again. A folder named
for all that decides it holds parts of `ROWS` rows, `rows-00000064/` those from row 64 on:

    ids.bin        int32 [rows, seq, k]
    log_probs.bin  float16 [rows, seq, k + 1]
    record.json, SHA256SUMS

A part appears whole or not at all (`data.atomic`), so writing that was cut off goes on behind the last part; one that no longer matches its
sums is written again, with a warning.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from loguru import logger

from data.atomic import building
from data.sums import checked_record, write_record

FORMAT = 1  # raised when the files change; what was written before is then simply not found
ROWS = 64  # of a part


class TeacherTargets:
    """The targets of the rows of a run, by row number."""

    def __init__(self, folder: str | Path, made_from: Mapping[str, Any], *, seq: int, k: int) -> None:
        """**Arguments:**

        - `folder`: where targets of all kinds lie.
        - `made_from`: JSON; all that decides what is in a row and what the teacher says of it.
        """
        self.made_from = {"format": FORMAT, **made_from, "seq": seq, "k": k, "rows": ROWS}
        key = hashlib.sha256(json.dumps(self.made_from, sort_keys=True).encode()).hexdigest()[:16]
        self.folder, self.seq, self.k = Path(folder) / f"top{k}-{key}", seq, k
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def bytes_of(self, rows: int) -> int:
        """How much so many rows take on disk, a last part filled up."""
        return len(self.parts_of(rows)) * ROWS * self.seq * (4 * self.k + 2 * (self.k + 1))

    def parts_of(self, rows: int) -> range:
        """The parts that rows 0 to `rows - 1` stand in, by their first rows."""
        return range(0, rows, ROWS)

    def missing(self, rows: int) -> list[int]:
        """Those of them that are not there yet, or are damaged."""
        return [first for first in self.parts_of(rows) if not self._is_sound(first)]

    def write(self, first: int, ids: np.ndarray, log_probs: np.ndarray) -> None:
        """The part of `ROWS` rows from row `first` on."""
        expected = (ROWS, self.seq, self.k), (ROWS, self.seq, self.k + 1)
        if first % ROWS or (ids.shape, log_probs.shape) != expected:
            came = f"ids {ids.shape} and log_probs {log_probs.shape} from row {first} on"
            raise ValueError(f"a part has ids {expected[0]} and log_probs {expected[1]} from a multiple of {ROWS} on, got {came}")
        with building(self._place(first), lambda: self._opened(first)) as beside:
            ids.astype("<i4").tofile(beside / "ids.bin")
            log_probs.astype("<f2").tofile(beside / "log_probs.bin")
            write_record(beside, {**self.made_from, "first": first})
        self._open.pop(first, None)

    def rows(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """`ids` and `log_probs` of the rows `first` to `stop - 1`.

        **Raises:** `ValueError` or `OSError` where a part is not there or damaged.
        """
        found = [self._row(row) for row in range(first, stop)]
        return np.stack([ids for ids, _ in found]), np.stack([log_probs for _, log_probs in found])

    def _row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        first = row - row % ROWS
        if first not in self._open:
            self._open[first] = self._opened(first)
        ids, log_probs = self._open[first]
        return ids[row - first], log_probs[row - first]

    def _place(self, first: int) -> Path:
        return self.folder / f"rows-{first:08d}"

    def _is_sound(self, first: int) -> bool:
        if not self._place(first).exists():
            return False
        try:
            self._open[first] = self._opened(first)
        except (OSError, ValueError) as error:
            logger.warning("what the teacher said in '{}' is damaged: {}. Asking it again", self._place(first), error)
            return False
        return True

    def _opened(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        place = self._place(first)
        record = checked_record(place)
        if {name: record.get(name) for name in (*self.made_from, "first")} != self.made_from | {"first": first}:
            raise ValueError("record.json tells of another teacher, other rows or another part")
        ids = np.memmap(place / "ids.bin", "<i4", mode="r", shape=(ROWS, self.seq, self.k))
        return ids, np.memmap(place / "log_probs.bin", "<f2", mode="r", shape=(ROWS, self.seq, self.k + 1))
