"""Distil: a student learns what its teacher says of every token, instead of only which token came.

The teacher is any model that can be loaded; the student another one with the same tokenizer, or a fresh, smaller one. Both read the same
rows, and the student is pulled towards the teacher's distribution over the whole vocabulary at every place. What that brought is measured
on held-out text before and after: the student's loss and bits per byte, the teacher's, and how far the two are apart. `--control` trains
the same student on the same rows for as many steps with the plain next-token loss: the figure that a distilled one must beat.

    python -m recipes.distill runs/pretrain_small-DATE-TIME --student 1m
    python -m recipes.distill runs/pretrain_small-DATE-TIME --student 1m --control
    python -m recipes.distill runs/pretrain_small-DATE-TIME --student 1m --top-k 32        # the teacher is asked once, and then put away
    python -m recipes.distill runs/sft_chat-DATE-TIME --student runs/small --data-kind conversations --on-policy --loss.kind reverse
    python -m recipes.distill --resume                                                  # go on with the latest run, exactly

Sources of the settings: temperature 1 and no next-token loss, so that forward KL and the control differ in the targets alone; Hinton et al.
2015 (arXiv:1503.02531) soften both with temperatures of 1 to 20. Reverse KL on the student's own words: Agarwal et al. 2023
(arXiv:2306.13649). Optimizer and learning rate are those of `pretrain_small`; a student that can already do something wants a fifth of the
peak, as in `continue_pretrain`, a single guess like these.
"""

import json
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import equinox as eqx
import jax.random as jr
import numpy as np
import tyro
from loguru import logger
from pydantic import Field, model_validator

from data.chat_cache import OnBadRow, Overlong
from data.packing import Packing
from data.pipeline import batch_at, evaluation_batches, train_batches
from data.rows import describe_rows, training_rows
from data.teaching import TeacherTargets
from lm.base import AbstractLM
from lm.digests import digest
from lm.generate import Sampler
from recipes.command_line import claimed, fail, how_to_resume, parse, resumable
from recipes.corpus import describe_mixture, describe_packing, describe_source
from recipes.curves import Watch, curve_for
from recipes.distilling import (
    Kind,
    OnPolicy,
    apart,
    as_teacher,
    data_of,
    measure,
    parts_of,
    show,
    student_of,
    taught_batches,
    texts_of,
    write_targets,
)
from recipes.loading import load
from recipes.report import one_sample
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
from train.averages import AverageConfig, average_rate
from train.backends import attention_of
from train.checkpoint import Checkpoints
from train.debug import debug_nans
from train.distillation import Distillation, DistillationConfig, Teacher, make_comparison, make_top_k
from train.lineage import continued_from
from train.logs import RunLog, mfu, model_flops_per_token, plain_messages, read_metrics, words_kept, write_json
from train.loop import interruptible, nats_by_document, steps
from train.optimizers import OptimizerConfig, ScheduleConfig, build_optimizer, learning_rate
from train.pictures import plot_distillation
from train.publish import export
from train.runtime import cache_root, choose_device, compilation_cache, device_facts, memory_in_use, peak_flops
from train.step import StepConfig, TrainState, init_state, make_step, make_token_nats

# ------------------------------------------------------------------------------------------- config


