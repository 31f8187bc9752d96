"""Measure a model: bits per byte of texts, multiple choice, minimal pairs, and written answers, each with its interval.

    python -m recipes.evaluate runs/pretrain_small-DATE-TIME
    python -m recipes.evaluate MODEL --tasks arc_easy=arc-easy.jsonl.gz piqa=piqa.jsonl.gz blimp=blimp.zip novels=books.jsonl.gz
    python -m recipes.evaluate MODEL --tasks arc_easy=arc-easy.jsonl.gz --chat-template --normalisation per_nonspace
    python -m recipes.evaluate MODEL --tasks gsm8k=test.jsonl.gz --examples gsm8k=train.jsonl.gz --shots 5 --limit 200

MODEL is a run, a Hugging Face folder, a GGUF file, or owner/name on the Hub. A task is `NAME=PATH`; what it is shows in its records, one
JSON object a line (.jsonl, .jsonl.gz, .jsonl.zst, or a .zip of .jsonl files):

    query, choices, gold            multiple choice: the likeliest choice after the query, by five normalisations
    sentence_good, sentence_bad     minimal pairs: the good one must be the likelier
    question, answer                written greedily and compared; an answer may end in `#### 18`
    text                            bits per byte and perplexity; so are text files, folders and `stdlib`; PATH#held_out takes the part that
                                    training on PATH holds out

Without --tasks: `stdlib` and `next_line`, made of files that this Python brings, so that there is something to see at once.

What a model reads, and what the numbers mean, stands in docs/evaluation.md. The run folder has results.json, scores.png, and every single
answer as it comes, so that --resume goes on where a run was stopped.
"""

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import equinox as eqx
import tyro
from loguru import logger
from pydantic import Field, field_validator

import lm
from lm.digests import digest
from recipes.command_line import RecipeConfig, claimed, fail, parse, resumable
from recipes.evaluate_model import run_with
from recipes.evaluate_open import check_specs, open_task
from recipes.evaluate_report import published_scores, show, with_published
from recipes.evaluate_tasks import Exam, Key, Task
from recipes.evaluate_words import Words
from recipes.loading import kept_as, load
from recipes.running import ENDS_IN_WORDS, commit, save_config
from train.backends import choose_dtype
from train.evaluate import Scorer
from train.logs import plain_messages, progress, words_kept, write_json
from train.pictures import plot_scores
from train.process import process_settings
from train.runtime import choose_device, compilation_cache, device_facts
from train.step import make_token_nats

LINE_EVERY_S = 30.0  # where there is no terminal to draw a bar on


class Config(RecipeConfig):
    """Which model, which tasks, and how it is asked."""

    model: Annotated[Path, tyro.conf.Positional] = Field(description="run, Hugging Face folder, GGUF file, or owner/name on the Hub")
    tasks: tuple[str, ...] = Field(("stdlib", "next_line"), min_length=1, description="NAME=PATH, or the name of one built in")
    limit: int | None = Field(
        None, ge=1, description="items of each task at most (of each group, of each text), drawn by the seed; None: all"
    )
    shots: int = Field(0, ge=0, description="solved examples before each question, drawn anew for each; not for pairs and texts")
    examples: tuple[str, ...] = Field((), description="NAME=PATH of files they are drawn from; else the task's own, without the question")
    seed: int = Field(0, ge=0, description="of what is drawn: items, examples, resamples of intervals")
    chat_template: bool = Field(False, description="ask as the user of a conversation, by the tokenizer's template; not pairs and texts")
    system: str | None = Field(None, description="system message of it; None: what the template says by itself")
    before_question: str = Field("Question: ", description="put before a question that is answered in writing; a query has its own words")
    after_query: str = Field("\nAnswer:", description="put after a query or question; white space at its end gives way")
    before_choice: str | None = Field(None, description="put before a choice; None: a space, and nothing where there is a chat template")
    normalisation: Literal["raw", "per_token", "per_character", "per_byte", "per_nonspace"] = Field(
        "per_character", description="what log p is divided by in the headline; the others are reported, too"
    )
    opening: str | None = Field(
        None, description="token that prompts and sentences begin with; None: what the tokenizer puts there by itself. Not of texts"
    )
    weights: Literal["keep", "int8", "int4", "nf4"] = Field(
        "keep", description="how the matrices are kept: as loaded, or packed (lm.quant)"
    )
    seq: int | None = Field(
        None, ge=2, description="tokens of a window over texts, moved on by half of it; None: the context, at most 1024"
    )
    max_new_tokens: int = Field(256, ge=1, description="of a written answer")
    stop: tuple[str, ...] | None = Field(
        None, description="strings at which it ends; None: a blank line and 'Question:', none in a conversation"
    )
    published: tuple[str, ...] = Field((), description="TASK=PERCENT or TASK/METRIC=PERCENT, shown beside ours")
    batch_tokens: int = Field(4096, ge=1, description="tokens computed at a time, about")
    rows: int = Field(16, ge=1, description="answers written at a time")
    run_dir: Path | None = resumable(None, description="folder of the run; None: runs/evaluate-DATE-TIME")
    resume: bool = resumable(False, description="go on where the run in --run-dir (or the latest one) stopped")
    device: Literal["auto", "cpu", "gpu", "tpu"] = Field("auto", description="where to compute")
    backend: str = Field("auto", description="kernels: auto (the rule of train.backends) or one of " + ", ".join(lm.BACKENDS))
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="operands of matrix products; auto: as in training")

    @field_validator("backend")
    @classmethod
    def _is_known(cls, backend: str) -> str:
        if backend not in ("auto", *lm.BACKENDS):
            raise ValueError(f"must be auto or one of {', '.join(lm.BACKENDS)}")
        return backend


