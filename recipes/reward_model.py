"""A reward model: learn from pairs of answers to say with one number how good an answer is.

The language model that is begun with keeps its blocks and gets a head of one number, read at the last token of an answer; it learns that
the chosen answer of each pair is worth more than the rejected one (Bradley-Terry). Pairs are those of `recipes.dpo`: the model's own right
and wrong answers to the problems of a task, or a file. A tenth of the prompts is held out; there it is measured how often the chosen answer
wins, and by how much. On a task also what it is good for: of several answers to each held-out problem the one with the highest reward is
taken (best of n), and right more often than a random one, as far as the model can judge.

    python -m recipes.reward_model runs/grpo_arithmetic-…/start
    python -m recipes.reward_model runs/sft_chat-… --data preferences.json.gz --adapter.kind lora --schedule.peak 1e-4
    python -m recipes.reward_model --resume
    python -m recipes.score runs/reward_model-… answers.jsonl       # rewards of answers; recipes.score has the function, too

Sources: the loss, Ouyang et al. 2022 (arXiv:2203.02155, eq. 1); one pass over the pairs is usual for models of billions of parameters,
which otherwise learn pairs by heart (the same, appendix C.2); the learning rate and the passes here are single guesses for small models,
those want 1e-6 to 1e-5. `--reward.margin`, `--reward.centre`: see there.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key
from loguru import logger

import lm
from data.preferences import Pair, read_pairs
from data.tasks import TASKS
from data.tasks.problems import RewardError, pass_at_k
from lm.base import AbstractLM
from lm.digests import digest
from lm.generate import Sampler
from recipes.command_line import claimed, fail, parse
from recipes.continue_pretrain import prepared
from recipes.loading import load
from recipes.preferring import PairConfig, encoded, identity_of_pairs, learn, own_pairs, pairs_at, split
from recipes.prompting import Prompting
from recipes.rl_stages import Drawing
from recipes.running import ENDS_IN_WORDS, check_start, choose_flight, save_config, session_facts
from recipes.score import Scorer, accuracy, rows_of_texts
from train.adapters import adapted, trained_part
from train.backends import attention_of
from train.intervals import Estimate, bootstrap_ratio
from train.lineage import continued_from
from train.logs import plain_messages, words_kept, write_json
from train.optimizers import ScheduleConfig, build_optimizer
from train.pictures import plot_rewards
from train.publish import export
from train.reward_model import (
    RewardBatch,
    RewardConfig,
    RewardModel,
    make_rewards,
    pair_losses,
    pair_metrics,
    reward_objective,
    write_head,
)
from train.runtime import choose_device, compilation_cache, device_facts, peak_flops
from train.step import TrainState, init_state, make_step

NOTE = "A reward model: reward_head.safetensors holds its head, a number at an answer's last token. As a language model it is of no use."

# ------------------------------------------------------------------------------------------- config


class Config(PairConfig):
    """Everything that makes the run what it is."""

    reward: RewardConfig = RewardConfig()
    schedule: ScheduleConfig = ScheduleConfig(peak=3e-4, warmup=0.1)


# ------------------------------------------------------------------------------------------- main


def main(config: Config) -> Path:
    """The whole experiment. Returns the run folder."""
    plain_messages()
    folder = config.run_dir or Path("runs") / f"reward_model-{datetime.now():%Y%m%d-%H%M%S}"
    with claimed(folder, "reward_model"), words_kept(folder):
        run(config, folder)
    return folder


def run(config: Config, folder: Path) -> None:
    """Model, pairs, loop, report, in this order."""
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

    # The decoder with a head of zeros. With adapters, these and the head are trained; else all but an unembedding, which nothing reads.
    base = lm.Base.of(model, config.source.name) if config.adapter.kind != "none" else None
    began = digest(eqx.filter(model, eqx.is_array))
    adapter_key, dropout_key = jr.split(jr.key(config.seed))
    optimizer = build_optimizer(config.optimizer)

    def fresh_state() -> TrainState:
        own = RewardModel.of(adapted(jax.tree.map(jnp.array, model), config.adapter, key=adapter_key))
        trained = own.trained(trained_part(own.base, config.adapter))
        return init_state(own, optimizer, frozen=config.optimizer.frozen, trainable=trained)

    # Pairs: from the file, or the model's own, drawn once a run.
    task = TASKS[config.task]()
    drawing = Drawing(task, prompting, prompting.width([*task.train, *task.held_out]), config.max_new_tokens, Sampler(), flight, ops)
    pairs = read_pairs(config.data) if config.data is not None else own_pairs(config, model, drawing, folder / "pairs.jsonl")
    rows, kept = rows_of(pairs, prompting, config.seq, model.config.context)
    train, held_out = split(rows, kept)
    count = len(train.tokens) // 2
    total = config.total_steps(count)
    config = config.model_copy(update={"steps": total})
    logger.info(
        f"{count:,} pairs to train on, {len(held_out.tokens) // 2:,} held out, rows of {train.tokens.shape[1]} tokens: {total:,} steps"
    )

    def batches(start: int) -> Iterator[RewardBatch]:
        """The batch of a step is a function of (seed, step)."""
        for index in range(start, total):
            yield pairs_at(train, index, config.batch, config.seed)

    # The loop.
    objective = reward_objective(config.reward)
    step = make_step(optimizer, config.step, flight, ops, dropout_key, donate=not config.debug_nans, objective=objective)
    identity = {"start": began, "tokenizer": tokenizer.digest, "pairs": identity_of_pairs(config, pairs)}
    in_checkpoints = {"model_type": model.config.model_type, "model": model.config.model_dump(), "reward_model": True}
    if base is not None:
        in_checkpoints |= {"base": base.record(), "adapter": config.adapter.model_dump(mode="json")}

    def plain(reward_model: RewardModel) -> RewardModel:
        """Adapters merged into the weights."""
        return RewardModel(lm.dequantised(lm.merge(reward_model.base)), reward_model.head)

    rewards = make_rewards(flight, ops)
    at_once = 2 * config.batch // config.step.micro_batches

    def rewards_of(reward_model: RewardModel, rows: RewardBatch) -> tuple[np.ndarray, np.ndarray]:
        """Of the chosen and of the rejected answers."""
        parts = [RewardBatch(*(filled(field[at : at + at_once], at_once) for field in rows)) for at in range(0, len(rows.tokens), at_once)]
        found = np.concatenate([rewards(reward_model, part) for part in parts])
        return found[::2], found[1::2]

    def look(reward_model: RewardModel) -> dict[str, float]:
        if not len(held_out.tokens):
            return {}
        chosen, rejected = rewards_of(reward_model, RewardBatch(*(field[: 2 * config.validate_rows] for field in held_out)))
        told = {"loss": pair_losses(config.reward, chosen, rejected)} | pair_metrics(chosen, rejected)
        return {f"val_{name}": float(np.mean(values)) for name, values in told.items()}

    example = held_out if len(held_out.tokens) else train

    def sample(reward_model: RewardModel) -> str:
        one = RewardBatch(*(field[:2] for field in example))
        shown = [tokenizer.decode(text[marks > 0], skip_special_tokens=False) for text, marks in zip(one.tokens, one.segments, strict=True)]
        (chosen,), (rejected,) = rewards_of(reward_model, one)
        return f"a pair: {chosen:+.3f} for {shown[0]!r}, {rejected:+.3f} for {shown[1]!r}"

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
    state, course = learn("reward_model", config, folder, fresh_state(), step, batches, **how, look=look, sample=sample)

    # What came of it, over all that was held out.
    learned = plain(state.model)
    results: dict[str, Any] = {"steps": total, "pairs": count, **course}
    if len(held_out.tokens):
        results |= measures(*rewards_of(learned, held_out), seed=config.seed)
    if config.data is None:
        scorer = Scorer(learned, prompting, rewards, at_once)
        results["best_of_n"] = best_of_n(scorer, model, drawing, n=config.answers, key=jr.key(config.seed + 1))
    also = partial(write_head, learned.head)
    export(learned.base, tokenizer, folder / "export", manifest=manifest, results=results, also=also, note=NOTE)
    write_json(folder / "results.json", results)
    pairs_of = task.name if config.data is None else config.data.name
    plot_rewards(folder / "metrics.jsonl", folder / "rewards.png", title=f"reward model on {pairs_of}, {count:,} pairs")
    show(results, folder)


# ------------------------------------------------------------------------------------------- pairs


def rows_of(pairs: Sequence[Pair], prompting: Prompting, seq: int, context: int) -> tuple[RewardBatch, list[Pair]]:
    """Rows of all pairs that fit into `seq` tokens, as wide as the longest of them; and those pairs."""
    texts, kept = encoded(pairs, prompting, seq, context)
    whole = [np.concatenate(text) for text in texts]
    return rows_of_texts(whole, rows=len(whole), width=max(map(len, whole))), kept


def filled(field: np.ndarray, rows: int) -> np.ndarray:
    """With rows of padding behind: one shape for all parts."""
    return np.concatenate([field, np.zeros((rows - len(field), *field.shape[1:]), field.dtype)])


# ------------------------------------------------------------------------------------------- report


def measures(chosen: np.ndarray, rejected: np.ndarray, *, seed: int) -> dict[str, Any]:
    """Of held-out pairs: how often the chosen answer wins and by how much, with intervals over pairs; the means of both."""
    margin: Estimate = bootstrap_ratio(chosen - rejected, np.ones(len(chosen)), seed=seed)
    return {
        "accuracy": accuracy(chosen, rejected).record(),
        "margin": margin.record(),
        "rewards_chosen": float(np.mean(chosen)),
        "rewards_rejected": float(np.mean(rejected)),
    }


def best_of_n(scorer: Scorer, model: AbstractLM, drawing: Drawing, *, n: int, key: Key[Array, ""]) -> dict[str, Any]:
    """Of `n` answers to each held-out problem, by the model begun with: the share of problems solved by a random one, by the one with the
    highest reward, and by any, with 95 % intervals over problems."""
    task, problems = drawing.task, list(drawing.task.held_out)
    answers: list[str] = []
    solved: list[np.ndarray] = []
    at_once = max(1, 1024 // n)
    for part, at in enumerate(range(0, len(problems), at_once)):
        some = problems[at : at + at_once]
        asked = some + [some[0]] * (at_once - len(some))  # one shape for all parts
        rollouts = drawing.draw(model, asked, n, jr.fold_in(key, part))
        answers += [drawing.prompting.text(rollouts.answer(row)) for row in range(len(some) * n)]
        solved.append(drawing.prompting.judge(task, asked, rollouts).solved[: len(some) * n])
    right = np.concatenate(solved).reshape(-1, n)
    rewards = scorer.score([problem.prompt for problem in problems for _ in range(n)], answers).reshape(-1, n)
    taken = np.take_along_axis(right, np.argmax(rewards, axis=1)[:, None], axis=1)
    shares = {"random": pass_at_k(right, 1), "best": pass_at_k(taken, 1), "any": pass_at_k(right, n)}
    return {"n": n, "problems": len(right)} | {name: [share.mean, share.low, share.high] for name, share in shares.items()}


def show(results: dict[str, Any], folder: Path) -> None:
    """On the screen, what came of it."""
    if "accuracy" in results:
        found, margin = results["accuracy"], results["margin"]
        shown = "" if margin["low"] is None else f" ({margin['low']:.3f} to {margin['high']:.3f})"
        print(f"\nof {found['n']:,} held-out pairs the chosen answer wins {found['value']:.1%} ({found['low']:.1%} to {found['high']:.1%})")
        print(f"  by {margin['value']:.3f}{shown} on average")
    else:
        print("\nno pair was held out: nothing was measured")
    if best := results.get("best_of_n"):
        words = {name: f"{best[name][0]:.1%} ({best[name][1]:.1%} to {best[name][2]:.1%})" for name in ("random", "best", "any")}
        print(f"  of {best['n']} answers to each of {best['problems']:,} problems: a random one is right {words['random']}, ", end="")
        print(f"the one with the highest reward {words['best']}, any {words['any']}")
    print(f"  curves {folder / 'rewards.png'}; score answers: python -m recipes.score {folder} answers.jsonl")


if __name__ == "__main__":
    chosen_config = parse(Config, __doc__ or "", recipe="reward_model")
    try:
        main(chosen_config)
    except (*ENDS_IN_WORDS, RewardError) as error:
        fail(str(error))
