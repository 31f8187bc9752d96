"""Direct preference optimisation: teach a model which of two answers is better.

Without `--data` the pairs are the model's own: it writes several answers to each problem of a task, the task's verifier tells right from
wrong, and one right and one wrong answer make a pair. So the model learns to prefer what it can already do. With `--data` the pairs come
from a file of preferences. A tenth of the prompts is held out; on them margins and accuracies are measured before, during and after, and of
a task pass@1 as well.

    python -m recipes.dpo runs/grpo_arithmetic-…/start                             # the model that imitation left behind
    python -m recipes.dpo runs/sft_chat-… --data preferences.json.gz --preference.loss simpo --preference.beta 2
    python -m recipes.dpo --resume

Logged as in TRL's DPOTrainer: rewards_chosen, rewards_rejected, margin, accuracy, log_probs_chosen, log_probs_rejected. Sources of the
settings: β 0.1, Rafailov et al. 2023 (arXiv:2305.18290, appendix B); the learning rate is a single guess for small models, models of
billions of parameters want 5e-7 to 5e-6.
"""

import json
import time
from collections.abc import Iterator
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

import lm
from data.preferences import Pair, read_pairs
from data.tasks import TASKS
from data.tasks.problems import RewardError
from lm.base import AbstractLM
from lm.digests import digest
from lm.flight import put_on_flight
from lm.generate import Sampler
from recipes.command_line import claimed, fail, how_to_resume, parse, resumable
from recipes.loading import load
from recipes.prompting import Prompting
from recipes.rl_stages import Drawing, pass_metrics
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
from train.backends import attention_of
from train.checkpoint import Checkpoints
from train.debug import debug_nans
from train.lineage import continued_from
from train.logs import RunLog, plain_messages, progress, read_metrics, words_kept, write_json
from train.loop import interruptible, steps
from train.optimizers import OptimizerConfig, ScheduleConfig, build_optimizer, learning_rate
from train.preference import PreferenceBatch, PreferenceConfig, preference_objective, sequence_log_probs
from train.publish import export
from train.rl import make_log_probs
from train.runtime import choose_device, compilation_cache, device_facts, peak_flops
from train.step import StepConfig, TrainState, init_state, make_step

# ------------------------------------------------------------------------------------------- config


class Config(RunConfig):
    """Everything that makes the run what it is."""

    source: Annotated[Path, tyro.conf.Positional] = Field(
        description="the model to begin with: run, Hugging Face folder, GGUF file, or owner/name on the Hub"
    )
    data: Path | None = Field(None, description="a file of preferences (.json, .jsonl, .gz); None: the model's own answers to the task")
    task: Literal["arithmetic", "calculator", "countdown", "counting", "reversal"] = Field("arithmetic", description="see data/tasks")
    problems: int = Field(1000, ge=1, description="problems of the task that are answered to make pairs")
    answers: int = Field(8, ge=2, description="answers to each, of which one right and one wrong make a pair")
    max_new_tokens: int = Field(6, ge=1, description="longest answer to a problem, its end included")

    preference: PreferenceConfig = PreferenceConfig()
    reference: Literal["precomputed", "copy", "lora_off"] = Field(
        "precomputed",
        description="log-probs of the start: of all pairs before the first step, at each step by a copy of it, or by the model itself with "
        "its adapters off (needs --adapter.kind). All give the same numbers",
    )
    adapter: AdapterConfig = AdapterConfig(kind="none")
    seq: int = Field(512, gt=1, description="longest prompt and answer, in tokens; longer pairs are left out, and counted")
    batch: int = Field(64, gt=0, description="pairs a step")
    steps: int | None = resumable(None, ge=1, description="optimizer steps; None: by --epochs")
    epochs: float = Field(4.0, gt=0, description="passes over the pairs, where --steps is not given")
    optimizer: OptimizerConfig = OptimizerConfig(name="adamw", beta2=0.99, weight_decay=0.0)
    schedule: ScheduleConfig = ScheduleConfig(peak=5e-5, warmup=0.1)
    step: StepConfig = StepConfig()
    validate_every: int = resumable(20, ge=1, description="steps between looks at the held-out pairs")
    validate_rows: int = resumable(256, ge=1, description="held-out pairs in such a look")
    save_every: int = resumable(100, ge=1, description="steps between checkpoints")
    sample_every: int = resumable(100, ge=1, description="steps between answers to a held-out prompt on the screen")
    seed: int = Field(0, ge=0, description="of draws, pairs and their order")

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        if self.batch % self.step.micro_batches:
            raise ValueError(f"batch ({self.batch} pairs) must be a multiple of step.micro_batches ({self.step.micro_batches})")
        if self.reference == "lora_off" and self.adapter.kind == "none":
            raise ValueError("reference lora_off takes the adapters off, and there are none: add --adapter.kind lora, or take a copy")
        return self


