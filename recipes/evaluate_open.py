"""From what the user typed to a task: `NAME=PATH`, whose first record shows what it is, or the name of one that is built in."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data.sources import open_source
from data.tasks import exact_match, minimal_pairs, multiple_choice, next_line
from data.tasks.records import RECORD_SUFFIXES, Record, file_digest, read_records
from recipes.evaluate_likelihood import choice_task, pair_task
from recipes.evaluate_tasks import Exam, Pairs, Task
from recipes.evaluate_written import HELD_OUT, problem_task, text_task

BUILT_IN = {
    "stdlib": "bits per byte on the held-out files of the Python standard library",
    "next_line": "which of four lines comes next in them",
}
BUILT_IN_QUESTIONS = 200
SHAPES = {
    "multiple choice": multiple_choice.FIELDS,
    "minimal pairs": minimal_pairs.FIELDS,
    "exact match": exact_match.FIELDS,
    "text": ("text",),
}


def check_specs(tasks: Sequence[str], examples: Sequence[str]) -> None:
    """**Raises:** `ValueError` for what is no task or comes twice, and for examples of a task that is not asked for."""
    names = [spec.partition("=")[0] for spec in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--tasks names {', '.join(twice)} more than once: give each a name of its own, as in easy=a.jsonl hard=b.jsonl")
    for name, (_, mark, path) in zip(names, (spec.partition("=") for spec in tasks), strict=True):
        if not mark and name not in BUILT_IN:
            known = "; ".join(f"{task} ({words})" for task, words in BUILT_IN.items())
            raise ValueError(f"unknown task '{name}': expected NAME=PATH, with the path of a task's file, or one built in: {known}")
        if mark and (not path or not name or not name.replace("_", "").replace("-", "").replace(".", "").isalnum()):
            raise ValueError(f"'{name}={path}' is not NAME=PATH, with a name of letters, digits, '_', '-' and '.'")
    for spec in examples:
        name, mark, path = spec.partition("=")
        if not mark or not path or name not in names:
            raise ValueError(f"--examples '{spec}' is not NAME=PATH with the name of a task; the tasks are {', '.join(names)}")


def open_task(spec: str, exam: Exam) -> Task:
    """The task of one word of --tasks.

    **Raises:** `ValueError`, in words, for a file that is none, and records that lack something.
    """
    name, mark, path = spec.partition("=")
    if not mark:
        return text_task(name, f"stdlib{HELD_OUT}", exam) if name == "stdlib" else _next_line(name, exam)
    if path.endswith(HELD_OUT) or not path.lower().endswith(RECORD_SUFFIXES):
        return text_task(name, path, exam)
    records = read_records(path)
    kind = _kind(records[0])
    if kind == "text":
        return text_task(name, path, exam)
    record = {"kind": kind, "file": Path(path).name, "sha256": file_digest(path)}
    if kind == "multiple choice":
        questions = [multiple_choice.question(each) for each in records]
        return choice_task(name, questions, record, exam, examples=_examples(name, exam, _solved_question))
    if kind == "minimal pairs":
        return pair_task(name, [minimal_pairs.pair(each) for each in records], record, exam)
    problems = [exact_match.problem(each) for each in records]
    return problem_task(
        name, problems, record, exam, examples=_examples(name, exam, lambda each: (each.text("question"), each.text("answer")))
    )


def _next_line(name: str, exam: Exam) -> Task:
    source = open_source("stdlib")
    number = min(BUILT_IN_QUESTIONS, exam.settings.limit or BUILT_IN_QUESTIONS)
    made = next_line.questions((document["text"] for document in source.held_out), number, seed=exam.settings.seed)
    record: dict[str, Any] = {"kind": "multiple choice", "file": "stdlib", "sha256": source.record["sha256"]}
    return choice_task(name, made, record | {"python": source.record["python"]}, exam, examples=None, wording=next_line.WORDING)


def _kind(record: Record) -> str:
    for kind, fields in SHAPES.items():
        if set(fields) <= record.fields.keys():
            return kind
    shapes = "; ".join(f"{kind}: {', '.join(fields)}" for kind, fields in SHAPES.items())
    raise ValueError(f"{record.where} has the fields {', '.join(sorted(record.fields)) or 'none'}, which make no task. Expected {shapes}")


def _solved_question(record: Record) -> tuple[str, str]:
    question = multiple_choice.question(record)
    return question.query, question.choices[question.gold]


def _examples(name: str, exam: Exam, read: Callable[[Record], tuple[str, str]]) -> Pairs | None:
    """From the file named with --examples; `None` where none is, so that they are the task's own."""
    given = dict(each.split("=", 1) for each in exam.settings.examples)
    return [read(record) for record in read_records(given[name])] if name in given else None
