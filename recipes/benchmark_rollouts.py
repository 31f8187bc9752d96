"""How fast answers are drawn: all in one batch, as reinforcement learning draws them, against one after the other.

The same model, prompts, sampler and compiled functions (`train.rollout.roll_out`) on each side; what differs is how many rows a call has.
They take turns in one process, A B C A B C, so that a neighbour on the machine slows all alike; a ratio is of one round. Counted are
tokens that the model drew, over the seconds of the whole call: prompts read, tokens drawn, everything fetched.

    python -m recipes.benchmark_rollouts                                                       # a fresh model, as in grpo_arithmetic
    python -m recipes.benchmark_rollouts --model runs/grpo_arithmetic-…/start --rl-steps 10
    python -m recipes.benchmark_rollouts --model HuggingFaceTB/SmolLM2-135M-Instruct --prompts 8 --n 8 --max-new-tokens 40 --alone 8

`--rl-steps` also takes some steps of GRPO, and tells which share of their time goes into drawing, judging, the trainer's log-probabilities
and updates.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.random as jr
import numpy as np
import tyro
from pydantic import Field
from rich.console import Console

from data.tasks import TASKS
from data.tasks.problems import Problem
from lm.base import AbstractLM
from recipes import grpo_arithmetic
from recipes.benchmark_tables import print_table
from recipes.command_line import RecipeConfig, fail
from recipes.grpo_arithmetic import beginning
from recipes.reinforcement import RL_ENDS_IN_WORDS, drawing_for
from recipes.rl_report import Clock
from recipes.rl_stages import Drawing
from train.logs import plain_messages, progress, read_metrics
from train.rollout import Rollouts
from train.runtime import choose_device, compilation_cache, device_facts

BATCHED, BY_PROMPT, ALONE = "all at once", "a prompt at a time", "an answer at a time"


class Config(RecipeConfig):
    """What to measure, and how long."""

    model: Path | None = Field(
        None,
        description="run, Hugging Face folder, GGUF file or owner/name on the Hub; None: a fresh model, as recipes.grpo_arithmetic has it",
    )
    task: Literal["arithmetic", "calculator", "countdown", "counting", "reversal"] = Field("arithmetic", description="whose prompts")
    prompts: int = Field(32, ge=1, description="prompts of a batch")
    n: int = Field(8, ge=1, description="answers to each")
    max_new_tokens: int = Field(5, ge=1, description="longest answer, its end included")
    alone: int = Field(64, ge=1, description="answers of a round that are drawn in smaller calls: all of them would take long")
    rounds: int = Field(5, ge=1, description="turns that each side takes")
    rl_steps: int = Field(0, ge=0, description="steps of GRPO to take afterwards, for the shares of their time; 0: none")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="operands of the blocks' products")
    backend: str = Field("auto", description="kernels, as in other recipes")
    device: Literal["auto", "cpu", "gpu", "tpu"] = Field("auto", description="where to compute")
    seed: int = Field(0, ge=0, description="of a fresh model, prompts and draws")
    jsonl: Path | None = Field(None, description="also append the figures to this file, a line a run")

    @property
    def rl(self) -> grpo_arithmetic.Config:
        """The settings of the RL that would draw so."""
        names = ("model", "task", "prompts", "n", "max_new_tokens", "dtype", "backend", "device", "seed")
        return grpo_arithmetic.Config(**{name: getattr(self, name) for name in names}, algorithm="grpo" if self.n > 1 else "reinforce")


class Side(NamedTuple):
    """One way to draw."""

    calls: int
    rows: int  # answers a call
    draw: Callable[[int], list[Rollouts]]  # of a round


def main(config: Config) -> dict[str, Any]:
    """Measure, show, and return the figures."""
    plain_messages()
    device = choose_device(config.device)
    compilation_cache()
    rl = config.rl
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer, origin = beginning(rl, Path(folder))
    task = TASKS[config.task]()
    drawing = drawing_for(rl, task, model, tokenizer, device, origin)
    order = np.random.default_rng(config.seed).permutation(len(task.train))
    problems = [task.train[order[i % len(order)]] for i in range(config.prompts)]
    sides = sides_of(config, model, drawing, problems)
    speeds = in_turns(sides, config.rounds)
    figures: dict[str, Any] = {
        "settings": config.model_dump(mode="json", exclude={"jsonl"}),
        "model": {"from": origin, "parameters": model.n_params},
        "ran_with": {"kernels": drawing.ops.name, **drawing.flight.model_dump()},
        "device": device_facts(device),
        "tokens_per_s": speeds,
        "times_alone": ratios(speeds),
    }
    if config.rl_steps:
        figures["share_of_time"] = shares_of_time(rl, config.rl_steps)
    show(figures, sides)
    if config.jsonl is not None:
        config.jsonl.parent.mkdir(parents=True, exist_ok=True)
        with config.jsonl.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")
    return figures


def sides_of(config: Config, model: AbstractLM, drawing: Drawing, problems: Sequence[Problem]) -> dict[str, Side]:
    """The ways to draw. Each round has keys of its own, and the smaller calls take the first prompts."""
    alone = min(config.alone, config.prompts * config.n)
    some = max(1, alone // config.n)
    key = jr.key(config.seed)

    def one_by_one(asked: Sequence[Problem], n: int) -> Callable[[int], list[Rollouts]]:
        def draw(number: int) -> list[Rollouts]:
            own = jr.fold_in(key, number)
            return [drawing.draw(model, [problem], n, jr.fold_in(own, i)) for i, problem in enumerate(asked)]

        return draw

    return {
        BATCHED: Side(1, config.prompts * config.n, lambda number: [drawing.draw(model, problems, config.n, jr.fold_in(key, number))]),
        BY_PROMPT: Side(some, config.n, one_by_one(problems[:some], config.n)),
        ALONE: Side(alone, 1, one_by_one([problems[i // config.n] for i in range(alone)], 1)),
    }


def in_turns(sides: dict[str, Side], rounds: int) -> dict[str, list[float]]:
    """Tokens a second of each side, round by round. A first round of each compiles and is not kept."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    with progress("drawing", (rounds + 1) * len(sides)) as told:
        for number in range(rounds + 1):
            for i, (name, side) in enumerate(sides.items()):
                begin = time.perf_counter()
                drawn = side.draw(number)
                seconds = time.perf_counter() - begin
                if number:
                    speeds[name].append(sum(int(rollouts.drawn.sum()) for rollouts in drawn) / seconds)
                told(number * len(sides) + i + 1)
    return speeds


