"""What is asked of a model that only reads: log p(continuation | context), and the rows in which many such requests are run.

Requests with one context make a *group*: the choices of a question. All but the last token of the context is the group's *head*, which is
read once, into a cache. A *tail* is what one request adds: that last token and the continuation without its own last. Its targets are the
continuation.

    context        the cat sat          continuations   on a mat / in trees
    head           the cat
    tails              sat on  a        targets   on a   mat
                       sat in                     in trees

Heads stand side by side in rows, a segment each. Tails come in *passes* over these rows: in a pass a row holds one tail at most of each
group, under its group's segment and with positions that go on where the head ended. A pass never changes the cache, so tails of one group
do not see one another, by the mask rule of the house and nothing more. Where no group has a head, the tails stand alone in rows of
their own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.packing import plan_best_fit, require_positive

ROUNDING = 8  # places; rows are as long as a multiple
HEAD_PLACES = (256, 384, 512, 768, 1024)  # lengths that are tried for rows of heads
TAIL_ROW = 256  # places at least, of rows of tails without heads
# What a plan is chosen by: places, more of them where rows are long, since attention looks along the whole row (of a model 768 wide it
# costs as much as all else at 6 · 768 places), and something for each pass, however short.
ATTENTION_AS_ALL_ELSE = 6 * 768
PASS_COST = 64  # places


class Request(NamedTuple):
    """log p(continuation | context), as token ids (int32)."""

    context: np.ndarray  # at least one token
    continuation: np.ndarray  # at least one token

    @property
    def tokens(self) -> int:
        """How many the model reads for it: all but the last of the continuation."""
        return len(self.context) + len(self.continuation) - 1


class ScoredRows(NamedTuple):
    """Rows of heads or of tails; each field is `[rows, places]`, int32."""

    tokens: np.ndarray
    targets: np.ndarray  # 0 in heads and padding
    positions: np.ndarray  # in the text of the request
    segments: np.ndarray  # 0 is padding
    requests: np.ndarray  # the request that a place's target belongs to; -1 in heads and padding


class RequestBatch(NamedTuple):
    """Heads, read once, and the passes of tails over them."""

    heads: ScoredRows | None  # None: no request of the batch has one
    passes: tuple[ScoredRows, ...]

    @property
    def places(self) -> int:
        return sum(rows.tokens.size for rows in self.all_rows)

    @property
    def real_tokens(self) -> int:
        return sum(int((rows.segments > 0).sum()) for rows in self.all_rows)

    @property
    def all_rows(self) -> tuple[ScoredRows, ...]:
        return self.passes if self.heads is None else (self.heads, *self.passes)


@dataclass(frozen=True)
class _Row:
    """The groups of a row, in order, and the tails of each pass."""

    groups: list[int]
    passes: list[list[int]]  # requests


class RequestPlan:
    """A list of `RequestBatch`es in which every request is scored once. The same requests always make the same batches."""

    def __init__(self, requests: Sequence[Request], *, batch_tokens: int) -> None:
        """**Arguments:**

        - `batch_tokens`: places a batch of rows has, about.
        """
        require_positive(batch_tokens=batch_tokens)
        if empty := [i for i, request in enumerate(requests) if not len(request.context) or not len(request.continuation)]:
            raise ValueError(f"a request needs at least one token of context and one of continuation; these have not: {empty[:5]}")
        self.requests = list(requests)
        self.groups = _groups(requests)
        self.head_lengths = np.array([len(requests[group[0]].context) - 1 for group in self.groups], np.int64)
        longest = _rounded(max((len(request.continuation) for request in requests), default=1))
        if not self.head_lengths.any():
            self.head_places, self.tail_places = 0, max(TAIL_ROW, longest)
            tails = _packed([len(request.continuation) for request in requests], self.tail_places)
            self.rows_a_batch = _even(len(tails), batch_tokens // self.tail_places)
            self.rows = [_Row([], [each]) for each in tails]
            return
        longest_head = int(self.head_lengths.max())
        lengths = [places for places in HEAD_PLACES if places >= longest_head] or [_rounded(longest_head)]
        plans = [plan for places in lengths for plan in self._plans(places, longest, batch_tokens)]
        _, self.head_places, self.tail_places, self.rows_a_batch, self.rows = min(plans, key=lambda plan: plan[0])

    def __len__(self) -> int:
        return -(-len(self.rows) // self.rows_a_batch)

    def __getitem__(self, i: int) -> RequestBatch:
        if not 0 <= i < len(self):
            raise IndexError(f"batch {i} of {len(self)}")
        rows = self.rows[i * self.rows_a_batch : (i + 1) * self.rows_a_batch]
        passes = max(len(row.passes) for row in rows)
        heads = self._heads(rows) if self.head_places else None
        return RequestBatch(heads, tuple(self._tails(rows, number) for number in range(passes)))

    def requests_in(self, i: int) -> list[int]:
        """The requests that batch `i` scores, by number."""
        rows = self.rows[i * self.rows_a_batch : (i + 1) * self.rows_a_batch]
        return sorted(request for row in rows for tails in row.passes for request in tails)

    @property
    def tokens_alone(self) -> int:
        """What the model would read if every request were run by itself, unpadded."""
        return sum(request.tokens for request in self.requests)

    def _plans(self, head_places: int, longest: int, batch_tokens: int) -> Iterator[tuple[float, int, int, int, list[_Row]]]:
        """For each length of the tails' rows: what it costs, both lengths, rows of a batch, and the rows. Those with as many passes stand
        together, for a batch has as many as its row with the most."""
        rows = _packed(np.maximum(self.head_lengths, 1), head_places)  # an empty head keeps a place, of padding
        size = _even(len(rows), batch_tokens // head_places)
        batches = -(-len(rows) // size)
        places = longest
        while places <= max(longest, head_places):
            planned = sorted((_Row(groups, self._passes(groups, places)) for groups in rows), key=lambda row: -len(row.passes))
            passes = sum(len(row.passes) for row in planned[::size])
            heads = batches * size * head_places * (1 + head_places / ATTENTION_AS_ALL_ELSE)
            tails = passes * (size * places * (1 + (head_places + places) / ATTENTION_AS_ALL_ELSE) + PASS_COST)
            yield heads + tails, head_places, places, size, planned
            places = _rounded(int(1.2 * places) + 1)

    def _passes(self, groups: list[int], places: int) -> list[list[int]]:
        """The tails of a row dealt to passes: longest first, each to the first pass that has room and no tail of its group."""
        tails = [(-len(self.requests[request].continuation), request, group) for group in groups for request in self.groups[group]]
        passes: list[tuple[list[int], set[int]]] = []
        room: list[int] = []
        for negative, request, group in sorted(tails):
            fits = (i for i, (_, taken) in enumerate(passes) if group not in taken and room[i] >= -negative)
            i = next(fits, len(passes))
            if i == len(passes):
                passes.append(([], set()))
                room.append(places)
            passes[i][0].append(request)
            passes[i][1].add(group)
            room[i] += negative
        return [tails_of_pass for tails_of_pass, _ in passes]

    def _heads(self, rows: list[_Row]) -> ScoredRows:
        built = _empty(self.rows_a_batch, self.head_places)
        for r, row in enumerate(rows):
            at = 0
            for segment, group in enumerate(row.groups, start=1):
                head = self.requests[self.groups[group][0]].context[:-1]
                place = slice(at, at + len(head))
                built.tokens[r, place] = head
                built.positions[r, place] = np.arange(len(head))
                built.segments[r, place] = segment
                at += max(len(head), 1)
        return built

    def _tails(self, rows: list[_Row], number: int) -> ScoredRows:
        built = _empty(self.rows_a_batch, self.tail_places)
        for r, row in enumerate(rows):
            segment_of = {request: segment for segment, group in enumerate(row.groups, start=1) for request in self.groups[group]}
            at = 0
            for nth, i in enumerate(row.passes[number] if number < len(row.passes) else [], start=1):
                request = self.requests[i]
                length, start = len(request.continuation), len(request.context) - 1
                place = slice(at, at + length)
                built.tokens[r, place] = np.append(request.context[-1:], request.continuation[:-1])
                built.targets[r, place] = request.continuation
                built.positions[r, place] = start + np.arange(length)
                built.segments[r, place] = segment_of.get(i, nth)
                built.requests[r, place] = i
                at += length
        return built


def encode_pair(encode: Callable[[str], np.ndarray], context: str, continuation: str) -> tuple[np.ndarray, np.ndarray]:
    """The ids of both, as they are when the two texts are encoded as one: the continuation's are those behind as many as the context has
    alone. (Where a token spans the border, that is as good a cut as any; lm-eval makes the same one.)"""
    alone, whole = encode(context), encode(context + continuation)
    return alone, whole[len(alone) :]


def with_spaces_moved(context: str, continuation: str) -> tuple[str, str]:
    """White space at the end of the context goes to the head of the continuation, where a word's token expects it.

    >>> with_spaces_moved("Answer: ", "yes")
    ('Answer:', ' yes')
    """
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _groups(requests: Sequence[Request]) -> list[list[int]]:
    """Requests with one context, in the order in which the contexts first come."""
    found: dict[bytes, list[int]] = {}
    for i, request in enumerate(requests):
        found.setdefault(np.asarray(request.context, np.int32).tobytes(), []).append(i)
    return list(found.values())


def _empty(rows: int, places: int) -> ScoredRows:
    tokens, targets, positions, segments = np.zeros((4, rows, places), np.int32)
    return ScoredRows(tokens, targets, positions, segments, np.full((rows, places), -1, np.int32))


def _packed(lengths: npt.ArrayLike, places: int) -> list[list[int]]:
    """What stands in each row, best fit."""
    tokens = np.asarray(lengths, np.int64)
    plan = plan_best_fit(tokens + 1, places, np.arange(len(tokens)))  # which counts (token, target) pairs, one less than tokens
    return [plan.document[a:b].tolist() for a, b in pairwise(plan.row_start.tolist())]


def _rounded(n: int) -> int:
    return -(-n // ROUNDING) * ROUNDING


def _even(rows: int, most: int) -> int:
    """Rows of a batch, so that as many batches of at most `most` are as equal as they can be."""
    batches = max(1, -(-rows // max(1, most)))
    return max(1, -(-rows // batches))
