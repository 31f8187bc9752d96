"""What recipes of supervised fine-tuning share: a tokenizer with chat tokens, conversations on disk, and the measures before and after.

The measures: loss on the supervised tokens of held-out conversations; bits per byte of text as the model was pretrained on (what is
forgotten); right answers to held-out instructions (`data.tasks.instructions`) and right tool calls, with intervals; answers to fixed
prompts.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import grain
import numpy as np
from loguru import logger
from rich.console import Console
from rich.table import Table

import lm
from data.cache import TokenCache
from data.chat import CHATML, CHATML_TOKENS, ChatFormat
from data.chat_cache import COUNTS, OnBadRow, Overlong, chat_cache
from data.conversations import read_conversation
from data.pipeline import evaluation_batches
from data.rows import Mixture
from data.sources import Source
from data.tasks import instructions
from data.tokenizer import Tokenizer
from lm.base import AbstractLM
from lm.generate import Sampler
from lm.surgery import grow_vocab
from recipes.command_line import CONFIG_FILE
from recipes.report import bits_of, nats_of
from train.intervals import Estimate, wilson
from train.logs import progress
from train.loop import nats_by_document
from train.runtime import cache_root

Template = Literal["auto", "own", "chatml"]

# ------------------------------------------------------------------------------------------- chat tokens


def chat_tokenizer(tokenizer: Tokenizer, model: AbstractLM, template: Template) -> tuple[Tokenizer, AbstractLM]:
    """The tokenizer with the template asked for (auto: its own, else the built-in ChatML), and the model with a row for each of its tokens.
    What is added is said. With ChatML the EOS is `<|im_end|>`, so that whoever generates stops at the end of a turn."""
    if template == "own" and not tokenizer.chat_templates:
        raise ValueError("--template own: this tokenizer has no chat template; leave it out to take the built-in one")
    if template != "chatml" and tokenizer.chat_templates:
        logger.info("chat template: the model's own")
        return tokenizer, model
    missing = [name for name in CHATML_TOKENS if tokenizer.id_of(name) is None]
    chat = tokenizer.changed(special_tokens=CHATML_TOKENS, chat_template=CHATML, eos=CHATML_TOKENS[1])
    rows = model.config.vocab
    logger.info(
        f"chat template: the built-in ChatML; new tokens {', '.join(missing) or 'none'}"
        + (f"; the embedding grows from {rows:,} to {chat.vocab_size:,} rows" if chat.vocab_size > rows else "")
    )
    return chat, grow_vocab(model, max(chat.vocab_size, rows))


# ------------------------------------------------------------------------------------------- conversations


@dataclass(frozen=True)
class Encoding:
    """How conversations become rows."""

    form: ChatFormat
    seq: int
    overlong: Overlong
    on_bad_row: OnBadRow

    def cache(self, documents: grain.MapDataset, source: Source, split: str) -> TokenCache:
        """Encoded once, on disk, for all runs."""
        settings: dict[str, Any] = {"seq": self.seq, "overlong": self.overlong, "on_bad_row": self.on_bad_row}
        folder, digest = cache_root() / "tokens", source.record["sha256"]
        with progress(f"encoding {split} conversations", len(documents)) as told:
            return chat_cache(documents, self.form, folder, source_digest=digest, split=f"chat_{split}", on_progress=told, **settings)

    def training(self, source: Source) -> TokenCache | Mixture:
        """The conversations of the source, or of each part of a mixture, to train on."""
        if not source.parts:
            return self.cache(source.train, source, "train")
        caches = tuple(self.cache(part.source.train, part.source, "train") for part in source.parts)
        return Mixture(tuple(part.name for part in source.parts), caches, tuple(part.weight for part in source.parts), "repeat")


def counts_of(tokens: TokenCache | Mixture) -> dict[str, int]:
    """What became of the rows, over all parts."""
    caches = [tokens] if isinstance(tokens, TokenCache) else list(tokens.caches)
    return {name: sum(cache.record["counts"][name] for cache in caches) for name in caches[0].record["counts"]}


def describe_conversations(split: str, tokens: TokenCache | Mixture) -> None:
    """Say how many conversations there are, what share of their tokens is trained on, and what was cut or left out."""
    counts = counts_of(tokens)
    share = counts["trained_tokens"] / counts["tokens"]
    logger.info(
        f"{split}: {counts['rows']:,} conversations, {counts['examples']:,} examples, {counts['tokens']:,} tokens, "
        f"{share:.1%} of them trained on"
    )
    if lost := [f"{counts[name]:,} {name.replace('_', ' ')}" for name in COUNTS if counts[name]]:
        logger.warning(f"{split}: {', '.join(lost)}")
    for cache in [tokens] if isinstance(tokens, TokenCache) else tokens.caches:
        for words in cache.record["bad_rows"]:
            logger.warning(f"skipped {words}")


# ------------------------------------------------------------------------------------------- text that may be forgotten


def known_text(source: Path) -> str | None:
    """What the model of a run was trained on before, back to its beginning; `None` where that is not known."""
    saved = source / CONFIG_FILE
    if not ((source / "checkpoints").is_dir() or (source / "export").is_dir()) or not saved.is_file():
        return None
    settings = json.loads(saved.read_text(encoding="utf-8"))
    if settings.get("text", "auto") not in ("auto", "none"):
        return settings["text"]
    if "text" in settings:  # a run of these recipes: what came before it
        return known_text(Path(settings["source"]))
    if settings.get("data_kind") == "conversations":  # of `recipes.distill`
        return known_text(Path(settings["teacher"]))
    if "preference" in settings or "reward" in settings:  # of `recipes.dpo` or `recipes.reward_model`, whose data are pairs
        return known_text(Path(settings["source"]))
    if "algorithm" in settings:  # of `recipes.grpo_arithmetic`
        return None if settings["model"] is None else known_text(Path(settings["model"]))
    return settings.get("data")


def some_text(source: Source, most_bytes: int) -> Source:
    """The held-out documents, each cut to an equal share of `most_bytes`, and nothing to train on: enough to see what is forgotten."""
    documents = [source.held_out[i] for i in range(len(source.held_out))]
    share = max(200, most_bytes // len(documents))
    cut = [
        {"name": each["name"], "text": each["text"].encode()[:share].decode(errors="ignore")} for each in documents[: most_bytes // share]
    ]
    digest = sha256(f"{source.record['sha256']} cut: {most_bytes}".encode()).hexdigest()
    size = sum(len(each["text"].encode()) for each in cut)
    record = source.record | {"sha256": digest, "held_out_bytes": size, "held_out_documents": len(cut)}
    return replace(source, held_out=grain.MapDataset.source(cut), record=record, parts=())


# ------------------------------------------------------------------------------------------- measures


class Question(NamedTuple):
    """What is asked, and what is right."""

    task: str
    prompt: np.ndarray
    right: Callable[[str], bool]


def instruction_questions(form: ChatFormat, source: Source, each: int) -> list[Question]:
    """`each` held-out instructions of every task, the first ones of `data.tasks.instructions`; right is the answer and nothing else, and in
    a second count ("… within") the answer with words around it."""
    found: list[Question] = []
    for task in instructions.TASKS:
        rows = (json.loads(source.held_out[i]["text"]) for i in range(len(source.held_out)))
        for row, _ in zip((row for row in rows if row["task"] == task), range(each), strict=False):
            prompt, answer = form.prompt(row["messages"][:1]), row["answer"]
            found.append(Question(task, prompt, lambda reply, answer=answer: instructions.score(reply, answer)))  # type: ignore[misc]
            found.append(Question(f"{task} within", prompt, lambda reply, answer=answer: instructions.holds(reply, answer)))  # type: ignore[misc]
    return found


def tool_questions(form: ChatFormat, source: Source, most: int) -> list[Question]:
    """The tool calls in held-out conversations: right is the function ("tool name"), and the whole call ("tool call")."""
    found: list[Question] = []
    for i in range(len(source.held_out)):
        conversation = read_conversation(source.held_out[i]["text"])
        for k, message in enumerate(conversation.messages):
            if message.get("tool_calls") and len(found) < 2 * most:
                prompt = form.prompt(conversation.messages[:k], conversation.tools)
                wanted = [(call["function"]["name"], _arguments(call["function"]["arguments"])) for call in message["tool_calls"]]
                found.append(Question("tool name", prompt, lambda reply, w=wanted: [n for n, _ in calls_in(reply)] == [n for n, _ in w]))  # type: ignore[misc]
                found.append(Question("tool call", prompt, lambda reply, w=wanted: calls_in(reply) == w))  # type: ignore[misc]
    return found


def calls_in(reply: str) -> list[tuple[str, Any]]:
    """The functions called in a reply, with their arguments; a call that is not JSON counts as one of nothing."""
    found = []
    for part in reply.split("<tool_call>")[1:]:
        try:
            call = json.loads(part.split("</tool_call>")[0])
            found.append((call["name"], _arguments(call.get("arguments", {}))))
        except (ValueError, KeyError, TypeError, AttributeError):
            found.append(("", None))
    return found


def _arguments(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def answer(model: AbstractLM, form: ChatFormat, prompts: Sequence[np.ndarray], *, most: int, batch: int = 16) -> list[str]:
    """The likeliest answers, `most` tokens at most; "" to a prompt that leaves no room in the context."""
    room = model.config.context - most
    fitting = sorted((i for i, prompt in enumerate(prompts) if len(prompt) <= room), key=lambda i: len(prompts[i]))
    replies = [""] * len(prompts)
    with progress("answers", len(fitting)) as told:
        for first in range(0, len(fitting), batch):
            some = fitting[first : first + batch]
            settings: dict[str, Any] = {"max_new_tokens": most, "sampler": Sampler(0.0), "stop_ids": list(form.stop_ids)}
            for i, tokens in zip(some, lm.generate(model, [prompts[i] for i in some], **settings), strict=True):
                replies[i] = form.tokenizer.decode(tokens)
            told(first + len(some))
    return replies


def accuracy(model: AbstractLM, form: ChatFormat, questions: Sequence[Question], *, most: int) -> dict[str, Estimate]:
    """The share of right answers to the questions of each task, with Wilson's interval. Equal prompts are asked once."""
    asked = {question.prompt.tobytes(): question.prompt for question in questions}
    replies = dict(zip(asked, answer(model, form, list(asked.values()), most=most), strict=True))
    right: dict[str, list[bool]] = {}
    for question in questions:
        right.setdefault(question.task, []).append(question.right(replies[question.prompt.tobytes()]))
    return {task: wilson(sum(marks), len(marks)) for task, marks in right.items()}


