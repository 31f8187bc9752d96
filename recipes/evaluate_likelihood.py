"""Tasks that the model only reads: multiple choice and minimal pairs, by the log-likelihood of each choice."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from data.requests import Request, RequestPlan
from data.tasks import multiple_choice
from data.tasks.minimal_pairs import Pair
from data.tasks.multiple_choice import Question, Wording
from recipes.evaluate_tasks import (
    Exam,
    Key,
    Pairs,
    Results,
    Task,
    accuracy,
    by_group,
    drawn_by_group,
    examples_before,
    summary,
    without_too_long,
)
from recipes.evaluate_words import check_ids
from train.evaluate import Speed


def choice_task(
    name: str, questions: Sequence[Question], record: dict[str, Any], exam: Exam, *, examples: Pairs | None, wording: Wording | None = None
) -> Task:
    """Questions whose answer is the likeliest choice, by every normalisation.

    **Arguments:**

    - `examples`: what few-shot examples are drawn from; `None`: the questions themselves.
    - `wording`: the task's own; `None`: that of the settings.
    """
    settings, words = exam.settings, exam.words
    wording = wording or Wording(after_query=settings.after_query)
    before = settings.before_choice if settings.before_choice is not None else "" if words.chat else wording.before_choice
    wording = replace(wording, before_choice=before)
    chosen = drawn_by_group(questions, lambda each: each.group, settings)
    own = [(each.query, each.choices[each.gold]) for each in questions]
    prompts = {i: words.prompt(wording, each.query, examples_before(i, own, examples, settings)) for i, each in chosen.items()}
    requests: dict[Key, Request] = {
        (i, c): words.request(prompts[i], before + choice) for i, each in chosen.items() for c, choice in enumerate(each.choices)
    }
    asked = _that_fit(name, chosen, requests, exam)

    def summed_up(results: Results) -> dict[str, Any]:
        right: dict[str, dict[str, list[bool]]] = {normalisation: {} for normalisation in multiple_choice.NORMALISATIONS}
        for i, question in asked.items():
            found = [results[i, c] for c in range(len(question.choices))]
            values, tokens = [each["log_likelihood"] for each in found], [each["tokens"] for each in found]
            for normalisation, choice in multiple_choice.chosen(question.choices, values, tokens).items():
                right[normalisation].setdefault(question.group, []).append(choice == question.gold)
        metrics = {normalisation: accuracy(groups) for normalisation, groups in right.items()}
        how = {"normalisation": settings.normalisation, "shots": settings.shots, "chat_template": words.chat}
        blind = multiple_choice.chance(list(asked.values()))
        return summary("accuracy", settings.normalisation, metrics, "questions", **how, chance=blind) | by_group(
            right[settings.normalisation]
        )

    first = next(iter(asked))
    record = record | {"shots": settings.shots, "wording": vars(wording), "records": len(questions), "drawn": len(chosen)}
    return _task(name, record, asked, requests, summed_up, f"{prompts[first]}⟦{before}{asked[first].choices[0]}⟧", exam)


def pair_task(name: str, pairs: Sequence[Pair], record: dict[str, Any], exam: Exam) -> Task:
    """Pairs of which the good sentence should be the likelier as a whole: no template, no examples, nothing divided."""
    chosen = drawn_by_group(pairs, lambda each: each.group, exam.settings)
    sentences = [sentence for pair in chosen.values() for sentence in (pair.good, pair.bad)]
    keys = [(i, c) for i in chosen for c in (0, 1)]
    requests: dict[Key, Request] = dict(zip(keys, exam.words.whole(sentences), strict=True))
    asked = _that_fit(name, chosen, requests, exam)

    def summed_up(results: Results) -> dict[str, Any]:
        right: dict[str, list[bool]] = {}
        ties = 0
        for i, pair in asked.items():
            good, bad = (results[i, c]["log_likelihood"] for c in (0, 1))
            right.setdefault(pair.group, []).append(good > bad)
            ties += good == bad
        return summary("accuracy", "raw", {"raw": accuracy(right)}, "pairs", chance=0.5, ties_counted_wrong=ties) | by_group(right)

    first = asked[next(iter(asked))]
    opening = "".join(exam.tokenizer.tokens_of(exam.words.start))
    record = record | {"records": len(pairs), "drawn": len(chosen)}
    return _task(name, record, asked, requests, summed_up, f"{opening}⟦{first.good}⟧ against {opening}⟦{first.bad}⟧", exam)


def _that_fit(name: str, items: Mapping[int, Any], requests: dict[Key, Request], exam: Exam) -> dict[int, Any]:
    """The items all of whose requests fit into the context; the requests of others are taken out."""
    check_ids([ids for request in requests.values() for ids in request], exam.model.config.vocab)
    longest: dict[int, int] = {}
    for (i, _), request in requests.items():
        longest[i] = max(longest.get(i, 0), request.tokens)
    kept = without_too_long(name, items, longest, exam.context, "the context of this model")
    for key in [key for key in requests if key[0] not in kept]:
        del requests[key]
    return kept


def _task(
    name: str,
    record: dict[str, Any],
    asked: Mapping[int, Any],
    requests: Mapping[Key, Request],
    summed_up: Callable[[Results], dict[str, Any]],
    example: str,
    exam: Exam,
) -> Task:
    keys, speed = list(requests), Speed()
    plan = RequestPlan(list(requests.values()), batch_tokens=exam.settings.batch_tokens)
    counts = {"asked": len(asked), "refused_as_too_long": record["drawn"] - len(asked), "requests": len(keys), "batches": len(plan)}

    def run(unit: int) -> dict[Key, dict[str, Any]]:
        return {keys[i]: likelihood._asdict() for i, likelihood in exam.scorer(plan[unit], speed).items()}

    units = [[keys[i] for i in plan.requests_in(unit)] for unit in range(len(plan))]
    return Task(name, record | counts | {"tokens_alone": plan.tokens_alone}, units, run, summed_up, example, speed)
