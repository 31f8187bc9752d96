"""Pretrain a small language model from scratch, on a laptop, in about ten minutes.

What happens: a byte-level BPE tokenizer is trained on the corpus, the corpus is packed into rows, a small Qwen3-shaped decoder is trained
on it with Muon, and the result is measured on files it has never seen, sampled from, and exported as a folder that `transformers` loads.

The corpus is the source code of the Python standard library that runs this: about 650 files and 12 MB that every machine has, free to use,
and with a natural yardstick, since everybody can run `xz -9` on the same held-out files. Any text will do: `--data FOLDER`, `FILE.txt`,
`FILE.jsonl[.gz|.zst]`, `FILE.parquet`, `hf://owner/name/split`, or several with weights: `--data stdlib:0.7,books/:0.3`.

    python -m recipes.pretrain_small                       # about ten minutes on 2 CPU cores
    python -m recipes.pretrain_small --preset 14m --data my_texts/ --minutes 60
    python -m recipes.pretrain_small --resume              # go on with the latest run, exactly

Sources of the settings: Muon and its 0.2 scale, Liu et al. 2025 (arXiv:2502.16982); linear decay to zero, Bergsma et al. 2025
(arXiv:2502.15938); QK-norm, RMSNorm, SwiGLU and tied embeddings as in Qwen3 (arXiv:2505.09388). Learning rates are single guesses, not
swept.
"""

import json
import lzma
import math
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from loguru import logger
from pydantic import Field, model_validator
from rich.console import Console
from rich.table import Table

import lm
from data.cache import TokenCache
from data.packing import Packing
from data.pipeline import batch_at, evaluation_batches, train_batches
from data.rows import MixedRows, Mixture, OnEnd, training_rows
from data.sources import Source, open_source
from data.tasks.python_syntax import complete_statements, parses
from data.tokenizer import SPECIAL_TOKENS, Tokenizer
from lm.flight import Flight
from lm.generate import Sampler
from lm.models.qwen3 import Qwen3Config
from recipes.command_line import CONFIG_FILE, RecipeConfig, claimed, fail, how_to_resume, load_config, parse, resumable
from train.backends import choose_backend, choose_dtype
from train.checkpoint import CheckpointError, Checkpoints
from train.logs import RunLog, mfu, model_flops_per_token, plain_messages, plot_curves, progress, read_metrics, words_kept, write_json
from train.loop import bits_per_byte, interruptible, nats_by_document, steps
from train.optimizers import OptimizerConfig, ScheduleConfig, build_optimizer, learning_rate
from train.publish import YARDSTICKS, export
from train.runtime import (
    DeviceError,
    cache_root,
    choose_device,
    compilation_cache,
    device_facts,
    memory_in_use,
    peak_flops,
    process_settings,
)
from train.step import StepConfig, TrainState, init_state, make_step, make_token_nats

# ------------------------------------------------------------------------------------------- config