# ------------------------------------------------------------------------------------------- main


def main(config: Config) -> Path:
    """The whole evaluation. Returns the run folder."""
    plain_messages()
    check_specs(config.tasks, config.examples)
    folder = config.run_dir or Path("runs") / f"evaluate-{datetime.now():%Y%m%d-%H%M%S}"
    with claimed(folder, "evaluate"), words_kept(folder):
        run(config, folder)
    return folder


def run(config: Config, folder: Path) -> None:
    """Model, tasks, answers, report, in this order."""
    names = [spec.partition("=")[0] for spec in config.tasks]
    published = published_scores(config.published, names)
    check_start(config, folder)

    # The model, and how it is run.
    device = choose_device(config.device)
    compilation_cache()
    model, tokenizer, origin = load(config.model)
    facts = device_facts(device)
    if config.weights != "keep":
        model, _ = kept_as(model, config.weights, config.dtype if config.dtype != "auto" else choose_dtype(facts))
    ops, flight = run_with(model, facts, config.dtype, config.backend)
    logger.info(
        f"{origin}: {model.config.model_type}, {model.n_params:,} parameters, context {model.config.context}, weights {config.weights}"
    )
    logger.info(f"on {device.device_kind}: kernels {ops.name}, {flight.dtype}")
    words = Words(tokenizer, config.opening, config.chat_template, config.system)
    logger.info(
        "texts begin with {texts_begin_with}, those of an empty context with {empty_contexts_begin_with}".format(**words.described())
    )
    exam = Exam(model, tokenizer, words, Scorer(model, flight, ops), make_token_nats(flight, ops), flight.dtype, config)

    # The tasks. From here on there is a run to resume.
    tasks = [open_task(spec, exam) for spec in config.tasks]
    identity = {"model": digest(eqx.filter(model, eqx.is_array)), "tokenizer": tokenizer.digest}
    identity |= {task.name: task.record["sha256"] for task in tasks}
    check_identity(identity, folder)
    save_config(config, folder)
    write_json(folder / "identity.json", identity)
    for task in tasks:
        told = ", ".join(
            f"{name} {value:,}" for name, value in task.record.items() if isinstance(value, int) and not isinstance(value, bool)
        )
        logger.info(f"{task.name} ({task.record['kind']}): {told}; for example {task.example!r}")

    # The answers.
    begin = time.monotonic()
    answers = {task.name: carried_out(task, folder / f"{task.name}.jsonl") for task in tasks}

    # The report.
    results = {task.name: task.summed_up(answers[task.name]) | {"task": task.record["kind"]} for task in tasks}
    speed = {task.name: task.speed.record() for task in tasks}
    manifest: dict[str, Any] = {
        "model": {"source": Path(config.model).name, "model_type": model.config.model_type, "parameters": model.n_params},
        "identity": identity,
        "words": words.described(),
        "tasks": {task.name: task.record | {"example": task.example} for task in tasks},
        "ran_with": {"kernels": ops.name, **flight.model_dump(), **process_settings()},
        "device": facts,
        "commit": commit(),
        "speed_of_this_session": speed,
        "seconds_of_this_session": time.monotonic() - begin,
    }
    write_json(folder / "manifest.json", manifest)
    write_json(folder / "results.json", results)
    shown = with_published(results, published)
    plot_scores(shown, folder / "scores.png", title=Path(config.model).name)
    for name, spent in speed.items():
        if spent["tokens"]:
            logger.info(f"{name}: {in_words(spent)}")
    show(shown, folder)


