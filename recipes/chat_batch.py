"""A file of prompts answered in batches: JSON Lines in, JSON Lines out, an answer appended as soon as its batch is done."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.random as jr
import numpy as np

from data.tokenizer import Tokenizer
from lm.base import AbstractLM
from lm.generate import generate
from recipes.chat_commands import checked, split_system
from recipes.chat_config import Config
from recipes.command_line import check_resumed, read_config
from recipes.conversation import turn_ends
from recipes.stop_strings import before_stop
from train.logs import progress, write_json

Row = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A line of the file: what the model is to go on from, or why it cannot."""

    line: int  # of the file, from 1; also the seed of its draws
    row: Row
    ids: np.ndarray
    error: str | None = None


def answer_all(config: Config, model: AbstractLM, tokenizer: Tokenizer, slots: int) -> int:
    """Answer what `--out` does not hold yet. The exit status: 1 where a line could not be answered, 130 after Ctrl-C.

    **Raises:** `ValueError` for a file that is no JSON Lines of prompts, and for answers that were made of others, or otherwise.
    """
    assert config.prompts is not None
    assert config.out is not None
    rows = list(_rows(config.prompts))
    done = _answered(config.out, rows)
    _check_settings(config, done)
    questions = [_question(config, tokenizer, line, row, slots) for line, row in rows if line not in done]
    if done:
        say(f"{len(done)} of {len(rows)} are answered in {config.out} already")
    failed = sum("error" in answer for answer in done.values())
    try:
        with config.out.open("a", encoding="utf-8") as out, progress("prompts", len(questions)) as told:
            count = 0
            for batch in _batches(questions, config, slots):
                for answer in _answers(batch, config, model, tokenizer, slots):
                    out.write(json.dumps(answer, ensure_ascii=False) + "\n")
                    failed += "error" in answer
                out.flush()
                count += len(batch)
                told(count)
    except KeyboardInterrupt:
        say(f"stopped: {len(done) + count} of {len(rows)} are answered in {config.out}. The same command goes on there")
        return 130
    say(f"{len(rows)} lines answered in {config.out}{f', {failed} of them with an error' if failed else ''}")
    return int(failed > 0)


def say(words: str) -> None:
    print(f"[{words}]", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------- the two files


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not text.strip():
            continue
        where = f"line {line} of {path}"
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f'{where} is not JSON ({error}): expected an object such as {{"prompt": "Hi"}}') from None
        if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
            raise ValueError(f'{where}: expected an object with either "prompt" or "messages", got {text[:60]}')
        if "messages" in row:
            checked(row["messages"], where)
        elif not isinstance(row["prompt"], str):
            raise ValueError(f"{where}: prompt is {row['prompt']!r}: expected a text")
        yield line, row


def _answered(path: Path, rows: Sequence[tuple[int, Row]]) -> dict[int, Row]:
    """The answers that are there, by line. A last line that was cut short is removed, and said."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
        say(f"the last line of {path} was cut short: it is answered again")
    asked, found = dict(rows), {}
    for answer in map(json.loads, whole.splitlines()):
        line = answer["line"]
        if line not in asked or any(answer.get(name) != value for name, value in asked[line].items()):
            raise ValueError(f"{path} holds an answer to another line {line} than the prompts have now: choose another --out, or remove it")
        found[line] = answer
    return found


def _check_settings(config: Config, done: dict[int, Row]) -> None:
    """Answers of one file are made in one way: the settings stand beside them."""
    assert config.out is not None
    beside = config.out.with_name(f"{config.out.name}.config.json")
    if done and beside.exists():
        check_resumed(read_config(type(config), beside), config)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(beside, config.model_dump(mode="json"))


# ------------------------------------------------------------------------------------------- answers


def _question(config: Config, tokenizer: Tokenizer, line: int, row: Row, slots: int) -> Question:
    try:
        ids = _ids(config, tokenizer, row)
    except ValueError as error:
        return Question(line, row, np.zeros(0, np.int32), str(error))
    too_long = f"the prompt has {len(ids):,} tokens, the context {slots:,}, of which at least one is for the answer"
    return Question(line, row, ids, too_long if len(ids) >= slots else None)


def _ids(config: Config, tokenizer: Tokenizer, row: Row) -> np.ndarray:
    if not tokenizer.chat_templates:
        if "messages" in row or config.system is not None:
            raise ValueError("messages and system prompts need a chat template, which this model's tokenizer has not: give a prompt")
        return tokenizer.encode_prompt(row["prompt"])
    system, messages = split_system(row.get("messages") or [{"role": "user", "content": row["prompt"]}])
    system = config.system if system is None else system
    whole = [*([] if system is None else [{"role": "system", "content": system}]), *messages]
    return tokenizer.encode_with_specials(tokenizer.render_chat(whole, add_generation_prompt=True, **config.template_names()))


def _batches(questions: Sequence[Question], config: Config, slots: int) -> Iterator[list[Question]]:
    """In the order of the file. One whose answer may have to be shorter goes alone, so that no answer depends on its neighbours."""
    batch: list[Question] = []
    for question in questions:
        alone = question.error is not None or len(question.ids) + config.max_new_tokens > slots
        if batch and (alone or len(batch) == config.batch):
            yield batch
            batch = []
        if alone:
            yield [question]
        else:
            batch.append(question)
    if batch:
        yield batch


def _answers(batch: list[Question], config: Config, model: AbstractLM, tokenizer: Tokenizer, slots: int) -> Iterator[Row]:
    if batch[0].error is not None:
        yield {"line": batch[0].line, **batch[0].row, "error": batch[0].error}
        return
    most = min(config.max_new_tokens, *(slots - len(question.ids) for question in batch))
    drawn = generate(
        model,
        [question.ids for question in batch],
        max_new_tokens=most,
        sampler=config.sampler(),
        stop_ids=turn_ends(tokenizer, config.template_names()),
        key=jr.key(config.seed),
        seeds=[question.line for question in batch],
    )
    for question, tokens in zip(batch, drawn, strict=True):
        text, met = before_stop(tokenizer.decode(tokens), config.stop)
        full = "max-new-tokens" if most == config.max_new_tokens else "context is full"
        ended = f"stop string {met!r}" if met is not None else "end" if len(tokens) < most else full
        counts = {"prompt_tokens": len(question.ids), "tokens": len(tokens)}
        yield {"line": question.line, **question.row, "reply": text, "stopped_by": ended, **counts}
