"""What recipes of reinforcement learning share: a model to begin from, a look at held-out problems, the models they leave behind."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from loguru import logger

import lm
from data.pipeline import Batch
from data.tasks.problems import Problem, Share, Task, pass_at_k
from data.tokenizer import Tokenizer
from lm.base import AbstractLM
from lm.flight import Flight
from lm.generate import Sampler
from recipes.prompting import Prompting
from train.logs import progress
from train.optimizers import OptimizerConfig, build_optimizer
from train.publish import building, in_dtype, write_model
from train.rl import FP32_GAP, gap_of, policy_batch
from train.rollout import Rollouts, roll_out
from train.step import StepConfig, init_state, make_step


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn, wherever they are: in training and on held-out problems alike."""

    task: Task
    prompting: Prompting
    width: int  # tokens kept for a prompt
    max_new_tokens: int
    sampler: Sampler
    flight: Flight
    ops: lm.Ops

    @property
    def row(self) -> int:
        """Targets of a row that holds any prompt and answer."""
        return row_for(self.width + self.longest - 1)

    @property
    def longest(self) -> int:
        """Tokens of an answer, a tool's replies included."""
        tool = self.task.tool
        return self.max_new_tokens + (0 if tool is None else tool.max_calls * tool.max_tokens)

    def draw(self, model: AbstractLM, problems: Sequence[Problem], n: int, key: Any) -> Rollouts:
        """`n` answers to each problem."""
        return roll_out(
            model,
            [self.prompting.prompt(problem.prompt) for problem in problems],
            n=n,
            width=self.width,
            max_new_tokens=self.max_new_tokens,
            stop_ids=self.prompting.stop_ids,
            key=key,
            flight=self.flight,
            ops=self.ops,
            sampler=self.sampler,
            tool=self.prompting.tool_calls(self.task.tool),
        )

    def solved(
        self, model: AbstractLM, problems: Sequence[Problem], n: int, key: Any, *, rows: int, on_part: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """Which of `n` answers to each problem solve it, `[problems, n]`; about `rows` answers drawn at a time."""
        at_once = max(1, rows // n)
        found = []
        for part, at in enumerate(range(0, len(problems), at_once)):
            some = list(problems[at : at + at_once])
            filled = some + [some[0]] * (at_once - len(some))  # one shape for all parts
            rollouts = self.draw(model, filled, n, jr.fold_in(key, part))
            found.append(self.prompting.judge(self.task, filled, rollouts).solved.reshape(at_once, n)[: len(some)])
            if on_part is not None:
                on_part(at + len(some))
        return np.concatenate(found)


def row_for(targets: int) -> int:
    """How wide a row of at least so many targets is: of long ones a multiple of 64, as matrix products on GPUs want it. XLA's own find no
    tiles for 16 rows of 767."""
    return targets if targets <= 256 else -(-targets // 64) * 64


# ------------------------------------------------------------------------------------------- imitation


class Imitation:
    """Learning a fixed set of worked examples by heart, as far as it goes: next-token loss on their solutions, a shuffled pass after the
    other. The batch of a step is a function of (seed, step)."""

    def __init__(
        self, model: AbstractLM, drawing: Drawing, examples: Sequence[Problem], *, batch: int, peak: float, decay: float, seed: int
    ) -> None:
        rows = drawing.prompting.rows(examples, drawing.task, drawing.row)
        self._rows, self._batch, self._peak, self._seed = rows, min(batch, len(examples)), peak, seed
        optimizer = build_optimizer(OptimizerConfig(name="adamw", beta2=0.99, weight_decay=decay))
        self._step = make_step(optimizer, StepConfig(ratios_every=0), drawing.flight, drawing.ops, jr.key(seed))
        self.state = init_state(jax.tree.map(jnp.copy, model), optimizer)

    def step(self, index: int) -> float:
        """One update; the loss before it, nats a token. The learning rate rises over 20 steps and stays."""
        count = len(self._rows.tokens)
        each = max(1, count // self._batch)  # batches a pass; a remainder waits for the next shuffle
        epoch, place = divmod(index, each)
        order = np.random.default_rng((self._seed, 2, epoch)).permutation(count)[place * self._batch : (place + 1) * self._batch]
        self.state, metrics = self._step(
            self.state, Batch(*(field[order] for field in self._rows)), self._peak * min(1.0, (index + 1) / 20)
        )
        return float(metrics["loss"])


def warm_start(
    model: AbstractLM,
    drawing: Drawing,
    examples: Sequence[Problem],
    folder: Path,
    *,
    steps: int,
    patience: int,
    every: int,
    answers: int,
    **how: Any,
) -> AbstractLM:
    """Imitate until `patience` looks at the held-out problems have brought no new best (or for `steps` steps), and return the model of the
    best look. The curve goes to `warm.jsonl`."""
    rows, imitation = how.pop("rows"), Imitation(model, drawing, examples, **how)
    best, best_share, worse, begin = jax.tree.map(jnp.copy, model), -1.0, 0, time.perf_counter()
    (folder / "warm.jsonl").unlink(missing_ok=True)
    logger.info(
        f"imitating {len(examples):,} worked examples, looking at {len(drawing.task.held_out)} held-out problems every {every} steps"
    )
    with progress("imitation", steps) as bar:
        for index in range(steps):
            loss = imitation.step(index)
            bar(index + 1)
            if (index + 1) % every:
                continue
            share = _look(imitation.state.model, drawing, answers, rows, index, how["seed"])
            _note(folder / "warm.jsonl", index + 1, time.perf_counter() - begin, loss, share)
            worse += 1
            if share.mean > best_share:
                best, best_share, worse = jax.tree.map(jnp.copy, imitation.state.model), share.mean, 0
            if worse >= patience:
                break
    logger.info(
        f"imitation: {index + 1} steps, {(time.perf_counter() - begin) / 60:.1f} minutes; best held-out pass@1 {100 * best_share:.1f}%"
    )
    return best


def control(
    model: AbstractLM, drawing: Drawing, examples: Sequence[Problem], folder: Path, *, minutes: float, every: int, answers: int, **how: Any
) -> dict[str, Any]:
    """What the same minutes of imitation give: the best and the last look, with intervals. The time of the looks does not count."""
    rows, imitation = how.pop("rows"), Imitation(model, drawing, examples, **how)
    imitation.step(0)  # compiles; RL's first step did so too
    path = folder / "control.jsonl"
    path.unlink(missing_ok=True)
    shares: list[Share] = []
    spent, index, thousandth = 0.0, 1, 0
    with progress("control", 1000) as bar:
        while spent < 60 * minutes:
            begin = time.perf_counter()
            loss = imitation.step(index)
            spent += time.perf_counter() - begin
            index += 1
            thousandth = min(1000, int(1000 * spent / max(1e-9, 60 * minutes)))
            bar(thousandth)
            if index % (5 * every) == 0 or spent >= 60 * minutes:
                shares.append(_look(imitation.state.model, drawing, answers, rows, index, how["seed"]))
                _note(path, index, spent, loss, shares[-1])
    best = max(shares, key=lambda share: share.mean)
    return {"minutes": spent / 60, "steps": index, "best": [best.mean, best.low, best.high], "last": [*vars(shares[-1]).values()]}


def _look(model: AbstractLM, drawing: Drawing, answers: int, rows: int, index: int, seed: int) -> Share:
    key = jr.fold_in(jr.key(seed + 2), index)
    return pass_at_k(drawing.solved(model, drawing.task.held_out, answers, key, rows=rows), 1)


def _note(path: Path, step: int, seconds: float, loss: float, share: Share) -> None:
    line = {"step": step, "minutes": seconds / 60, "loss": loss, "pass@1": share.mean, "pass@1_low": share.low, "pass@1_high": share.high}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


# ------------------------------------------------------------------------------------------- looks and models


def pass_metrics(solved: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """`pass@k` of each k with the ends of its interval, for the log."""
    told: dict[str, float] = {}
    for k in ks:
        share = pass_at_k(solved, k)
        told |= {f"pass@{k}": share.mean, f"pass@{k}_low": share.low, f"pass@{k}_high": share.high}
    return told


def keep_model(model: AbstractLM, tokenizer: Tokenizer, folder: Path) -> None:
    """A Hugging Face folder in fp32, whole or not there."""
    with building(folder) as beside:
        write_model(in_dtype(model, "float32"), tokenizer, beside)


def measured_gap_limit(model: AbstractLM, drawing: Drawing, log_probs: Any, prompts: int, n: int, *, seed: int) -> float:
    """By how many nats sampler and trainer may differ on a token: 1e-4 in fp32, else three times the largest gap of three runs of four
    batches each, of other prompts every time. The largest of many tokens is larger than that of few: one batch a run was too little for a
    training run of hundreds."""
    if drawing.flight.dtype == "float32":
        return FP32_GAP
    train = drawing.task.train
    gaps = []
    for run in range(3):
        largest = 0.0
        for i in range(4 * run, 4 * run + 4):
            some = [train[place % len(train)] for place in range(i * prompts, (i + 1) * prompts)]
            rollouts = drawing.draw(model, some, n, jr.fold_in(jr.key(seed), i))
            batch = policy_batch(rollouts, np.ones(len(rollouts)), seq=drawing.row)
            largest = max(largest, gap_of(batch._replace(old_log_probs=log_probs(model, batch))).largest)
        gaps.append(largest)
    shown = ", ".join(f"{gap:.2e}" for gap in gaps)
    logger.info(
        f"sampler and trainer in {drawing.flight.dtype}: largest gaps of three runs of draws {shown} nats; the limit is {3 * max(gaps):.2e}"
    )
    return 3 * max(gaps)
