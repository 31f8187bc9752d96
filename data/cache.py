"""Tokens on disk: every document of one split, encoded once, memory-mapped ever after. `TokenCache.build_or_open` encodes texts;
`TokenCache.of` keeps what somebody else encoded, with marks on the tokens that are trained on (`data.chat_cache`).

A cache is a folder named for what is in it (`train-<hash of tokenizer and source>`):

    tokens.bin      every document as opening token, text, EOS, one after another; uint16, or uint32 for large vocabularies
    offsets.bin     int64 [documents + 1]: document i is tokens[offsets[i] : offsets[i + 1]]
    text_bytes.bin  int64 [documents]: UTF-8 bytes of each text, for bits per byte
    trained.bin     uint8 [tokens]: 1 where a token is learned; not there where all are
    names.json      the documents' names, one a line
    names.bin       int64 [documents + 1]: the byte where each name's line begins in it
    record.json     counts and what the cache was made from
    SHA256SUMS      of the files above; `sha256sum -c` checks it too

It appears whole or not at all (`data.atomic`); one that no longer matches its sums is rebuilt, with a warning.
"""

import functools
import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import grain
import numpy as np
from loguru import logger

from data.atomic import building
from data.sums import checked_record, write_record
from data.tokenizer import Tokenizer

FORMAT = 2  # raised when the files change; older caches are then simply not found
TEXT_AT_ONCE = 1 << 20  # characters encoded in one call