def ratios(speeds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """How many times as fast as an answer at a time: of each round, then the least, the middle and the most of these."""
    found = {}
    for name, own in speeds.items():
        times = [speed / alone for speed, alone in zip(own, speeds[ALONE], strict=True)]
        found[name] = {"min": min(times), "median": statistics.median(times), "max": max(times)}
    return found


def shares_of_time(rl: grpo_arithmetic.Config, steps: int) -> dict[str, float]:
    """Where the time of RL's steps goes, the first one left out: it compiles."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        changes = {"run_dir": run, "steps": steps + 1, "warm_examples": 0, "control": False, "answers": 1, "validate_every": steps + 1}
        grpo_arithmetic.main(rl.model_copy(update=changes))
        lines = [line for line in read_metrics(run / "metrics.jsonl") if "rollout_s" in line][1:]
    spent = {part.removesuffix("_s"): sum(line[part] for line in lines) for part in Clock.PARTS}
    return {part: seconds / sum(spent.values()) for part, seconds in spent.items()}


def show(figures: dict[str, Any], sides: dict[str, Side]) -> None:
    """A line a side: median, and the least and the most of the rounds."""
    rows = []
    for name, side in sides.items():
        speeds, times = figures["tokens_per_s"][name], figures["times_alone"][name]
        speed = f"{statistics.median(speeds):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f})"
        rows.append([name, f"{side.calls:,}", f"{side.rows:,}", speed, f"{times['median']:.1f} ({times['min']:.1f} to {times['max']:.1f})"])
    settings, model = figures["settings"], figures["model"]
    title = f"{model['parameters']:,} parameters, {settings['prompts']} prompts of {settings['task']}, {settings['rounds']} rounds"
    print_table(Console(), title, ("drawn", "calls", "answers a call", "tokens/s", "times an answer at a time"), rows)
    if shares := figures.get("share_of_time"):
        words = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        print(f"time of {settings['rl_steps']} steps of RL: {words} (check: the trainer's log-probabilities)")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__, prog="python -m recipes.benchmark_rollouts"))
    except RL_ENDS_IN_WORDS as error:
        fail(str(error))