def supervised_loss(model: AbstractLM, token_nats: Any, held_out: TokenCache, *, batch: int, seq: int) -> float:
    """Nats a supervised token over all held-out conversations."""
    batches = evaluation_batches(held_out, batch=batch, seq=seq, stride=seq)
    with progress("held-out conversations", len(batches)) as told:
        nats, tokens = nats_by_document(token_nats, model, batches, told)
    return sum(nats.values()) / sum(tokens.values())


def measure(
    model: AbstractLM,
    token_nats: Any,
    form: ChatFormat,
    held_out: TokenCache,
    text: tuple[Source, TokenCache] | None,
    questions: Sequence[Question],
    prompts: Sequence[str],
    *,
    batch: int,
    seq: int,
    most: int,
) -> dict[str, Any]:
    """All measures of a model."""
    found: dict[str, Any] = {"loss": supervised_loss(model, token_nats, held_out, batch=batch, seq=seq)}
    if text is not None:
        source, cache = text
        nats, tokens = nats_of(token_nats, model, cache, batch=batch, seq=seq)
        found["text"] = {
            "bits_per_byte": bits_of(cache, nats, range(len(cache))),
            "held_out_bytes": source.record["held_out_bytes"],
            "held_out_tokens": sum(tokens.values()),
        }
    found["tasks"] = {task: each.record() for task, each in accuracy(model, form, questions, most=most).items()}
    asked = [form.prompt([{"role": "user", "content": prompt}]) for prompt in prompts]
    found["answers"] = dict(zip(prompts, answer(model, form, asked, most=most), strict=True))
    return found


