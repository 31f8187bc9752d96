"""What every source shares: `Source`, the rule for holding documents out, and `Documents`, which gathers them.

Which documents are held out depends on their names alone, so adding a file never moves another one to the other side.
Every text is read once to be counted and summed, and again when somebody asks for it: no source holds its texts in memory
(see `data.store`).
"""

import hashlib
from array import array
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import grain
import numpy as np
from loguru import logger

from data.store import Place, TextStore

OnInvalidUTF8 = Literal["error", "replace", "skip"]

HELD_OUT_ONE_IN = 20
SMALLEST_TO_CUT = 100  # bytes; below this a single document is not cut in two


@dataclass(frozen=True)
class Source:
    """Documents to train on, documents never trained on, and the record of how they came about."""

    name: str  # short, for titles and folder names
    train: grain.MapDataset  # of {"text": str, "name": str}
    held_out: grain.MapDataset  # likewise
    whole: grain.MapDataset  # likewise; all of them in order, the only one uncut: what is measured and not trained on
    record: dict[str, Any]  # JSON: what was asked, counts, `sha256` over every document's name and bytes in order
    parts: tuple["Part", ...] = ()  # of a mixture; `train`, `held_out` and `whole` are then theirs, one after another


@dataclass(frozen=True)
class Part:
    """One source of a mixture."""

    name: str  # as the user typed it
    source: Source
    weight: float  # above 0; share of the training tokens once divided by the sum


