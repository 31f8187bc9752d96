"""What a task is made of: problems, rewards that judge what was written, and the one place where rewards are called and added up.

A reward is a plain function of a problem and an answer. It gives a number, or `None` where it cannot judge, and the sample is then left
out of everything. Whatever else it does is a mistake in the reward, and stops with the sample that shows it (`RewardError`).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Problem:
    """One question."""

    prompt: str  # what the model reads; of a chat model, the user's message
    facts: Mapping[str, Any] = field(default_factory=dict)  # what the rewards judge by
    solution: str | None = None  # an answer to imitate; None where none is known


Reward = Callable[[Problem, str], float | None]


@dataclass(frozen=True)
class Tool:
    """Something the model may call: it writes `ends_call`, reads what `run` makes of the text since its last call, and writes on."""

    ends_call: str  # must be one token of the tokenizer
    run: Callable[[str], str]
    max_calls: int = 1  # in one answer
    max_tokens: int = 16  # of what it says; more is an error


@dataclass(frozen=True)
class Task:
    """Problems to learn from, others to be measured on, and what an answer is worth."""

    name: str
    train: Sequence[Problem]
    held_out: Sequence[Problem]
    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]  # of each reward in the sum
    verifier: str  # the reward that is 1 where the problem is solved; pass@k asks this one
    tool: Tool | None = None

    def __post_init__(self) -> None:
        if self.rewards.keys() != self.weights.keys():
            raise ValueError(
                f"task {self.name!r}: rewards {sorted(self.rewards)} and weights {sorted(self.weights)} must have the same names"
            )
        if self.verifier not in self.rewards:
            raise ValueError(f"task {self.name!r}: the verifier {self.verifier!r} must be one of its rewards, {sorted(self.rewards)}")
        if not len(self.train) or not len(self.held_out):
            raise ValueError(f"task {self.name!r} has {len(self.train)} problems to train on and {len(self.held_out)} held out: needs both")

    def weighted(self, weights: Mapping[str, float]) -> "Task":
        """The same with some of its rewards weighted otherwise."""
        if strange := weights.keys() - self.weights.keys():
            raise ValueError(f"task {self.name!r} has no reward called {', '.join(sorted(strange))}; it has {', '.join(self.weights)}")
        return Task(**(vars(self) | {"weights": {**self.weights, **weights}}))


class RewardError(RuntimeError):
    """A reward raised, or gave what is no number; the message shows the sample."""


@dataclass(frozen=True)
class Scores:
    """What some answers were worth."""

    total: np.ndarray  # `[answers]`, Σ weight · reward; NaN where a reward gave None
    by_reward: dict[str, np.ndarray]  # each `[answers]`, unweighted; NaN where it gave None
    solved: np.ndarray  # `[answers]`, bool; False where it could not be judged


def score(task: Task, problems: Sequence[Problem], answers: Sequence[str]) -> Scores:
    """Judge each answer to its problem by all rewards of the task.

    **Raises:** `RewardError` where a reward raises or returns something other than a finite number or `None`.
    """
    by_reward = {
        name: np.array([_judged(task, name, problem, answer) for problem, answer in zip(problems, answers, strict=True)], np.float64)
        for name in task.rewards
    }
    total = sum((task.weights[name] * values for name, values in by_reward.items()), np.zeros(len(answers)))
    return Scores(np.asarray(total), by_reward, by_reward[task.verifier] >= 1)


def _judged(task: Task, name: str, problem: Problem, answer: str) -> float:
    try:
        value = task.rewards[name](problem, answer)
    except Exception as error:  # whatever it is, the sample belongs to it
        raise RewardError(_words(task, name, problem, answer, f"raised {type(error).__name__}: {error}")) from error
    if value is None:
        return math.nan
    if not isinstance(value, Real | np.bool_) or not math.isfinite(value):
        kind = type(value).__name__
        raise RewardError(_words(task, name, problem, answer, f"returned {value!r} ({kind}), expected a finite number or None"))
    return float(value)


def _words(task: Task, name: str, problem: Problem, answer: str, what: str) -> str:
    return (
        f"reward {name!r} of task {task.name!r} {what}\n  prompt: {problem.prompt!r}\n  answer: {answer!r}\n"
        f"  facts:  {dict(problem.facts)!r}\nMend the reward, or let it return None to leave such samples out."
    )


# ------------------------------------------------------------------------------------------- which problem when


def in_order(problems: Sequence[Problem], seed: int, cursor: int) -> Iterator[tuple[int, int]]:
    """(number, index of the problem) from number `cursor` on, without end: a fresh shuffle for each pass over the problems. The problem of
    a number is a function of (seed, number), so a run goes on from the number it had come to."""
    n = len(problems)
    while True:
        epoch, first = divmod(cursor, n)
        order = np.random.default_rng((seed, epoch)).permutation(n)
        for place in range(first, n):
            yield epoch * n + place, int(order[place])
        cursor = (epoch + 1) * n


# ------------------------------------------------------------------------------------------- pass@k


@dataclass(frozen=True)
class Share:
    """A share of problems, with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f}% ({100 * self.low:.1f} to {100 * self.high:.1f})"


def pass_at_k(solved: np.ndarray, k: int) -> Share:
    """The chance that at least one of k answers solves a problem, from n ≥ k answers to each.

    For a problem with c of n answers right, 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, arXiv:2107.03374, eq. 1), which is unbiased where
    1 - (1 - c/n)^k is not. The interval is over problems: Wilson's (1927) at the number of independent yes-or-no problems that would have
    the standard error seen, so that it has a width even where all are solved.

    **Arguments:**

    - `solved`: bool, `[problems, n]`.
    """
    problems, n = solved.shape
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} answers to each problem, got {n}")
    wrong = n - solved.sum(axis=1)
    each = np.array([1.0 - math.comb(int(w), k) / math.comb(n, k) for w in wrong])
    mean = float(each.mean())
    variance = float(each.var()) / problems
    count = mean * (1 - mean) / variance if variance > 0 else problems
    z = 1.96
    centre, spread = mean + z * z / (2 * count), z * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return Share(mean, (centre - spread) / scale, (centre + spread) / scale)
