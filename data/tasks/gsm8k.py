"""Grade-school mathematics in words: GSM8K (Cobbe et al. 2021, arXiv:2110.14168).

A record is `{"question", "answer"}`, the answer a worked solution that ends in `#### 72`. The final answer is taken from text as the
paper's code does: the number behind the first `####`, commas dropped. What has no such number is wrong, however right it may be: a model
that is to be judged so must be told so in its prompt. The solutions' calculator notes, `<<48/2=24>>`, are left out of what is imitated.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from data.tasks import exact_match
from data.tasks.problems import Problem, Task

ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")  # ANS_RE of the paper's repository (openai/grade-school-math)
_NOTE = re.compile(r"<<.*?>>")
ASK = "\nThink step by step, and end with a line of #### and the number."


def task(train: Iterable[Mapping[str, Any]], held_out: Iterable[Mapping[str, Any]]) -> Task:
    """From records, as a JSONL file gives them. Rewards: the right answer; and, unweighted, an answer in its place, and the right number
    being the last one of the text, wherever that is."""
    return Task(
        name="gsm8k",
        train=[problem(record) for record in train],
        held_out=[problem(record) for record in held_out],
        rewards={"correct": correct, "has_answer": has_answer, "last_number": last_number},
        weights={"correct": 1.0, "has_answer": 0.0, "last_number": 0.0},
        verifier="correct",
    )


def problem(record: Mapping[str, Any]) -> Problem:
    answer = extract(record["answer"])
    if answer is None:
        raise ValueError(f"no '#### number' in the answer of a GSM8K record: {record['answer']!r}")
    return Problem(record["question"] + ASK, {"answer": answer}, solution=_NOTE.sub("", record["answer"]))


def extract(text: str) -> str | None:
    """The final answer as the paper takes it, commas dropped; `None` where there is none."""
    found = ANSWER.search(text)
    return None if found is None else found[1].strip().replace(",", "")


def correct(problem: Problem, answer: str) -> float:
    """1 where the extracted answer is the problem's, as a string: the paper compares so, and `72.0` is not `72`."""
    return float(extract(answer) == problem.facts["answer"])


def has_answer(problem: Problem, answer: str) -> float:
    return float(extract(answer) is not None)


def last_number(problem: Problem, answer: str) -> float:
    """1 where the last number of the text has the value asked for: the "flexible" rule of `data.tasks.exact_match`, kinder than the
    paper's."""
    asked = exact_match.Problem(problem.prompt, f"#### {problem.facts['answer']}")
    return float(exact_match.matches(asked, answer)["flexible"])
