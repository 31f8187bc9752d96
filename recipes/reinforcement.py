"""The loop of reinforcement learning with verifiable rewards, which the recipes share: each brings a model, a task and its settings.

One step: draw answers to some prompts, judge them, prove that sampler and trainer are the same model, make advantages, update. Around it:
looks at held-out problems, the best and worst answers, checkpoints, the record. What the algorithms are is in `train.policy` and
`train.advantages`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from loguru import logger
from pydantic import Field, field_validator, model_validator

import lm
from data.tasks.problems import RewardError, Task, in_order, pass_at_k
from data.tokenizer import Tokenizer
from lm.base import AbstractLM
from lm.digests import digest
from lm.generate import Sampler
from recipes.command_line import how_to_resume, resumable
from recipes.curves import Watch, curve_for
from recipes.loading import load
from recipes.prompting import Prompting
from recipes.rl_report import Clock, json_safe, nothing_learned, of_updates, show, summary
from recipes.rl_stages import Drawing, keep_model, measured_gap_limit, pass_metrics
from recipes.running import (
    ENDS_IN_WORDS,
    RunConfig,
    begin_session,
    choose_flight,
    restore,
    save_config,
    session_facts,
    trackers_of,
    watched,
)
from train.advantages import RunningMean
from train.backends import attention_of
from train.checkpoint import Checkpoints
from train.debug import debug_nans
from train.groups import Judged, advantages_of, check_group, gather
from train.lineage import continued_from
from train.logs import RunLog, write_json
from train.loop import interruptible
from train.optimizers import OptimizerConfig, build_optimizer
from train.policy import ALGORITHMS, Algorithm, policy_objective
from train.publish import export
from train.rl import GapError, check_gap, describe, make_log_probs, parts_of, policy_batch
from train.rollout_view import draw_learning, keep_rollouts
from train.runtime import device_facts, peak_flops
from train.step import StepConfig, TrainState, init_state, make_step

RL_ENDS_IN_WORDS = (*ENDS_IN_WORDS, RewardError, GapError)

# ------------------------------------------------------------------------------------------- config


class RLConfig(RunConfig):
    """What makes a run of reinforcement learning what it is, model and task apart."""

    model: Path | None = Field(None, description="a run, Hugging Face folder or GGUF file to begin from")
    algorithm: Literal["reinforce", "rloo", "grpo", "dr_grpo", "dapo", "gspo"] = Field("grpo", description="see the table in docs/rl.md")
    steps: int = resumable(800, ge=1, description="batches of answers to learn from")
    prompts: int = Field(32, ge=1, description="prompts a batch")
    n: int = Field(16, ge=1, description="answers to each")
    max_new_tokens: int = Field(6, ge=1, description="longest answer, its end included")
    passes: int = Field(1, ge=1, description="times each batch is learned from")
    parts: int = Field(1, ge=1, description="updates in one pass: the batch in so many parts")
    peak: float = Field(5e-4, gt=0, description="learning rate of RL, after the rise")
    rise: int = Field(10, ge=1, description="steps over which the learning rate rises from 0")
    cooldown: float = Field(0.0, ge=0, lt=1, description="share of the steps, at the end, over which the learning rate falls to a tenth")
    optimizer: OptimizerConfig = OptimizerConfig(name="adamw", beta2=0.99, weight_decay=0.0)
    step: StepConfig = StepConfig()
    clip_low: float | None = Field(None, gt=0, description="the ratio is clipped at 1 - this; None: the algorithm's own")
    clip_high: float | None = Field(None, gt=0, description="and at 1 + this; None: the algorithm's own")
    importance_cap: float = Field(2.0, ge=1, description="importance weights are cut off here")
    kl_weight: float = Field(0.0, ge=0, description="of the KL from the model RL began with; 0: none, and it is not computed")
    kl: Literal["k1", "k2", "k3"] = Field("k3", description="estimator of the KL; k1 is taken from the reward, the others enter the loss")
    most_draws: int = Field(4, ge=1, description="dapo: times that prompts are drawn for one batch, at most")
    overlong_buffer: int = Field(2, ge=1, description="dapo: tokens before the longest answer over which the length penalty grows to 1")
    temperature: float = Field(1.0, gt=0, description="of the draws; log-probs are those of the distribution that is drawn from")
    top_k: int | None = Field(None, ge=1, description="draw among the k likeliest tokens only")
    top_p: float | None = Field(None, gt=0, le=1, description="draw among the likeliest tokens that hold this probability together")
    min_p: float | None = Field(None, ge=0, le=1, description="draw among tokens at least this fraction as likely as the likeliest")

    dtype: Literal["auto", "float32", "bfloat16"] = resumable("float32", description="operands of the blocks' products; the head is fp32")
    gap_limit: float | None = resumable(
        None,
        gt=0,
        description="nats by which sampler and trainer may differ on a token; above, the run stops. None: 1e-4 in float32; in bfloat16 "
        "three times the largest gap of three calibration runs, four batches of draws each, before the first step, which is then written "
        "into the run's config",
    )
    answers: int = Field(8, ge=1, description="answers to each held-out problem in a look; pass@1 and pass@this are reported")
    validate_every: int = resumable(50, ge=1, description="steps between looks at the held-out problems")
    validate_rows: int = resumable(512, ge=1, description="held-out problems in such a look; the first and last one take all")
    sample_every: int = resumable(100, ge=1, description="steps between best and worst answers on the screen and in rollouts.jsonl")
    save_every: int = resumable(100, ge=1, description="steps between checkpoints")
    seed: int = Field(0, ge=0, description="of weights, examples, prompts and draws")

    @field_validator("n")
    @classmethod
    def _groups(cls, n: int, info: Any) -> int:
        if "algorithm" in info.data:
            check_group(ALGORITHMS[info.data["algorithm"]], n)
        return n

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.prompts * self.n) % (self.parts * self.step.micro_batches):
            raise ValueError(f"prompts x n ({self.prompts * self.n}) must be a multiple of parts x step.micro_batches")
        if self.kl != "k3" and not self.kl_weight:
            raise ValueError(
                f"kl {self.kl} says how a KL is estimated, and kl_weight 0 asks for none: add a --kl-weight, or leave out --kl"
            )
        if self.chosen.overlong and self.overlong_buffer > self.max_new_tokens:
            raise ValueError(f"overlong_buffer ({self.overlong_buffer} tokens) must be no more than max_new_tokens ({self.max_new_tokens})")
        return self

    @property
    def rows(self) -> int:
        """Answers a batch."""
        return self.prompts * self.n

    @property
    def chosen(self) -> Algorithm:
        """The algorithm, with the bounds of the clip that were asked for."""
        own = ALGORITHMS[self.algorithm]
        return replace(own, clip_low=self.clip_low or own.clip_low, clip_high=self.clip_high or own.clip_high)

    @property
    def drawn_by(self) -> Sampler:
        """How tokens are drawn."""
        return Sampler(self.temperature, self.top_k, self.top_p, self.min_p)


def drawing_for(config: RLConfig, task: Task, model: AbstractLM, tokenizer: Tokenizer, device: jax.Device, origin: str) -> Drawing:
    """How this model answers this task's prompts, on this device; both are told of. `origin`: where the model is from."""
    prompting = Prompting.of(tokenizer)
    width = prompting.width([*task.train, *task.held_out], multiple=1)
    seq = width + config.max_new_tokens
    ops, flight = choose_flight(config, device_facts(device), n_layers=model.config.n_layers, seq=seq, **attention_of(model))
    logger.info(
        f"task {task.name}: {len(task.train):,} problems to learn from, {len(task.held_out):,} held out; prompts of up to {width} tokens"
    )
    logger.info(f"model: {model.n_params:,} parameters, from {origin}; on {device.device_kind}: kernels {ops.name}, {flight.dtype}")
    drawing = Drawing(task, prompting, width, config.max_new_tokens, config.drawn_by, flight, ops)
    if width + drawing.longest > model.config.context:
        raise ValueError(
            f"prompts of up to {width} tokens and answers of up to {drawing.longest} are more than the model's context of "
            f"{model.config.context}: take a smaller --max-new-tokens, shorter prompts, or a model with a longer context"
        )
    return drawing


