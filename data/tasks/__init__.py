"""Tasks: prompts, and rewards that judge what was written to them. One file a task; numpy and the standard library only.

How a task is written. A reward is a plain function, a `Problem` holds what it judges by, and a function without required arguments makes
the `Task`:

    def doubled(problem: Problem, answer: str) -> float:
        return float(answer.strip() == problem.facts["answer"])

    def task() -> Task:
        made = [Problem(f"{n}{n}=", {"answer": str(2 * n)}, solution=str(2 * n)) for n in range(100)]
        return Task("doubling", made[:90], made[90:], {"doubled": doubled}, {"doubled": 1.0}, verifier="doubled")

Then a line in `TASKS`, and a test that the reward knows right, wrong and nonsensical answers apart. Several rewards are added up by their
weights and logged by their names; one of weight 0 is only logged.

`TASKS` are those that need nothing from outside. `gsm8k.task` and `ifeval.task` take records, `reasoning.task` a name of reasoning-gym.
"""

from collections.abc import Callable

from data.tasks import arithmetic, calculator, constraints, countdown, letters
from data.tasks.problems import Task

TASKS: dict[str, Callable[[], Task]] = {
    "arithmetic": arithmetic.task,
    "calculator": calculator.task,
    "constraints": constraints.task,
    "countdown": countdown.task,
    "counting": letters.counting,
    "reversal": letters.reversal,
}
