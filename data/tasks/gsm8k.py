"""Grade-school mathematics in words: GSM8K (Cobbe et al. 2021, arXiv:2110.14168).

A record is `{"question", "answer"}`, the answer a worked solution that ends in `#### 72`. The final answer is taken from text as the
paper's code does: the number behind the first `####`, commas dropped. What has no such number is wrong, however right it may be: a model
that is to be judged so must be told so in its prompt. The solutions' calculator notes, `<<48/2=24>>`, are left out of what is imitated.
"""

import re
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from data.tasks import exact_match
from data.tasks.problems import Problem, Task
from data.tasks.records import read_records

ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")  # ANS_RE of the paper's repository (openai/grade-school-math)
_NOTE = re.compile(r"<<.*?>>")
ASK = "\nThink step by step, and end with a line of #### and the number."
HELD_OUT_OF = 20  # where one file is all there is: a question in so many is held out


def task(train: Iterable[Mapping[str, Any]], held_out: Iterable[Mapping[str, Any]], *, ask: str = ASK) -> Task:
    """From records, as a JSONL file gives them. Rewards: the right answer; and, unweighted, an answer in its place, and the right number
    being the last one of the text, wherever that is.

    **Arguments:**

    - `ask`: what stands behind each question.
    """
    return Task(
        name="gsm8k",
        train=[problem(record, ask) for record in train],
        held_out=[problem(record, ask) for record in held_out],
        rewards={"correct": correct, "has_answer": has_answer, "last_number": last_number},
        weights={"correct": 1.0, "has_answer": 0.0, "last_number": 0.0},
        verifier="correct",
    )


def read(path: Path) -> list[dict[str, str]]:
    """The records of a file: `.jsonl`, gzipped or not.

    **Raises:** `ValueError` that names the line where a question or its answer is missing, or the answer has no number behind `####`.
    """
    found = []
    for record in read_records(path):
        found.append({"question": record.text("question"), "answer": record.text("answer")})
        if extract(found[-1]["answer"]) is None:
            raise ValueError(f"{record.where}: {_no_number(found[-1]['answer'])}")
    return found


def split(records: Iterable[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Those to learn from, and a twentieth held out, by the hash of the question alone: the same in any order, and of any file."""
    sides: tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]] = ([], [])
    for record in records:
        digest = int.from_bytes(sha256(record["question"].encode()).digest()[:8], "big")
        sides[digest % HELD_OUT_OF == 0].append(record)
    return sides


def problem(record: Mapping[str, Any], ask: str = ASK) -> Problem:
    answer = extract(record["answer"])
    if answer is None:
        raise ValueError(_no_number(record["answer"]))
    return Problem(record["question"] + ask, {"answer": answer}, solution=_NOTE.sub("", record["answer"]))


def _no_number(answer: str) -> str:
    return f"no '#### number' in the answer of a GSM8K record: {answer!r}"


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
