"""Any task of the package `reasoning-gym`: procedural problems with a scorer each, no network (Stojanovski et al. 2025, arXiv:2505.24760).

The package is an extra, `tasks`, and is imported only when a task of it is asked for. Its scorers are other people's: one of 0.1.25 raises
on answers that are text (`prime_factorization`), another once rewarded nonsense. `Task`'s rewards stop at the first, and `suspicious` finds
the second before a run is built on it.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from data.tasks.problems import Problem, Task

NONSENSE = ("", " ", "?", "banana", "the the the the", "[]", "{}", "0", "-1", "None", "I do not know.")


def task(name: str, count: int = 4096, held_out: int = 512, seed: int = 0, **options: Any) -> Task:
    """A task of the package by its name there, such as `chain_sum`; `options` are its own settings.

    Problems of training and those held out are drawn with seeds of their own; one whose question occurs in both is left out of training.

    **Raises:** `ValueError` where there is no such task; `ImportError` where the package is missing.
    """
    gym = _package()
    try:
        learned, other = (
            gym.create_dataset(name, size=size, seed=s, **options) for size, s in ((count, seed), (held_out, seed + 1_000_003))
        )
    except (ValueError, TypeError, AssertionError) as error:  # its registry, its settings, its checks of them
        raise ValueError(f"reasoning-gym cannot make {name!r} with {options}: {error}") from error

    def correct(problem: Problem, answer: str) -> float:
        return float(other.score_answer(answer=answer.strip(), entry=problem.facts["entry"]))

    held = [_problem(entry) for entry in other]
    questions = {problem.prompt for problem in held}
    train = [problem for problem in map(_problem, learned) if problem.prompt not in questions]
    return Task(name, train, held, {"correct": correct}, {"correct": 1.0}, verifier="correct")


def suspicious(
    task: Task, problems: Sequence[Problem], nonsense: Sequence[str] = NONSENSE, limit: float = 0.5
) -> list[tuple[str, str, float]]:
    """(question, nonsense, reward) wherever a nonsensical answer earns more than `limit`, without being the answer itself."""
    reward = task.rewards[task.verifier]
    found = []
    for problem in problems:
        for answer in nonsense:
            worth = reward(problem, answer)
            if worth is not None and worth > limit and answer.strip() != (problem.solution or "").strip():
                found.append((problem.prompt, answer, float(worth)))
    return found


def _problem(entry: Mapping[str, Any]) -> Problem:
    return Problem(entry["question"], {"entry": dict(entry)}, solution=None if entry["answer"] is None else str(entry["answer"]))


def _package() -> Any:
    try:
        return importlib.import_module("reasoning_gym")
    except ModuleNotFoundError as error:
        raise ImportError("tasks of reasoning-gym need the package: uv pip install reasoning-gym") from error