# ------------------------------------------------------------------------------------------- one step


@dataclass
class Learner:
    """What one step needs beside the state."""

    config: RLConfig
    drawing: Drawing
    step: Any
    log_probs: Any  # (model, batch) → by the trainer
    reference: AbstractLM | None
    gap_limit: float
    baseline: RunningMean
    cursor: int  # number of the next problem

    def iterate(self, state: TrainState, index: int) -> "Iteration":
        """Draw, judge, prove that sampler and trainer are one, update."""
        config, task, algorithm = self.config, self.drawing.task, self.config.chosen
        clock, key = Clock(), jr.fold_in(jr.key(config.seed), index)

        def draw(indices: list[int], turn: int) -> Judged:
            problems = [task.train[i] for i in indices]
            rollouts = self.drawing.draw(state.model, problems, config.n, jr.fold_in(key, turn))
            clock.lap("rollout_s")
            scores = self.drawing.prompting.judge(task, problems, rollouts)
            clock.lap("reward_s")
            return Judged(rollouts, indices, scores.total, scores.by_reward)

        order = in_order(task.train, config.seed, self.cursor)
        judged, drawn, self.cursor = gather(order, draw, config.prompts, dynamic=algorithm.dynamic_sampling, most_draws=config.most_draws)
        everything = Judged.together(drawn)
        best = sum(weight for weight in task.weights.values() if weight > 0)
        metrics: dict[str, Any] = describe(everything.rollouts, everything.rewards, everything.by_reward, best) | {"draws": len(drawn)}

        batch = policy_batch(judged.rollouts, judged.rewards, seq=self.drawing.row)
        batch = batch._replace(old_log_probs=self.log_probs(state.model, batch))
        gap = check_gap(batch, self.gap_limit, self.drawing.prompting.tokenizer.tokens_of)
        metrics |= {"gap": gap.mean, "gap_max": gap.largest}
        penalty = None
        if self.reference is not None:
            batch = batch._replace(reference_log_probs=self.log_probs(self.reference, batch))
            if config.kl == "k1":
                penalty = config.kl_weight * np.sum(batch.old_log_probs - batch.reference_log_probs, axis=1)
        lengths = {"most": self.drawing.longest, "overlong_buffer": config.overlong_buffer}
        advantages = advantages_of(algorithm, judged, self.baseline, **lengths, kl_of_answers=penalty)
        batch = batch._replace(advantages=np.nan_to_num(advantages[:, None]).astype(np.float32) * batch.loss_weights)
        metrics["idle"] = bool(np.all(batch.advantages == 0))
        clock.lap("check_s")

        rate = rate_at(config, index)
        told = []
        for i in range(config.passes):
            for part in parts_of(batch, config.parts, (config.seed, index, i)):
                state, of_update = self.step(state, jax.tree.map(jnp.asarray, part), rate)
                told.append(of_update)
        metrics |= {"learning_rate": rate, **of_updates(jax.device_get(told))}
        clock.lap("update_s")
        metrics |= {**clock.seconds, "rollout_tokens_per_s": metrics["tokens_generated"] / clock.seconds["rollout_s"]}
        return Iteration(index + 1, state, metrics, judged, advantages)


