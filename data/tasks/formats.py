"""Rewards for the form of an answer, to be put beside those for its content: `with_format(task, boxed(), 0.1)`.

Each of these makes a reward; none looks at whether the answer is right.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from data.tasks.problems import Problem, Reward, Task

_THOUGHT = re.compile(r"\A<think>(?P<thought>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*\Z", re.DOTALL)


def with_format(task: Task, name: str, reward: Reward, weight: float) -> Task:
    """The task with one more reward."""
    if name in task.rewards:
        raise ValueError(f"task {task.name!r} has a reward called {name!r} already: give this one another name")
    return Task(**(vars(task) | {"rewards": {**task.rewards, name: reward}, "weights": {**task.weights, name: weight}}))


def think_then_answer(problem: Problem, answer: str) -> float:
    """1 for `<think>…</think><answer>…</answer>` and nothing else, each mark once (DeepSeek-R1, arXiv:2501.12948, section 2.2.2)."""
    marks = ("<think>", "</think>", "<answer>", "</answer>")
    return float(_THOUGHT.match(answer) is not None and all(answer.count(mark) == 1 for mark in marks))


def in_answer(reward: Reward) -> Reward:
    """The reward on what stands between `<answer>` and `</answer>` alone; 0 where the form is not kept."""

    def inside(problem: Problem, answer: str) -> float | None:
        found = _THOUGHT.match(answer)
        return 0.0 if found is None else reward(problem, found["answer"].strip())

    return inside


def matches(pattern: str) -> Reward:
    """1 where the whole answer, but for spaces around it, matches a regular expression."""
    compiled = re.compile(pattern, re.DOTALL)
    return lambda problem, answer: float(compiled.fullmatch(answer.strip()) is not None)


def boxed(problem: Problem, answer: str) -> float:
    r"""1 where the answer has exactly one `\boxed{…}` whose brackets close."""
    return float(answer.count(r"\boxed{") == 1 and unboxed(answer) is not None)


def unboxed(answer: str) -> str | None:
    r"""What stands in the last `\boxed{…}`, brackets inside it included; `None` where there is none that closes."""
    start = answer.rfind(r"\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len(r"\boxed")
    for place in range(begin, len(answer)):
        depth += (answer[place] == "{") - (answer[place] == "}")
        if depth == 0:
            return answer[begin + 1 : place]
    return None


def is_json(check: Callable[[Any], bool] = lambda value: True) -> Reward:
    """1 where the answer is one JSON value, in a code fence or not, that `check` accepts."""

    def reward(problem: Problem, answer: str) -> float:
        text = re.sub(r"\A```(?:json)?\s*\n(.*)\n```\Z", r"\1", answer.strip(), flags=re.DOTALL)
        try:
            return float(check(json.loads(text)))
        except (ValueError, RecursionError):
            return 0.0

    return reward


def at_most(characters: int, slope: float = 1.0) -> Reward:
    """0 up to so many characters, then minus `slope` for each `characters` more, down to -1."""
    if characters < 1:
        raise ValueError(f"the length allowed must be at least 1 character, got {characters}")
    return lambda problem, answer: -min(1.0, slope * max(0, len(answer) - characters) / characters)
