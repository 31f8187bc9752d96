"""Countdown: reach a number from others with + - * /, each used once, as in the game show and in TinyZero (Pan et al. 2025).

    prompt    3 7 25 -> 46:
    answer    25+3*7

A problem is drawn by making it: an expression over the numbers is drawn until its value is a whole number from 10 to 100. Problems are held
out by their numbers, as sets.
"""

import ast
import operator
import zlib
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from data.tasks.problems import Problem, Task

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_LONGEST = 200  # characters of an answer that is looked at
_HELD_OUT_OF = 16  # one set of numbers in so many is held out


def task(count: int = 4096, operands: int = 3, seed: int = 0) -> Task:
    """`count` problems to train on, and a sixteenth as many held out. Rewards: correct; and, worth a tenth, a well-formed expression of
    exactly these numbers, whatever it comes to."""
    rng = np.random.default_rng(seed)
    train: list[Problem] = []
    held_out: list[Problem] = []
    while len(train) < count or len(held_out) < max(1, count // _HELD_OUT_OF):
        made = _draw(rng, operands)
        part = held_out if zlib.crc32(repr(sorted(made.facts["numbers"])).encode()) % _HELD_OUT_OF == 0 else train
        if len(part) < (count if part is train else max(1, count // _HELD_OUT_OF)):
            part.append(made)
    return Task("countdown", train, held_out, {"correct": correct, "form": form}, {"correct": 1.0, "form": 0.1}, verifier="correct")


def _draw(rng: np.random.Generator, operands: int) -> Problem:
    while True:
        numbers = [int(x) for x in rng.integers(1, 26, operands)]
        text = str(numbers[0])
        for number in numbers[1:]:
            text += f"{rng.choice(list('+-*/'))}{number}"
        value = evaluate(text)
        if value is not None and value[0].denominator == 1 and 10 <= value[0] <= 100:
            shown = [int(x) for x in rng.permutation(numbers)]
            return Problem(f"{' '.join(map(str, shown))} -> {value[0]}:", {"numbers": shown, "target": int(value[0])}, solution=text)


def evaluate(text: str) -> tuple[Fraction, list[int]] | None:
    """The exact value of an expression of whole numbers, brackets and + - * /, and the numbers in it; `None` for anything else, division by
    zero included."""
    if len(text) > _LONGEST:
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    numbers: list[int] = []
    value = _value(tree, numbers)
    return None if value is None else (value, numbers)


def _value(node: ast.expr, numbers: list[int]) -> Fraction | None:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        numbers.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left, numbers), _value(node.right, numbers)
        if left is None or right is None or (isinstance(node.op, ast.Div) and right == 0):
            return None
        return _OPERATORS[type(node.op)](left, right)
    return None


def _uses(numbers: Sequence[int], answer: str) -> Fraction | None:
    found = evaluate(answer)
    return found[0] if found is not None and sorted(found[1]) == sorted(numbers) else None


def correct(problem: Problem, answer: str) -> float:
    """1 for an expression of exactly these numbers with the right value."""
    return float(_uses(problem.facts["numbers"], answer) == problem.facts["target"])


def form(problem: Problem, answer: str) -> float:
    """1 for an expression of exactly these numbers."""
    return float(_uses(problem.facts["numbers"], answer) is not None)