class TokenCache:
    """The encoded documents of one split. Make one with `TokenCache.build_or_open`."""

    def __init__(self, folder: Path) -> None:
        """Open the cache in `folder` after checking it. **Raises:** `ValueError` saying what is damaged."""
        self.folder = folder
        self.record: dict[str, Any] = checked_record(folder)
        self.tokens = np.memmap(folder / "tokens.bin", self.record["dtype"], mode="r")
        self.offsets = np.memmap(folder / "offsets.bin", "<i8", mode="r")
        self.text_bytes = np.memmap(folder / "text_bytes.bin", "<i8", mode="r")  # per document
        self.names: Sequence[str] = _Names(folder)  # per document
        marked = "trained.bin" in self.record["sizes"]
        self.trained = np.memmap(folder / "trained.bin", np.uint8, mode="r") if marked else None  # per token; None: all
        documents, total = int(self.record["documents"]), int(self.record["tokens"])
        sizes = len(self.offsets) - 1, len(self.text_bytes), len(self.names), len(self.tokens)
        if sizes != (documents, documents, documents, total):
            raise ValueError(f"the record says {documents} documents and {total} tokens, the files hold {sizes}")
        if self.offsets[0] != 0 or self.offsets[-1] != total or (np.diff(self.offsets) <= 0).any():
            raise ValueError(f"offsets.bin does not rise from 0 to {total}")

    @classmethod
    def build_or_open(
        cls,
        documents: grain.MapDataset,
        tokenizer: Tokenizer,
        folder: str | Path,
        *,
        source_digest: str,
        split: str,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Self:
        """The cache of `documents` under `folder`, built if it is not there or is damaged.

        Killed at any moment, it leaves nothing that a later run would take for a cache; two processes may build the
        same one at once. Documents are encoded some megabytes at a time, so memory stays small (but see
        `Tokenizer.encode_batch` for a long document with a tokenizer from elsewhere).

        **Arguments:**

        - `documents`: of `{"text", "name"}`, as in `Source`.
        - `source_digest`: `Source.record["sha256"]`. With the tokenizer and `split` it decides which cache this is.
        - `split`: `"train"` or `"held_out"`.
        - `on_progress`: called with (documents done, documents in all) now and then while building.

        **Raises:** `ValueError` if there is nothing to encode or the tokenizer has no EOS; `OSError`, in words, if the
        disk is full.
        """
        opening, closing = _document_marks(tokenizer)
        if not len(documents):
            raise ValueError(f"no documents in the split '{split}': expected at least one to encode")
        made_from = {
            "tokenizer": tokenizer.digest,
            "marks": [opening, closing, tokenizer.pad_id],
            "source": source_digest,
        }

        def encoded() -> Iterator[Encoded]:
            return _encoded_texts(documents, tokenizer, opening, closing, on_progress)

        return cls.of(encoded, tokenizer, folder, made_from=made_from, split=split, documents=len(documents), facts={"opening": opening})

    @classmethod
    def of(
        cls,
        encoded: Callable[[], Iterator["Encoded"]],
        tokenizer: Tokenizer,
        folder: str | Path,
        *,
        made_from: Mapping[str, Any],
        split: str,
        documents: int | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Self:
        """The cache of documents encoded by the caller, built if it is not there or is damaged, as `build_or_open`.

        **Arguments:**

        - `encoded`: called if it must be built. All documents have marks on what is trained on, or none has.
        - `made_from`: JSON; with `split` it decides which cache this is.
        - `documents`: how many there are to be, where that is known.
        - `facts`: for the record; may be filled while `encoded` runs.
        """
        key = hashlib.sha256(json.dumps([FORMAT, {**made_from, "split": split}], sort_keys=True).encode()).hexdigest()[:16]
        place = Path(folder) / f"{split}-{key}"
        opened = functools.partial(cls._opened, place, documents)
        if place.exists():
            try:
                return opened()
            except (OSError, ValueError) as error:
                logger.warning("the token cache '{}' is damaged: {}. Building it again", place, error)
        pad = tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id
        with building(place, opened) as beside:
            counts = _write(encoded(), tokenizer.vocab_size, beside)
            made = {**made_from, "split": split}
            write_record(beside, {"format": FORMAT, **made, "pad": 0 if pad is None else pad, **(facts or {}), **counts})
        return opened()

    @classmethod
    def _opened(cls, place: Path, documents: int | None) -> Self:
        cache = cls(place)
        if documents is not None and len(cache) != documents:
            raise ValueError(f"it holds {len(cache)} documents where the source has {documents}")
        return cache

    def __len__(self) -> int:
        return len(self.names)

    def document(self, i: int) -> np.ndarray:
        """All tokens (int32) of document `i`, its opening token and EOS included."""
        return self.piece(i, 0, int(self.offsets[i + 1] - self.offsets[i]))

    def piece(self, i: int, start: int, length: int) -> np.ndarray:
        """`length` tokens (int32) of document `i` from `start`; only these are read from disk."""
        at = self.offsets[i] + start
        assert self.offsets[i] <= at <= at + length <= self.offsets[i + 1], (i, start, length)
        return self.tokens[at : at + length].astype(np.int32)

    def weights(self, i: int, start: int, length: int) -> np.ndarray:
        """The loss weights (float32) of `length` pairs of document `i` from `start`: a pair counts where its target is trained on."""
        if self.trained is None:
            return np.ones(length, np.float32)
        at = self.offsets[i] + start + 1
        return self.trained[at : at + length].astype(np.float32)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, opening token and EOS included: what `data.packing` plans from."""
        return np.diff(self.offsets)

    @property
    def total_tokens(self) -> int:
        return self.record["tokens"]

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer; a model needs at least as many rows in its embedding."""
        return self.record["vocab_size"]

    @property
    def max_token(self) -> int:
        """The largest id that really occurs."""
        return self.record["max_token"]

    @property
    def pad_id(self) -> int:
        """The id that fills rows up. EOS where the tokenizer has no PAD; it is never read, segment 0 hides it."""
        return self.record["pad"]

    def __repr__(self) -> str:
        return f"TokenCache({self.folder.name!r}: {len(self)} documents, {self.total_tokens} tokens)"


def _document_marks(tokenizer: Tokenizer) -> tuple[int, int]:
    """The tokens before and after each document."""
    if tokenizer.eos_id is None:
        raise ValueError(
            f"{tokenizer} has no EOS token, so nothing would mark where a document ends: expected eos_token in the "
            "tokenizer_config.json beside its tokenizer.json"
        )
    assert tokenizer.opening_id is not None, "it is EOS where there is nothing else"
    return tokenizer.opening_id, tokenizer.eos_id


class Encoded(NamedTuple):
    """One document for `TokenCache.of`."""

    name: str
    tokens: np.ndarray
    text_bytes: int  # UTF-8 bytes of its text
    trained: np.ndarray | None = None  # bool [tokens]


def _encoded_texts(
    documents: grain.MapDataset, tokenizer: Tokenizer, opening: int, closing: int, on_progress: Callable[[int, int], None] | None
) -> Iterator[Encoded]:
    done = 0
    for some in _batches(documents):
        for row, tokens in zip(some, tokenizer.encode_batch([row["text"] for row in some]), strict=True):
            yield Encoded(row["name"], np.concatenate([[opening], tokens, [closing]]), len(row["text"].encode()))
        done += len(some)
        if on_progress is not None:
            on_progress(done, len(documents))


def _write(encoded: Iterable[Encoded], vocab_size: int, folder: Path) -> dict[str, Any]:
    """The files of a cache but for its record, and their counts."""
    dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
    lengths, text_bytes = array("q"), array("q")
    names_at = array("q", [2])
    max_token = 0
    with (
        (folder / "tokens.bin").open("wb") as out,
        (folder / "names.json").open("wb") as names,
        (folder / "trained.bin").open("wb") as marks,
    ):
        for document in encoded:
            out.write(document.tokens.astype(dtype).tobytes())
            if document.trained is not None:
                marks.write(document.trained.astype(np.uint8).tobytes())
            name = json.dumps(document.name).encode()
            names.write((b",\n" if len(lengths) else b"[\n") + name)
            names_at.append(names_at[-1] + len(name) + 2)
            lengths.append(len(document.tokens))
            text_bytes.append(document.text_bytes)
            max_token = max(max_token, int(document.tokens.max()))
        names.write(b"\n]\n")
    if not (folder / "trained.bin").stat().st_size:
        (folder / "trained.bin").unlink()
    offsets = np.zeros(len(lengths) + 1, "<i8")
    np.cumsum(np.frombuffer(lengths, np.int64), out=offsets[1:])
    for name_of_file, values in (("offsets", offsets), ("text_bytes", text_bytes), ("names", names_at)):
        np.asarray(values, "<i8").tofile(folder / f"{name_of_file}.bin")
    return {
        "documents": len(lengths),
        "tokens": int(offsets[-1]),
        "text_bytes": int(np.sum(np.frombuffer(text_bytes, np.int64))),
        "dtype": dtype,
        "vocab_size": vocab_size,
        "max_token": max_token,
    }


class _Names(Sequence[str]):
    """The lines of `names.json`, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._at = np.memmap(folder / "names.bin", "<i8", mode="r")
        self._bytes = np.memmap(folder / "names.json", np.uint8, mode="r")

    def __len__(self) -> int:
        return len(self._at) - 1

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"name {i} of {len(self)}")
        i %= len(self)
        return json.loads(self._bytes[self._at[i] : self._at[i + 1] - 2].tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def _batches(documents: grain.MapDataset) -> Iterator[list[dict[str, str]]]:
    some: list[dict[str, str]] = []
    characters = 0
    for i in range(len(documents)):
        some.append(documents[i])
        characters += len(some[-1]["text"])
        if characters >= TEXT_AT_ONCE or len(some) == 1024:
            yield some
            some, characters = [], 0
    if some:
        yield some