def rate_at(config: RLConfig, index: int) -> float:
    """The learning rate of step `index`: up over the rise, level, and down to a tenth over the cooldown, all in straight lines."""
    falling = config.cooldown * config.steps
    rest = min(1.0, (config.steps - 1 - index) / falling) if falling else 1.0
    return config.peak * min((index + 1) / config.rise, 0.1 + 0.9 * rest, 1.0)


class Iteration(NamedTuple):
    done: int
    state: TrainState
    metrics: dict[str, Any]
    judged: Judged  # what was learned from
    advantages: np.ndarray


# ------------------------------------------------------------------------------------------- all steps


def reinforce(
    config: RLConfig, folder: Path, model: AbstractLM, given: str, drawing: Drawing, device: jax.Device, recipe: str
) -> dict[str, Any]:
    """From the start to the last step, looking at held-out problems now and then. Returns the results. `given`: the digest of what the
    whole run began with."""
    task, tokenizer, flight, ops = drawing.task, drawing.prompting.tokenizer, drawing.flight, drawing.ops
    optimizer = build_optimizer(config.optimizer)
    kl: dict[str, Any] = {"importance_cap": config.importance_cap, "kl_weight": config.kl_weight, "kl": config.kl}
    chunk = config.step.loss_chunk
    objective = policy_objective(config.chosen, flight, ops, sampler=drawing.sampler, most=drawing.longest, **kl, chunk=chunk)
    compiled = make_step(optimizer, config.step, flight, ops, jr.key(config.seed), donate=not config.debug_nans, objective=objective)
    step = debug_nans(compiled) if config.debug_nans else compiled
    log_probs = make_log_probs(flight, ops, drawing.sampler, rows=config.rows // config.step.micro_batches, chunk=chunk)
    identity = {"start": digest(eqx.filter(model, eqx.is_array)), "tokenizer": tokenizer.digest, "task": task.name}
    ks = sorted({1, config.answers})

    def fresh_state() -> TrainState:
        return init_state(jax.tree.map(jnp.copy, model), optimizer)  # the start itself stays: steps are given their state

    def look(state: TrainState, done: int, problems: int) -> np.ndarray:
        key = jr.fold_in(jr.key(config.seed + 1), done)
        return drawing.solved(state.model, task.held_out[:problems], config.answers, key, rows=config.rows)

    watch = Watch(curve_for(recipe, config, identity))
    with Checkpoints(folder / "checkpoints", keep_latest=config.keep_latest) as checkpoints:
        found = restore(checkpoints, jax.eval_shape(fresh_state), identity, config.steps)
        state, start, record = found or (fresh_state(), 0, {"cursor": 0, "baseline": None, "train_s": 0.0})
        state = replace(state, step=state.step * config.passes * config.parts)  # it counts updates
        reference = model if config.kl_weight else None
        if config.gap_limit is None:
            limit = measured_gap_limit(model, drawing, log_probs, config.prompts, config.n, seed=config.seed + 3)
            config = config.model_copy(update={"gap_limit": limit})
            save_config(config, folder)
        assert config.gap_limit is not None
        learner = Learner(
            config, drawing, step, log_probs, reference, config.gap_limit, RunningMean(value=record["baseline"]), record["cursor"]
        )
        train_s, idle = record["train_s"], 0
        session = session_facts(device, ops, flight, peak_flops(device))
        facts = {"model_type": model.config.model_type, "parameters": model.n_params, **model.config.model_dump()}
        manifest: dict[str, Any] = {} if config.model is None else {"continued_from": continued_from(config.model, given)}
        manifest |= {"task": task.name, "algorithm": vars(config.chosen), "model": facts, "seed": config.seed, "identity": identity}
        manifest |= {"steps": config.steps, "tokenizer": {"digest": tokenizer.digest, "vocab": tokenizer.vocab_size}}
        manifest["sessions"] = begin_session(recipe, folder, config, start, session)
        write_json(folder / "manifest.json", json_safe(manifest))
        with (
            trackers_of(config, folder, recipe, start + 1) as trackers,
            RunLog(folder, total_steps=config.steps, start_step=start + 1 if start else 0, trackers=trackers, watch=watch.line) as log,
            interruptible() as interrupt,
        ):
            if start == 0:
                log.log(0, minutes=0.0, **pass_metrics(look(state, 0, len(task.held_out)), ks))

            def iterations(state: TrainState) -> Iterator[Iteration]:
                for index in range(start, config.steps):
                    iteration = learner.iterate(state, index)
                    state = iteration.state
                    yield iteration

            with watched(iterations(state), config, folder) as training:
                for done, state, metrics, judged, advantages in training:
                    train_s += sum(metrics[name] for name in Clock.PARTS)
                    log.log(done, minutes=train_s / 60, **metrics)
                    last = done == config.steps
                    idle += metrics["idle"]
                    if metrics["idle"] and idle & (idle - 1) == 0:  # at 1, 2, 4, 8, …
                        logger.warning(nothing_learned(idle, metrics))
                    if done % config.validate_every == 0 or last:
                        solved = look(state, done, len(task.held_out) if last else config.validate_rows)
                        log.log(done, minutes=train_s / 60, **pass_metrics(solved, ks))
                        log.message(f"step {done}: held-out pass@1 {pass_at_k(solved, 1)}, pass@{ks[-1]} {pass_at_k(solved, ks[-1])}")
                    if done % config.sample_every == 0 or last:
                        log.show(keep_rollouts(folder, done, judged, advantages, tokenizer.tokens_of))
                    if done % config.save_every == 0 or last or interrupt.due(done):
                        kept = {"identity": identity, "cursor": learner.cursor, "baseline": learner.baseline.value, "train_s": train_s}
                        kept |= {"model_type": model.config.model_type, "model": model.config.model_dump(), "use_average": False}
                        checkpoints.save(done, state.items(), kept)
                    if interrupt.due(done):
                        checkpoints.wait()
                        resume = how_to_resume(folder, recipe)
                        log.message(f"stopped at step {done} of {config.steps}, everything saved. Go on with:\n  {resume}")
                        raise SystemExit(interrupt.exit_status)

    results = summary(folder, train_s, ks, steps=config.steps, algorithm=config.algorithm, seed=config.seed) | watch.record()
    export(state.model, tokenizer, folder / "export", manifest=json_safe(manifest), results=results)
    write_json(folder / "results.json", results)
    return results


def reinforce_loaded(
    config: RLConfig, folder: Path, source: Path, task: Task, device: jax.Device, recipe: str, *, fp32_gap: float | None = None
) -> None:
    """A model that exists, from its start to the report. It is kept in `start/`, in fp32: it may have come from the Hub, and a KL refers to
    it. `fp32_gap`: the limit of the gap in float32 where none is set; `None`: that of `measured_gap_limit`."""
    start = folder / "start"
    model, tokenizer, origin = load(start if start.is_dir() else source)
    given = digest(eqx.filter(model, eqx.is_array))
    drawing = drawing_for(config, task, model, tokenizer, device, origin)
    if config.gap_limit is None and drawing.flight.dtype == "float32":
        config = config.model_copy(update={"gap_limit": fp32_gap})
    if not config.resume:
        save_config(config, folder)
    if not start.is_dir():
        keep_model(model, tokenizer, start)
    model = lm.load_pretrained(start)

    results = reinforce(config, folder, model, given, drawing, device, recipe)
    draw_learning(folder, title=f"{task.name}: {config.algorithm}, seed {config.seed}")
    show(results)
