"""Sums and differences of two-digit numbers: `47+38=` → `85`, `47-83=` → `-36`.

Sixteen of the ninety two-digit numbers are set aside. The 16 · 16 · 2 = 512 problems among them are held out; the problems among the other
74 are for training. So none of the held-out operands occurs in any training prompt, in no pair and on no side.
"""

import itertools
import re

import numpy as np

from data.tasks.problems import Problem, Task

HELD_OUT_NUMBERS = 16
_SPLIT_SEED = 2110  # fixed: a held-out problem stays held out in every run
_ANSWER = re.compile(r"-?[0-9]{1,9}")


def task() -> Task:
    """10,952 problems to train on, 512 held out. One reward: the right number, alone."""
    numbers = np.random.default_rng(_SPLIT_SEED).permutation(np.arange(10, 100))
    held_out, train = numbers[:HELD_OUT_NUMBERS], numbers[HELD_OUT_NUMBERS:]
    return Task(
        name="arithmetic",
        train=problems(sorted(map(int, train))),
        held_out=problems(sorted(map(int, held_out))),
        rewards={"correct": correct},
        weights={"correct": 1.0},
        verifier="correct",
    )


def problems(numbers: list[int]) -> list[Problem]:
    """Every sum and every difference of two of these numbers, in both orders."""
    return [problem(a, sign, b) for a, b in itertools.product(numbers, numbers) for sign in "+-"]


def problem(a: int, sign: str, b: int) -> Problem:
    answer = a + b if sign == "+" else a - b
    return Problem(prompt=f"{a}{sign}{b}=", facts={"answer": answer}, solution=str(answer))


def correct(problem: Problem, answer: str) -> float:
    """1 for the right number and nothing else but spaces around it; 0 otherwise."""
    written = answer.strip()
    return float(_ANSWER.fullmatch(written) is not None and int(written) == problem.facts["answer"])
