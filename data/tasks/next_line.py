"""A task from any text, when there is none at hand: which line comes next? Four lines of the same indentation, the true one among them.

The others are real lines from elsewhere in the same documents, so each reads well alone and only the context tells. It is meant for text
that was held out; the built-in one is the held-out part of the Python standard library.
"""

from collections.abc import Iterable

import numpy as np

from data.tasks.multiple_choice import Question, Wording

WORDING = Wording(after_query="", before_choice="\n")
CONTEXT_LINES = 8
LEAST_CHARACTERS = 12  # of a line, without indentation: `return` and `else:` are no question
CHOICES = 4


def questions(texts: Iterable[str], number: int, *, seed: int) -> list[Question]:
    """`number` questions, or as many as there can be, spread at random over the texts.

    **Raises:** `ValueError` where the texts have no four lines to choose from.
    """
    found = [(text_number, at, each) for text_number, each in enumerate(map(_lines, texts)) for at in _places(each)]
    by_indentation: dict[int, list[str]] = {}
    for _, at, each in found:
        by_indentation.setdefault(_indentation(each[at]), []).append(each[at])
    rng = np.random.default_rng(seed)
    made: list[Question] = []
    for i in rng.permutation(len(found)).tolist():
        if len(made) == number:
            break
        _, at, each = found[i]
        others = sorted(set(by_indentation[_indentation(each[at])]) - set(each[max(0, at - CONTEXT_LINES) : at + 1]))
        if len(others) < CHOICES - 1:
            continue
        wrong = [others[j] for j in rng.permutation(len(others))[: CHOICES - 1].tolist()]
        gold = int(rng.integers(CHOICES))
        choices = (*wrong[:gold], each[at], *wrong[gold:])
        made.append(Question("\n".join(each[at - CONTEXT_LINES : at]), choices, gold))
    if not made:
        raise ValueError(f"no question can be made: expected texts with lines of at least {LEAST_CHARACTERS} characters, {CHOICES} alike")
    return made


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def _places(lines: list[str]) -> list[int]:
    """The lines that are worth a question."""
    return [at for at in range(CONTEXT_LINES, len(lines)) if len(lines[at].strip()) >= LEAST_CHARACTERS]


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip())
