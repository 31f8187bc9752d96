"""Direct preference optimisation: teach a model which of two answers is better.

Without `--data` the pairs are the model's own: it writes several answers to each problem of a task, the task's verifier tells right from
wrong, and one right and one wrong answer make a pair. So the model learns to prefer what it can already do. With `--data` the pairs come
from a file of preferences. A tenth of the prompts is held out; on them margins and accuracies are measured before, during and after, and of
a task pass@1 as well.

    python -m recipes.dpo runs/grpo_arithmetic-…/start                             # the model that imitation left behind
    python -m recipes.dpo runs/grpo_arithmetic-…/start --problems 8000 --preference.loss orpo --schedule.peak 1e-3
    python -m recipes.dpo runs/sft_chat-… --data preferences.json.gz --preference.loss simpo --preference.beta 2
    python -m recipes.dpo --resume

Logged as in TRL's DPOTrainer: rewards_chosen, rewards_rejected, margin, accuracy, log_probs_chosen, log_probs_rejected. Sources of the
settings: β 0.1, Rafailov et al. 2023 (arXiv:2305.18290, appendix B); the learning rate is a single guess for small models, models of
billions of parameters want 5e-7 to 5e-6.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
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
from recipes.command_line import claimed, fail, parse
from recipes.continue_pretrain import prepared
from recipes.loading import load
from recipes.preferring import PairConfig, encoded, identity_of_pairs, learn, own_pairs, pairs_at, split
from recipes.prompting import Prompting
from recipes.rl_stages import Drawing, pass_metrics
from recipes.running import ENDS_IN_WORDS, check_start, choose_flight, save_config, session_facts
from train.adapters import adapted, trained_part
from train.backends import attention_of
from train.lineage import continued_from
from train.logs import plain_messages, read_metrics, words_kept, write_json
from train.optimizers import build_optimizer
from train.preference import PreferenceBatch, PreferenceConfig, preference_objective, sequence_log_probs
from train.publish import export
from train.rl import make_log_probs
from train.runtime import choose_device, compilation_cache, device_facts, peak_flops
from train.step import TrainState, init_state, make_step

# ------------------------------------------------------------------------------------------- config


class Config(PairConfig):
    """Everything that makes the run what it is."""

    preference: PreferenceConfig = PreferenceConfig()
    reference: Literal["precomputed", "copy", "lora_off"] = Field(
        "precomputed",
        description="log-probs of the start: of all pairs before the first step, at each step by a copy of it, or by the model itself with "
        "its adapters off (needs --adapter.kind). All give the same numbers",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
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
    loaded, tokenizer, origin = load(config.source)
    model = prepared(loaded, 0.0)
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
    rows, kept = rows_of(pairs, prompting, config.seq, model.config.context)
    train, held_out = split(rows, kept)
    count = len(train.tokens) // 2
    total = config.total_steps(count)
    config = config.model_copy(update={"steps": total})
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
    step = make_step(optimizer, config.step, flight, ops, dropout_key, donate=not config.debug_nans, objective=objective)
    identity = {"start": began, "tokenizer": tokenizer.digest, "pairs": identity_of_pairs(config, pairs)}
    in_checkpoints = {"model_type": model.config.model_type, "model": model.config.model_dump()}
    if base is not None:
        in_checkpoints |= {"base": base.record(), "adapter": config.adapter.model_dump(mode="json"), "also": []}
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

    def plain(state_model: AbstractLM) -> AbstractLM:
        """Adapters merged into the weights: to ask, and to export."""
        return lm.dequantised(lm.merge(state_model)) if with_adapters else state_model

    def solve(state_model: AbstractLM) -> dict[str, float]:
        """pass@1 on the task's held-out problems, where the pairs are of a task."""
        if config.data is not None:
            return {}
        return pass_metrics(drawing.solved(plain(state_model), task.held_out, config.answers, jr.key(config.seed + 1), rows=1024), [1])

    def sample(state_model: AbstractLM) -> str:
        return f"to a held-out prompt: {answer_to(plain(state_model), example, prompting)!r}"

    facts = {"model_type": model.config.model_type, "parameters": model.n_params, **model.config.model_dump()}
    manifest: dict[str, Any] = {
        "continued_from": continued_from(config.source, began),
        "pairs": count,
        "steps": total,
        "model": facts,
        "seed": config.seed,
        "identity": identity,
    }
    session = session_facts(device, ops, flight, peak_flops(device))
    how: dict[str, Any] = {"total": total, "identity": identity, "kept": in_checkpoints, "manifest": manifest, "session": session}
    state, course = learn("dpo", config, folder, begun, step, batches, **how, look=look, ends=solve, sample=sample)
    results = summary(folder, config, total) | course
    if base is not None:
        lm.save_adapter(state.model, folder / "adapter", base=base)
    export(plain(state.model), tokenizer, folder / "export", manifest=manifest, results=results)
    write_json(folder / "results.json", results)
    show(results)


# ------------------------------------------------------------------------------------------- pairs


def rows_of(pairs: Sequence[Pair], prompting: Prompting, seq: int, context: int) -> tuple[PreferenceBatch, list[Pair]]:
    """Rows of all pairs that fit into `seq` targets, as wide as the longest of them; and those pairs."""
    texts, kept = encoded(pairs, prompting, seq, context, targets=True)
    width = max(len(prompt) + len(answer) - 1 for prompt, answer in texts)
    tokens, targets, positions, segments = (np.zeros((len(texts), width), np.int32) for _ in range(4))
    weights = np.zeros((len(texts), width), np.float32)
    for row, (prompt, answer) in enumerate(texts):
        whole = np.concatenate([prompt, answer])
        length = len(whole) - 1
        tokens[row, :length], targets[row, :length] = whole[:-1], whole[1:]
        positions[row, :length], segments[row, :length] = np.arange(length), 1
        weights[row, len(prompt) - 1 : length] = 1
    return PreferenceBatch(tokens, targets, positions, segments, weights, np.zeros(len(texts), np.float32)), kept


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