class Config(RecipeConfig):
    """Everything that makes the run what it is. Presets set the sizes."""

    preset: Literal["1m", "4m", "14m", "30m", "60m"] = Field("4m", description="sizes of model and batch, by parameter count")
    data: str = Field(
        "stdlib", description="the corpus: stdlib, a folder, a file (text, jsonl, parquet), hf://owner/name/split, or a mixture A:0.7,B:0.3"
    )
    on_end: OnEnd = Field("repeat", description="what a part of a mixture does after its last row: begin again, or stop the run")
    on_invalid_utf8: Literal["error", "replace", "skip"] = Field("error", description="what to do with a document that is not UTF-8")
    vocab: int = Field(4096, ge=256 + len(SPECIAL_TOKENS), description="tokens of the vocabulary to be learned, special ones included")
    d_model: int = Field(256, gt=0, description="width of the residual stream")
    n_layers: int = Field(4, gt=0, description="blocks")
    n_heads: int = Field(4, gt=0, description="query heads of a block")
    n_kv_heads: int = Field(4, gt=0, description="key and value heads of a block; a divisor of n-heads")
    d_ff: int = Field(704, gt=0, description="hidden width of the MLPs")
    seq: int = Field(512, gt=1, description="tokens of a row, and the context of the model")
    packing: Packing = Field("concat", description="rows from documents: cut to fill (concat), kept whole (best_fit), or one a row (pad)")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability, on embedding and residual branches; useful past a few epochs")
    batch: int = Field(8, gt=0, description="rows a step; tokens a step = batch x seq")

    steps: int | None = resumable(None, ge=1, description="optimizer steps; None: as many as fit into --minutes, measured at the start")
    minutes: float = Field(8.0, gt=0, description="minutes of training where --steps is not given")
    max_epochs: float = Field(6.0, gt=0, description="passes over the corpus, at most, where --steps is not given")
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    step: StepConfig = StepConfig()
    seed: int = Field(0, ge=0, description="of weights, data order, dropout and samples")

    run_dir: Path | None = resumable(None, description="folder of the run; None: runs/pretrain_small-DATE-TIME")
    resume: bool = resumable(False, description="go on where the run in --run-dir (or the latest one) stopped")
    device: Literal["auto", "cpu", "gpu", "tpu"] = resumable("auto", description="where to compute")
    backend: str = resumable("auto", description="kernels: auto (the rule of train.backends) or one of " + ", ".join(lm.BACKENDS))
    dtype: Literal["auto", "float32", "bfloat16"] = resumable(
        "auto",
        description="operands of matrix products; masters stay float32. float32 on a GPU or TPU means its default: TF32, or bf16 passes",
    )
    layers: Literal["auto", "loop", "scan"] = resumable("auto", description="blocks one by one or as a scan; auto: scan above 12 layers")
    remat: Literal["none", "dots", "full"] = resumable("none", description="what the backward pass recomputes to save memory")
    save_every: int = resumable(200, ge=1, description="steps between checkpoints")
    validate_every: int = resumable(100, ge=1, description="steps between looks at the held-out loss")
    validate_rows: int = resumable(64, ge=1, description="rows of held-out text in such a look")
    sample_every: int = resumable(200, ge=1, description="steps between samples on the screen")
    keep_latest: int = resumable(2, ge=1, description="checkpoints kept, beside the best one")
    report_samples: int = resumable(64, ge=0, description="samples judged at the end")

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model ({self.d_model}) must be a multiple of n_heads ({self.n_heads}): a head is d_model / n_heads wide")
        self.model_config_of(self.vocab)  # raises where heads cannot be grouped
        if self.batch % self.step.micro_batches:
            raise ValueError(f"batch ({self.batch} rows) must be a multiple of step.micro_batches ({self.step.micro_batches})")
        if self.backend not in ("auto", *lm.BACKENDS):
            raise ValueError(f"backend must be auto or one of {', '.join(lm.BACKENDS)}, got {self.backend!r}")
        return self

    def model_config_of(self, vocab: int) -> Qwen3Config:
        """The drawing at these sizes. Embedding and head share one matrix."""
        return Qwen3Config(
            vocab=vocab,
            d_model=self.d_model,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            head_dim=self.d_model // self.n_heads,
            d_ff=self.d_ff,
            context=self.seq,
            rope_base=10_000.0,
            tied=True,
            dropout=self.dropout,
        )


PRESETS: dict[str, dict[str, Any]] = {
    "1m": {"vocab": 2048, "d_model": 128, "n_layers": 4, "n_heads": 2, "n_kv_heads": 2, "d_ff": 352, "seq": 256, "batch": 8},
    "4m": {},
    "14m": {"vocab": 8192, "d_model": 384, "n_layers": 6, "n_heads": 6, "n_kv_heads": 6, "d_ff": 1024, "seq": 512, "batch": 8},
    "30m": {"vocab": 8192, "d_model": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 8, "d_ff": 1376, "seq": 512, "batch": 16},
    "60m": {"vocab": 16384, "d_model": 640, "n_layers": 10, "n_heads": 10, "n_kv_heads": 10, "d_ff": 1728, "seq": 512, "batch": 32},
}

# ------------------------------------------------------------------------------------------- main


def main(config: Config) -> Path:
    """The whole experiment. Returns the run folder."""
    plain_messages()
    folder = config.run_dir or Path("runs") / f"pretrain_small-{datetime.now():%Y%m%d-%H%M%S}"
    with claimed(folder, "pretrain_small"), words_kept(folder):
        run(config, folder)
    return folder


