"""Turn a model that only goes on with text into one that follows small instructions.

The model is what `recipes.pretrain_small` left, the instructions are made on this machine (`data.tasks.instructions`): sums, strings,
and questions about the code of the standard library, which the model was pretrained on; some 23,000 of them, twice over. Each is written
as a conversation in ChatML, and the model learns what the assistant says and nothing else. Measured before and after, on questions about
numbers, words and files that were held out: the loss, the share of right answers, and what was forgotten of the old text.

    python -m recipes.sft_chat runs/pretrain_small-DATE-TIME
    python -m recipes.sft_chat runs/pretrain_small-DATE-TIME --data instructions:0.5,mine.jsonl:0.5
    python -m recipes.sft_chat --resume                                  # go on with the latest run, exactly
    python -m recipes.chat runs/sft_chat-DATE-TIME                       # and talk to it

`recipes.show_chat` shows any conversation as the model reads it, what it learns from in colour. `--data` takes files of conversations in
every usual format (`data.conversations`).

Sources of the settings: two passes, and a peak of the learning rate a fifth of `pretrain_small`'s, are single guesses.
"""

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import tyro
from loguru import logger
from pydantic import Field, model_validator

import lm
from data.cache import TokenCache
from data.chat import ChatFormat, Turns
from data.chat_cache import OnBadRow, Overlong
from data.conversations import open_conversations
from data.pipeline import batch_at, evaluation_batches, train_batches
from data.rows import describe_rows, training_rows
from data.sources import open_source
from data.tasks import instructions
from lm.base import AbstractLM
from lm.digests import digest
from recipes.command_line import claimed, fail, how_to_resume, parse, resumable
from recipes.continue_pretrain import look, prepared
from recipes.corpus import describe_mixture, describe_packing, describe_source, encode
from recipes.curves import Watch, curve_for
from recipes.finetuning import (
    Encoding,
    Template,
    answer,
    chat_tokenizer,
    counts_of,
    describe_conversations,
    instruction_questions,
    known_text,
    measure,
    show,
    some_text,
    tool_questions,
)
from recipes.loading import load
from recipes.running import (
    ENDS_IN_WORDS,
    RunConfig,
    begin_session,
    check_start,
    choose_flight,
    restore,
    save_config,
    session_facts,
    trackers_of,
    watched,
)
from train.adapters import AdapterConfig, adapted, trained_part
from train.averages import AverageConfig, average_rate
from train.backends import attention_of
from train.checkpoint import Checkpoints
from train.debug import debug_nans
from train.lineage import continued_from
from train.logs import RunLog, mfu, model_flops_per_token, plain_messages, plot_curves, read_metrics, words_kept, write_json
from train.loop import interruptible, steps
from train.optimizers import OptimizerConfig, ScheduleConfig, build_optimizer, learning_rate
from train.pictures import plot_tasks
from train.publish import export
from train.runtime import choose_device, compilation_cache, device_facts, memory_in_use, peak_flops
from train.step import StepConfig, TrainState, init_state, make_step, make_token_nats

# ------------------------------------------------------------------------------------------- config


class Experiment(RunConfig):
    """Everything that makes a run of fine-tuning what it is."""

    source: Annotated[Path, tyro.conf.Positional] = Field(
        description="the model to begin with: run, Hugging Face folder, GGUF file, or owner/name on the Hub"
    )
    data: str = Field(
        description="conversations: instructions (made here), a file or folder of them, hf://owner/name/split, or A:0.7,B:0.3"
    )
    on_bad_row: OnBadRow = Field(
        "error", description="what to do with a row that is no conversation to learn from; skipped ones are counted"
    )
    overlong: Overlong = Field("split", description="a conversation longer than a row: drop it, truncate its end, or split it at its turns")
    turns: Turns = Field(
        "together", description="all turns of the assistant in one row, or apart, for templates that rewrite earlier turns"
    )
    template: Template = Field("auto", description="chat template: the model's own, the built-in chatml, or auto: its own if it has one")
    text: str = Field(
        "auto", description="text that may be forgotten, as --data of pretrain_small; auto: what the run SOURCE was trained on"
    )
    text_bytes: int = Field(200_000, ge=1000, description="bytes of its held-out part that are measured")
    seq: int | None = Field(None, gt=1, description="tokens of a row; None: the model's context, 1024 at most")
    packing: Literal["best_fit", "pad"] = Field("best_fit", description="several conversations a row, which do not see one another, or one")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability on embedding and residual branches, in place of the model's own")
    batch: int = Field(8, gt=0, description="rows a step; tokens a step = batch x seq")

    steps: int | None = resumable(None, ge=1, description="optimizer steps; None: as many as --epochs are")
    epochs: float = Field(2.0, gt=0, allow_inf_nan=False, description="passes over the conversations, where --steps is not given")
    adapter: AdapterConfig = AdapterConfig(kind="none")
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig(peak=1e-3, warmup=0.05)
    average: AverageConfig = AverageConfig()
    step: StepConfig = StepConfig()
    seed: int = Field(0, ge=0, description="of data order and dropout")

    questions: int = resumable(40, ge=0, description="held-out instructions of each task, and tool calls, asked before and after; 0: none")
    prompts: tuple[str, ...] = resumable((), description="what the model is asked before and after")
    answer_tokens: int = resumable(64, ge=1, description="tokens of an answer, at most")

    @model_validator(mode="after")
    def _fits_together(self) -> "Experiment":
        if self.batch % self.step.micro_batches:
            raise ValueError(f"batch ({self.batch} rows) must be a multiple of step.micro_batches ({self.step.micro_batches})")
        if self.optimizer.name == "schedule_free" and self.schedule.shape != "constant":
            raise ValueError("schedule_free averages instead of lowering the learning rate: add --schedule.shape constant")
        return self


