"""Text without a length or without random access: `StreamBatches` packs documents as they come, and every batch carries the
cursor from which the next one follows.

Sources that can be listed belong into a cache and `data.pipeline`, where any batch can be had by its number. A stream is for the
rest: `LineStream` over a file too long to unpack twice, or any `grain.IterDataset` of `{"text", "name"}`. A checkpoint stores the
cursor of the last batch that was *trained on*; prefetched batches after it are simply made again.

Grain's own `ConcatThenSplitIterDataset` is not used: its state holds tuples, which JSON gives back as lists, and it then takes
wrong rows without a word. Here the packer keeps one document and two numbers, and states from JSON get their tuples back.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import grain
import numpy as np

from data.documents import Documents, OnInvalidUTF8
from data.packing import require_positive
from data.pipeline import Batch
from data.readers import JSONL_SUFFIXES, lines, text_of
from data.tokenizer import Tokenizer


class StreamBatch(NamedTuple):
    """A batch, and where the stream stood after it."""

    batch: Batch
    cursor: dict[str, Any]  # JSON; `StreamBatches(..., cursor=...)` goes on behind this batch


class StreamBatches:
    """Batches of rows packed from a stream: documents end to end, cut every `seq` pairs, as in `plan_concat`.

    Rows that a stream which ends leaves open are filled with padding, and so is the last batch: nothing is dropped. `counts`
    says what was read so far; it goes with the cursor.
    """

    def __init__(
        self,
        documents: grain.IterDataset,
        tokenizer: Tokenizer,
        *,
        batch: int,
        seq: int,
        cursor: dict[str, Any] | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """**Arguments:**

        - `documents`: of `{"text", "name"}`, in a pipeline that is the same whenever a cursor is used.
        - `batch`: rows in the global batch. Every process reads the whole stream and keeps its share of the rows, so the
            global batch is the same at any `process_count`, and so is the cursor.
        - `cursor`: of the last batch trained on; `None` begins at the beginning.
        """
        require_positive(batch=batch, seq=seq)
        if not 0 <= process_index < process_count or batch % process_count:
            raise ValueError(
                f"expected a process_index below process_count and a batch it divides, got process_index {process_index}, "
                f"process_count {process_count}, batch {batch}"
            )
        if tokenizer.eos_id is None:
            raise ValueError(f"{tokenizer} has no EOS token, so nothing would mark where a document ends")
        self._tokenizer, self._batch, self._seq = tokenizer, batch, seq
        self._opening = tokenizer.opening_id
        self._closing = tokenizer.eos_id
        self._pad = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
        share = batch // process_count
        self._share = slice(process_index * share, (process_index + 1) * share)
        self._documents = documents.__iter__()
        self._before = self._documents.get_state()  # of the source, before the document in hand
        self._document: np.ndarray | None = None
        self._used = 0  # pairs of the document in hand that are in rows
        self.counts = {"documents": 0, "empty_documents": 0, "documents_cut": 0, "pairs": 0, "padding": 0, "rows": 0}
        if cursor is not None:
            self._go_to(cursor)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StreamBatch:
        rows = {name: np.zeros((self._batch, self._seq), np.int32) for name in Batch._fields[:4]}
        rows["tokens"][:] = rows["targets"][:] = self._pad
        weights = np.zeros((self._batch, self._seq), np.float32)
        filled = [self._fill({name: field[row] for name, field in rows.items()}, weights[row]) for row in range(self._batch)]
        if not any(filled):
            raise StopIteration
        pairs = sum(filled)
        self.counts["pairs"] += pairs
        self.counts["padding"] += self._batch * self._seq - pairs
        self.counts["rows"] += sum(n > 0 for n in filled)
        batch = Batch(*(field[self._share] for field in (*rows.values(), weights)))
        return StreamBatch(batch, {"source": self._before, "used_pairs": self._used, "counts": dict(self.counts)})

    def close(self) -> None:
        """Stop reading."""
        self._documents.close()

    def _fill(self, row: dict[str, np.ndarray], weights: np.ndarray) -> int:
        """Fill one row; how many pairs it got."""
        at, segment = 0, 0
        while at < self._seq and (document := self._in_hand()) is not None:
            length = min(self._seq - at, len(document) - 1 - self._used)
            piece = document[self._used : self._used + length + 1]
            segment += 1
            here = slice(at, at + length)
            row["tokens"][here], row["targets"][here] = piece[:-1], piece[1:]
            row["positions"][here], row["segments"][here] = np.arange(length), segment
            weights[here] = 1.0
            at += length
            first_piece = self._used == 0
            self._used += length
            if self._used == len(document) - 1:
                self._document, self._used, self._before = None, 0, self._documents.get_state()
            elif first_piece:
                self.counts["documents_cut"] += 1
        return at

    def _in_hand(self) -> np.ndarray | None:
        """The document being packed, or the next one with a text in it; `None` at the end of the stream."""
        while self._document is None:
            try:
                text = next(self._documents)["text"]
            except StopIteration:
                return None
            if text.strip():
                self._document = self._encoded(text)
                self.counts["documents"] += 1
            else:
                self.counts["empty_documents"] += 1
                self._before = self._documents.get_state()
        return self._document

    def _encoded(self, text: str) -> np.ndarray:
        return np.concatenate([[self._opening], self._tokenizer.encode(text), [self._closing]]).astype(np.int32)

    def _go_to(self, cursor: dict[str, Any]) -> None:
        if set(cursor) != {"source", "used_pairs", "counts"}:
            raise ValueError(f"expected a cursor of StreamBatches with source, used_pairs and counts, got the keys {sorted(cursor)}")
        self._before = _shaped_like(self._before, cursor["source"])
        self._documents.set_state(self._before)
        self.counts = dict(cursor["counts"])
        if cursor["used_pairs"]:
            self._document = self._encoded(next(self._documents)["text"])
            self._used = int(cursor["used_pairs"])
            if self._used >= len(self._document) - 1:
                raise ValueError(
                    f"the cursor stands behind {self._used} pairs of a document that has {len(self._document) - 1}: "
                    "the stream or the tokenizer is not the one it was made with"
                )


class LineStream(grain.IterDataset):
    """The documents of a `.jsonl[.gz|.zst]` file, read once from its beginning to its end; memory is that of one line."""

    def __init__(self, path: str | Path, *, text_field: str = "text", on_invalid_utf8: OnInvalidUTF8 = "error") -> None:
        super().__init__()
        self._path = Path(os.path.expanduser(path))
        if not self._path.is_file() or not self._path.name.lower().endswith(JSONL_SUFFIXES):
            raise ValueError(f"expected a file ending in one of {', '.join(JSONL_SUFFIXES)}, got '{path}'")
        self._text_field, self._on_invalid_utf8 = text_field, on_invalid_utf8

    def __iter__(self) -> "_Lines":
        return _Lines(self._path, self._text_field, self._on_invalid_utf8)

    def __repr__(self) -> str:
        return f"LineStream({str(self._path)!r})"


class _Lines(grain.DatasetIterator):
    """Its state is how many lines were read and what was done to them; going there reads them again, without parsing."""

    def __init__(self, path: Path, text_field: str, on_invalid_utf8: OnInvalidUTF8) -> None:
        super().__init__()
        self._path, self._text_field = path, text_field
        self._rule = Documents(str(path), on_invalid_utf8)  # for its rule about bad bytes and its counts
        self._open: Callable[[], Iterator[tuple[int, bytes]]] = lambda: lines(path)
        self._left = self._open()
        self._read = 0

    def __next__(self) -> dict[str, str]:
        for number, line in self._left:
            self._read = number
            where = f"line {self._read} of '{self._path}'"
            if not line.strip():
                self._rule.counts["blank_lines"] += 1
            elif (decoded := self._rule.decode(line, where)) is not None:
                raw = text_of(decoded, where, self._text_field).encode("utf-8", "surrogatepass")
                if (text := self._rule.decode(raw, f"`{self._text_field}` in {where}")) is not None:
                    return {"text": text, "name": f"{self._path.name}:{self._read}"}
        raise StopIteration

    def get_state(self) -> dict[str, Any]:
        return {"lines": self._read, "counts": dict(self._rule.counts)}

    def set_state(self, state: dict[str, Any]) -> None:
        self._left, self._read = self._open(), 0
        while self._read < state["lines"]:
            try:
                self._read, _ = next(self._left)
            except StopIteration:
                raise ValueError(f"'{self._path}' has {self._read} lines where {state['lines']} were read before: it has changed") from None
        self._rule.counts.clear()
        self._rule.counts.update(state["counts"])


def _shaped_like(fresh: Any, restored: Any) -> Any:
    """`restored` with tuples where `fresh`, a state of the same pipeline, has them: JSON makes lists of them."""
    if isinstance(fresh, dict) and isinstance(restored, dict):
        return {key: _shaped_like(fresh.get(key), value) for key, value in restored.items()}
    if isinstance(restored, (list, tuple)):
        inside = [
            _shaped_like(fresh[i] if isinstance(fresh, (list, tuple)) and i < len(fresh) else None, v) for i, v in enumerate(restored)
        ]
        return tuple(inside) if isinstance(fresh, tuple) else inside
    return restored
