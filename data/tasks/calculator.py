"""A task with a tool: products and sums too large to do in one's head, and a calculator to ask.

The model writes an expression and hands over with `<|tool|>`. The calculator's reply, `=1086;`, is put into its context, is read and never
learned from, and the model writes the answer:

    prompt    23*47+5:
    answer    23*47+5<|tool|>=1086;1086
              ^^^^^^^^^^^^^^^       ^^^^   written by the model

Problems are held out by their first operand.
"""

import re

import numpy as np

from data.tasks.problems import Problem, Task, Tool

CALL, OPEN, CLOSE = "<|tool|>", "=", ";"
_EXPRESSION = re.compile(r"([0-9]{1,6})\*([0-9]{1,6})\+([0-9]{1,6})")
_SPLIT_SEED = 4710


def task() -> Task:
    """8,000 problems to train on, 400 held out. Rewards: the right answer; and a call that could be answered, worth a tenth."""
    numbers = np.random.default_rng(_SPLIT_SEED).permutation(np.arange(12, 100))
    held_out, train = np.sort(numbers[:8]), np.sort(numbers[8:])
    return Task(
        name="calculator",
        train=_problems(train, 100),
        held_out=_problems(held_out, 50),
        rewards={"correct": correct, "called": called},
        weights={"correct": 1.0, "called": 0.1},
        verifier="correct",
        tool=Tool(ends_call=CALL, run=calculate, max_calls=1, max_tokens=12),
    )


def _problems(first: np.ndarray, of_each: int) -> list[Problem]:
    draws = np.random.default_rng(_SPLIT_SEED + 1).integers(12, 1000, (len(first), of_each, 2))
    return [problem(int(a), int(b), int(c)) for a, pairs in zip(first, draws, strict=True) for b, c in pairs]


def problem(a: int, b: int, c: int) -> Problem:
    expression, answer = f"{a}*{b}+{c}", a * b + c
    return Problem(f"{expression}:", {"answer": answer}, solution=f"{expression}{CALL}{calculate(expression)}{answer}")


def calculate(call: str) -> str:
    """What the calculator says of a call: the value of `a*b+c`, or `error` for anything else."""
    found = _EXPRESSION.fullmatch(call.strip())
    value = "error" if found is None else str(int(found[1]) * int(found[2]) + int(found[3]))
    return f"{OPEN}{value}{CLOSE}"


def correct(problem: Problem, answer: str) -> float:
    """1 for the right number behind the calculator's last reply (or alone, for who needs none); 0 otherwise."""
    written = answer.rpartition(CLOSE)[2] if CALL in answer else answer
    return float(re.fullmatch(r"[0-9]{1,18}", written.strip()) is not None and int(written) == problem.facts["answer"])


def called(problem: Problem, answer: str) -> float:
    """1 where the calculator was asked for something it could answer."""
    return float(CALL + OPEN in answer and f"{OPEN}error{CLOSE}" not in answer)
