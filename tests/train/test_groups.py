"""Which answers a step learns from."""

import itertools

import numpy as np
import pytest

from train.advantages import RunningMean
from train.groups import Judged, advantages_of, check_group, gather
from train.policy import ALGORITHMS
from train.rollout import Rollouts


def judged(rewards: list[list[float]], problems: list[int]) -> Judged:
    """Groups with these rewards; the token of an answer is the number of its problem."""
    n = len(rewards[0])
    rows = np.repeat(problems, n)
    tokens = np.stack([rows, np.where(np.arange(len(rows)) % n == 0, rows, -1)], axis=1).astype(np.int32)
    zeros = np.zeros(tokens.shape, np.float32)
    prompts = [np.array([p]) for p in problems]
    rollouts = Rollouts(prompts, n, tokens, tokens >= 0, zeros, zeros, np.ones(len(rows), bool))
    flat = np.concatenate(rewards)
    return Judged(rollouts, problems, flat, {"right": flat})


def test_dynamic_sampling_draws_on_until_enough_groups_teach() -> None:
    drawn = []

    def draw(problems: list[int], turn: int) -> Judged:
        drawn.append(problems)
        return judged([[1.0, 0.0] if p % 3 == 0 else [1.0, 1.0] for p in problems], problems)

    kept, everything, number = gather(zip(itertools.count(), itertools.count()), draw, 4, dynamic=True, most_draws=9)
    assert drawn == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert number == 12
    assert kept.problems == [0, 3, 6, 9]
    assert kept.rollouts.tokens[:, 0].tolist() == [0, 0, 3, 3, 6, 6, 9, 9]
    assert kept.rewards.tolist() == [1, 0] * 4
    assert sum(len(part.problems) for part in everything) == 12


def test_where_too_few_teach_the_batch_is_filled_with_others() -> None:
    kept, _, number = gather(
        zip(itertools.count(), itertools.count()),
        lambda problems, turn: judged([[1.0, 0.0] if p == 5 else [0.0, 0.0] for p in problems], problems),
        4,
        dynamic=True,
        most_draws=2,
    )
    assert number == 8
    assert kept.problems == [5, 0, 1, 2]


def test_without_it_the_first_draw_is_taken_as_it_is() -> None:
    kept, drawn, number = gather(
        zip(itertools.count(3), itertools.count()), lambda p, turn: judged([[0.0, 0.0]] * 4, p), 4, dynamic=False, most_draws=5
    )
    assert (kept.problems, len(drawn), number) == ([0, 1, 2, 3], 1, 7)


def test_penalties_are_taken_from_rewards_before_the_advantages() -> None:
    one = judged([[1.0, 1.0, 1.0], [0.0, 1.0, np.nan]], [4, 8])
    how = {"most": 2, "overlong_buffer": 1}
    # dapo: the first answer of each group has 2 tokens, the longest: -1. Rewards 0, 1, 1 and -1, 1: means 2/3, 0; deviations √(1/3), √2.
    found = advantages_of(ALGORITHMS["dapo"], one, RunningMean(), **how)
    first, second = np.sqrt(1 / 3) + 1e-4, np.sqrt(2) + 1e-4
    np.testing.assert_allclose(found, [-2 / 3 / first, 1 / 3 / first, 1 / 3 / first, -1 / second, 1 / second, np.nan], atol=1e-9)
    # k1: r - β Σ k1
    found = advantages_of(ALGORITHMS["dr_grpo"], one, RunningMean(), **how, kl_of_answers=np.array([0.3, 0, 0, 0, 0, 0.5]))
    np.testing.assert_allclose(found, [-0.2, 0.1, 0.1, -0.5, 0.5, np.nan], atol=1e-9)
    baseline = RunningMean(value=0.25)
    np.testing.assert_allclose(advantages_of(ALGORITHMS["reinforce"], one, baseline, **how)[:3], 0.75)


def test_one_answer_to_a_prompt_is_enough_for_reinforce_alone() -> None:
    check_group(ALGORITHMS["reinforce"], 1)
    for name in ("grpo", "rloo", "dapo"):
        with pytest.raises(ValueError, match="needs at least 2 of them, got n = 1"):
            check_group(ALGORITHMS[name], 1)
