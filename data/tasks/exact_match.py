"""Questions whose answer is written out and compared: grade-school maths (GSM8K, Cobbe et al. 2021, arXiv:2110.14168) and the like.

A GSM8K answer ends in `#### 18`. Two rules find the model's: *strict* takes the number behind `####`, *flexible* the last number of all
that was written. Where a task's own answers have no `####`, its first line is compared instead (`exact`).
"""

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from data.tasks.records import Record

FIELDS = ("question", "answer")
MARK = "####"

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")
_MARKED = re.compile(rf"{MARK}\s*(-?\$?[\d.,]+)")


@dataclass(frozen=True)
class Problem:
    """A question and the whole answer, working included."""

    question: str
    answer: str

    @property
    def marked(self) -> bool:
        return MARK in self.answer

    @property
    def gold(self) -> str:
        """What is compared: behind the last mark, or the whole answer."""
        return self.answer.rpartition(MARK)[2].strip()


def problem(record: Record) -> Problem:
    """A record with the fields `question` and `answer`. **Raises:** `ValueError` where one is missing, or nothing stands behind `####`."""
    found = Problem(record.text("question"), record.text("answer"))
    if not found.gold:
        raise ValueError(f"{record.where}: nothing stands behind the {MARK} of `answer`")
    return found


def matches(problem: Problem, written: str) -> dict[str, bool]:
    """By each rule, whether what the model wrote has the answer."""
    if not problem.marked:
        lines = written.strip().splitlines()
        return {"exact": same_answer(lines[0] if lines else "", problem.gold)}
    marked, numbers = _MARKED.search(written), _NUMBER.findall(written)
    return {
        "strict": marked is not None and same_answer(marked[1], problem.gold),
        "flexible": bool(numbers) and same_answer(numbers[-1], problem.gold),
    }


def same_answer(written: str, gold: str) -> bool:
    """Equal as numbers (18, 18.00, $18, 1,800 and 1800), or letter by letter but for case and a full stop at the end."""
    first, second = _plain(written), _plain(gold)
    if first == second:
        return True
    try:
        return Decimal(first) == Decimal(second)
    except InvalidOperation:
        return False


def _plain(text: str) -> str:
    return re.sub(r"(?<=\d),(?=\d{3})|\$", "", text.strip()).removesuffix(".").strip().casefold()
