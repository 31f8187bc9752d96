"""What every source shares: `Source`, the rule for holding documents out, and `Documents`, which gathers them.

Which documents are held out depends on their names alone, so adding a file never moves another one to the other side.
All texts are in memory for now: about one byte of RAM a byte of plain text, up to four where a text has emoji.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import grain

OnInvalidUTF8 = Literal["error", "replace", "skip"]

HELD_OUT_ONE_IN = 20
SMALLEST_TO_CUT = 100  # bytes; below this a single document is not cut in two


@dataclass(frozen=True)
class Source:
    """Documents to train on, documents never trained on, and the record of how they came about."""

    name: str  # short, for titles and folder names
    train: grain.MapDataset  # of {"text": str, "name": str}
    held_out: grain.MapDataset  # likewise
    record: dict[str, Any]  # JSON: what was asked, counts, `sha256` over every document's name and bytes in order
    parts: tuple["Part", ...] = ()  # of a mixture; `train` and `held_out` are then theirs, one after another


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
        self.names: list[str] = []
        self.texts: list[str] = []
        self.counts: Counter[str] = Counter()
        self.digest = hashlib.sha256()

    def add(self, name: str, raw: bytes, where: str) -> None:
        """Take one document; one with nothing but white space is dropped. `where` names it in an error."""
        text = self.decode(raw, where)
        if text is not None and not text.strip():
            self.counts["empty_documents"] += 1
        elif text is not None:
            self.names.append(name)
            self.texts.append(text)
            for part in (name.encode(), text.encode()):
                self.digest.update(len(part).to_bytes(8, "little") + part)

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
        if not self.names:
            counts = ", ".join(f"{what} {n}" for what, n in self.counts.items())
            raise ValueError(f"no text in '{self.spec}' ({counts}): expected at least one document that is not empty")
        bytes_all = sum(len(text.encode()) for text in self.texts)
        train, held_out, rule = _split(self.spec, list(zip(self.names, self.texts, strict=True)))
        record = {
            "spec": self.spec,
            **record,
            "documents": len(self.names),
            "bytes": bytes_all,
            "sha256": self.digest.hexdigest(),
            "held_out_rule": rule,
            **_sizes("train", train),
            **_sizes("held_out", held_out),
            "on_invalid_utf8": self.on_invalid_utf8,
            "empty_documents": 0,
            "invalid_documents_skipped": 0,
            "invalid_documents_replaced": 0,
            "characters_replaced": 0,
            **self.counts,
        }
        return Source(name, grain.MapDataset.source(_Texts(train)), grain.MapDataset.source(_Texts(held_out)), record)


class _Texts:
    """Grain's random access over documents in memory."""

    def __init__(self, documents: list[tuple[str, str]]) -> None:
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, i: int) -> dict[str, str]:
        name, text = self.documents[i]
        return {"text": text, "name": name}

    def __repr__(self) -> str:
        return f"{len(self)} documents in memory"


def _split(spec: str, documents: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]], str]:
    """Training documents, held-out documents, the rule in words."""
    if len(documents) == 1:
        name, text = documents[0]
        head, tail = _cut_tail(spec, text.encode())
        return [(name, head)], [(f"{name}#tail", tail)], "the last 5 % of the only document"
    chosen = {name for name, _ in documents if is_held_out(name)}
    rule = f"sha256(name) % {HELD_OUT_ONE_IN} == 0"
    if not 0 < len(chosen) < len(documents):
        last = max(1, len(documents) // HELD_OUT_ONE_IN)
        rule = f"the last {last} of {len(documents)} documents, since {rule} chose {len(chosen)}"
        chosen = {name for name, _ in documents[-last:]}
    return [d for d in documents if d[0] not in chosen], [d for d in documents if d[0] in chosen], rule


def _cut_tail(spec: str, raw: bytes) -> tuple[str, str]:
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
    return raw[:cut].decode(), raw[cut:].decode()


def _sizes(part: str, documents: list[tuple[str, str]]) -> dict[str, int]:
    return {f"{part}_documents": len(documents), f"{part}_bytes": sum(len(text.encode()) for _, text in documents)}
