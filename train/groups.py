"""Which answers a step learns from: groups of answers to prompts, judged, and drawn anew where they teach nothing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from train.advantages import OF_GROUP, RunningMean, informative, overlong_penalty
from train.policy import Algorithm
from train.rollout import Rollouts


@dataclass(frozen=True)
class Judged:
    """Rollouts of some prompts and what they are worth. Rows as in `Rollouts`."""

    rollouts: Rollouts
    problems: list[int]  # index of each prompt's problem
    rewards: np.ndarray  # `[rows]`; NaN for what is left out
    by_reward: dict[str, np.ndarray]

    def take(self, groups: np.ndarray) -> "Judged":
        """Some of the prompts, with all their answers."""
        r, n = self.rollouts, self.rollouts.n
        rows = (groups[:, None] * n + np.arange(n)).reshape(-1)
        fields = {name: getattr(r, name)[rows] for name in ("tokens", "drawn", "log_probs", "entropies", "ended")}
        rollouts = Rollouts([r.prompts[g] for g in groups], n, **fields)
        by_reward = {name: values[rows] for name, values in self.by_reward.items()}
        return Judged(rollouts, [self.problems[g] for g in groups], self.rewards[rows], by_reward)

    @staticmethod
    def together(parts: "list[Judged]") -> "Judged":
        first = parts[0].rollouts
        fields = {
            name: np.concatenate([getattr(part.rollouts, name) for part in parts])
            for name in ("tokens", "drawn", "log_probs", "entropies", "ended")
        }
        rollouts = Rollouts([prompt for part in parts for prompt in part.rollouts.prompts], first.n, **fields)
        by_reward = {name: np.concatenate([part.by_reward[name] for part in parts]) for name in parts[0].by_reward}
        problems = [problem for part in parts for problem in part.problems]
        return Judged(rollouts, problems, np.concatenate([part.rewards for part in parts]), by_reward)


def gather(
    order: Iterator[tuple[int, int]], draw: Callable[[list[int], int], Judged], prompts: int, *, dynamic: bool, most_draws: int
) -> tuple[Judged, list[Judged], int]:
    """The groups of one step, all that was drawn for it, and the number of the next problem.

    With `dynamic` sampling, groups whose rewards are all the same are set aside and others drawn, `most_draws` times at most; what is then
    missing is filled with such groups, which teach nothing and are counted by the caller.

    **Arguments:**

    - `order`: (number, problem) without end.
    - `draw`: answers to problems, judged; told which draw of this step it is.
    """
    drawn: list[Judged] = []
    kept: list[Judged] = []
    spare: list[Judged] = []
    number = 0
    for turn in range(most_draws if dynamic else 1):
        some = [next(order) for _ in range(prompts)]
        number = some[-1][0] + 1
        judged = draw([problem for _, problem in some], turn)
        drawn.append(judged)
        teaches = informative(judged.rewards.reshape(-1, judged.rollouts.n)) if dynamic else np.ones(prompts, bool)
        kept.append(judged.take(np.flatnonzero(teaches)))
        spare.append(judged.take(np.flatnonzero(~teaches)))
        if sum(len(part.problems) for part in kept) >= prompts:
            break
    together = Judged.together([part for part in kept + spare if part.problems])
    return together.take(np.arange(prompts)), drawn, number


def advantages_of(
    algorithm: Algorithm, judged: Judged, baseline: RunningMean, *, most: int, overlong_buffer: int, kl_of_answers: np.ndarray | None = None
) -> np.ndarray:
    """`[rows]`, NaN for what is left out.

    **Arguments:**

    - `most`, `overlong_buffer`: of the length penalty, where the algorithm has one.
    - `kl_of_answers`: weight · Σ_t k1, taken from the rewards first.
    """
    rewards = judged.rewards
    if algorithm.overlong:
        rewards = rewards + overlong_penalty(judged.rollouts.lengths, most, overlong_buffer)
    if kl_of_answers is not None:
        rewards = rewards - kl_of_answers
    groups = rewards.reshape(-1, judged.rollouts.n)
    if algorithm.advantage == "reinforce":
        return baseline.advantages(groups).reshape(-1)
    return OF_GROUP[algorithm.advantage](groups).reshape(-1)


def check_group(algorithm: Algorithm, n: int) -> None:
    """**Raises:** `ValueError` where an algorithm cannot work with `n` answers to a prompt."""
    if n < 2 and algorithm.advantage != "reinforce":
        raise ValueError(
            f"{algorithm.advantage} compares the answers to one prompt, so it needs at least 2 of them, got n = {n}; "
            "reinforce can do with 1 (its baseline is the mean of past rewards)"
        )
