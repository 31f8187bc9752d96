"""Tasks that the model writes or reads at length: written answers that are compared, and texts in bits per byte."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

import lm
from data.cache import TokenCache
from data.pipeline import evaluation_batches
from data.sources import open_source
from data.tasks import exact_match
from data.tasks.exact_match import Problem
from data.tasks.multiple_choice import Wording
from data.tasks.records import drawn
from recipes.completions import complete
from recipes.corpus import encode
from recipes.evaluate_tasks import Exam, Key, Pairs, Results, Task, examples_before, summary, without_too_long
from recipes.evaluate_words import check_ids
from train.evaluate import Speed
from train.intervals import Estimate, bootstrap_ratio, wilson
from train.loop import nats_by_document

HELD_OUT = "#held_out"  # at the end of a path: only the part of the text that training runs hold out


def problem_task(name: str, problems: Sequence[Problem], record: dict[str, Any], exam: Exam, *, examples: Pairs | None) -> Task:
    """Problems answered in writing, greedily, and compared. `examples`: what few-shot examples are drawn from; `None`: the problems."""
    settings, words = exam.settings, exam.words
    wording = Wording(settings.before_question, settings.after_query)
    chosen = {i: problems[i] for i in drawn(range(len(problems)), settings.limit, settings.seed)}
    own = [(each.question, each.answer) for each in problems]
    prompts = {i: words.prompt(wording, each.question, examples_before(i, own, examples, settings)) for i, each in chosen.items()}
    ids = {i: words.prompt_ids(prompt) for i, prompt in prompts.items()}
    check_ids(list(ids.values()), exam.model.config.vocab)
    room = exam.context - settings.max_new_tokens
    asked = without_too_long(name, chosen, {i: len(each) for i, each in ids.items()}, room, "the context less --max-new-tokens")
    # Neighbours in length are written together: little padding, and few lengths to compile for.
    order = sorted(asked, key=lambda i: (len(ids[i]), i))
    units = [order[at : at + settings.rows] for at in range(0, len(order), settings.rows)]
    stops = settings.stop if settings.stop is not None else () if words.chat else (wording.between, "Question:")
    writer, speed = lm.cast(exam.model, exam.dtype), Speed()

    def run(unit: int) -> dict[Key, dict[str, Any]]:
        begin = time.perf_counter()
        prompts_here = [ids[i] for i in units[unit]]
        written = complete(writer, prompts_here, exam.tokenizer, max_new_tokens=settings.max_new_tokens, stops=stops, ops=exam.scorer.ops)
        count = sum(each.tokens for each in written)
        places = len(written) * max(each.tokens for each in written)
        speed.add((len(written), len(prompts_here[-1])), count, places, time.perf_counter() - begin)
        return {(i,): each._asdict() | exact_match.matches(asked[i], each.text) for i, each in zip(units[unit], written, strict=True)}

    def summed_up(results: Results) -> dict[str, Any]:
        rules = list(exact_match.matches(asked[order[0]], ""))
        metrics = {rule: wilson(sum(results[(i,)][rule] for i in asked), len(asked)) for rule in rules}
        cut = sum(results[(i,)]["ended_by"] == "max_new_tokens" for i in asked)
        how = {"rule": rules[0], "shots": settings.shots, "chat_template": words.chat, "cut_at_max_new_tokens": cut}
        return summary("exact match", rules[0], metrics, "problems", **how)

    kept = {"records": len(problems), "drawn": len(chosen), "asked": len(asked), "refused_as_too_long": len(chosen) - len(asked)}
    record = record | kept | {"shots": settings.shots, "stops": list(stops), "max_new_tokens": settings.max_new_tokens}
    return Task(name, record, [[(i,) for i in unit] for unit in units], run, summed_up, f"{prompts[order[0]]}⟦…⟧", speed)


def text_task(name: str, path: str, exam: Exam) -> Task:
    """Bits per byte and perplexity of all documents, or of those held out, in windows as in pretraining: each token is predicted once, the
    first from the opening token, and the end of the document is one of them."""
    settings = exam.settings
    source = open_source(path.removesuffix(HELD_OUT))
    part = "held_out" if path.endswith(HELD_OUT) else "whole"
    documents = source.held_out if part == "held_out" else source.whole
    if settings.limit is not None and settings.limit < len(documents):
        chosen = drawn(range(len(documents)), settings.limit, settings.seed)
        documents = grain.MapDataset.source([documents[i] for i in chosen])
        part = f"{part}-{settings.limit}-{settings.seed}"
    cache = encode(documents, exam.tokenizer, source, part)
    check_ids([np.asarray([cache.max_token])], exam.model.config.vocab)
    seq = settings.seq or min(exam.context, 1024)
    stride = max(1, seq // 2)
    batches = evaluation_batches(cache, batch=max(1, settings.batch_tokens // seq), seq=seq, stride=stride)
    speed = Speed()

    def run(unit: int) -> dict[Key, dict[str, Any]]:
        begin = time.perf_counter()
        batch, of = batches[unit]
        nats, tokens = nats_by_document(exam.token_nats, exam.model, [(batch, of)])
        speed.add(batch.tokens.shape, int((batch.segments > 0).sum()), batch.tokens.size, time.perf_counter() - begin)
        return {(unit,): {"documents": [[i, nats[i], tokens[i]] for i in nats]}}

    def summed_up(results: Results) -> dict[str, Any]:
        return _of_texts(cache, [results[(unit,)]["documents"] for unit in range(len(batches))], seq, settings.seed)

    record: dict[str, Any] = {"kind": "text", "file": Path(source.name).name, "sha256": source.record["sha256"], "part": part}
    record |= {"documents": len(cache), "bytes": int(cache.text_bytes.sum()), "window": seq, "stride": stride}
    example = exam.tokenizer.decode(cache.piece(0, 0, min(int(cache.lengths[0]), 64)), skip_special_tokens=False)
    return Task(name, record, [[(unit,)] for unit in range(len(batches))], run, summed_up, f"{example}…", speed)


def _of_texts(cache: TokenCache, batches: Sequence[Sequence[Sequence[Any]]], seq: int, seed: int) -> dict[str, Any]:
    """The summary from (document, nats, tokens) of every batch."""
    nats, tokens = np.zeros(len(cache)), np.zeros(len(cache))
    for batch in batches:
        for document, some_nats, some_tokens in batch:
            nats[document] += some_nats
            tokens[document] += some_tokens
    sizes = np.asarray(cache.text_bytes)
    bits = bootstrap_ratio(nats / math.log(2), sizes, seed=seed)
    a_token = bootstrap_ratio(nats, tokens, seed=seed)
    low, high = (None if edge is None else math.exp(edge) for edge in (a_token.low, a_token.high))
    perplexity = Estimate(math.exp(a_token.value), low, high, a_token.n, a_token.interval)
    how = {"perplexity": perplexity.value, "bytes": int(sizes.sum()), "tokens": int(tokens.sum()), "window": seq}
    return summary("bits per byte", "bits_per_byte", {"bits_per_byte": bits, "perplexity": perplexity}, "documents", **how)
