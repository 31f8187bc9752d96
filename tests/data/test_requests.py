"""Requests in rows: each is scored once, from its own context, whatever shares the row."""

import numpy as np
import pytest

from data.requests import Request, RequestPlan, encode_pair, with_spaces_moved


def ids(*tokens: int) -> np.ndarray:
    return np.asarray(tokens, np.int32)


def some_requests(seed: int = 0, groups: int = 23) -> list[Request]:
    """Groups of one to four continuations; some contexts are a single token, and so have no head."""
    rng = np.random.default_rng(seed)
    made = []
    for group in range(groups):
        context = rng.integers(1, 90, 1 if group % 5 == 0 else rng.integers(2, 40)).astype(np.int32)
        made += [Request(context, rng.integers(1, 90, rng.integers(1, 9)).astype(np.int32)) for _ in range(1 + group % 4)]
    return made


def read_back(plan: RequestPlan) -> dict[int, tuple[list[int], list[int]]]:
    """For each request, what the model sees before and at the places that are scored (by segment), and the targets."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    for i in range(len(plan)):
        batch = plan[i]
        for rows in batch.passes:
            for r in range(len(rows.tokens)):
                for request in set(rows.requests[r].tolist()) - {-1}:
                    here = rows.requests[r] == request
                    (segment,) = set(rows.segments[r, here].tolist())
                    assert (rows.segments[r] == segment).sum() == here.sum(), "one tail of a group in a pass"
                    seen = {} if batch.heads is None else heads_of(batch.heads, r, segment)
                    seen |= dict(zip(rows.positions[r, here].tolist(), rows.tokens[r, here].tolist(), strict=True))
                    assert sorted(seen) == list(range(len(seen)))
                    assert request not in found
                    found[request] = [seen[p] for p in sorted(seen)], rows.targets[r, here].tolist()
    return found


def heads_of(heads, r: int, segment: int) -> dict[int, int]:
    here = heads.segments[r] == segment
    return dict(zip(heads.positions[r, here].tolist(), heads.tokens[r, here].tolist(), strict=True))


@pytest.mark.parametrize("batch_tokens", [1, 600, 10_000])
def test_every_request_is_scored_once_behind_its_own_context(batch_tokens: int) -> None:
    requests = some_requests()
    plan = RequestPlan(requests, batch_tokens=batch_tokens)
    found = read_back(plan)
    assert len(found) == len(requests)
    for i, (seen, targets) in found.items():
        assert seen == [*requests[i].context, *requests[i].continuation[:-1]]
        assert targets == requests[i].continuation.tolist()
    assert sorted(i for unit in range(len(plan)) for i in plan.requests_in(unit)) == list(range(len(requests)))


def test_contexts_of_one_token_stand_in_rows_without_heads() -> None:
    requests = [Request(ids(1), ids(*range(2, 2 + n))) for n in range(1, 60)]
    plan = RequestPlan(requests, batch_tokens=512)
    assert all(plan[i].heads is None and len(plan[i].passes) == 1 for i in range(len(plan)))
    assert len(read_back(plan)) == len(requests)


def test_a_shared_context_is_read_once() -> None:
    context = ids(*range(1, 31))
    requests = [Request(context, ids(50 + i, 60)) for i in range(4)]
    plan = RequestPlan(requests, batch_tokens=256)
    assert plan.tokens_alone == 4 * 31
    assert plan[0].real_tokens == 29 + 4 * 2
    assert len(plan) == 1


def test_most_places_are_real_where_there_is_enough_to_fill_rows() -> None:
    rng = np.random.default_rng(1)
    requests = []
    for _ in range(400):
        context = rng.integers(1, 90, rng.integers(20, 60)).astype(np.int32)
        requests += [Request(context, rng.integers(1, 90, rng.integers(2, 9)).astype(np.int32)) for _ in range(4)]
    plan = RequestPlan(requests, batch_tokens=2048)
    batches = [plan[i] for i in range(len(plan))]
    assert sum(batch.real_tokens for batch in batches) > 0.85 * sum(batch.places for batch in batches)
    assert len({rows.tokens.shape for batch in batches for rows in batch.all_rows}) == 2  # two programs to compile, not one a batch


def test_the_same_requests_make_the_same_batches() -> None:
    first, second = (RequestPlan(some_requests(groups=90), batch_tokens=300)[1] for _ in range(2))
    for a, b in zip(first.all_rows, second.all_rows, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_request_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least one token of context and one of continuation; these have not: \[1\]"):
        RequestPlan([Request(ids(1), ids(2)), Request(ids(1), ids())], batch_tokens=8)
    assert len(RequestPlan([], batch_tokens=8)) == 0


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation() -> None:
    assert with_spaces_moved("Answer: ", "yes") == ("Answer:", " yes")
    assert with_spaces_moved("Answer:\n", "yes") == ("Answer:", "\nyes")
    assert with_spaces_moved("Answer:", " yes") == ("Answer:", " yes")


def test_a_pair_is_cut_behind_as_many_tokens_as_the_context_has_alone() -> None:
    def by_words(text: str) -> np.ndarray:  # "ab" is one token, where "a" and "b" are two
        return ids(*(len(word) for word in text.split()))

    context, continuation = encode_pair(by_words, "one three", " seven no")
    assert (context.tolist(), continuation.tolist()) == ([3, 5], [5, 2])
    context, continuation = encode_pair(by_words, "one thr", "ee no")  # a token over the border counts to the context
    assert (context.tolist(), continuation.tolist()) == ([3, 3], [2])
