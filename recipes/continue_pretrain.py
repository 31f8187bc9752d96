"""Go on training a model on your own text, without letting it forget the old one.

A model and its tokenizer are taken from wherever one can be loaded: a run, a Hugging Face folder, a GGUF file, the Hub. The new text is
mixed with a share of the old (replay), the learning rate rises again from 0 and falls again to 0, and both texts' held-out parts are
measured before, during and after: what was learned, and what was forgotten, in bits per byte.

    python -m recipes.continue_pretrain runs/pretrain_small-DATE-TIME --data my_texts/
    python -m recipes.continue_pretrain export/ --data notes.jsonl --replay old_texts/ --replay-share 0.2
    python -m recipes.continue_pretrain --resume           # go on with the latest run, exactly

Without `--replay`, the old text is what the run was trained on; a folder that is no run does not tell it, and then there is neither replay
nor a measure of forgetting, which is said.

Sources of the settings: re-warming, re-decaying and a few percent of replay, Ibrahim et al. 2024 (arXiv:2403.08763), who find them to match
training on all data anew. The peak of the learning rate is a single guess, a fifth of `pretrain_small`'s.
"""

import json
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from loguru import logger
from pydantic import Field, model_validator
from rich.console import Console
from rich.table import Table

import lm
from data.cache import TokenCache
from data.packing import Packing
from data.pipeline import batch_at, evaluation_batches, train_batches
from data.rows import Mixture, describe_rows, training_rows
from data.sources import Source, open_source
from data.tokenizer import Tokenizer
from lm.base import AbstractLM
from lm.digests import digest
from lm.hf import abstract
from lm.native import quantisation_of
from recipes.command_line import claimed, fail, how_to_resume, parse, resumable
from recipes.corpus import describe_mixture, describe_packing, describe_source, encode, encode_training
from recipes.curves import Watch, curve_for
from recipes.finetuning import known_text
from recipes.loading import load
from recipes.report import heads, measure, one_sample
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
from train.backends import attention_of
from train.checkpoint import Checkpoints
from train.debug import debug_nans
from train.lineage import continued_from
from train.logs import RunLog, mfu, model_flops_per_token, plain_messages, read_metrics, words_kept, write_json
from train.loop import interruptible, nats_by_document, steps
from train.optimizers import OptimizerConfig, ScheduleConfig, build_optimizer, learning_rate
from train.pictures import plot_forgetting
from train.publish import export
from train.runtime import choose_device, compilation_cache, device_facts, memory_in_use, peak_flops
from train.step import StepConfig, TrainState, init_state, make_step, make_token_nats

# ------------------------------------------------------------------------------------------- config


class Config(RunConfig):
    """Everything that makes the run what it is."""

    source: Annotated[Path, tyro.conf.Positional] = Field(
        description="the model to begin with: run, Hugging Face folder, GGUF file, or owner/name on the Hub"
    )
    data: str = Field(description="the new text: a folder, a file, hf://owner/name/split, stdlib, or a mixture A:0.7,B:0.3")
    replay: str = Field("auto", description="the old text, as --data; auto: what the run SOURCE was trained on; none: no replay")
    replay_share: float = Field(0.05, ge=0, lt=1, description="share of the training tokens taken from the old text; 0: only measure it")
    on_invalid_utf8: Literal["error", "replace", "skip"] = Field("error", description="what to do with a document that is not UTF-8")
    seq: int | None = Field(None, gt=1, description="tokens of a row; None: the model's context, 1024 at most")
    packing: Packing = Field("concat", description="rows from documents: cut to fill (concat), kept whole (best_fit), or one a row (pad)")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability on embedding and residual branches, in place of the model's own")
    batch: int = Field(8, gt=0, description="rows a step; tokens a step = batch x seq")

    steps: int | None = resumable(None, ge=1, description="optimizer steps; None: as many as fit into --minutes, measured at the start")
    minutes: float = Field(5.0, gt=0, allow_inf_nan=False, description="minutes of training where --steps is not given")
    max_epochs: float = Field(4.0, gt=0, allow_inf_nan=False, description="passes over all text, at most, where --steps is not given")
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig(peak=1e-3, warmup=0.05)
    average: AverageConfig = AverageConfig()
    step: StepConfig = StepConfig()
    seed: int = Field(0, ge=0, description="of data order, dropout and samples")

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        if self.batch % self.step.micro_batches:
            raise ValueError(f"batch ({self.batch} rows) must be a multiple of step.micro_batches ({self.step.micro_batches})")
        if self.optimizer.name == "schedule_free" and self.schedule.shape != "constant":
            raise ValueError("schedule_free averages instead of lowering the learning rate: add --schedule.shape constant")
        return self


