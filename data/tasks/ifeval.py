"""Instructions whose following can be checked by a program: IFEval (Zhou et al. 2023, arXiv:2311.07911).

A record is `{"prompt", "instruction_id_list", "kwargs"}`; ids may have a language in front (`en:`). The rules of each kind are in
`data.tasks.ifeval_rules`. *Strict* judges the answer as it is. *Loose* accepts it if any of eight versions passes: without its first line,
last line or both, each with and without asterisks (section 2.2).
"""

from collections.abc import Iterable, Mapping
from typing import Any

from data.tasks.ifeval_rules import RULES
from data.tasks.problems import Problem, Task

MORE_THAN_TEXT = "language:response_language"  # needs a language detector, which is not here: such a prompt cannot be judged


def task(train: Iterable[Mapping[str, Any]], held_out: Iterable[Mapping[str, Any]]) -> Task:
    """From records. Rewards: all instructions followed, strictly (the verifier) and loosely; and the share followed strictly."""
    rewards = {"strict": strict, "loose": loose, "share": share}
    weights = {"strict": 1.0, "loose": 0.0, "share": 0.0}
    return Task("ifeval", [problem(r) for r in train], [problem(r) for r in held_out], rewards, weights, verifier="strict")


def problem(record: Mapping[str, Any]) -> Problem:
    """**Raises:** `ValueError` for an instruction of a kind that is not known."""
    kinds = [name.removeprefix("en:") for name in record["instruction_id_list"]]
    if strange := [kind for kind in kinds if kind not in RULES and kind != MORE_THAN_TEXT]:
        raise ValueError(f"unknown instructions {strange}; known are {', '.join(sorted(RULES))}, and {MORE_THAN_TEXT}, which is not judged")
    given = [{name: value for name, value in values.items() if value is not None} for values in record["kwargs"]]
    return Problem(record["prompt"], {"instructions": list(zip(kinds, given, strict=True))})


def followed(problem: Problem, answer: str, *, loosely: bool = False) -> list[bool] | None:
    """Whether each instruction was followed; `None` where one of them cannot be judged here."""
    instructions = problem.facts["instructions"]
    if any(kind == MORE_THAN_TEXT for kind, _ in instructions):
        return None
    versions = loose_versions(answer) if loosely else [answer]
    return [any(version.strip() and RULES[kind](version, **given) for version in versions) for kind, given in instructions]


def loose_versions(answer: str) -> list[str]:
    lines = answer.split("\n")
    cut = [answer, "\n".join(lines[1:]).strip(), "\n".join(lines[:-1]).strip(), "\n".join(lines[1:-1]).strip()]
    return cut + [version.replace("*", "") for version in cut]


def strict(problem: Problem, answer: str) -> float | None:
    found = followed(problem, answer)
    return None if found is None else float(all(found))


def loose(problem: Problem, answer: str) -> float | None:
    found = followed(problem, answer, loosely=True)
    return None if found is None else float(all(found))


def share(problem: Problem, answer: str) -> float | None:
    found = followed(problem, answer)
    return None if found is None else sum(found) / len(found)
