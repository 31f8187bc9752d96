"""Multiple choice by log-likelihood: the answer is the choice that the model finds likeliest after the question.

Longer choices have lower likelihoods, so log p is compared as it is or divided by some length of the choice. Which one is right is a
convention, and scores under different ones do not compare: all are reported (`NORMALISATIONS`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from data.tasks.records import Record

FIELDS = ("query", "choices", "gold")

# What log p is divided by, from the text of the choice (without the space before it) and its number of tokens.
NORMALISATIONS: dict[str, Callable[[str, int], float]] = {
    "raw": lambda choice, tokens: 1,  # lm-eval's acc
    "per_token": lambda choice, tokens: tokens,  # the mean log p of its tokens; depends on the tokenizer
    "per_character": lambda choice, tokens: len(choice),  # lm-eval's acc_norm
    "per_byte": lambda choice, tokens: len(choice.encode()),  # of UTF-8; lm-eval's acc_bytes
    "per_nonspace": lambda choice, tokens: sum(not char.isspace() for char in choice),  # characters that are not white space
}


@dataclass(frozen=True)
class Question:
    """A question with its choices."""

    query: str
    choices: tuple[str, ...]
    gold: int  # the right one, from 0
    group: str = ""


@dataclass(frozen=True)
class Wording:
    """How a question is put to a model that goes on with text: `before_query` + QUERY + `after_query` | `before_choice` + CHOICE."""

    before_query: str = ""
    after_query: str = "\nAnswer:"
    before_choice: str = " "
    between: str = "\n\n"  # examples

    def asked(self, query: str) -> str:
        """White space at the end of the query gives way, so that a file that ends it with a line break asks the same."""
        return self.before_query + query.rstrip() + self.after_query

    def solved(self, query: str, answer: str) -> str:
        return self.asked(query) + self.before_choice + answer

    def context(self, query: str, examples: Sequence[tuple[str, str]] = ()) -> str:
        """All that stands before the choice: examples with their answers, then the question."""
        return self.between.join([*(self.solved(*example) for example in examples), self.asked(query)])

    def messages(self, query: str, examples: Sequence[tuple[str, str]] = (), system: str | None = None) -> list[dict[str, str]]:
        """The same as a conversation, an example a turn."""
        said = [] if system is None else [{"role": "system", "content": system}]
        for asked, answer in examples:
            said += [{"role": "user", "content": self.asked(asked)}, {"role": "assistant", "content": answer}]
        return [*said, {"role": "user", "content": self.asked(query)}]


def question(record: Record) -> Question:
    """A record with the fields `query`, `choices`, `gold`. **Raises:** `ValueError` naming what is wrong, and where."""
    choices = record.texts("choices", at_least=2)
    return Question(record.text("query"), choices, record.index("gold", choices), record.group)


def scores(choices: Sequence[str], log_likelihoods: Sequence[float], tokens: Sequence[int]) -> dict[str, list[float]]:
    """For each normalisation, the score of each choice: log p over that length."""
    each = list(zip(choices, log_likelihoods, tokens, strict=True))
    return {name: [value / length(choice, n) for choice, value, n in each] for name, length in NORMALISATIONS.items()}


def chosen(choices: Sequence[str], log_likelihoods: Sequence[float], tokens: Sequence[int]) -> dict[str, int]:
    """For each normalisation, the choice with the highest score; of equal ones the first."""
    return {name: int(np.argmax(values)) for name, values in scores(choices, log_likelihoods, tokens).items()}


def chance(questions: Sequence[Question]) -> float:
    """The share that blind guessing gets right."""
    return sum(1 / len(each.choices) for each in questions) / len(questions)


def few_shot(examples: Sequence[tuple[str, str]], number: int, *, seed: int, item: int, leave_out: int | None) -> list[tuple[str, str]]:
    """`number` of the (query, answer) pairs, drawn anew for each item from `seed` and the item's number.

    **Arguments:**

    - `leave_out`: the place of the item itself, where the examples are the task's own.

    **Raises:** `ValueError` where there are too few.
    """
    possible = [i for i in range(len(examples)) if i != leave_out]
    if number > len(possible):
        raise ValueError(f"asked for {number} examples before each question, but there are only {len(possible)} to draw from")
    taken = np.random.default_rng([seed, item]).permutation(len(possible))[:number]
    return [examples[possible[i]] for i in taken.tolist()]