class Config(RunConfig):
    """Everything that makes the run what it is."""

    teacher: Annotated[Path, tyro.conf.Positional] = Field(
        description="the model to learn from: run, Hugging Face folder, GGUF file, or owner/name on the Hub"
    )
    student: str = Field("1m", description="the model that learns: one with the same tokenizer, or 1m, 4m, 14m, 30m, 60m for a fresh one")
    data: str = Field("auto", description="what is read, as in pretrain_small or sft_chat; auto: what the run TEACHER was trained on")
    data_kind: Kind = Field(
        "text", description="text, every token of which counts, or conversations, where what the assistant says does (auto: instructions)"
    )
    overlong: Overlong = Field("split", description="a conversation longer than a row: drop it, truncate its end, or split it at its turns")
    on_bad_row: OnBadRow = Field("error", description="what to do with a row that is no conversation; skipped ones are counted")
    loss: DistillationConfig = DistillationConfig()
    control: bool = Field(False, description="no teacher: the same student, rows and steps with the plain next-token loss")
    top_k: int | None = Field(
        None,
        ge=1,
        description="ask the teacher once, before the first step, and keep its k likeliest tokens on disk; None: at each step",
    )
    on_policy: bool = Field(False, description="learn on what the student itself writes, from beginnings of the data on")
    prompt_tokens: int = Field(64, ge=1, description="on-policy: longest beginning, in tokens")
    max_new_tokens: int = Field(64, ge=1, description="on-policy: longest that is written, its end included")
    draw_temperature: float = Field(1.0, gt=0, description="on-policy: of the student's draws; 1: its own distribution")
    seq: int | None = Field(None, gt=1, description="tokens of a row; None: the student's context, 1024 at most")
    packing: Literal[Packing, "auto"] = Field(
        "auto", description="rows from documents: concat, best_fit or pad; auto: concat for text, best_fit for conversations"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="probability on embedding and residual branches of the student")
    batch: int = Field(8, gt=0, description="rows a step; tokens a step = batch x seq")

    steps: int = resumable(500, ge=1, description="optimizer steps; the same for --control, so that the two compare")
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    average: AverageConfig = AverageConfig()
    step: StepConfig = StepConfig()
    seed: int = Field(0, ge=0, description="of a fresh student, data order, dropout, draws and samples")

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        if self.batch % self.step.micro_batches:
            raise ValueError(f"batch ({self.batch} rows) must be a multiple of step.micro_batches ({self.step.micro_batches})")
        if self.optimizer.name == "schedule_free" and self.schedule.shape != "constant":
            raise ValueError("schedule_free averages instead of lowering the learning rate: add --schedule.shape constant")
        if self.control and (self.top_k is not None or self.on_policy):
            raise ValueError("control learns from the text and asks no teacher: leave out --top-k and --on-policy")
        if self.on_policy and self.top_k is not None:
            raise ValueError("on_policy: nobody can keep what the teacher says of a text that is not written yet: leave out --top-k")
        if self.on_policy and self.loss.next_token:
            raise ValueError("on_policy: the next token is the student's own draw, and nothing to learn: leave out --loss.next-token")
        if self.step.z_loss and not self.control:
            raise ValueError("step.z_loss belongs to the next-token loss, and this is another: leave it out, or take --control")
        if self.data_kind == "conversations" and self.packing == "concat":
            raise ValueError("packing concat would cut conversations anywhere: take best_fit or pad")
        return self

    @property
    def chosen_packing(self) -> Packing:
        if self.packing != "auto":
            return self.packing
        return "concat" if self.data_kind == "text" else "best_fit"

    @property
    def learned_from(self) -> str:
        """In words, for the report."""
        if self.control:
            return "the next-token loss alone (control)"
        words = f"{self.loss.kind} divergence from the teacher at temperature {self.loss.temperature:g}"
        words += f", {self.loss.next_token:.0%} next-token loss" if self.loss.next_token else ""
        words += "" if self.top_k is None else f", its {self.top_k} likeliest tokens"
        return words + (", on the student's own words" if self.on_policy else "")


# ------------------------------------------------------------------------------------------- main


def main(config: Config) -> Path:
    """The whole experiment. Returns the run folder."""
    plain_messages()
    folder = config.run_dir or Path("runs") / f"distill-{datetime.now():%Y%m%d-%H%M%S}"
    with claimed(folder, "distill"), words_kept(folder):
        run(config, folder)
    return folder


