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
(arXiv:2502.15938); QK-norm, RMSNorm, SwiGLU and tied embeddings as in Qwen3 (arXiv:2505.09388); ten times the learning rate for the
embedding, and the learning rate by the width: measured (docs/ablations.md).
"""

import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Self

import jax
import jax.random as jr
import numpy as np
from loguru import logger
from pydantic import Field, model_validator

import lm
from data.packing import Packing
from data.pipeline import batch_at, evaluation_batches, train_batches
from data.rows import OnEnd, describe_rows, training_rows
from data.sources import Source, open_source
from data.tokenizer import SPECIAL_TOKENS, Tokenizer
from lm.flight import Flight
from lm.models.qwen3 import Qwen3Config
from recipes.command_line import claimed, fail, how_to_resume, parse, resumable
from recipes.corpus import describe_mixture, describe_packing, describe_source, encode, encode_training, fewer_held_out
from recipes.curves import Watch, curve_for
from recipes.report import bits_of, draw_curves, heads, judge_samples, measure, nats_of, one_sample, show, xz_yardsticks
from recipes.running import (
    ENDS_IN_WORDS,
    RunConfig,
    begin_session,
    check_start,
    choose_flight,
    restore,
    save_config,
    session_facts,
    steps_that_fit,
    trackers_of,
    watched,
)
from train.averages import AverageConfig, average_rate
from train.checkpoint import Checkpoints
from train.debug import debug_nans
from train.logs import RunLog, mfu, model_flops_per_token, plain_messages, read_metrics, words_kept, write_json
from train.loop import interruptible, nats_by_document, steps
from train.optimizers import OptimizerConfig, ScheduleConfig, build_optimizer, learning_rate
from train.pictures import plot_update_ratios
from train.publish import export
from train.runtime import choose_device, compilation_cache, device_facts, memory_in_use, peak_flops
from train.step import CompiledStep, StepConfig, TrainState, init_state, make_step, make_token_nats
from train.transfer import peak_at

# ------------------------------------------------------------------------------------------- config


class Experiment(RunConfig):
    """Everything that makes the run what it is. `pretrain_124m` and `pretrain_1b` are the same with other values."""

    data: str = Field(
        "stdlib", description="the corpus: stdlib, a folder, a file (text, jsonl, parquet), hf://owner/name/split, or a mixture A:0.7,B:0.3"
    )
    on_end: OnEnd = Field("repeat", description="what a part of a mixture does after its last row: begin again, or stop the run")
    on_invalid_utf8: Literal["error", "replace", "skip"] = Field("error", description="what to do with a document that is not UTF-8")
    held_out_documents: int | None = Field(
        None, ge=1, description="held-out documents measured, evenly spaced; the others are left out of everything. None: all"
    )
    tokenizer_documents: int | None = Field(
        None, ge=1, description="training documents that the tokenizer is learned from, evenly spaced; None: all"
    )
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
    minutes: float = Field(8.0, gt=0, allow_inf_nan=False, description="minutes of training where --steps is not given")
    max_epochs: float = Field(6.0, gt=0, allow_inf_nan=False, description="passes over the corpus, at most, where --steps is not given")
    optimizer: OptimizerConfig = OptimizerConfig(embed_rate=10.0)
    schedule: ScheduleConfig = ScheduleConfig()
    average: AverageConfig = AverageConfig()
    step: StepConfig = StepConfig()
    seed: int = Field(0, ge=0, description="of weights, data order, dropout and samples")

    report_samples: int = resumable(64, ge=0, description="samples judged at the end")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model ({self.d_model}) must be a multiple of n_heads ({self.n_heads}): a head is d_model / n_heads wide")
        self.model_config_of(self.vocab)  # raises where heads cannot be grouped
        if self.batch % self.step.micro_batches:
            raise ValueError(f"batch ({self.batch} rows) must be a multiple of step.micro_batches ({self.step.micro_batches})")
        if self.optimizer.name == "schedule_free" and self.schedule.shape != "constant":
            raise ValueError("schedule_free averages instead of lowering the learning rate: add --schedule.shape constant")
        return self

    def model_config_of(self, vocab: int) -> Any:
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


class Config(Experiment):
    """The experiment in sizes for a laptop."""

    preset: Literal["1m", "4m", "14m", "30m", "60m"] = Field("4m", description="sizes of model and batch, by parameter count")


def sized(*, vocab: int, d_model: int, n_layers: int, d_ff: int, seq: int, batch: int) -> dict[str, Any]:
    """A preset: heads 64 wide, and the settings that go along with the width by the rules of `train.transfer`."""
    heads = d_model // 64
    sizes = {"vocab": vocab, "d_model": d_model, "n_layers": n_layers, "n_heads": heads, "n_kv_heads": heads, "d_ff": d_ff}
    return sizes | {"seq": seq, "batch": batch, "schedule": ScheduleConfig(peak=peak_at(d_model))}


PRESETS: dict[str, dict[str, Any]] = {
    "1m": sized(vocab=2048, d_model=128, n_layers=4, d_ff=352, seq=256, batch=8),
    "4m": {},
    "14m": sized(vocab=8192, d_model=384, n_layers=6, d_ff=1024, seq=512, batch=8),
    "30m": sized(vocab=8192, d_model=512, n_layers=8, d_ff=1376, seq=512, batch=16),
    "60m": sized(vocab=16384, d_model=640, n_layers=10, d_ff=1728, seq=512, batch=32),
}

# Tokens a parameter, below which a smaller model does better in the same time: with 0.1 the preset 4m lost to 1m, with 0.7 it won.
FEW_TOKENS = 0.5

# ------------------------------------------------------------------------------------------- main


def main(config: Experiment, recipe: str = "pretrain_small") -> Path:
    """The whole experiment, by the name of the recipe whose values these are. Returns the run folder."""
    plain_messages()
    folder = config.run_dir or Path("runs") / f"{recipe}-{datetime.now():%Y%m%d-%H%M%S}"
    with claimed(folder, recipe), words_kept(folder):
        run(config, folder, recipe)
    return folder


def run(config: Experiment, folder: Path, recipe: str) -> None:
    """Corpus, tokenizer, model, loop, report, in this order."""
    device = choose_device(config.device)
    ops, flight = flight_of(config, device_facts(device))
    compilation_cache()
    check_start(config, folder)

    # Corpus, tokenizer, tokens on disk.
    source = open_source(config.data, on_invalid_utf8=config.on_invalid_utf8)
    if config.held_out_documents is not None:
        source = fewer_held_out(source, config.held_out_documents)
    describe_source(source)
    tokenizer = train_or_load_tokenizer(config, source, folder / "tokenizer")
    train_tokens = encode_training(source, tokenizer, config.on_end)
    held_out = encode(source.held_out, tokenizer, source, "held_out")
    bytes_per_token = float(np.sum(held_out.text_bytes)) / held_out.total_tokens
    logger.info(f"tokenizer: {tokenizer.vocab_size:,} tokens, {bytes_per_token:.2f} bytes a token on held-out text")
    rows = training_rows(train_tokens, seq=config.seq, seed=config.seed, packing=config.packing)
    packing: dict[str, Any] = {"batch": config.batch, "seq": config.seq, "seed": config.seed, "packing": config.packing}
    first_batch = batch_at(train_tokens, 0, **packing)  # a corpus too small for one stops here
    if config.steps is not None:
        rows.require(config.steps * config.batch, f"{config.steps} steps of {config.batch} rows")  # and a part that ends early
    describe_packing(rows)

    # Model, optimizer, step.
    model_config = config.model_config_of(tokenizer.vocab_size)
    fresh_state, compiled = beginning(config, model_config, flight, ops)
    abstract = jax.eval_shape(fresh_state)
    n_params = sum(leaf.size for leaf in jax.tree.leaves(abstract.model))
    n_trained = sum(leaf.size for leaf in jax.tree.leaves(abstract.trainable))
    step = debug_nans(compiled) if config.debug_nans else compiled
    token_nats = make_token_nats(flight, ops, config.step.loss_chunk)
    frozen = f" ({n_params - n_trained:,} of them frozen)" if n_trained < n_params else ""
    logger.info(f"model: {n_params:,} parameters{frozen}, {config.n_layers} layers, d_model {config.d_model}, context {config.seq}")
    logger.info(f"on {device.device_kind}: kernels {ops.name}, {flight.dtype}, layers as a {flight.layers}, remat {flight.remat}")
    if not config.resume:
        save_config(config, folder)  # from here on there is a run to resume

    # How long: measured once, then part of the config, so that a resumed run ends where this one would.
    if config.steps is None:
        fit = steps_that_fit(step, fresh_state(), first_batch, rows, config.batch, minutes=config.minutes, max_epochs=config.max_epochs)
        config = config.model_copy(update={"steps": fit})
        save_config(config, folder)
        tell_if_too_large(n_params, rows.pairs_in(fit * config.batch))
    assert config.steps is not None

    # What the run is made of, for the record, and what this process runs it with.
    peak = peak_flops(device)
    flops = model_flops_per_token(abstract.model.n_active_params, config.n_layers, config.d_model, config.seq)
    manifest = {
        "corpus": source.record,
        "tokenizer": {"digest": tokenizer.digest, "vocab": tokenizer.vocab_size, "bytes_per_token_held_out": bytes_per_token},
        "packing": rows.describe(),
        "mixture": rows.realised(config.steps * config.batch),
        "model": {"model_type": model_config.model_type, "parameters": n_params, "trained": n_trained, **model_config.model_dump()},
        "steps": config.steps,
        "tokens": rows.pairs_in(config.steps * config.batch),  # padding is none
        "seed": config.seed,
    }
    describe_mixture(rows.realised(config.steps * config.batch))
    identity = {"corpus": source.record["sha256"], "tokenizer": tokenizer.digest}
    manifest["identity"] = identity
    watch = Watch(curve_for(recipe, config, identity))

    # The loop.
    rate, rate_of_average = learning_rate(config.schedule, config.steps), average_rate(config.average, config.steps)
    at_once = config.batch // config.step.micro_batches  # rows that memory holds in training
    validation = list(evaluation_batches(held_out, batch=at_once, seq=config.seq, stride=config.seq, max_rows=config.validate_rows))
    prompts = heads(source, tokenizer, seq=config.seq)

    def judged(state: TrainState) -> Any:
        """The model to validate, sample and export: at the average of the weights where there is one and it is to be used."""
        averaged = state.averaged if config.average.use else None
        return state.model if averaged is None else averaged

    with Checkpoints(folder / "checkpoints", keep_latest=config.keep_latest) as checkpoints:
        state, start, record = restore(checkpoints, abstract, identity, config.steps) or (fresh_state(), 0, {"train_s": 0.0})
        manifest["sessions"] = begin_session(recipe, folder, config, start, session_facts(device, ops, flight, peak))
        write_json(folder / "manifest.json", manifest)
        begin = time.monotonic() - record["train_s"]
        with (
            trackers_of(config, folder, recipe, start + 1) as trackers,
            RunLog(folder, total_steps=config.steps, start_step=start + 1, trackers=trackers, watch=watch.line) as log,
            train_batches(train_tokens, **packing, start_step=start, stop_step=config.steps) as batches,
            interruptible() as interrupt,
        ):

            def pause(done: int) -> bool:
                intervals = (config.save_every, config.validate_every, config.sample_every)
                return interrupt.due(done) or any(done % interval == 0 for interval in intervals)

            training = steps(
                step,
                state,
                batches,
                rate,
                average_rate=rate_of_average,
                start=start,
                stop=config.steps,
                pause=pause,
                stop_at_spike=config.step.on_spike == "stop",
                describe=lambda index: describe_rows(rows, index * config.batch, (index + 1) * config.batch),
            )
            with watched(training, config, folder) as training:
                for done, state, arrived in training:
                    for metrics in arrived:
                        epoch = metrics["step"] * config.batch / rows.rows_per_epoch
                        share = mfu(metrics["tokens_per_s"], flops, peak.flops_per_s)
                        memory = memory_in_use()["peak_bytes"]
                        log.log(**metrics, mfu=share, epoch=epoch, peak_memory_bytes=memory)  # type: ignore[arg-type]
                    val_loss = None  # of these very weights, or not known
                    if done % config.validate_every == 0 or done == config.steps:
                        nats, tokens = nats_by_document(token_nats, judged(state), validation)
                        val_loss = sum(nats.values()) / sum(tokens.values())
                        log.log(done, val_loss=val_loss)
                    if done % config.sample_every == 0 and done < config.steps:
                        sample = one_sample(judged(state), tokenizer, prompts[0], seq=config.seq, seed=config.seed)
                        log.message(f"step {done}, continuing a held-out file: {sample!r}")
                    if done % config.save_every == 0 or done == config.steps or interrupt.due(done):
                        record = {"identity": identity, "val_loss": val_loss, "train_s": time.monotonic() - begin}
                        record |= {
                            "model_type": model_config.model_type,
                            "model": model_config.model_dump(),
                            "use_average": config.average.use,
                        }
                        checkpoints.save(done, state.items(), record, metric=val_loss)
                    if interrupt.due(done):
                        checkpoints.wait()
                        resume = how_to_resume(folder, recipe)
                        log.message(f"stopped at step {done} of {config.steps}, everything saved. Go on with:\n  {resume}")
                        raise SystemExit(interrupt.exit_status)

    # What came of it.
    logger.info("measuring on all held-out text")
    sizes = {"batch": 2 * at_once, "seq": config.seq}
    results = measure(judged(state), token_nats, source, held_out, **sizes)
    if state.averaged is not None:
        other, name = (state.model, "as trained") if config.average.use else (state.averaged, "averaged")
        nats, _ = nats_of(token_nats, other, held_out, **sizes)
        results["bits_per_byte_other_weights"] = {name: bits_of(held_out, nats, range(len(held_out)))}
        results["weights"] = "averaged" if config.average.use else "as trained"
    results |= xz_yardsticks(source)
    title = f"{n_params / 1e6:,.0f}M parameters on {source.name}"
    draw_curves(folder, results, title)
    plot_update_ratios(folder / "metrics.jsonl", folder / "update_ratios.png", title=title)
    speeds = [line["tokens_per_s"] for line in read_metrics(folder / "metrics.jsonl") if "tokens_per_s" in line]
    speed = float(np.median(speeds))
    results |= {"steps": config.steps, "skipped": int(state.stats.skipped), "spikes": int(state.stats.spikes)}
    results |= watch.record()
    results |= {"train_s": record["train_s"], "tokens_per_s": speed, "mfu": mfu(speed, flops, peak.flops_per_s)}
    if mixture := rows.realised(config.steps * config.batch):
        results["mixture"] = mixture
    drawn: dict[str, Any] = {"count": config.report_samples, "seq": config.seq, "seed": config.seed}
    samples = judge_samples(judged(state), tokenizer, prompts, source, results, folder, **drawn)
    export(judged(state), tokenizer, folder / "export", manifest=manifest, results=results)
    write_json(folder / "results.json", results)
    show(results, folder, samples)


def flight_of(config: Experiment, device: Mapping[str, Any]) -> tuple[lm.Ops, Flight]:
    """Kernels and flight for a device with these facts."""
    return choose_flight(config, device, n_layers=config.n_layers, head_dim=config.d_model // config.n_heads, seq=config.seq)


def beginning(config: Experiment, model_config: Any, flight: Flight, ops: lm.Ops) -> tuple[Callable[[], TrainState], CompiledStep]:
    """How to make the first state, and the step. `recipes.plan` compiles the same for a card that is not there."""
    optimizer = build_optimizer(config.optimizer)
    model_key, dropout_key = jr.split(jr.key(config.seed))

    def fresh_state() -> TrainState:
        model = lm.build(model_config, key=model_key)
        return init_state(model, optimizer, frozen=config.optimizer.frozen, average=config.average.name != "none")

    return fresh_state, make_step(optimizer, config.step, flight, ops, dropout_key, donate=not config.debug_nans)


def train_or_load_tokenizer(config: Experiment, source: Source, folder: Path) -> Tokenizer:
    """Trained once a run, on the training documents alone."""
    if config.resume:
        return Tokenizer.load(folder)
    documents = len(source.train)
    taken = min(documents, config.tokenizer_documents or documents)
    logger.info(f"training a tokenizer of {config.vocab:,} tokens on {taken:,} documents")
    texts = (source.train[i * documents // taken]["text"] for i in range(taken))  # one text in memory at a time
    tokenizer = Tokenizer.train(texts, config.vocab)
    tokenizer.save(folder, model_max_length=config.seq)
    return tokenizer


def tell_if_too_large(n_params: int, tokens: int) -> None:
    """Say so where the time gives a model few tokens for its size: a smaller one would come further in it."""
    if tokens < FEW_TOKENS * n_params:
        logger.warning(
            f"only {tokens / n_params:.2f} tokens a parameter: in the same time a smaller model comes to fewer bits per byte "
            "(docs/ablations.md); take a smaller --preset or --d-model"
        )


if __name__ == "__main__":
    chosen = parse(Config, __doc__ or "", recipe="pretrain_small", presets=PRESETS, default_preset="4m")
    try:
        main(chosen)
    except ENDS_IN_WORDS as error:
        fail(str(error))
