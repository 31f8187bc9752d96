"""Conversations on disk as token ids with marks on what is trained on: a `TokenCache` that packing and batches take as any other.

What does not fit into a row is cut, split or dropped by a policy that the caller names, and counted:

    drop        the conversation is left out
    truncate    its end is left out
    split       it becomes several, cut before a user's turn, each with the system's message; what is too long alone is truncated
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import grain

from data.cache import Encoded, TokenCache
from data.chat import ChatFormat, Example
from data.conversations import Conversation, Message, read_conversation

Overlong = Literal["drop", "truncate", "split"]
OnBadRow = Literal["error", "skip"]

BAD_ROWS_NAMED = 5
COUNTS = ("truncated", "tokens_cut", "split", "dropped_overlong", "dropped_nothing_trained", "bad_rows_skipped")


def chat_cache(
    documents: grain.MapDataset,
    form: ChatFormat,
    folder: str | Path,
    *,
    source_digest: str,
    split: str,
    seq: int,
    overlong: Overlong = "split",
    on_bad_row: OnBadRow = "error",
    on_progress: Callable[[int], None] | None = None,
) -> TokenCache:
    """The cache of some conversations, built if it is not there. Its record holds `counts`: rows, examples, tokens, trained tokens and
    `COUNTS`; and `bad_rows`: the first few that were skipped, with the reason.

    **Arguments:**

    - `documents`: of `{"text": JSON, "name"}`, as `data.conversations.open_conversations` gives them.
    - `seq`: (token, target) pairs in a row; no example has more.
    - `on_bad_row`: stop at a row that is no conversation to learn from, or leave it out.
    - `on_progress`: told the rows done.

    **Raises:** `ValueError` with the name of the row and what is wrong with it; if no example is left.
    """
    counts: Counter[str] = Counter(dict.fromkeys(("rows", "examples", "tokens", "trained_tokens", *COUNTS), 0))
    bad: list[str] = []
    facts: dict[str, Any] = {"counts": counts, "bad_rows": bad}

    def encoded() -> Iterator[Encoded]:
        for i in range(len(documents)):
            row = documents[i]
            counts["rows"] += 1
            try:
                conversation = read_conversation(row["text"])
                parts = _examples(form, conversation, seq, overlong, counts)
            except ValueError as error:
                if on_bad_row == "error":
                    raise ValueError(f"{row['name']}: {error}. Mend it, or leave such rows out (on_bad_row skip)") from error
                counts["bad_rows_skipped"] += 1
                if len(bad) < BAD_ROWS_NAMED:
                    bad.append(f"{row['name']}: {error}")
                continue
            for part, example in enumerate(parts):
                counts["examples"] += 1
                counts["tokens"] += len(example.tokens)
                counts["trained_tokens"] += int(example.trained.sum())
                name = row["name"] if len(parts) == 1 else f"{row['name']}#{part}"
                yield Encoded(name, example.tokens, len(row["text"].encode()) if part == 0 else 0, example.trained)
            if on_progress is not None:
                on_progress(i + 1)
        if not counts["examples"]:
            why = "; ".join(bad) or ", ".join(f"{name} {counts[name]}" for name in COUNTS if counts[name])
            raise ValueError(f"none of the {counts['rows']} rows of the split '{split}' is left to learn from: {why}")

    template = sha256(repr(sorted(form.tokenizer.chat_templates.items())).encode()).hexdigest()
    made_from: dict[str, Any] = {"tokenizer": form.tokenizer.digest, "source": source_digest, "template": template, "turns": form.turns}
    made_from |= {"chat_format": 1, "seq": seq, "overlong": overlong, "on_bad_row": on_bad_row}
    return TokenCache.of(encoded, form.tokenizer, folder, made_from=made_from, split=split, facts=facts)


def _examples(form: ChatFormat, conversation: Conversation, seq: int, overlong: Overlong, counts: Counter[str]) -> list[Example]:
    """The examples of a conversation, none longer than a row, each with something to learn."""
    whole = form.encode(conversation)
    if all(_fits(example, seq) for example in whole):
        return whole
    if overlong == "split" and form.turns == "together":
        whole = [example for part in _split(form, conversation, seq) for example in form.encode(part)]
        counts["split"] += len(whole) > 1
    if overlong == "drop":
        counts["dropped_overlong"] += sum(not _fits(example, seq) for example in whole)
        return [example for example in whole if _fits(example, seq)]
    kept = []
    for example in whole:
        cut = Example(example.tokens[: seq + 1], example.trained[: seq + 1])
        if not cut.trained[1:].any():
            counts["dropped_nothing_trained"] += 1
            continue
        counts["truncated"] += not _fits(example, seq)
        counts["tokens_cut"] += len(example.tokens) - len(cut.tokens)
        kept.append(cut)
    return kept


def _fits(example: Example, seq: int) -> bool:
    return len(example.tokens) <= seq + 1


def _split(form: ChatFormat, conversation: Conversation, seq: int) -> list[Conversation]:
    """Parts that begin with a user's turn, as many exchanges in each as fit into a row, the system's first message before each."""
    messages = conversation.messages
    system = messages[:1] if messages[0]["role"] == "system" else ()
    parts: list[Conversation] = []
    taken: tuple[Message, ...] = ()
    for exchange in _exchanges(messages[len(system) :]):
        longer = Conversation((*system, *taken, *exchange), conversation.tools)
        if taken and not all(_fits(example, seq) for example in form.encode(longer)):
            parts.append(Conversation((*system, *taken), conversation.tools))
            taken = ()
        taken = (*taken, *exchange)
    return [*parts, Conversation((*system, *taken), conversation.tools)]


def _exchanges(messages: Sequence[Message]) -> list[tuple[Message, ...]]:
    """Cut before each user's turn that an assistant's turn comes before; without an answer at the end, what is asked goes with the last."""
    found: list[list[Message]] = [[]]
    for message in messages:
        if message["role"] == "user" and any(earlier["role"] == "assistant" for earlier in found[-1]):
            found.append([])
        found[-1].append(message)
    if len(found) > 1 and all(message["role"] != "assistant" for message in found[-1]):
        found[-2:] = [found[-2] + found[-1]]
    return [tuple(exchange) for exchange in found]