class Config(Experiment):
    """The experiment on a small model of ours."""

    data: str = Field(
        instructions.NAME,
        description="conversations: instructions (made here), a file or folder of them, hf://owner/name/split, or A:0.7,B:0.3",
    )
    prompts: tuple[str, ...] = resumable(
        (
            "What is 17 + 25?",
            'Write the word "lamp" backwards.',
            "Which arguments does this function take?\ndef open_door(key, times=2):",
            "Write the signature of `read_line`, a function that does this: Read one line and return it.",
            "Hello! Who are you?",
        ),
        description="what the model is asked before and after",
    )


# ------------------------------------------------------------------------------------------- main


def main(config: Experiment, recipe: str = "sft_chat") -> Path:
    """The whole experiment, by the name of the recipe whose values these are. Returns the run folder."""
    plain_messages()
    folder = config.run_dir or Path("runs") / f"{recipe}-{datetime.now():%Y%m%d-%H%M%S}"
    with claimed(folder, recipe), words_kept(folder):
        run(config, folder, recipe)
    return folder


def run(config: Experiment, folder: Path, recipe: str) -> None:
    """Model, conversations, the measure before, loop, the measure after, in this order."""
    device = choose_device(config.device)
    compilation_cache()
    check_start(config, folder)

    # The model as it was, in fp32, with rows for the tokens of a chat.
    loaded, base_tokenizer, origin = load(config.source)
    tokenizer, model = chat_tokenizer(base_tokenizer, prepared(loaded, config.dropout), config.template)
    form = ChatFormat(tokenizer, config.turns)
    shape = model.config
    seq = config.seq or min(shape.context, 1024)
    if seq > shape.context:
        raise ValueError(f"--seq {seq} is more than the context of this model, {shape.context}")
    ops, flight = choose_flight(config, device_facts(device), n_layers=shape.n_layers, seq=seq, **attention_of(model))
    tokenizer.save(folder / "tokenizer", model_max_length=shape.context)
    logger.info(f"model: {origin}, {shape.model_type}, {model.n_params:,} parameters, context {shape.context}; rows of {seq} tokens")
    logger.info(f"on {device.device_kind}: kernels {ops.name}, {flight.dtype}, layers as a {flight.layers}, remat {flight.remat}")

    # Conversations, and text that may be forgotten, as the model was pretrained on it.
    source = open_conversations(config.data)
    describe_source(source)
    encoding = Encoding(form, seq, config.overlong, config.on_bad_row)
    train_tokens, held_out = encoding.training(source), encoding.cache(source.held_out, source, "held_out")
    describe_conversations("to train on", train_tokens)
    describe_conversations("held out", held_out)
    rows = training_rows(train_tokens, seq=seq, seed=config.seed, packing=config.packing)
    packing: dict[str, Any] = {"batch": config.batch, "seq": seq, "seed": config.seed, "packing": config.packing}
    batch_at(train_tokens, 0, **packing)  # too few conversations for one batch stop here
    describe_packing(rows)
    total = config.steps or max(1, round(config.epochs * rows.rows_per_epoch / config.batch))
    logger.info(f"{total:,} steps, {total * config.batch / rows.rows_per_epoch:.2f} epochs")
    text = text_to_remember(config, base_tokenizer)
    questions = []
    if config.questions:
        asked = source if config.data == instructions.NAME else instructions.source()
        questions = instruction_questions(form, asked, config.questions)
        if asked is not source:
            questions += tool_questions(form, source, config.questions)

    # Adapters, if any: they are trained in place of the weights, and with them the rows of new tokens.
    with_adapters = config.adapter.kind != "none"
    also = new_rows(loaded, model) if with_adapters else ()
    base = lm.Base.of(model, config.source.name) if with_adapters else None
    began = digest(eqx.filter(loaded, eqx.is_array))
    adapter_key, dropout_key = jr.split(jr.key(config.seed))

    # Optimizer and step. Moments begin at zero: the text is another.
    optimizer = build_optimizer(config.optimizer)

    tuned = adapted(model, config.adapter, key=adapter_key)
    # It holds the arrays of `model`, which the first step takes: by then all has been measured that is to be.
    begun = init_state(
        tuned,
        optimizer,
        frozen=config.optimizer.frozen,
        trainable=trained_part(tuned, config.adapter, also),
        average=config.average.name != "none",
    )
    n_trained = sum(leaf.size for leaf in jax.tree.leaves(begun.trainable))
    logger.info(f"adapter: {config.adapter.kind}; {n_trained:,} numbers are trained")

    compiled = make_step(optimizer, config.step, flight, ops, dropout_key, donate=not config.debug_nans, measured=True)
    step = debug_nans(compiled) if config.debug_nans else compiled
    token_nats = make_token_nats(flight, ops, config.step.loss_chunk)
    if not config.resume:
        save_config(config, folder)  # from here on there is a run to resume

    # Before.
    measured: dict[str, Any] = {"batch": config.batch, "seq": seq, "most": config.answer_tokens}
    kept = folder / "before.json"
    if config.resume and kept.is_file():
        before = json.loads(kept.read_text(encoding="utf-8"))
    else:
        logger.info("measuring the model as it is")
        before = measure(model, token_nats, form, held_out, text, questions, config.prompts, **measured)
        write_json(kept, before)
    logger.info(f"before: {before['loss']:.4f} nats a supervised token")

    # The model as it was goes, in fp32 it would outweigh a packed base. What is not trained of it lives on in `begun`.
    n_params, n_active = model.n_params, model.n_active_params
    del loaded, model, tuned

    # What the run is made of, for the record.
    peak = peak_flops(device)
    flops = model_flops_per_token(n_active, shape.n_layers, shape.d_model, seq)
    mixture = rows.realised(total * config.batch)
    describe_mixture(mixture)
    conversations = {"train": counts_of(train_tokens), "held_out": counts_of(held_out)}
    manifest: dict[str, Any] = {
        "continued_from": continued_from(config.source, began),
        "corpus": source.record,
        "conversations": conversations,
        "chat": {"stop_ids": list(form.stop_ids), "turns": config.turns, "overlong": config.overlong, "template": tokenizer.chat_templates},
        "old_text": None if text is None else text[0].record,
        "tokenizer": {"digest": tokenizer.digest, "vocab": tokenizer.vocab_size},
        "packing": rows.describe(),
        "mixture": mixture,
        "model": {"model_type": shape.model_type, "parameters": n_params, "trained": n_trained, **shape.model_dump()},
        "adapter": config.adapter.model_dump(mode="json"),
        "steps": total,
        "tokens": rows.pairs_in(total * config.batch),  # padding is none
        "seed": config.seed,
    }
    identity = {"conversations": source.record["sha256"], "tokenizer": tokenizer.digest, "model": began}
    kept_apart = {} if base is None else {"base": base.record(), "adapter": config.adapter.model_dump(mode="json"), "also": list(also)}

    # The loop.
    rate, rate_of_average = learning_rate(config.schedule, total), average_rate(config.average, total)
    looks = {"new": list(evaluation_batches(held_out, batch=config.batch, seq=seq, stride=seq, max_rows=config.validate_rows))}
    counts = conversations["train"]
    lost = {"truncated": counts["truncated"], "dropped": counts["dropped_overlong"] + counts["dropped_nothing_trained"]}

    def judged(state: TrainState) -> AbstractLM:
        """The model to validate and save: at the average of the weights where there is one and it is to be used."""
        averaged = state.averaged if config.average.use else None
        return state.model if averaged is None else averaged

    def plain(state: TrainState) -> AbstractLM:
        """The same, adapters merged into the weights, which are arrays again if they were packed: to ask, and to export."""
        return lm.dequantised(lm.merge(judged(state))) if with_adapters else judged(state)

    manifest["identity"] = identity
    watch = Watch(curve_for(recipe, config, identity))
    with Checkpoints(folder / "checkpoints", keep_latest=config.keep_latest) as checkpoints:
        found = restore(checkpoints, begun, identity, total, by_reference=with_adapters)
        state, start, record = found or (begun, 0, {"train_s": 0.0})
        del found, begun  # of a run that goes on these are arrays of a beginning that is not needed
        manifest["sessions"] = begin_session(recipe, folder, config, start, session_facts(device, ops, flight, peak))
        write_json(folder / "manifest.json", manifest)
        begin = time.monotonic() - record["train_s"]
        first = start + 1 if start else 0  # a new run tells of the model as it was, too
        with (
            trackers_of(config, folder, recipe, first) as trackers,
            RunLog(folder, total_steps=total, start_step=first, trackers=trackers, watch=watch.line) as log,
            train_batches(train_tokens, **packing, start_step=start, stop_step=total) as batches,
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
                stop=total,
                pause=pause,
                stop_at_spike=config.step.on_spike == "stop",
                describe=lambda index: describe_rows(rows, index * config.batch, (index + 1) * config.batch),
            )
            with watched(training, config, folder) as training:
                for done, state, arrived in training:
                    for metrics in arrived:
                        told: dict[str, Any] = {"epoch": metrics["step"] * config.batch / rows.rows_per_epoch, **lost}
                        share, memory = mfu(metrics["tokens_per_s"], flops, peak.flops_per_s), memory_in_use()["peak_bytes"]
                        log.log(**metrics, mfu=share, peak_memory_bytes=memory, **told)  # type: ignore[arg-type]
                    val_loss = None  # of these very weights, or not known
                    if done % config.validate_every == 0 or done == total:
                        val_loss = look(looks, token_nats, judged(state))["val_loss"]
                        log.log(done, val_loss=val_loss)
                    if config.prompts and done % config.sample_every == 0 and done < total:
                        asked_now = form.prompt([{"role": "user", "content": config.prompts[0]}])
                        reply = answer(plain(state), form, [asked_now], most=config.answer_tokens)[0]
                        log.message(f"step {done}, asked {config.prompts[0]!r}: {reply!r}")
                    if done % config.save_every == 0 or done == total or interrupt.due(done):
                        record = {"identity": identity, "val_loss": val_loss, "train_s": time.monotonic() - begin}
                        record |= {"model_type": shape.model_type, "model": shape.model_dump(), "use_average": config.average.use}
                        checkpoints.save(done, state.items(by_reference=with_adapters), record | kept_apart, metric=val_loss)
                    if interrupt.due(done):
                        checkpoints.wait()
                        log.message(f"stopped at step {done} of {total}, everything saved. Go on with:\n  {how_to_resume(folder, recipe)}")
                        raise SystemExit(interrupt.exit_status)

    # After.
    logger.info("measuring the model as it has become")
    after = measure(plain(state), token_nats, form, held_out, text, questions, config.prompts, **measured)
    speed = float(np.median([line["tokens_per_s"] for line in read_metrics(folder / "metrics.jsonl") if "tokens_per_s" in line]))
    results: dict[str, Any] = {"steps": total, "mixture": mixture, "conversations": conversations}
    results |= {"skipped": int(state.stats.skipped), "spikes": int(state.stats.spikes), "train_s": record["train_s"]} | watch.record()
    results |= {"tokens_per_s": speed, "mfu": mfu(speed, flops, peak.flops_per_s)}
    results |= {"loss": {"before": before["loss"], "after": after["loss"]}, "tasks": {"before": before["tasks"], "after": after["tasks"]}}
    results |= {"answers": {"before": before["answers"], "after": after["answers"]}}
    if text is not None:
        results |= {"before": {"old": before["text"]}, "after": {"old": after["text"]}}
        results["forgotten"] = after["text"]["bits_per_byte"] - before["text"]["bits_per_byte"]
    plot_curves(folder / "metrics.jsonl", folder / "loss.png", title=f"{n_params / 1e6:,.0f}M parameters on {source.name}")
    plot_tasks(before["tasks"], after["tasks"], folder / "tasks.png")
    if base is not None:
        lm.save_adapter(judged(state), folder / "adapter", base=base, also=also)
    export(plain(state), tokenizer, folder / "export", manifest=manifest, results=results)
    write_json(folder / "results.json", results)
    show(before, after, results, folder)


def new_rows(old: AbstractLM, grown: AbstractLM) -> tuple[str, ...]:
    """The roles of the matrices that got rows for new tokens, which no adapter could teach."""
    if grown.config.vocab == old.config.vocab:
        return ()
    return ("embed.weight",) if getattr(grown, "unembed", None) is None else ("embed.weight", "unembed.weight")


def text_to_remember(config: Experiment, tokenizer: Any) -> Any:
    """Held-out text of the kind that the model was trained on, as a source and encoded; `None`, and a warning, where it is not known."""
    spec = known_text(config.source) if config.text == "auto" else None if config.text == "none" else config.text
    if spec is None:
        logger.warning("no old text is named: what the model forgets is not measured. Name some with --text")
        return None
    source = some_text(open_source(spec), config.text_bytes)
    cache: TokenCache = encode(source.held_out, tokenizer, source, "held_out")
    return source, cache


if __name__ == "__main__":
    chosen = parse(Config, __doc__ or "", recipe="sft_chat")
    try:
        main(chosen)
    except ENDS_IN_WORDS as error:
        fail(str(error))
