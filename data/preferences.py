"""Pairs of answers of which one was preferred, from the shapes such files come in.

A record holds a prompt, `chosen` and `rejected`, each a text, a message or a list of messages:

    {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}
    {"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant", …}], "rejected": […]}
    {"chosen": [user, assistant], "rejected": [user, assistant]}                          the prompt is what they share
    {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", …}, "rejected": {…}}      ShareGPT
"""

import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
HELD_OUT_OF = 10  # a prompt in so many is held out


@dataclass(frozen=True)
class Pair:
    """Messages, and two texts that answer them."""

    messages: list[dict[str, str]]  # the last one is not the assistant's
    chosen: str
    rejected: str

    @property
    def is_held_out(self) -> bool:
        """By the prompt alone: all pairs of a prompt fall on one side, in every run and in any order."""
        digest = hashlib.sha256(json.dumps(self.messages, ensure_ascii=False).encode()).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_OF == 0


def read_pairs(path: Path) -> list[Pair]:
    """All pairs of a `.json` or `.jsonl` file, gzipped or not.

    **Raises:** `ValueError` that names the record which is not a pair.
    """
    pairs = []
    for number, record in enumerate(records_of(path), start=1):
        try:
            pairs.append(pair_of(record))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"record {number} of '{path}' is no preference pair: {error}") from error
    if not pairs:
        raise ValueError(f"'{path}' has no records")
    return pairs


def records_of(path: Path) -> Iterator[Any]:
    """The records of a `.json` or `.jsonl` file, gzipped or not.

    **Raises:** `ValueError` for what is not JSON, with the line.
    """
    if not path.is_file():
        raise ValueError(f"no file at '{path}': expected .json, .jsonl, or either with .gz")
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            text = file.read()
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"'{path}' is not whole text in UTF-8, gzipped or not as its name says: {error}") from error
    if text.lstrip()[:1] == "[":
        try:
            yield from json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"'{path}' is not JSON: {error}") from error
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"'{path}', line {number} is not JSON: {error}") from error


def pair_of(record: Mapping[str, Any]) -> Pair:
    """**Raises:** `ValueError` or `KeyError` where the record is no pair."""
    chosen, rejected = messages_of(record["chosen"], "assistant"), messages_of(record["rejected"], "assistant")
    if "prompt" in record or "conversations" in record:
        shared = messages_of(record["prompt"] if "prompt" in record else record["conversations"], "user")
        if chosen[: len(shared)] == shared and len(chosen) > 1:
            chosen, rejected = chosen[len(shared) :], rejected[len(shared) :]
    else:
        shared = chosen[:-1]
        if rejected[:-1] != shared:
            raise ValueError("chosen and rejected begin with different messages, and there is no prompt")
        chosen, rejected = chosen[-1:], rejected[-1:]
    if len(chosen) != 1 or len(rejected) != 1 or chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        raise ValueError("chosen and rejected must be one answer each, by the assistant, behind the same messages")
    if not shared or shared[-1]["role"] == "assistant":
        raise ValueError("the messages before the answers must end with one that is not the assistant's")
    return Pair(shared, chosen[0]["content"], rejected[0]["content"])


def messages_of(value: Any, role: str) -> list[dict[str, str]]:
    """A text (by `role`), a message or several, as `{"role", "content"}`.

    **Raises:** `KeyError` or `TypeError` for what is none of these.
    """
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    several: Sequence[Any] = [value] if isinstance(value, Mapping) else value
    if not isinstance(several, list) or not all(isinstance(m, Mapping) for m in several):
        raise TypeError(f"expected a text, a message or a list of messages, got {value!r}")
    return [
        {"role": _ROLES.get(said := m.get("role") or m["from"], said), "content": str(m["content"] if "content" in m else m["value"])}
        for m in several
    ]