def run(config: Config, folder: Path) -> None:
    """Corpus, tokenizer, model, loop, report, in this order."""
    device = choose_device(config.device)
    ops, flight = choose_flight(config, device)
    compilation_cache()
    check_folder(config, folder)

    # Corpus, tokenizer, tokens on disk.
    source = open_source(config.data, on_invalid_utf8=config.on_invalid_utf8)
    describe_source(source)
    tokenizer = train_or_load_tokenizer(config, source, folder / "tokenizer")
    train_tokens = encode_training(source, tokenizer, config)
    held_out = encode(source.held_out, tokenizer, source, "held_out")
    bytes_per_token = float(np.sum(held_out.text_bytes)) / held_out.total_tokens
    logger.info(f"tokenizer: {tokenizer.vocab_size:,} tokens, {bytes_per_token:.2f} bytes a token on held-out text")
    rows = training_rows(train_tokens, seq=config.seq, seed=config.seed, packing=config.packing)
    packing: dict[str, Any] = {"batch": config.batch, "seq": config.seq, "seed": config.seed, "packing": config.packing}
    first_batch = batch_at(train_tokens, 0, **packing)  # a corpus too small for one stops here
    if not config.resume:
        save_config(config, folder)  # from here on there is a run to resume

    # Model, optimizer, step.
    model_config = config.model_config_of(tokenizer.vocab_size)
    optimizer = build_optimizer(config.optimizer)
    model_key, dropout_key = jr.split(jr.key(config.seed))

    def fresh_state() -> TrainState:
        return init_state(lm.build(model_config, key=model_key), optimizer)

    abstract = jax.eval_shape(fresh_state)
    n_params = sum(leaf.size for leaf in jax.tree.leaves(abstract.trainable))
    step = make_step(optimizer, config.step, flight, ops, dropout_key)
    token_nats = make_token_nats(flight, ops, config.step.loss_chunk)
    logger.info(f"model: {n_params:,} parameters, {config.n_layers} layers, d_model {config.d_model}, context {config.seq}")
    logger.info(f"on {device.device_kind}: kernels {ops.name}, {flight.dtype}, layers as a {flight.layers}, remat {flight.remat}")

    # How long: measured once, then part of the config, so that a resumed run ends where this one would.
    if config.steps is None:
        seconds = seconds_a_step(step, fresh_state(), first_batch)
        fit, most = int(config.minutes * 60 / seconds), int(config.max_epochs * rows.rows_per_epoch / config.batch)
        if isinstance(rows, MixedRows) and rows.on_end == "stop":
            most = min(most, rows.rows_before_an_end() // config.batch)
        config = config.model_copy(update={"steps": max(1, min(fit, most))})
        logger.info(
            f"{seconds:.2f} s a step: {fit:,} steps fit into {config.minutes:g} minutes, {most:,} make {config.max_epochs:g} epochs; "
            f"taking {config.steps:,}"
        )
        save_config(config, folder)
    assert config.steps is not None

    # What the run is made of, for the record, and what this process runs it with.
    peak = peak_flops(device)
    flops = model_flops_per_token(n_params, config.n_layers, config.d_model, config.seq)
    ran_with = {"kernels": ops.name, **flight.model_dump(), **process_settings()}
    session = {"ran_with": ran_with, "device": device_facts(device), "peak": {"flops_per_s": peak.flops_per_s, "source": peak.source}}
    manifest = {
        "corpus": source.record,
        "tokenizer": {"digest": tokenizer.digest, "vocab": tokenizer.vocab_size, "bytes_per_token_held_out": bytes_per_token},
        "packing": rows.describe(),
        "mixture": rows.realised(config.steps * config.batch),
        "model": {"model_type": model_config.model_type, "parameters": n_params, **model_config.model_dump()},
        "steps": config.steps,
        "tokens": config.steps * config.batch * config.seq,
        "seed": config.seed,
    }
    for name, part in rows.realised(config.steps * config.batch).items():
        shares = f"{part['token_share']:.2%} (asked: {part['weight']:.2%})"
        logger.info(f"mixture: {name} {part['tokens']:,} tokens, {shares}, {part['epochs']:.2f} epochs")
    identity = {"corpus": source.record["sha256"], "tokenizer": tokenizer.digest}

    # The loop.
    rate = learning_rate(config.schedule, config.steps)
    validation = list(evaluation_batches(held_out, batch=config.batch, seq=config.seq, stride=config.seq, max_rows=config.validate_rows))
    prompts = heads(source, tokenizer, config)
    with Checkpoints(folder / "checkpoints", keep_latest=config.keep_latest) as checkpoints:
        state, start, record = restore(checkpoints, abstract, identity, config.steps) or (fresh_state(), 0, {"train_s": 0.0})
        manifest["sessions"] = begin_session(folder, config, start, session)
        write_json(folder / "manifest.json", manifest)
        begin = time.monotonic() - record["train_s"]
        with (
            RunLog(folder, total_steps=config.steps, start_step=start + 1) as log,
            train_batches(train_tokens, **packing, start_step=start, stop_step=config.steps) as batches,
            interruptible() as interrupt,
        ):

            def pause(done: int) -> bool:
                intervals = (config.save_every, config.validate_every, config.sample_every)
                return interrupt.due(done) or any(done % interval == 0 for interval in intervals)

            training = steps(step, state, batches, rate, start=start, stop=config.steps, pause=pause)
            for done, state, arrived in training:
                for metrics in arrived:
                    epoch = metrics["step"] * config.batch / rows.rows_per_epoch
                    share = mfu(metrics["tokens_per_s"], flops, peak.flops_per_s)
                    memory = memory_in_use()["peak_bytes"]
                    log.log(**metrics, mfu=share, epoch=epoch, peak_memory_bytes=memory)  # type: ignore[arg-type]
                val_loss = None  # of these very weights, or not known
                if done % config.validate_every == 0 or done == config.steps:
                    nats, tokens = nats_by_document(token_nats, state.model, validation)
                    val_loss = sum(nats.values()) / sum(tokens.values())
                    log.log(done, val_loss=val_loss)
                if done % config.sample_every == 0 and done < config.steps:
                    log.message(f"step {done}, continuing a held-out file: {one_sample(state.model, tokenizer, prompts[0], config)!r}")
                if done % config.save_every == 0 or done == config.steps or interrupt.due(done):
                    record = {"identity": identity, "val_loss": val_loss, "train_s": time.monotonic() - begin}
                    record |= {"model_type": model_config.model_type, "model": model_config.model_dump()}
                    items = {"model": state.trainable, "optimizer": {"state": state.optimizer, "skipped": state.skipped}}
                    checkpoints.save(done, items, record, metric=val_loss)
                if interrupt.due(done):
                    checkpoints.wait()
                    resume = how_to_resume(folder, "pretrain_small")
                    log.message(f"stopped at step {done} of {config.steps}, everything saved. Go on with:\n  {resume}")
                    raise SystemExit(interrupt.exit_status)

    # What came of it.
    results = measure(config, folder, state.model, token_nats, source, held_out)
    speeds = [line["tokens_per_s"] for line in read_metrics(folder / "metrics.jsonl") if "tokens_per_s" in line]
    speed = float(np.median(speeds))
    results |= {"steps": config.steps, "skipped": int(state.skipped), "train_s": record["train_s"]}
    results |= {"tokens_per_s": speed, "mfu": mfu(speed, flops, peak.flops_per_s)}
    if mixture := rows.realised(config.steps * config.batch):
        results["mixture"] = mixture
    samples = judge_samples(config, folder, state.model, tokenizer, prompts, source, results)
    export(state.model, tokenizer, folder / "export", manifest=manifest, results=results)
    write_json(folder / "results.json", results)
    show(results, folder, samples)


# ------------------------------------------------------------------------------------------- the run folder


def check_folder(config: Config, folder: Path) -> None:
    """A new run needs a folder of its own."""
    logger.info(f"run folder: {folder}")
    if config.resume:
        return
    if (folder / CONFIG_FILE).exists():
        raise ValueError(f"{folder} already holds a run: add --resume to go on with it, or choose another --run-dir")
    left_by_a_start_that_failed = {".lock", "run.log", "tokenizer"}
    others = sorted({path.name for path in folder.iterdir()} - left_by_a_start_that_failed)
    if others:
        raise ValueError(f"{folder} is no run, and not empty (it has {', '.join(others[:3])} …): choose another --run-dir")


def save_config(config: Config, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG_FILE, config.model_dump(mode="json", exclude={"resume", "run_dir"}))


def restore(
    checkpoints: Checkpoints, abstract: TrainState, identity: dict[str, str], total_steps: int
) -> tuple[TrainState, int, dict[str, Any]] | None:
    """The state of the last checkpoint, the steps done, and its record; `None` where there is none yet."""
    if not checkpoints.steps():
        return None
    items = {"model": abstract.trainable, "optimizer": {"state": abstract.optimizer, "skipped": abstract.skipped}}
    found = checkpoints.restore(items)
    if found.record["identity"] != identity:
        raise ValueError(
            f"this run was trained on corpus and tokenizer {found.record['identity']}; now they are {identity}. "
            "The text has changed since (another Python? edited files?): bring it back, or start a new run"
        )
    if found.step > total_steps:
        raise ValueError(f"the run has done {found.step} steps already; --steps {total_steps} would be fewer")
    complete = found.step == total_steps
    logger.info("training is complete: only the report is made again" if complete else f"going on after step {found.step}")
    optimizer = found.items["optimizer"]
    step = jnp.asarray(found.step, jnp.int32)
    return TrainState(found.items["model"], abstract.frozen, optimizer["state"], step, optimizer["skipped"]), found.step, found.record


def begin_session(folder: Path, config: Config, start: int, session: dict[str, Any]) -> list[dict[str, Any]]:
    """The processes that worked on this run, this one added. What differs from the last one and changes the numbers is said."""
    written = folder / "manifest.json"
    earlier = json.loads(written.read_text(encoding="utf-8"))["sessions"] if config.resume and written.exists() else []
    saved = load_config(Config, folder)
    if start and saved.steps != config.steps:
        logger.warning(
            f"the run now has {config.steps} steps instead of {saved.steps}: the learning rate follows the new schedule from here"
        )
    for name in ("ran_with", "device"):
        if earlier and earlier[-1][name] != session[name]:
            old, new = earlier[-1][name], session[name]
            changed = [f"{key} {old.get(key)} → {new.get(key)}" for key in new if old.get(key) != new.get(key)]
            logger.warning(f"not the same {name} as before, so not bit for bit the same run: {'; '.join(changed)}")
    save_config(config, folder)
    command = ["python", "-m", "recipes.pretrain_small", *sys.argv[1:]]
    return [*earlier, {"start_step": start, "command": command, "commit": commit(), **session}]


def commit() -> str | None:
    """The commit of this checkout, with a mark if files have changed since; `None` outside git."""
    try:
        asked = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=Path(__file__).parent, capture_output=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return asked.stdout.decode().strip() or None if asked.returncode == 0 else None


# ------------------------------------------------------------------------------------------- data


def describe_source(source: Source) -> None:
    """Say what is trained on, what is held out and by which rule, and what was left out."""
    record = source.record
    logger.info(
        f"corpus {source.name}: {record['train_documents']:,} documents, {record['train_bytes']:,} bytes to train on; "
        f"{record['held_out_documents']:,} documents, {record['held_out_bytes']:,} bytes held out ({record['held_out_rule']})"
    )
    counts = {name.replace("_", " "): record.get(name, 0) for name in LEFT_OUT}
    counts |= record["left_out"] if isinstance(record.get("left_out"), dict) else {}
    if any(counts.values()):
        logger.info("left out or changed: " + ", ".join(f"{count:,} {what}" for what, count in counts.items() if count))


LEFT_OUT = ("empty_documents", "blank_lines", "invalid_documents_skipped", "invalid_documents_replaced", "characters_replaced")


def train_or_load_tokenizer(config: Config, source: Source, folder: Path) -> Tokenizer:
    """Trained once a run, on the training documents alone."""
    if config.resume:
        return Tokenizer.load(folder)
    logger.info(f"training a tokenizer of {config.vocab:,} tokens")
    tokenizer = Tokenizer.train((source.train[i]["text"] for i in range(len(source.train))), config.vocab)  # one text in memory at a time
    tokenizer.save(folder, model_max_length=config.seq)
    return tokenizer


def encode(documents: Any, tokenizer: Tokenizer, source: Source, split: str) -> TokenCache:
    """Encoded once a tokenizer and corpus, on disk, for all runs."""
    folder, digest = cache_root() / "tokens", source.record["sha256"]
    with progress(f"encoding {split} documents", len(documents)) as told:
        return TokenCache.build_or_open(
            documents, tokenizer, folder, source_digest=digest, split=split, on_progress=lambda done, _: told(done)
        )


def encode_training(source: Source, tokenizer: Tokenizer, config: Config) -> TokenCache | Mixture:
    """The tokens of the source, or of each part of a mixture."""
    if not source.parts:
        return encode(source.train, tokenizer, source, "train")
    caches = tuple(encode(part.source.train, tokenizer, part.source, "train") for part in source.parts)
    names, weights = tuple(part.name for part in source.parts), tuple(part.weight for part in source.parts)
    return Mixture(names, caches, weights, config.on_end)


# ------------------------------------------------------------------------------------------- how to run


def choose_flight(config: Config, device: jax.Device) -> tuple[lm.Ops, Flight]:
    """Kernels, dtype and layer loop for this device, unless the user named them. What is chosen is printed and recorded."""
    facts = device_facts(device)
    dtype = config.dtype if config.dtype != "auto" else choose_dtype(facts)
    layers = config.layers if config.layers != "auto" else "scan" if config.n_layers > 12 else "loop"
    backend = choose_backend(facts, dtype=dtype, head_dim=config.d_model // config.n_heads, seq=config.seq, asked=config.backend)
    return lm.BACKENDS[backend], Flight(layers=layers, remat=config.remat, dtype=dtype)


def seconds_a_step(step: Any, state: TrainState, batch: Any) -> float:
    """Compile the step, then time it, on a state that is thrown away: the median of six, or of fewer where they take long."""
    times: list[float] = []
    while len(times) < 7 and (len(times) < 3 or sum(times[1:]) < 10):
        begin = time.perf_counter()
        state, metrics = step(state, batch, 0.0)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - begin)
    return float(np.median(times[1:]))  # the first one compiled


# ------------------------------------------------------------------------------------------- samples


SAMPLER = Sampler(temperature=0.7, top_p=0.95)
HEAD_CHARACTERS = 160  # of a held-out file, up to the end of a line: what a sample continues
SAMPLE_CHARACTERS = 200  # at least, or the sample is drawn again


def heads(source: Source, tokenizer: Tokenizer, config: Config) -> list[np.ndarray]:
    """BOS and the first lines of each held-out file, as far as they fit into half the context."""
    found = []
    for document in source.held_out:
        text = document["text"]
        end = text.find("\n", min(HEAD_CHARACTERS, len(text)))
        tokens = tokenizer.encode(text[: end + 1] if end >= 0 else text)
        found.append(np.concatenate([[tokenizer.bos_id], tokens])[: config.seq // 2].astype(np.int32))
    return found


def stops(tokenizer: Tokenizer) -> list[int]:
    """Where a document ends."""
    return [] if tokenizer.eos_id is None else [tokenizer.eos_id]


def one_sample(model: Any, tokenizer: Tokenizer, prompt: np.ndarray, config: Config) -> str:
    """A short continuation, always drawn with the same key, so that looks at different steps compare."""
    room = min(64, config.seq - len(prompt))
    tokens = lm.generate(model, [prompt], max_new_tokens=room, sampler=SAMPLER, stop_ids=stops(tokenizer), key=jr.key(config.seed))[0]
    return tokenizer.decode(tokens)


def draw_samples(model: Any, tokenizer: Tokenizer, prompts: list[np.ndarray], config: Config) -> tuple[list[dict[str, Any]], int]:
    """`config.report_samples` continuations of at least SAMPLE_CHARACTERS, taking the prompts in turn, and how many were drawn for them."""
    kept: list[dict[str, Any]] = []
    drawn = 0
    room = min(config.seq // 2, 320)
    for attempt in range(4):
        missing = config.report_samples - len(kept)
        if missing == 0:
            break
        turn = [(drawn + i) % len(prompts) for i in range(missing)]
        key = jr.fold_in(jr.key(config.seed), attempt)
        outputs = lm.generate(model, [prompts[i] for i in turn], max_new_tokens=room, sampler=SAMPLER, stop_ids=stops(tokenizer), key=key)
        for i, tokens in zip(turn, outputs, strict=True):
            text = tokenizer.decode(tokens)
            if len(text) >= SAMPLE_CHARACTERS:
                kept.append({"file": i, "prompt": tokenizer.decode(prompts[i]), "text": text, "finished": len(tokens) < room})
        drawn += missing
    return kept, drawn


def share_that_parses(samples: list[dict[str, Any]]) -> float:
    whole = [complete_statements(s["prompt"] + s["text"], after=len(s["prompt"]), finished=s["finished"]) for s in samples]
    return sum(map(parses, whole)) / len(samples)


def real_samples(samples: list[dict[str, Any]], source: Source) -> list[dict[str, Any]]:
    """The text that really follows each prompt, cut at the sample's length."""
    real = []
    for sample in samples:
        text = source.held_out[sample["file"]]["text"]
        start = len(sample["prompt"])
        real.append({**sample, "text": text[start : start + len(sample["text"])], "finished": start + len(sample["text"]) >= len(text)})
    return real


# ------------------------------------------------------------------------------------------- report


XZ_WINDOW = 64 << 20  # bytes that xz -9 looks back; a larger text is not compared: it would take minutes, and priming would be lost


def xz_yardsticks(source: Source, cache_folder: Path) -> dict[str, float]:
    """Bits per byte of `xz -9` on the held-out files joined in path order: alone, and primed with the training text. Kept on disk, for it
    takes a while. What is larger than xz's window is left out, and said."""
    sizes = {"xz": source.record["held_out_bytes"], "xz_primed": source.record["held_out_bytes"] + source.record["train_bytes"]}
    wanted = [name for name, size in sizes.items() if size <= XZ_WINDOW]
    for name in sizes.keys() - set(wanted):
        logger.info(f"not measured: {name} ({sizes[name]:,} bytes, more than the {XZ_WINDOW:,} that xz -9 looks back)")
    kept = cache_folder / f"{source.record['sha256']}.json"
    if wanted and not kept.exists():
        logger.info("compressing the same text with xz, for comparison")
        held_out = b"".join(document["text"].encode() for document in source.held_out)
        found = {"xz": 8 * len(lzma.compress(held_out, preset=9)) / len(held_out)}
        if "xz_primed" in wanted:
            train = b"".join(document["text"].encode() for document in source.train)
            primed, alone = (len(lzma.compress(text, preset=9)) for text in (train + held_out, train))
            found["xz_primed"] = 8 * (primed - alone) / len(held_out)
        cache_folder.mkdir(parents=True, exist_ok=True)
        write_json(kept, found)
    return json.loads(kept.read_text(encoding="utf-8")) if wanted else {}


def measure(config: Config, folder: Path, model: Any, token_nats: Any, source: Source, held_out: TokenCache) -> dict[str, Any]:
    """Bits per byte of all held-out text beside those of xz, and the picture of the run."""
    logger.info("measuring on all held-out text")
    # Half a row of context for each token, where its document has that much before it.
    batches = evaluation_batches(held_out, batch=2 * config.batch, seq=config.seq, stride=config.seq // 2)
    with progress("held-out batches", len(batches)) as told:
        nats, tokens = nats_by_document(token_nats, model, batches, told)
    assert sum(tokens.values()) == held_out.total_tokens - len(held_out), "every token but each document's BOS is predicted, once"

    everything = range(len(held_out))
    others = [i for i in everything if not held_out.names[i].startswith("encodings/")]  # tables of character codes

    def of(documents: Any) -> float:
        return bits_per_byte(sum(nats[i] for i in documents), sum(int(held_out.text_bytes[i]) for i in documents))

    results: dict[str, Any] = {
        "bits_per_byte": of(everything),
        "held_out_bytes": int(sum(held_out.text_bytes)),
        "held_out_tokens": sum(tokens.values()),
    }
    if 0 < len(others) < len(held_out):
        results["bits_per_byte_without_encodings"] = of(others)
    start = 0
    for part in source.parts:  # their held-out documents stand one part after another
        end = start + part.source.record["held_out_documents"]
        results.setdefault("bits_per_byte_by_source", {})[part.name] = of(range(start, end))
        start = end
    results |= xz_yardsticks(source, cache_root() / "xz")
    nats_per_bit = math.log(2) * results["held_out_bytes"] / results["held_out_tokens"]  # bits a byte → nats a token
    references = {coder: results[key] * nats_per_bit for key, coder in (("xz", "xz -9"), ("xz_primed", "xz -9, primed")) if key in results}
    plot_curves(folder / "metrics.jsonl", folder / "loss.png", title=f"{config.preset} on {source.name}", references=references)
    return results


def judge_samples(
    config: Config, folder: Path, model: Any, tokenizer: Tokenizer, prompts: list[np.ndarray], source: Source, results: dict[str, Any]
) -> list[dict[str, Any]]:
    """Draw samples, write them down, and, where the corpus is Python, count those that parse."""
    if config.report_samples == 0:
        return []
    logger.info(f"drawing {config.report_samples} samples")
    samples, drawn = draw_samples(model, tokenizer, prompts, config)
    results |= {"samples": len(samples), "samples_drawn": drawn}
    if samples and all(document["name"].endswith(".py") for document in source.held_out):
        results["samples_that_parse"] = share_that_parses(samples)
        results["real_text_that_parses"] = share_that_parses(real_samples(samples, source))
    (folder / "samples.txt").write_text("\n\n".join(f"{'=' * 100}\n{s['prompt']}⟦{s['text']}⟧" for s in samples), encoding="utf-8")
    return samples


def show(results: dict[str, Any], folder: Path, samples: list[dict[str, Any]]) -> None:
    """The last words on the screen."""
    console = Console()
    if samples:
        sample = samples[0]
        console.rule("a sample: the head of a held-out file, then the model")
        console.print(sample["prompt"], style="dim", end="", markup=False, highlight=False)
        console.print(sample["text"], markup=False, highlight=False)
    table = Table(title="held-out text, bits per byte (less is better)", title_justify="left")
    table.add_column("coder")
    table.add_column("bits per byte", justify="right")
    table.add_row("this model", f"{results['bits_per_byte']:.4f}")
    if "bits_per_byte_without_encodings" in results:
        table.add_row("this model, without encodings/", f"{results['bits_per_byte_without_encodings']:.4f}")
    for name, value in results.get("bits_per_byte_by_source", {}).items():
        table.add_row(f"this model, {name}", f"{value:.4f}")
    for key, coder in YARDSTICKS.items():
        if key in results:
            table.add_row(coder, f"{results[key]:.4f}")
    console.print(table)
    share = results["mfu"]
    console.print(
        f"{results['tokens_per_s']:,.0f} tokens/s" + (f", MFU {share:.1%}" if share is not None else ", peak of this device not known")
    )
    if results.get("samples_drawn") and not results["samples"]:
        console.print(f"none of the {results['samples_drawn']} samples drawn reached {SAMPLE_CHARACTERS} characters, so none is judged")
    if "samples_that_parse" in results:
        kept = f"{results['samples']} samples of at least {SAMPLE_CHARACTERS} characters ({results['samples_drawn']} drawn)"
        real = f"{results['real_text_that_parses']:.0%}"
        console.print(f"{results['samples_that_parse']:.0%} of {kept} parse as Python; of real text cut alike {real}", soft_wrap=True)
    lines = [f"curve {folder / 'loss.png'}", f"for transformers {folder / 'export'}"]
    if samples:
        lines.append(f"samples {folder / 'samples.txt'}")
    lines.append(f"more samples: python -m recipes.sample {folder} --prompt 'def main('")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    chosen = parse(Config, PRESETS, __doc__ or "", default_preset="4m", recipe="pretrain_small")
    try:
        main(chosen)
    except (ValueError, OSError, CheckpointError, DeviceError) as error:
        fail(str(error))