# ------------------------------------------------------------------------------------------- main


def main(config: Config) -> Path:
    """The whole experiment. Returns the run folder."""
    plain_messages()
    folder = config.run_dir or Path("runs") / f"dpo-{datetime.now():%Y%m%d-%H%M%S}"
    with claimed(folder, "dpo"), words_kept(folder):
        run(config, folder)
    return folder


def run(config: Config, folder: Path) -> None:
    """Model, pairs, reference, loop, report, in this order."""
    device = choose_device(config.device)
    compilation_cache()
    check_start(config, folder)
    model, tokenizer, origin = load(config.source)
    prompting = Prompting.of(tokenizer)
    ops, flight = choose_flight(config, device_facts(device), n_layers=len(model.blocks), seq=config.seq, **attention_of(model))
    logger.info(f"model: {model.n_params:,} parameters, from {origin}; on {device.device_kind}: kernels {ops.name}, {flight.dtype}")
    if not config.resume:
        save_config(config, folder)
    tokenizer.save(folder / "tokenizer", model_max_length=model.config.context)

    # What is trained, and the model as it was. Adapters begin at nothing, so the model without them is the one this run began with.
    with_adapters = config.adapter.kind != "none"
    base = lm.Base.of(model, config.source.name) if with_adapters else None
    began = digest(eqx.filter(model, eqx.is_array))
    adapter_key, dropout_key = jr.split(jr.key(config.seed))
    optimizer = build_optimizer(config.optimizer)

    def fresh_state() -> TrainState:
        own = adapted(jax.tree.map(jnp.array, model), config.adapter, key=adapter_key)  # its own arrays: the step takes those it is given
        return init_state(own, optimizer, frozen=config.optimizer.frozen, trainable=trained_part(own, config.adapter))

    begun = fresh_state()
    reference = lm.without_adapters(begun.model) if with_adapters else model

    # Pairs: from the file, or the model's own, drawn once a run.
    task = TASKS[config.task]()
    width = prompting.width([*task.train, *task.held_out])
    drawing = Drawing(task, prompting, width, config.max_new_tokens, Sampler(), flight, ops)
    pairs = read_pairs(config.data) if config.data is not None else own_pairs(config, reference, drawing, folder / "pairs.jsonl")
    rows, kept = rows_of(pairs, prompting, config.seq)
    train, held_out = split(rows, kept)
    count = len(train.tokens) // 2
    if count < config.batch:
        raise ValueError(f"{count} pairs to train on are less than one batch of {config.batch}: take a smaller --batch, or more pairs")
    config = config.model_copy(update={"steps": config.steps or max(1, round(config.epochs * count / config.batch))})
    assert config.steps is not None
    total = config.steps
    logger.info(
        f"{count:,} pairs to train on, {len(held_out.tokens) // 2:,} held out, rows of {train.tokens.shape[1]} tokens: {total:,} steps"
    )

    # The reference: the model as it is now.
    log_probs = make_log_probs(flight, ops, Sampler(), rows=2 * config.batch // config.step.micro_batches, chunk=config.step.loss_chunk)
    needed = config.preference.needs_reference
    if needed:
        held_out = held_out._replace(reference=sequence_log_probs(held_out, log_probs, reference))
    if needed and config.reference == "precomputed":
        train = train._replace(reference=sequence_log_probs(train, log_probs, reference))

    def batches(start: int) -> Iterator[PreferenceBatch]:
        """The batch of a step is a function of (seed, step)."""
        for index in range(start, total):
            batch = pairs_at(train, index, config.batch, config.seed)
            if needed and config.reference != "precomputed":
                batch = batch._replace(reference=sequence_log_probs(batch, log_probs, reference))
            yield batch

    # The loop.
    objective = preference_objective(config.preference, flight, ops, chunk=config.step.loss_chunk)
    compiled = make_step(optimizer, config.step, flight, ops, dropout_key, donate=not config.debug_nans, objective=objective)
    step = debug_nans(compiled) if config.debug_nans else compiled
    identity = {"start": began, "tokenizer": tokenizer.digest}
    kept_apart = {} if base is None else {"base": base.record(), "adapter": config.adapter.model_dump(mode="json"), "also": []}
    example = held_out if len(held_out.tokens) else train
    look_size = min(config.validate_rows, len(held_out.tokens) // 2)

    @jax.jit
    def measured(state_model: Any, batch: PreferenceBatch) -> dict[str, Any]:
        told = objective(put_on_flight(state_model, flight, ops), batch, jr.key(0))
        return {"loss": told.loss.total / told.loss.count} | {name: total / count for name, (total, count) in told.means.items()}

    def look(state_model: AbstractLM) -> dict[str, float]:
        if look_size == 0:
            return {}
        batch = jax.tree.map(lambda x: jnp.asarray(x[: 2 * look_size]), held_out)
        return {f"val_{name}": float(value) for name, value in measured(state_model, batch).items()}

    def solve(state_model: AbstractLM) -> dict[str, float]:
        """pass@1 on the task's held-out problems, where the pairs are of a task."""
        if config.data is not None:
            return {}
        return pass_metrics(drawing.solved(state_model, task.held_out, config.answers, jr.key(config.seed + 1), rows=1024), [1])

    def plain(state: TrainState) -> AbstractLM:
        """Adapters merged into the weights: to ask, and to export."""
        return lm.dequantised(lm.merge(state.model)) if with_adapters else state.model

    with Checkpoints(folder / "checkpoints", keep_latest=config.keep_latest) as checkpoints:
        state, start, record = restore(checkpoints, begun, identity, total, by_reference=with_adapters) or (begun, 0, {"train_s": 0.0})
        begin = time.monotonic() - record["train_s"]
        session = session_facts(device, ops, flight, peak_flops(device))
        facts = {"model_type": model.config.model_type, "parameters": model.n_params, **model.config.model_dump()}
        manifest: dict[str, Any] = {
            "continued_from": continued_from(config.source, began),
            "pairs": count,
            "steps": total,
            "model": facts,
            "seed": config.seed,
            "identity": identity,
        }
        manifest["sessions"] = begin_session("dpo", folder, config, start, session)
        write_json(folder / "manifest.json", manifest)
        with (
            trackers_of(config, folder, "dpo", start + 1) as trackers,
            RunLog(folder, total_steps=total, start_step=start + 1 if start else 0, trackers=trackers) as log,
            interruptible() as interrupt,
        ):
            if start == 0:
                log.log(0, **look(state.model), **solve(plain(state)))

            def pause(done: int) -> bool:
                return interrupt.due(done) or done % config.save_every == 0 or done % config.validate_every == 0

            rate = learning_rate(config.schedule, total)
            training = steps(step, state, batches(start), rate, start=start, stop=total, pause=pause)
            with watched(training, config, folder) as training:
                for done, state, arrived in training:
                    for metrics in arrived:
                        metrics["pairs_per_s"] = metrics.pop("tokens_per_s")
                        log.log(**metrics)  # type: ignore[arg-type]
                    last = done == total
                    if done % config.validate_every == 0 or last:
                        found = look(state.model)
                        log.log(done, **found)
                        if found:
                            log.message(f"step {done}: held-out accuracy {found['val_accuracy']:.3f}, margin {found['val_margin']:.3f}")
                    if done % config.sample_every == 0 or last:
                        log.message(f"step {done}, to a held-out prompt: {answer_to(plain(state), example, prompting)!r}")
                    if done % config.save_every == 0 or last or interrupt.due(done):
                        record = {"identity": identity, "use_average": False, "train_s": time.monotonic() - begin}
                        record |= {"model_type": model.config.model_type, "model": model.config.model_dump(), **kept_apart}
                        checkpoints.save(done, state.items(by_reference=with_adapters), record)
                    if interrupt.due(done):
                        checkpoints.wait()
                        log.message(f"stopped at step {done} of {total}, everything saved. Go on with:\n  {how_to_resume(folder, 'dpo')}")
                        raise SystemExit(interrupt.exit_status)
            if start < total:
                log.log(total, **solve(plain(state)))
    results = summary(folder, config, total) | {"train_s": record["train_s"]}
    if base is not None:
        lm.save_adapter(state.model, folder / "adapter", base=base)
    export(plain(state), tokenizer, folder / "export", manifest=manifest, results=results)
    write_json(folder / "results.json", results)
    show(results)


# ------------------------------------------------------------------------------------------- pairs


def own_pairs(config: Config, model: AbstractLM, drawing: Drawing, path: Path) -> list[Pair]:
    """Of the model's answers to each problem one right and one wrong, drawn at random; none of a problem where all are alike."""
    if path.is_file():
        return read_pairs(path)
    task, rng = drawing.task, np.random.default_rng((config.seed, 3))
    problems = [task.train[i] for i in rng.permutation(len(task.train))[: config.problems]]
    lines: list[str] = []
    at_once = max(1, 1024 // config.answers)
    with progress("drawing pairs", len(problems)) as bar:
        for at in range(0, len(problems), at_once):
            some = problems[at : at + at_once]
            filled = some + [some[0]] * (at_once - len(some))  # one shape for all parts
            rollouts = drawing.draw(model, filled, config.answers, jr.fold_in(jr.key(config.seed), at))
            solved = drawing.prompting.judge(task, filled, rollouts).solved.reshape(at_once, config.answers)
            for i, problem in enumerate(some):
                right, wrong = np.flatnonzero(solved[i]), np.flatnonzero(~solved[i])
                if len(right) and len(wrong):
                    rows = i * config.answers + np.array([rng.choice(right), rng.choice(wrong)])
                    chosen, rejected = (drawing.prompting.text(rollouts.answer(int(row))) for row in rows)
                    lines.append(json.dumps({"prompt": problem.prompt, "chosen": chosen, "rejected": rejected}, ensure_ascii=False))
            bar(at + len(some))
    if not lines:
        raise ValueError(
            f"{len(problems)} problems had {config.answers} answers each, none both right and wrong ones: nothing is to be preferred. "
            "Take a model that can do some of the task, more --problems or more --answers"
        )
    logger.info(f"of {len(problems):,} problems, {len(lines):,} had right and wrong answers among {config.answers}: so many pairs")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_pairs(path)


def rows_of(pairs: list[Pair], prompting: Prompting, seq: int) -> tuple[PreferenceBatch, list[Pair]]:
    """Rows of all pairs that fit into `seq` targets, as wide as the longest of them; and those pairs."""
    encoded, kept = [], []
    for pair in pairs:
        prompt = prompting.conversation(pair.messages)
        answers = [prompting.answer(text)[0] for text in (pair.chosen, pair.rejected)]
        if len(prompt) + max(map(len, answers)) - 1 <= seq:
            encoded += [(prompt, answer) for answer in answers]
            kept.append(pair)
    if len(kept) < len(pairs):
        logger.warning(f"{len(pairs) - len(kept)} of {len(pairs)} pairs are longer than --seq {seq} tokens, and left out")
    if not kept:
        raise ValueError(f"every one of the {len(pairs)} pairs is longer than --seq {seq} tokens")
    width = max(len(prompt) + len(answer) - 1 for prompt, answer in encoded)
    tokens, targets, positions, segments = (np.zeros((len(encoded), width), np.int32) for _ in range(4))
    weights = np.zeros((len(encoded), width), np.float32)
    for row, (prompt, answer) in enumerate(encoded):
        whole = np.concatenate([prompt, answer])
        length = len(whole) - 1
        tokens[row, :length], targets[row, :length] = whole[:-1], whole[1:]
        positions[row, :length], segments[row, :length] = np.arange(length), 1
        weights[row, len(prompt) - 1 : length] = 1
    return PreferenceBatch(tokens, targets, positions, segments, weights, np.zeros(len(encoded), np.float32)), kept


def split(rows: PreferenceBatch, pairs: list[Pair]) -> tuple[PreferenceBatch, PreferenceBatch]:
    """Those to train on, and those held out."""
    held_out = np.repeat([pair.is_held_out for pair in pairs], 2)
    return PreferenceBatch(*(field[~held_out] for field in rows)), PreferenceBatch(*(field[held_out] for field in rows))


def pairs_at(rows: PreferenceBatch, index: int, batch: int, seed: int) -> PreferenceBatch:
    """The pairs of a step: one shuffled pass after the other, a remainder waiting for the next shuffle."""
    count = len(rows.tokens) // 2
    epoch, place = divmod(index, count // batch)
    pairs = np.random.default_rng((seed, 4, epoch)).permutation(count)[place * batch : (place + 1) * batch]
    order = np.stack([2 * pairs, 2 * pairs + 1], axis=1).reshape(-1)
    return PreferenceBatch(*(field[order] for field in rows))


# ------------------------------------------------------------------------------------------- looks and report


def answer_to(model: AbstractLM, rows: PreferenceBatch, prompting: Prompting, most: int = 64) -> str:
    """What the model says, greedily, to the prompt of the first pair."""
    prompt = rows.tokens[0, : int(np.argmax(rows.loss_weights[0] > 0)) + 1]
    room = min(most, model.config.context - len(prompt))
    return prompting.text(np.asarray(lm.generate(model, [prompt], max_new_tokens=room, stop_ids=prompting.stop_ids)[0], np.int32))


def summary(folder: Path, config: Config, total: int) -> dict[str, Any]:
    """Before and after, on what was held out."""
    lines = read_metrics(folder / "metrics.jsonl")
    looks = [line for line in lines if "val_loss" in line or "pass@1" in line]
    results: dict[str, Any] = {"steps": total, "loss": config.preference.loss, "before": {}, "after": {}}
    for end, at in (("before", 0), ("after", -1)):
        for name in [name for name in looks[0] if name != "step"]:
            results[end][name] = [line[name] for line in looks if name in line][at]
    return results


def show(results: dict[str, Any]) -> None:
    """On the screen, what came of it."""
    print(f"\n{'held out, ' + results['loss']:30} {'before':>10} {'after':>10}")
    for name, before in results["before"].items():
        print(f"  {name.removeprefix('val_'):28} {before:10.4f} {results['after'][name]:10.4f}")


if __name__ == "__main__":
    chosen = parse(Config, __doc__ or "", recipe="dpo")
    try:
        main(chosen)
    except (*ENDS_IN_WORDS, RewardError) as error:
        fail(str(error))