def is_held_out(name: str) -> bool:
    """About one name in twenty, the same ones on every machine."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


class Documents:
    """Documents gathered in order by a source function, with a count of everything that was done to them.

    `add` each document, `counts[...] += 1` for what the source itself leaves out, then `source`.
    """

    def __init__(self, spec: str, on_invalid_utf8: OnInvalidUTF8) -> None:
        self.spec, self.on_invalid_utf8 = spec, on_invalid_utf8
        self.store = TextStore()
        self.held_out = array("q")  # numbers of the documents that `is_held_out`
        self.bytes = 0
        self.counts: Counter[str] = Counter()
        self.digest = hashlib.sha256()

    def __len__(self) -> int:
        return len(self.store)

    def add(self, name: str, raw: bytes, where: str, place: Place | None = None, group: str | None = None) -> None:
        """Take one document; one with nothing but white space is dropped.

        **Arguments:**

        - `where`: names the document in an error.
        - `place`: where `raw` can be read again, in a file that `store.file` was told of.
        - `group`: what is held out together, or not at all; the document alone where it has none.
        """
        text = self.decode(raw, where)
        if text is not None and not text.strip():
            self.counts["empty_documents"] += 1
        elif text is not None:
            as_it_is = "\ufffd" not in text  # else U+FFFD may stand for bad bytes, which a second reading would meet again
            taken = raw if as_it_is else text.encode()
            if is_held_out(group or name):
                self.held_out.append(len(self))
            self.store.append(name, taken, place if as_it_is else None)
            self.bytes += len(taken)
            self.counts["documents_with_nul"] += b"\0" in taken
            for part in (name.encode(), taken):
                self.digest.update(len(part).to_bytes(8, "little"))
                self.digest.update(part)

    def decode(self, raw: bytes, where: str) -> str | None:
        """`raw` as text, or `None` if it is to be skipped. Line ends and byte order marks stay as they are."""
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            if self.on_invalid_utf8 == "skip":
                self.counts["invalid_documents_skipped"] += 1
                return None
            if self.on_invalid_utf8 == "replace":
                text = raw.decode("utf-8", "replace")
                self.counts["invalid_documents_replaced"] += 1
                self.counts["characters_replaced"] += text.count("\ufffd") - raw.count("\ufffd".encode())
                return text
            raise ValueError(
                f"{where} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start} ({error.reason}). "
                "Convert it, or set on_invalid_utf8 to 'replace' (U+FFFD for bad bytes) or 'skip' (leave it out)"
            ) from error

    def source(self, name: str, record: dict[str, Any]) -> Source:
        """The finished `Source`: documents split in two, `record` (what only this source knows) completed."""
        if not len(self):
            counts = ", ".join(f"{what} {n}" for what, n in self.counts.items()) or "it holds no documents"
            raise ValueError(f"no text in '{self.spec}' ({counts}): expected at least one document that is not empty")
        if with_nul := self.counts["documents_with_nul"]:
            logger.warning(
                "{} of {} documents of '{}' have NUL characters in them, as UTF-16 and binary files do; they are taken as they are",
                with_nul,
                len(self),
                self.spec,
            )
        store, held_out, rule = self._split()
        held_out_bytes = sum(store.size(int(i)) for i in held_out)
        train, kept_out = _Texts(store, held_out, False), _Texts(store, held_out, True)
        record = {
            "spec": self.spec,
            **record,
            "documents": len(self),
            "bytes": self.bytes,
            "sha256": self.digest.hexdigest(),
            "held_out_rule": rule,
            "train_documents": len(train),
            "train_bytes": self.bytes - held_out_bytes,
            "held_out_documents": len(kept_out),
            "held_out_bytes": held_out_bytes,
            "on_invalid_utf8": self.on_invalid_utf8,
            "empty_documents": 0,
            "invalid_documents_skipped": 0,
            "invalid_documents_replaced": 0,
            "characters_replaced": 0,
            **self.counts,
        }
        whole = grain.MapDataset.source(_Whole(self.store))
        return Source(name, grain.MapDataset.source(train), grain.MapDataset.source(kept_out), whole, record)

    def _split(self) -> tuple[TextStore, np.ndarray, str]:
        """The documents, the numbers of those held out, the rule in words."""
        if len(self) == 1:
            name = self.store.name(0)
            head, tail = _cut_tail(self.spec, self.store.text(0).encode())
            both = TextStore()
            both.append(name, head)
            both.append(f"{name}#tail", tail)
            return both, np.array([1]), "the last 5 % of the only document"
        rule = f"sha256(name) % {HELD_OUT_ONE_IN} == 0"
        if 0 < len(self.held_out) < len(self):
            return self.store, np.array(self.held_out), rule
        last = max(1, len(self) // HELD_OUT_ONE_IN)
        rule = f"the last {last} of {len(self)} documents, since {rule} chose {len(self.held_out)}"
        return self.store, np.arange(len(self) - last, len(self)), rule


class _Texts:
    """Grain's random access over the training documents, or those held out, in the order of the store."""

    def __init__(self, store: TextStore, held_out: np.ndarray, wants_held_out: bool) -> None:
        self.store, self.held_out, self.wants_held_out = store, held_out, wants_held_out
        self._others_before = held_out - np.arange(len(held_out))  # training documents before each that is held out

    def __len__(self) -> int:
        return len(self.held_out) if self.wants_held_out else len(self.store) - len(self.held_out)

    def __getitem__(self, i: int) -> dict[str, str]:
        at = self.held_out[i] if self.wants_held_out else i + np.searchsorted(self._others_before, i, side="right")
        return {"text": self.store.text(int(at)), "name": self.store.name(int(at))}

    def __repr__(self) -> str:
        return f"{len(self)} documents on disk"


class _Whole:
    """Grain's random access over all documents as they came."""

    def __init__(self, store: TextStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, i: int) -> dict[str, str]:
        return {"text": self.store.text(int(i)), "name": self.store.name(int(i))}

    def __repr__(self) -> str:
        return f"{len(self)} documents on disk"


def _cut_tail(spec: str, raw: bytes) -> tuple[bytes, bytes]:
    """About 95 % and 5 % of a document, cut after a line break if the tail has one, else between two characters."""
    if len(raw) < SMALLEST_TO_CUT:
        raise ValueError(
            f"'{spec}' is one document of {len(raw)} bytes, too little to train on one part and hold out another: "
            f"expected at least {SMALLEST_TO_CUT} bytes or two documents"
        )
    cut = len(raw) * (HELD_OUT_ONE_IN - 1) // HELD_OUT_ONE_IN
    after_line = raw.find(b"\n", cut - 1) + 1  # at `cut` itself if a line begins there
    if 0 < after_line < len(raw):
        cut = after_line
    while raw[cut] & 0b1100_0000 == 0b1000_0000:  # inside a character
        cut += 1
    return raw[:cut], raw[cut:]