# ------------------------------------------------------------------------------------------- main


def main(config: Config) -> Path:
    """The whole experiment. Returns the run folder."""
    plain_messages()
    folder = config.run_dir or Path("runs") / f"continue_pretrain-{datetime.now():%Y%m%d-%H%M%S}"
    with claimed(folder, "continue_pretrain"), words_kept(folder):
        run(config, folder)
    return folder


def run(config: Config, folder: Path) -> None:
    """Model, texts, the measure before, loop, the measure after, in this order."""
    device = choose_device(config.device)
    compilation_cache()
    check_start(config, folder)

    # The model as it was, in fp32 and with the dropout asked for.
    loaded, tokenizer, origin = load(config.source)
    model = prepared(loaded, config.dropout)
    shape = model.config
    seq = config.seq or min(shape.context, 1024)
    if seq > shape.context:
        raise ValueError(f"--seq {seq} is more than the context of this model, {shape.context}")
    ops, flight = choose_flight(config, device_facts(device), n_layers=shape.n_layers, seq=seq, **attention_of(model))
    tokenizer.save(folder / "tokenizer", model_max_length=shape.context)
    logger.info(f"model: {origin}, {shape.model_type}, {model.n_params:,} parameters, context {shape.context}; rows of {seq} tokens")
    logger.info(f"on {device.device_kind}: kernels {ops.name}, {flight.dtype}, layers as a {flight.layers}, remat {flight.remat}")

    # New text and old, each with a part that is only measured.
    texts = {"new": open_source(config.data, on_invalid_utf8=config.on_invalid_utf8)}
    replayed = old_text(config)
    if replayed is None:
        logger.warning("no old text: nothing is replayed, and what the model forgets is not measured. Name some with --replay")
    else:
        texts["old"] = open_source(replayed, on_invalid_utf8=config.on_invalid_utf8)
    for name, source in texts.items():
        logger.info(f"{name} text:")
        describe_source(source)
    held_out = {name: encode(source.held_out, tokenizer, source, "held_out") for name, source in texts.items()}
    train_tokens = with_replay(texts, tokenizer, config.replay_share)
    rows = training_rows(train_tokens, seq=seq, seed=config.seed, packing=config.packing)
    packing: dict[str, Any] = {"batch": config.batch, "seq": seq, "seed": config.seed, "packing": config.packing}
    first_batch = batch_at(train_tokens, 0, **packing)  # a corpus too small for one stops here
    if config.steps is not None:
        rows.require(config.steps * config.batch, f"{config.steps} steps of {config.batch} rows")  # and a part that ends early
    describe_packing(rows)

    # Optimizer and step. Moments begin at zero: the text is another.
    optimizer = build_optimizer(config.optimizer)
    dropout_key = jr.split(jr.key(config.seed))[1]
    began = digest(eqx.filter(model, eqx.is_array))

    def fresh_state() -> TrainState:
        own = jax.tree.map(jnp.array, model)  # the step takes the arrays it is given, and the model is measured again
        return init_state(own, optimizer, frozen=config.optimizer.frozen, average=config.average.name != "none")

    abstract_state = jax.eval_shape(fresh_state)
    compiled = make_step(optimizer, config.step, flight, ops, dropout_key, donate=not config.debug_nans)
    step = debug_nans(compiled) if config.debug_nans else compiled
    token_nats = make_token_nats(flight, ops, config.step.loss_chunk)
    if not config.resume:
        save_config(config, folder)  # from here on there is a run to resume
    if config.steps is None:
        fit = steps_that_fit(step, fresh_state(), first_batch, rows, config.batch, minutes=config.minutes, max_epochs=config.max_epochs)
        config = config.model_copy(update={"steps": fit})
        save_config(config, folder)
    assert config.steps is not None
    mixture = rows.realised(config.steps * config.batch)
    describe_mixture(mixture)

    # Before.
    sizes = {"batch": 2 * config.batch, "seq": seq}
    measured = folder / "before.json"
    if config.resume and measured.is_file():
        before = json.loads(measured.read_text(encoding="utf-8"))
    else:
        logger.info("measuring the model as it is")
        before = {name: measure(model, token_nats, source, held_out[name], **sizes) for name, source in texts.items()}
        write_json(measured, before)
    logger.info("bits per byte before: " + ", ".join(f"{name} text {found['bits_per_byte']:.4f}" for name, found in before.items()))

    # What the run is made of, for the record, and what this process runs it with.
    peak = peak_flops(device)
    flops = model_flops_per_token(model.n_active_params, shape.n_layers, shape.d_model, seq)
    manifest: dict[str, Any] = {
        "continued_from": continued_from(config.source, began),
        "corpus": texts["new"].record,
        "replay": texts["old"].record if "old" in texts else None,
        "tokenizer": {"digest": tokenizer.digest, "vocab": tokenizer.vocab_size},
        "packing": rows.describe(),
        "mixture": mixture,
        "model": {"model_type": shape.model_type, "parameters": model.n_params, **shape.model_dump()},
        "steps": config.steps,
        "tokens": rows.pairs_in(config.steps * config.batch),  # padding is none
        "seed": config.seed,
    }
    identity = {name: source.record["sha256"] for name, source in texts.items()} | {"tokenizer": tokenizer.digest, "model": began}

    # The loop.
    rate, rate_of_average = learning_rate(config.schedule, config.steps), average_rate(config.average, config.steps)
    looks = {
        name: list(evaluation_batches(cache, batch=config.batch, seq=seq, stride=seq, max_rows=config.validate_rows))
        for name, cache in held_out.items()
    }
    prompt = heads(texts["new"], tokenizer, seq=seq, most=1)[0]

    def judged(state: TrainState) -> Any:
        """The model to validate, sample and export: at the average of the weights where there is one and it is to be used."""
        averaged = state.averaged if config.average.use else None
        return state.model if averaged is None else averaged

    manifest["identity"] = identity
    watch = Watch(curve_for("continue_pretrain", config, identity))
    with Checkpoints(folder / "checkpoints", keep_latest=config.keep_latest) as checkpoints:
        state, start, record = restore(checkpoints, abstract_state, identity, config.steps) or (fresh_state(), 0, {"train_s": 0.0})
        manifest["sessions"] = begin_session("continue_pretrain", folder, config, start, session_facts(device, ops, flight, peak))
        write_json(folder / "manifest.json", manifest)
        begin = time.monotonic() - record["train_s"]
        first = start + 1 if start else 0  # a new run tells of the model as it was, too
        with (
            trackers_of(config, folder, "continue_pretrain", first) as trackers,
            RunLog(folder, total_steps=config.steps, start_step=first, trackers=trackers, watch=watch.line) as log,
            train_batches(train_tokens, **packing, start_step=start, stop_step=config.steps) as batches,
            interruptible() as interrupt,
        ):

            def pause(done: int) -> bool:
                intervals = (config.save_every, config.validate_every, config.sample_every)
                return interrupt.due(done) or any(done % interval == 0 for interval in intervals)

            if start == 0:
                log.log(0, **look(looks, token_nats, judged(state)))
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
                        share = mfu(metrics["tokens_per_s"], flops, peak.flops_per_s)
                        log.log(**metrics, mfu=share, peak_memory_bytes=memory_in_use()["peak_bytes"])  # type: ignore[arg-type]
                    val_loss = None  # on new text, of these very weights, or not known
                    if done % config.validate_every == 0 or done == config.steps:
                        losses = look(looks, token_nats, judged(state))
                        val_loss = losses["val_loss"]
                        log.log(done, **losses)
                    if done % config.sample_every == 0 and done < config.steps:
                        sample = one_sample(judged(state), tokenizer, prompt, seq=seq, seed=config.seed)
                        log.message(f"step {done}, continuing a held-out file: {sample!r}")
                    if done % config.save_every == 0 or done == config.steps or interrupt.due(done):
                        record = {"identity": identity, "val_loss": val_loss, "train_s": time.monotonic() - begin}
                        record |= {"model_type": shape.model_type, "model": shape.model_dump(), "use_average": config.average.use}
                        checkpoints.save(done, state.items(), record, metric=val_loss)
                    if interrupt.due(done):
                        checkpoints.wait()
                        resume = how_to_resume(folder, "continue_pretrain")
                        log.message(f"stopped at step {done} of {config.steps}, everything saved. Go on with:\n  {resume}")
                        raise SystemExit(interrupt.exit_status)

    # After.
    logger.info("measuring the model as it has become")
    after = {name: measure(judged(state), token_nats, source, held_out[name], **sizes) for name, source in texts.items()}
    speeds = [line["tokens_per_s"] for line in read_metrics(folder / "metrics.jsonl") if "tokens_per_s" in line]
    results: dict[str, Any] = {"before": before, "after": after, "steps": config.steps, "mixture": mixture}
    results |= {"skipped": int(state.stats.skipped), "spikes": int(state.stats.spikes), "train_s": record["train_s"]} | watch.record()
    results |= {"tokens_per_s": float(np.median(speeds)), "mfu": mfu(float(np.median(speeds)), flops, peak.flops_per_s)}
    if "old" in texts:
        results["forgotten"] = after["old"]["bits_per_byte"] - before["old"]["bits_per_byte"]
    plot_forgetting(folder / "metrics.jsonl", folder / "forgetting.png")
    export(judged(state), tokenizer, folder / "export", manifest=manifest, results=after["new"] | results)
    write_json(folder / "results.json", results)
    show(results, folder)


