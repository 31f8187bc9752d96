"""What `recipes.distill` is made of: teacher and student, rows to learn from, what the teacher says of them, prompts for the student's own
answers, and how far the two are apart on held-out text."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from loguru import logger
from rich.console import Console
from rich.table import Table

import lm
from data.cache import TokenCache
from data.chat import ChatFormat
from data.chat_cache import OnBadRow, Overlong
from data.conversations import open_conversations
from data.pipeline import Batch, evaluation_batches
from data.rows import Mixture, Rows
from data.sources import Source, open_source
from data.tasks import instructions
from data.teaching import ROWS, TeacherTargets
from data.tokenizer import Tokenizer
from lm.base import AbstractLM
from lm.flight import Flight
from lm.generate import Sampler
from lm.native import quantisation_of
from recipes import pretrain_small
from recipes.continue_pretrain import prepared
from recipes.corpus import encode, encode_training
from recipes.finetuning import Encoding, known_text
from recipes.loading import load
from recipes.report import stops
from train.distillation import TaughtBatch, Teacher
from train.logs import progress
from train.loop import bits_per_byte
from train.rl import policy_batch
from train.rollout import roll_out

Kind = Literal["text", "conversations"]

# ------------------------------------------------------------------------------------------- two models


def as_teacher(model: AbstractLM) -> AbstractLM:
    """In fp32, or packed as it is."""
    return model if quantisation_of(model) else jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model)


def student_of(
    named: str, teacher: AbstractLM, tokenizer: Tokenizer, *, seq: int | None, dropout: float, key: Any
) -> tuple[AbstractLM, str, Path | None]:
    """The student in fp32, words on it, and where it was loaded from; `None` for a fresh one.

    **Arguments:**

    - `named`: a preset of `pretrain_small`, or what `recipes.loading.load` opens.
    - `seq`: the context of a fresh one; `None`: the preset's, or the teacher's where that is shorter.

    **Raises:** `ValueError` for a student that does not read its teacher's tokens.
    """
    if named in pretrain_small.PRESETS:
        sizes = pretrain_small.Config(**pretrain_small.PRESETS[named])
        sizes = sizes.model_copy(update={"seq": seq or min(sizes.seq, teacher.config.context), "dropout": dropout})
        return lm.build(sizes.model_config_of(teacher.config.vocab), key=key), f"a fresh one of the sizes {named}", None
    model, own, origin = load(named)
    if own.digest != tokenizer.digest:
        raise ValueError(
            f"the student has another tokenizer ({own.vocab_size:,} tokens, digest {own.digest[:12]}…) than its teacher "
            f"({tokenizer.vocab_size:,} tokens, digest {tokenizer.digest[:12]}…), so what one says of a token means nothing to the other: "
            f"take a student with the teacher's tokenizer, or a fresh one (--student {', '.join(pretrain_small.PRESETS)})"
        )
    if model.config.vocab != teacher.config.vocab:
        raise ValueError(
            f"the student's embedding has {model.config.vocab:,} rows and the teacher's {teacher.config.vocab:,}, so their distributions "
            "are not over the same outcomes: bring one to the size of the other (lm.surgery.grow_vocab)"
        )
    if quantisation_of(model):
        raise ValueError(f"the student {named} is packed, and packed numbers are not trained: take the model it was packed from")
    return prepared(model, dropout), origin, Path(named)


# ------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Texts:
    """What is learned from, and what is measured."""

    source: Source
    train: TokenCache | Mixture
    held_out: TokenCache
    stop_ids: tuple[int, ...]  # each ends what a student writes


def data_of(kind: Kind, spec: str, teacher: Path) -> str:
    """The data by its name: for `auto` what the teacher was trained on, or instructions that are made here.

    **Raises:** `ValueError` where it is not known.
    """
    if spec != "auto":
        return spec
    known = instructions.NAME if kind == "conversations" else known_text(teacher)
    if known is None:
        raise ValueError(f"what {teacher} was trained on is not known: name some text with --data")
    return known


def texts_of(kind: Kind, spec: str, tokenizer: Tokenizer, *, seq: int, overlong: Overlong, on_bad_row: OnBadRow) -> Texts:
    """Opened and encoded.

    **Raises:** `ValueError` where conversations have no template.
    """
    if kind == "conversations":
        if not tokenizer.chat_templates:
            raise ValueError(
                "--data-kind conversations: this tokenizer has no chat template, so the teacher was never taught to converse: take one "
                "that recipes.sft_chat has, or --data-kind text"
            )
        source, form = open_conversations(spec), ChatFormat(tokenizer)
        encoding = Encoding(form, seq, overlong, on_bad_row)
        return Texts(source, encoding.training(source), encoding.cache(source.held_out, source, "held_out"), form.stop_ids)
    source = open_source(spec)
    held_out = encode(source.held_out, tokenizer, source, "held_out")
    return Texts(source, encode_training(source, tokenizer, "repeat"), held_out, tuple(stops(tokenizer)))


def parts_of(tokens: TokenCache | Mixture) -> tuple[tuple[TokenCache, ...], tuple[float, ...]]:
    """The caches that rows are made of, and their weights."""
    return ((tokens,), (1.0,)) if isinstance(tokens, TokenCache) else (tokens.caches, tokens.weights)


# ------------------------------------------------------------------------------------------- what the teacher says, kept


def write_targets(targets: TeacherTargets, rows: Rows, count: int, teacher: Teacher, top_k: Callable[..., Any], *, at_once: int) -> None:
    """Ask the teacher about the first `count` rows, `at_once` at a time, and keep what it says; what is there already stays."""
    missing = targets.missing(count)
    size = f"{targets.bytes_of(count) / 1e6:,.0f} MB in {targets.folder}"
    if not missing:
        logger.info(f"what the teacher says of these {count:,} rows is there: {size}")
        return
    logger.info(f"asking the teacher about {count:,} rows, {len(missing)} of {len(targets.parts_of(count))} parts: {size}")
    with progress("parts the teacher has read", len(missing)) as told:
        for done, first in enumerate(missing, start=1):
            said = []
            for at in range(first, first + ROWS, at_once):
                # Past its end a part is filled up with its last row, so that there is one shape.
                some = [rows[min(row, first + ROWS - 1)] for row in range(at, at + at_once)]
                said.append(top_k(teacher, Batch(*(np.stack([row[name] for row in some]) for name in Batch._fields))))
            targets.write(first, *(np.concatenate(part)[:ROWS] for part in zip(*said, strict=True)))
            told(done)


def taught_batches(batches: Iterator[Batch], targets: TeacherTargets, start: int, batch: int) -> Iterator[TaughtBatch]:
    """Each batch with what the teacher said of it."""
    for step, each in enumerate(batches, start=start):
        yield TaughtBatch(*each, *targets.rows(step * batch, (step + 1) * batch))


# ------------------------------------------------------------------------------------------- the student's own words


@dataclass
class OnPolicy:
    """Batches that the student writes itself. The batch of a step is a function of (weights, seed, step)."""

    tokens: TokenCache | Mixture
    count: int  # prompts a batch
    prompt_tokens: int  # longest
    max_new_tokens: int
    stop_ids: Sequence[int]
    sampler: Sampler
    flight: Flight
    ops: lm.Ops
    seed: int

    def __post_init__(self) -> None:
        """**Raises:** `ValueError` where every prompt is too long."""
        caches, self._weights = parts_of(self.tokens)
        self._parts = [(cache, *self._ends(cache)) for cache in caches]
        whole, kept = sum(map(len, caches)), sum(len(documents) for _, documents, _ in self._parts)
        if kept < whole:
            logger.warning(
                f"{whole - kept:,} of {whole:,} documents give no prompt of at most {self.prompt_tokens} tokens, and are left out"
            )
        if any(not len(documents) for _, documents, _ in self._parts):
            raise ValueError(f"no document gives a prompt of 1 to {self.prompt_tokens} tokens: allow longer ones with --prompt-tokens")

    def _ends(self, cache: TokenCache) -> tuple[np.ndarray, np.ndarray]:
        """The documents that prompts are taken from, and where the prompt of each ends: before what is trained on first. Of text, where
        all is, a prompt is any piece, and the numbers are the last places that one may begin at."""
        lengths = cache.lengths
        if cache.trained is None:
            ends = np.maximum(lengths - 1 - self.prompt_tokens, 0)  # a document has two tokens at least, its opening and its end
            kept = np.arange(len(cache))
        else:
            ends = np.array(
                [int(np.argmax(cache.trained[at:stop])) for at, stop in zip(cache.offsets[:-1], cache.offsets[1:], strict=True)]
            )
            kept = np.flatnonzero((ends > 0) & (ends <= self.prompt_tokens))
        return kept, ends

    def prompts(self, step: int) -> list[np.ndarray]:
        """Of a step: from a part by its weight; of text a piece of a document, each document as often as it is long, else what is asked."""
        rng, found = np.random.default_rng((self.seed, 5, step)), []
        shares = np.array(self._weights) / sum(self._weights)
        for _ in range(self.count):
            cache, documents, ends = self._parts[rng.choice(len(shares), p=shares)]
            if cache.trained is not None:
                document = int(rng.choice(documents))
                found.append(cache.piece(document, 0, int(ends[document])))
                continue
            document = int(np.searchsorted(cache.offsets, rng.integers(cache.total_tokens), side="right")) - 1
            start = int(rng.integers(ends[document] + 1))
            found.append(cache.piece(document, start, min(self.prompt_tokens, int(cache.lengths[document]) - 1 - start)))
        return found

    def batch(self, model: AbstractLM, step: int) -> Batch:
        """A row a prompt: what the student makes of it, weight 1 on the tokens it drew."""
        rollouts = roll_out(
            model,
            self.prompts(step),
            n=1,
            width=self.prompt_tokens,
            max_new_tokens=self.max_new_tokens,
            stop_ids=self.stop_ids,
            key=jr.fold_in(jr.key(self.seed), step),
            flight=self.flight,
            ops=self.ops,
            sampler=self.sampler,
        )
        rows = policy_batch(rollouts, np.ones(len(rollouts)), seq=self.prompt_tokens + self.max_new_tokens)
        return Batch(*(getattr(rows, name) for name in Batch._fields))


# ------------------------------------------------------------------------------------------- measures


def apart(
    compare: Callable[..., Any], student: AbstractLM, teacher: Teacher, batches: Any, on_batch: Callable[[int], None] | None = None
) -> dict[str, float]:
    """Means over every counted token: `nats` and `teacher_nats` (-log p of the text), `kl` from teacher to student (nats), `agreement`; and
    the number of `tokens`."""
    sums: dict[str, float] = {}
    for done, (batch, _) in enumerate(batches, start=1):
        told = jax.device_get(compare(student, teacher, batch)) | {"tokens": np.ones(batch.tokens.shape)}
        for name, values in told.items():
            sums[name] = sums.get(name, 0.0) + float(np.sum(values.astype(np.float64) * batch.loss_weights))
        if on_batch is not None:
            on_batch(done)
    return {name: total if name == "tokens" else total / sums["tokens"] for name, total in sums.items()}


def measure(
    compare: Callable[..., Any], student: AbstractLM, teacher: Teacher, held_out: TokenCache, *, batch: int, seq: int
) -> dict[str, Any]:
    """All of the held-out documents. Of text, each token has at least half a row before it where there is that much, and the bits per byte
    are those of the other recipes."""
    whole = held_out.trained is None
    batches = evaluation_batches(held_out, batch=batch, seq=seq, stride=max(1, seq // 2) if whole else seq)
    with progress("held-out batches", len(batches)) as told:
        found: dict[str, Any] = apart(compare, student, teacher, batches, told)
    result = {"loss": found["nats"], "kl": found["kl"], "agreement": found["agreement"], "tokens": int(found["tokens"])}
    teacher_result = {"loss": found["teacher_nats"]}
    if whole:
        size = int(np.sum(held_out.text_bytes))
        result["bits_per_byte"], teacher_result["bits_per_byte"] = (
            bits_per_byte(found[name] * found["tokens"], size) for name in ("nats", "teacher_nats")
        )
        result["held_out_bytes"] = size
    return result | {"teacher": teacher_result}


def show(results: Mapping[str, Any], folder: Path) -> None:
    """The last words on the screen."""
    before, after = results["before"], results["after"]
    console, table = Console(), Table("on what was held out", "student before", "student after", "teacher")
    for column in table.columns[1:]:
        column.justify = "right"
    names = {"loss": "loss, nats a token", "bits_per_byte": "bits per byte"}
    names |= {"kl": "KL(teacher‖student), nats a token", "agreement": "same likeliest token"}
    for name, words in names.items():
        if name in after:
            of_teacher = after["teacher"].get(name)
            table.add_row(words, f"{before[name]:.4f}", f"{after[name]:.4f}", "" if of_teacher is None else f"{of_teacher:.4f}")
    console.print(table)
    lines = [f"{results['steps']:,} steps, {results['learned_from']}; {results['tokens_per_s']:,.0f} tokens/s"]
    lines += [f"curves {folder / 'distillation.png'}", f"for transformers {folder / 'export'}"]
    lines.append(f"samples: python -m recipes.sample {folder} --prompt '…'")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