# ------------------------------------------------------------------------------------------- answers


def carried_out(task: Task, file: Path) -> dict[Key, dict[str, Any]]:
    """The results of all units: those in the file, and the others, which are computed and appended, a line each."""
    known = read_answers(file)
    missing = [unit for unit in range(len(task.units)) if not all(key in known for key in task.units[unit])]
    if len(missing) < len(task.units):
        logger.info(f"{task.name}: {len(task.units) - len(missing):,} of {len(task.units):,} batches were done before")
    last_line = begin = time.monotonic()
    with file.open("a", encoding="utf-8") as out, progress(task.name, len(task.units)) as told:
        for done, unit in enumerate(missing, start=1):
            found = task.run(unit)
            assert sorted(found) == sorted(task.units[unit]), "a unit gives the results it is made of"
            out.write("".join(json.dumps({"key": key, **result}, ensure_ascii=False) + "\n" for key, result in found.items()))
            out.flush()  # a killed run computes at most one batch again
            known |= found
            told(len(task.units) - len(missing) + done)
            if time.monotonic() - last_line > LINE_EVERY_S:
                last_line = time.monotonic()
                left = (last_line - begin) / done * (len(missing) - done)
                logger.info(
                    f"{task.name}: batch {len(task.units) - len(missing) + done:,} of {len(task.units):,}, {left / 60:.0f} minutes left"
                )
    return known


def read_answers(file: Path) -> dict[Key, dict[str, Any]]:
    """What an earlier process has written; half a line at the end is cut off."""
    if not file.exists():
        return {}
    whole, _, rest = file.read_bytes().rpartition(b"\n")
    if rest:
        file.write_bytes(whole + b"\n" if whole else b"")
    lines = [json.loads(line) for line in whole.splitlines()]
    return {tuple(line.pop("key")): line for line in lines}


# ------------------------------------------------------------------------------------------- what it is run with


def check_start(config: Config, folder: Path) -> None:
    """A new run needs an empty folder, one that goes on the folder of a run."""
    others = sorted({path.name for path in folder.iterdir()} - {".lock", "run.log"})
    if not config.resume and others:
        raise ValueError(f"{folder} has {', '.join(others[:3])} in it: choose another --run-dir, or go on with --resume")


def check_identity(identity: dict[str, str], folder: Path) -> None:
    """**Raises:** `ValueError` where the run in the folder was begun with another model, tokenizer or file."""
    file = folder / "identity.json"
    if not file.exists():
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    if changed := sorted(name for name in {*before, *identity} if before.get(name) != identity.get(name)):
        raise ValueError(f"{folder} was begun with another {', '.join(changed)}: its answers do not go with these. Start a new run")


def in_words(speed: dict[str, Any]) -> str:
    """A `train.evaluate.Speed`."""
    real = f"{speed['tokens']:,} real tokens in {speed['places']:,} places ({speed['real_share']:.1%})"
    return f"{real}, {speed['tokens_per_s']:,.0f} real tokens/s, {speed['tokens_per_s_with_compilation']:,.0f} with compilation"


if __name__ == "__main__":
    chosen = parse(Config, __doc__ or "", recipe="evaluate")
    try:
        main(chosen)
    except ENDS_IN_WORDS as error:
        fail(str(error))