# ------------------------------------------------------------------------------------------- model and text


def prepared(model: AbstractLM, dropout: float) -> AbstractLM:
    """The same weights in fp32, in a model with this dropout. Attention's own is switched off: fast kernels have none."""
    if packed := quantisation_of(model):
        kinds = sorted({str(record["kind"]) for record in packed.values()})
        raise ValueError(
            f"this model is packed ({', '.join(kinds)}): train the one it was made from; with adapters its weights can be packed for "
            "the run (--adapter.base, where the recipe has it)"
        )
    config = model.config
    wanted = {"dropout": dropout, "embed_dropout": dropout, "attention_dropout": 0.0}
    if dropout > 0 and "dropout" not in type(config).model_fields:
        raise ValueError(f"--dropout {dropout}: a {config.model_type} has no dropout on its branches; leave it out")
    changed = config.model_copy(update={name: value for name, value in wanted.items() if name in type(config).model_fields})
    differs = {name: getattr(config, name) for name in wanted if getattr(config, name, None) != getattr(changed, name, None)}
    if differs:
        logger.info(f"dropout of the model: {differs}; now { ({name: getattr(changed, name) for name in differs}) }")
    skeleton = abstract(lm.ARCHITECTURES[config.model_type].model.init, changed)
    return jax.tree.unflatten(jax.tree.structure(skeleton), [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(model)])