# ------------------------------------------------------------------------------------------- report


def show(before: Mapping[str, Any], after: Mapping[str, Any], results: Mapping[str, Any], folder: Path) -> None:
    """The last words on the screen."""
    console = Console()
    table = Table("measure on what was held out", "before", "after", "change")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("loss, nats a supervised token", *_changed(before["loss"], after["loss"]))
    if "text" in before:
        bits = (found["text"]["bits_per_byte"] for found in (before, after))
        table.add_row("old text, bits per byte", *_changed(*bits))
    for task, was in before["tasks"].items():
        now = after["tasks"][task]
        table.add_row(f"{task}, right of {now['n']}", _share(was), _share(now), f"{now['value'] - was['value']:+.0%}")
    console.print(table)
    for prompt, reply in after["answers"].items():
        console.print(f"[bold]{_one_line(prompt)}[/bold]", highlight=False)
        console.print(f"  before: {_one_line(before['answers'][prompt])!r}\n  after:  {_one_line(reply)!r}", markup=False, highlight=False)
    lines = [
        f"{results['tokens_per_s']:,.0f} tokens/s; curves {folder / 'loss.png'}, tasks {folder / 'tasks.png'}",
        f"for transformers {folder / 'export'}",
        f"talk to it: python -m recipes.chat {folder}",
    ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _changed(old: float, new: float) -> tuple[str, str, str]:
    return f"{old:.4f}", f"{new:.4f}", f"{new - old:+.4f}"


def _share(estimate: Mapping[str, Any]) -> str:
    return f"{estimate['value']:.0%} ({estimate['low']:.0%} to {estimate['high']:.0%})"


def _one_line(text: str, most: int = 160) -> str:
    line = text.replace("\n", "⏎")
    return line if len(line) <= most else line[: most - 1] + "…"