def run(config: Config, folder: Path) -> None:
    """Teacher, student, rows, the measure before, loop, the measure after, in this order."""
    device = choose_device(config.device)
    compilation_cache()
    check_start(config, folder)
    facts = device_facts(device)

    # Two models that read the same tokens.
    student_key, dropout_key = jr.split(jr.key(config.seed))
    wiser, tokenizer, origin = load(config.teacher)
    taught_by = digest(eqx.filter(wiser, eqx.is_array))
    model, words, came_from = student_of(config.student, wiser, tokenizer, seq=config.seq, dropout=config.dropout, key=student_key)
    shape = model.config
    seq = config.seq or min(shape.context, wiser.config.context, 1024)
    for name, each in (("student", model), ("teacher", wiser)):
        if seq > each.config.context:
            raise ValueError(f"--seq {seq} is more than the context of the {name}, {each.config.context}")
    if config.on_policy and config.prompt_tokens + config.max_new_tokens > seq:
        asked = f"{config.prompt_tokens} + {config.max_new_tokens}"
        raise ValueError(f"--prompt-tokens and --max-new-tokens ({asked}) are more than a row of {seq} tokens")
    teacher = teacher_of(config, wiser, facts, seq)
    ops, flight = choose_flight(config, facts, n_layers=shape.n_layers, seq=seq, **attention_of(model))
    tokenizer.save(folder / "tokenizer", model_max_length=shape.context)
    logger.info(f"teacher: {origin}, {wiser.config.model_type}, {wiser.n_params:,} parameters")
    logger.info(f"student: {words}, {shape.model_type}, {model.n_params:,} parameters; rows of {seq} tokens")
    logger.info(f"on {device.device_kind}: kernels {ops.name}, {flight.dtype}, layers as a {flight.layers}, remat {flight.remat}")
    logger.info(f"learned from: {config.learned_from}")

    # Rows to learn from, and what is held out.
    bad: dict[str, Any] = {"overlong": config.overlong, "on_bad_row": config.on_bad_row}
    config = config.model_copy(update={"data": data_of(config.data_kind, config.data, config.teacher)})  # whoever goes on is to know it
    texts = texts_of(config.data_kind, config.data, tokenizer, seq=seq, **bad)
    describe_source(texts.source)
    rows = training_rows(texts.train, seq=seq, seed=config.seed, packing=config.chosen_packing)
    packing: dict[str, Any] = {"batch": config.batch, "seq": seq, "seed": config.seed, "packing": config.chosen_packing}
    batch_at(texts.train, 0, **packing)  # too little text for one batch stops here
    describe_packing(rows)
    mixture = {} if config.on_policy else rows.realised(config.steps * config.batch)
    describe_mixture(mixture)
    on_policy = None
    if config.on_policy:
        how: dict[str, Any] = {"flight": flight, "ops": ops, "seed": config.seed, "sampler": Sampler(config.draw_temperature)}
        how |= {"prompt_tokens": config.prompt_tokens, "max_new_tokens": config.max_new_tokens, "stop_ids": texts.stop_ids}
        on_policy = OnPolicy(texts.train, config.batch, **how)
    top_k = None if config.top_k is None else make_top_k(config.top_k, config.loss.temperature, wiser.config.vocab, config.step.loss_chunk)
    if not config.resume:
        save_config(config, folder)  # from here on there is a run to resume

    # Before.
    compare = make_comparison(flight, ops, config.step.loss_chunk)
    sizes = {"batch": 2 * config.batch, "seq": seq}
    kept = folder / "before.json"
    if config.resume and kept.is_file():
        before = json.loads(kept.read_text(encoding="utf-8"))
    else:
        logger.info("measuring student and teacher on what is held out")
        before = measure(compare, model, teacher, texts.held_out, **sizes)
        write_json(kept, before)
    logger.info(f"loss before: {before['loss']:.4f} nats a token, the teacher's {before['teacher']['loss']:.4f}; apart {before['kl']:.4f}")

    # What the teacher says, once for all steps; then it is put away.
    began = digest(eqx.filter(model, eqx.is_array))
    identity = {"corpus": texts.source.record["sha256"], "tokenizer": tokenizer.digest, "teacher": taught_by, "student": began}
    held: Teacher | None = teacher
    targets = None
    if top_k is not None:
        assert config.top_k is not None
        caches, weights = parts_of(texts.train)
        made_from: dict[str, Any] = {"teacher": taught_by, "tokenizer": tokenizer.digest, "tokens": [cache.folder.name for cache in caches]}
        made_from |= {"weights": list(weights), "seed": config.seed, "packing": config.chosen_packing}
        made_from |= {"temperature": config.loss.temperature, "dtype": teacher.flight.dtype, "kernels": teacher.ops.name}
        targets = TeacherTargets(cache_root() / "teachers", made_from, seq=seq, k=config.top_k)
        write_targets(targets, rows, config.steps * config.batch, teacher, top_k, at_once=config.batch)
        held = None
    teacher_flops = model_flops_per_token(wiser.n_active_params, wiser.config.n_layers, wiser.config.d_model, seq) / 3  # forward only
    teacher_facts = continued_from(config.teacher, taught_by) | {"parameters": wiser.n_params, "model_type": wiser.config.model_type}
    del wiser, teacher

    # Optimizer and step.
    optimizer = build_optimizer(config.optimizer)
    objective = None if config.control else Distillation(None if targets else held, config.loss, flight, ops, config.step.loss_chunk)
    compiled = make_step(optimizer, config.step, flight, ops, dropout_key, donate=not config.debug_nans, objective=objective)
    step = debug_nans(compiled) if config.debug_nans else compiled
    begun = init_state(model, optimizer, frozen=config.optimizer.frozen, average=config.average.name != "none")
    token_nats = make_token_nats(flight, ops, config.step.loss_chunk)

    # What the run is made of, for the record.
    peak = peak_flops(device)
    flops = model_flops_per_token(model.n_active_params, shape.n_layers, shape.d_model, seq)
    flops += 0.0 if config.control or targets else teacher_flops
    manifest: dict[str, Any] = {
        "teacher": teacher_facts,
        "learned_from": config.learned_from,
        "corpus": texts.source.record,
        "tokenizer": {"digest": tokenizer.digest, "vocab": tokenizer.vocab_size},
        "packing": rows.describe(),
        "mixture": mixture,
        "model": {"model_type": shape.model_type, "parameters": model.n_params, **shape.model_dump()},
        "steps": config.steps,
        "seed": config.seed,
    }
    if not config.on_policy:
        manifest["tokens"] = rows.pairs_in(config.steps * config.batch)  # padding is none
    if came_from is not None:
        manifest["continued_from"] = continued_from(came_from, began)

    # The loop.
    rate, rate_of_average = learning_rate(config.schedule, config.steps), average_rate(config.average, config.steps)
    looks = evaluation_batches(texts.held_out, batch=config.batch, seq=seq, stride=seq, max_rows=config.validate_rows)
    first_held_out = texts.held_out.document(0)
    prompt = first_held_out[: min(config.prompt_tokens, seq // 2, len(first_held_out) - 1)]

    def judged(state: TrainState) -> AbstractLM:
        """The model to validate, sample and export: at the average of the weights where there is one and it is to be used."""
        averaged = state.averaged if config.average.use else None
        return state.model if averaged is None else averaged

    def look(state: TrainState) -> dict[str, float]:
        """Nats a token on some held-out rows, and how far from the teacher where it is at hand."""
        if held is None:
            nats, tokens = nats_by_document(token_nats, judged(state), looks)
            return {"val_loss": sum(nats.values()) / sum(tokens.values())}
        found = apart(compare, judged(state), held, looks)
        return {"val_loss": found["nats"], "val_kl": found["kl"], "val_agreement": found["agreement"]}

    manifest["identity"] = identity
    watch = Watch(curve_for("distill", config, identity))
    with Checkpoints(folder / "checkpoints", keep_latest=config.keep_latest) as checkpoints:
        state, start, record = restore(checkpoints, begun, identity, config.steps) or (begun, 0, {"train_s": 0.0})
        manifest["sessions"] = begin_session("distill", folder, config, start, session_facts(device, ops, flight, peak))
        write_json(folder / "manifest.json", manifest)
        begin = time.monotonic() - record["train_s"]
        first = start + 1 if start else 0  # a new run tells of the student as it was, too

        def batches(given: Any) -> Iterator[Any]:
            """Rows as they are, with what the teacher said of them, or as the student at this step goes on with their beginnings."""
            if on_policy is not None:
                return (on_policy.batch(state.model, index) for index in range(start, config.steps))
            return given if targets is None else taught_batches(given, targets, start, config.batch)

        def describe(index: int) -> str:
            here = index * config.batch, (index + 1) * config.batch
            return f"the student's own answers of step {index + 1}" if on_policy else describe_rows(rows, *here)

        with (
            trackers_of(config, folder, "distill", first) as trackers,
            RunLog(folder, total_steps=config.steps, start_step=first, trackers=trackers, watch=watch.line) as log,
            train_batches(texts.train, **packing, start_step=start, stop_step=config.steps) as given,
            interruptible() as interrupt,
        ):

            def pause(done: int) -> bool:
                intervals = (config.save_every, config.validate_every, config.sample_every)
                return interrupt.due(done) or any(done % interval == 0 for interval in intervals)

            if start == 0:
                log.log(0, **look(state))
            training = steps(
                step,
                state,
                batches(given),
                rate,
                average_rate=rate_of_average,
                start=start,
                stop=config.steps,
                pause=pause,
                stop_at_spike=config.step.on_spike == "stop",
                describe=describe,
            )
            with watched(training, config, folder) as training:
                for done, state, arrived in training:
                    for metrics in arrived:
                        share = None if on_policy else mfu(metrics["tokens_per_s"], flops, peak.flops_per_s)  # drawing is not counted
                        log.log(**metrics, mfu=share, peak_memory_bytes=memory_in_use()["peak_bytes"])  # type: ignore[arg-type]
                    val_loss = None  # of these very weights, or not known
                    if done % config.validate_every == 0 or done == config.steps:
                        found = look(state)
                        val_loss = found["val_loss"]
                        log.log(done, **found)
                    if done % config.sample_every == 0 and done < config.steps:
                        sample = one_sample(judged(state), tokenizer, prompt, seq=seq, seed=config.seed)
                        log.message(f"step {done}, continuing a held-out document: {sample!r}")
                    if done % config.save_every == 0 or done == config.steps or interrupt.due(done):
                        record = {"identity": identity, "val_loss": val_loss, "train_s": time.monotonic() - begin}
                        record |= {"model_type": shape.model_type, "model": shape.model_dump(), "use_average": config.average.use}
                        checkpoints.save(done, state.items(), record, metric=val_loss)
                    if interrupt.due(done):
                        checkpoints.wait()
                        resume = how_to_resume(folder, "distill")
                        log.message(f"stopped at step {done} of {config.steps}, everything saved. Go on with:\n  {resume}")
                        raise SystemExit(interrupt.exit_status)

    # After.
    logger.info("measuring the student as it has become")
    after = measure(compare, judged(state), held or teacher_of(config, load(config.teacher)[0], facts, seq), texts.held_out, **sizes)
    lines = read_metrics(folder / "metrics.jsonl")
    speed = float(np.median([line["tokens_per_s"] for line in lines if "tokens_per_s" in line]))
    results: dict[str, Any] = {"before": before, "after": after, "steps": config.steps, "learned_from": config.learned_from}
    results |= {"skipped": int(state.stats.skipped), "spikes": int(state.stats.spikes), "train_s": record["train_s"]} | watch.record()
    results |= {"tokens_learned": sum(line.get("tokens", 0) for line in lines), "tokens_per_s": speed, "mixture": mixture}
    results |= {name: after[name] for name in ("bits_per_byte", "held_out_bytes") if name in after}
    title = f"{model.n_params / 1e6:,.1f}M parameters: {config.learned_from}"
    plot_distillation(folder / "metrics.jsonl", folder / "distillation.png", teacher_loss=before["teacher"]["loss"], title=title)
    export(judged(state), tokenizer, folder / "export", manifest=manifest, results=results)
    write_json(folder / "results.json", results)
    show(results, folder)


def teacher_of(config: Config, model: AbstractLM, facts: Any, seq: int) -> Teacher:
    """The model as it is read here."""
    ops, flight = choose_flight(config, facts, n_layers=model.config.n_layers, seq=seq, **attention_of(model))
    return Teacher(as_teacher(model), flight, ops)


if __name__ == "__main__":
    chosen = parse(Config, __doc__ or "", recipe="distill")
    try:
        main(chosen)
    except ENDS_IN_WORDS as error:
        fail(str(error))
