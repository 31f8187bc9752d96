"""What every task of an evaluation is, whatever it asks: work in units with keyed results, and a summary of all of them.

A unit is a batch. Its results are written to the run folder when it is done, and a run that goes on leaves it out. Units are cut by what is
asked alone, never by what is still to do, so a run that was stopped gives the numbers it would have given.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from loguru import logger

from data.tasks.multiple_choice import few_shot
from data.tasks.records import drawn
from data.tokenizer import Tokenizer
from lm.base import AbstractLM
from recipes.evaluate_words import Words
from train.evaluate import Scorer, Speed
from train.intervals import Estimate, mean_of_groups, wilson

Key = tuple[int, ...]  # of a result: (item, choice), (item,) or (batch,)
Results = Mapping[Key, Mapping[str, Any]]
Pairs = Sequence[tuple[str, str]]  # (query, answer)

Item = TypeVar("Item")


@dataclass(frozen=True)
class Exam:
    """Who is asked, and how."""

    model: AbstractLM  # as it was loaded; likelihoods go through the scorer
    tokenizer: Tokenizer
    words: Words
    scorer: Scorer
    token_nats: Callable[..., Any]  # `train.step.make_token_nats`, for texts
    dtype: str  # of matrix products, in writing too
    settings: Any  # the recipe's Config

    @property
    def context(self) -> int:
        return self.model.config.context


@dataclass(frozen=True)
class Task:
    """Work, and what it says in the end."""

    name: str
    record: dict[str, Any]  # what was read, asked and refused
    units: Sequence[Sequence[Key]]  # the keys of each unit's results
    run: Callable[[int], dict[Key, dict[str, Any]]]
    summed_up: Callable[[Results], dict[str, Any]]  # the task's entry in `results.json`
    example: str  # of what the model is given
    speed: Speed


def drawn_by_group(items: Sequence[Item], group: Callable[[Item], str], settings: Any) -> dict[int, Item]:
    """The items by number; with a limit, so many of each group, at random."""
    numbers: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        numbers.setdefault(group(item), []).append(i)
    kept = sorted(i for each in numbers.values() for i in drawn(each, settings.limit, settings.seed))
    return {i: items[i] for i in kept}


def examples_before(item: int, own: Pairs, given: Pairs | None, settings: Any) -> list[tuple[str, str]]:
    """The few-shot examples of an item: of the file given for them, else of the task's own, without the item itself."""
    pool, leave_out = (own, item) if given is None else (given, None)
    return few_shot(pool, settings.shots, seed=settings.seed, item=item, leave_out=leave_out)


def without_too_long(name: str, items: Mapping[int, Item], tokens: Mapping[int, int], most: int, what: str) -> dict[int, Item]:
    """The items whose tokens fit. The others are refused: said, counted, and no part of the score.

    **Raises:** `ValueError` where none is left.
    """
    kept = {i: item for i, item in items.items() if tokens[i] <= most}
    if len(kept) < len(items):
        longest = max(tokens.values())
        words = f"{len(items) - len(kept):,} of {len(items):,} items have more than {most:,} tokens, {what}; the longest has {longest:,}"
        if not kept:
            raise ValueError(f"{name}: {words}. Nothing is left: take fewer --shots, or a model with a longer context")
        logger.warning(f"{name}: {words}. They are refused and are no part of the score")
    return kept


def summary(metric: str, headline: str, metrics: dict[str, Estimate], of: str, **more: Any) -> dict[str, Any]:
    """The entry of `results.json`: the headline flat, as a model card takes it, all metrics below it, and `more`."""
    metrics = {headline: metrics[headline]} | metrics  # the first of them
    estimate = metrics[headline]
    flat = {"metric": metric, "value": estimate.value, "low": estimate.low, "high": estimate.high, "n": estimate.n, "of": of}
    return flat | {"interval": estimate.interval} | more | {"metrics": {name: each.record() for name, each in metrics.items()}}


def accuracy(right: Mapping[str, Sequence[bool]]) -> Estimate:
    """Of the items of one group the share that is right, of several groups the mean of their shares."""
    counts, sizes = [sum(each) for each in right.values()], [len(each) for each in right.values()]
    return wilson(counts[0], sizes[0]) if len(sizes) == 1 else mean_of_groups(counts, sizes)


def by_group(right: Mapping[str, Sequence[bool]]) -> dict[str, Any]:
    """`groups` of a summary, where there are several."""
    if len(right) == 1:
        return {}
    return {"groups": {group: wilson(sum(each), len(each)).record() for group, each in sorted(right.items())}}