def old_text(config: Config) -> str | None:
    """What the model was trained on, if that is known or said."""
    if config.replay != "auto":
        return None if config.replay == "none" else config.replay
    return known_text(config.source)


def with_replay(texts: Mapping[str, Source], tokenizer: Tokenizer, share: float) -> TokenCache | Mixture:
    """The tokens of the new text and, where there is an old one, that share of its. Parts of mixtures keep their ratios."""
    if "old" not in texts or share == 0:
        return encode_training(texts["new"], tokenizer, "repeat")
    names: list[str] = []
    caches: list[TokenCache] = []
    weights: list[float] = []
    for name, share_of_all in (("new", 1 - share), ("old", share)):
        tokens = encode_training(texts[name], tokenizer, "repeat")
        if isinstance(tokens, TokenCache):
            tokens = Mixture((texts[name].name,), (tokens,), (1.0,))
        names += [f"{name} text: {part}" for part in tokens.names]
        caches += tokens.caches
        weights += [share_of_all * weight / sum(tokens.weights) for weight in tokens.weights]
    return Mixture(tuple(names), tuple(caches), tuple(weights))


def look(looks: Mapping[str, Any], token_nats: Any, model: Any) -> dict[str, float]:
    """Nats a token on some held-out rows: `val_loss` of the new text, `old_val_loss` of the old one."""
    found = {}
    for name, batches in looks.items():
        nats, tokens = nats_by_document(token_nats, model, batches)
        found["val_loss" if name == "new" else "old_val_loss"] = sum(nats.values()) / sum(tokens.values())
    return found


def show(results: dict[str, Any], folder: Path) -> None:
    """The last words on the screen."""
    console = Console()
    console.print("held-out text, bits per byte (less is better)", style="italic", highlight=False)
    table = Table()
    for column in ("text", "before", "after", "change"):
        table.add_column(column, justify="left" if column == "text" else "right")
    for name, before in results["before"].items():
        old, new = before["bits_per_byte"], results["after"][name]["bits_per_byte"]
        table.add_row(f"{name} text", f"{old:.4f}", f"{new:.4f}", f"{new - old:+.4f}")
    console.print(table)
    lines = [f"{results['tokens_per_s']:,.0f} tokens/s" + (f", MFU {results['mfu']:.1%}" if results["mfu"] is not None else "")]
    lines += [f"curves {folder / 'forgetting.png'}", f"for transformers {folder / 'export'}"]
    lines.append(f"samples: python -m recipes.sample {folder} --prompt '…'")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    chosen = parse(Config, __doc__ or "", recipe="continue_pretrain")
    try:
        main(chosen)
    except ENDS_IN_WORDS as error:
        fail(str(error))
