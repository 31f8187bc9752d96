"""Rewards are called in one place, which believes nothing; and pass@k is the paper's."""

import itertools
import math

import numpy as np
import pytest

from data.tasks import TASKS
from data.tasks.problems import Problem, RewardError, Task, in_order, pass_at_k, score

PROBLEMS = [Problem("1+1=", {"answer": 2}, "2"), Problem("2+2=", {"answer": 4}, "4")]


def task(**rewards) -> Task:
    return Task("t", PROBLEMS, PROBLEMS, rewards, dict.fromkeys(rewards, 1.0), verifier=next(iter(rewards)))


def right(problem: Problem, answer: str) -> float:
    return float(answer == str(problem.facts["answer"]))


def test_rewards_are_added_by_their_weights_and_told_by_name() -> None:
    short = Task("t", PROBLEMS, PROBLEMS, {"right": right, "length": lambda p, a: len(a)}, {"right": 2.0, "length": -0.5}, verifier="right")
    scores = score(short, PROBLEMS, ["2", "no"])
    assert scores.total.tolist() == [2 * 1 - 0.5 * 1, -0.5 * 2]
    assert scores.by_reward["length"].tolist() == [1, 2]
    assert scores.solved.tolist() == [True, False]
    assert score(short.weighted({"length": 0.0}), PROBLEMS, ["2", "no"]).total.tolist() == [2, 0]


def test_none_leaves_a_sample_out() -> None:
    scores = score(task(right=lambda p, a: None if a == "?" else right(p, a)), PROBLEMS, ["?", "4"])
    assert math.isnan(scores.total[0])
    assert scores.total[1] == 1
    assert scores.solved.tolist() == [False, True]


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("1", r"returned '1' \(str\)"),
        (float("nan"), r"returned nan \(float\)"),
        (float("inf"), "returned inf"),
        ([1.0], r"returned \[1.0\] \(list\)"),
    ],
)
def test_what_is_no_number_stops_with_the_sample(returned, words: str) -> None:
    with pytest.raises(RewardError, match=words) as caught:
        score(task(right=lambda p, a: returned), PROBLEMS, ["banana", "4"])
    assert "prompt: '1+1='" in str(caught.value)
    assert "answer: 'banana'" in str(caught.value)


def test_a_reward_that_raises_stops_with_the_sample() -> None:
    with pytest.raises(RewardError, match="raised ValueError: invalid literal") as caught:
        score(task(right=lambda p, a: int(a)), PROBLEMS, ["2", "banana"])
    assert "answer: 'banana'" in str(caught.value)


def test_booleans_and_numpy_numbers_are_numbers() -> None:
    assert score(task(a=lambda p, a: True, b=lambda p, a: np.float32(0.5)), PROBLEMS, ["", ""]).total.tolist() == [1.5, 1.5]


def test_a_task_that_does_not_fit_together_says_so() -> None:
    with pytest.raises(ValueError, match="must have the same names"):
        Task("t", PROBLEMS, PROBLEMS, {"right": right}, {"wrong": 1.0}, verifier="right")
    with pytest.raises(ValueError, match="verifier 'best' must be one of its rewards"):
        Task("t", PROBLEMS, PROBLEMS, {"right": right}, {"right": 1.0}, verifier="best")
    with pytest.raises(ValueError, match="has no reward called style"):
        task(right=right).weighted({"style": 1.0})
    with pytest.raises(ValueError, match="0 problems to train on"):
        Task("t", [], PROBLEMS, {"right": right}, {"right": 1.0}, verifier="right")


def test_problems_come_in_an_order_that_can_be_taken_up_anywhere() -> None:
    problems = list(range(7))
    whole = list(itertools.islice(in_order(problems, seed=3, cursor=0), 20))
    assert [number for number, _ in whole] == list(range(20))
    assert sorted(i for _, i in whole[:7]) == problems
    assert [i for _, i in whole[:7]] != [i for _, i in whole[7:14]]
    for cursor in (1, 7, 13, 19):
        assert list(itertools.islice(in_order(problems, 3, cursor), 20 - cursor)) == whole[cursor:]


def test_pass_at_k_is_the_chance_of_at_least_one_right_answer() -> None:
    # Of n = 4 answers c = 1 is right: two of them hold it in 3 of the C(4, 2) = 6 pairs. And all of c = 4.
    solved = np.array([[1, 0, 0, 0], [1, 1, 1, 1]], bool)
    assert pass_at_k(solved, 1).mean == pytest.approx((1 / 4 + 1) / 2, abs=1e-12)
    assert pass_at_k(solved, 2).mean == pytest.approx((3 / 6 + 1) / 2, abs=1e-12)
    assert pass_at_k(solved, 4).mean == pytest.approx(1, abs=1e-12)
    with pytest.raises(ValueError, match="pass@5 needs at least 5 answers"):
        pass_at_k(solved, 5)


def test_the_interval_covers_what_it_should() -> None:
    """Over many experiments with 60 problems whose chances are drawn, the interval holds the true mean in about 95 %."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        solved = rng.random((60, 4)) < rng.beta(0.5, 1.0, (60, 1))
        share = pass_at_k(solved, 1)
        held += share.low <= 1 / 3 <= share.high
    assert 0.92 < held / 400 < 0.985
    every = pass_at_k(np.ones((50, 2), bool), 1)
    assert every.high == pytest.approx(1)
    assert 0.9 < every.low < 0.95  # Wilson's interval of 50 out of 50: 92.9 %


@pytest.mark.parametrize("name", TASKS)
def test_every_task_judges_its_own_solutions_right_and_nonsense_wrong(name: str) -> None:
    made = TASKS[name]()
    for problems in (made.train[:20], made.held_out[:20]):
        assert score(made, problems, [p.solution for p in problems]).solved.all()
        for nonsense in ("", " ", "banana", "0 0", "-", "9" * 400, "<|eos|>", "((((", "½", "1e5", "١٢"):
            assert not score(made, problems, [nonsense] * len(problems)).solved.any(), nonsense
    held_out = {p.prompt for p in made.held_out}
    assert not held_out & {p.prompt for p in made.train}
