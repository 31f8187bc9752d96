"""Packing as a plan: from the lengths of documents alone, a `Plan` says which pieces fill which row; `build_row` then reads
one row's tokens. Nothing is streamed, so any row can be built at any time. Three plans for training, by name in `PACKINGS`:

    concat      documents end to end, cut where a row is full: no padding, most cuts
    best_fit    documents whole where they fit into a row, rows filled up with what fits best: little padding, few cuts
    pad         one document, or piece of a long one, a row: most padding, nothing beside it

What is packed are (token, target) pairs. A document of n tokens has n - 1, and cutting between pairs loses nothing: the
last target before a cut is the first token after it. Each piece gets its own segment and its positions start at 0, so
pieces never see one another. Two rows of five pairs from documents of 5, 4 and 3 tokens (here 1 is BOS, 2 EOS, 0 PAD):

    >>> documents = [[1, 11, 12, 13, 2], [1, 21, 22, 2], [1, 31, 2]]
    >>> plan = plan_concat([len(d) for d in documents], seq=5, order=[1, 0, 2])
    >>> np.stack([plan.document, plan.start, plan.length], axis=1)  # one line a piece; document 0 is cut after 2 pairs
    array([[1, 0, 3],
           [0, 0, 2],
           [0, 2, 2],
           [2, 0, 2]])
    >>> plan.row_start
    array([0, 2, 4])
    >>> class Cache:
    ...     pad_id = 0
    ...     def piece(self, i, start, length):
    ...         return np.array(documents[i][start : start + length])
    ...     def weights(self, i, start, length):
    ...         return np.ones(length)
    >>> for row in range(plan.rows):
    ...     for name, values in build_row(plan, row, Cache()).items():
    ...         print(f"{name:12} {values}")
    tokens       [ 1 21 22  1 11]
    targets      [21 22  2 11 12]
    positions    [0 1 2 0 1]
    segments     [1 1 1 2 2]
    loss_weights [1. 1. 1. 1. 1.]
    tokens       [12 13  1 31  0]
    targets      [13  2 31  2  0]
    positions    [0 1 0 1 0]
    segments     [1 1 2 2 0]
    loss_weights [1. 1. 1. 1. 0.]
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Plan:
    """Which pieces of which documents stand in which row, in order."""

    seq: int  # pairs a row
    document: np.ndarray  # [pieces] index of the document
    start: np.ndarray  # [pieces] its first pair in the document
    length: np.ndarray  # [pieces] pairs
    context: np.ndarray  # [pieces] leading pairs that are only read and carry no loss; 0 in training
    row_start: np.ndarray  # [rows + 1] row r holds the pieces row_start[r] to row_start[r + 1] - 1

    @property
    def rows(self) -> int:
        return len(self.row_start) - 1


class Pieces(Protocol):
    """What a row is read from: a `TokenCache`, or anything with these three."""

    @property
    def pad_id(self) -> int: ...

    def piece(self, i: int, start: int, length: int) -> np.ndarray: ...

    def weights(self, i: int, start: int, length: int) -> np.ndarray: ...


def plan_concat(lengths: npt.ArrayLike, seq: int, order: npt.ArrayLike) -> Plan:
    """Documents end to end, cut every `seq` pairs: every row but the last is full, and no pair is lost or repeated.

    The piece after a cut starts a new segment and cannot look back over the cut.

    **Arguments:**

    - `lengths`: tokens of each document, opening token and EOS included.
    - `order`: the documents to pack, by index, in this order.
    """
    require_positive(seq=seq)
    documents = np.asarray(order, np.int64)
    pairs = np.asarray(lengths, np.int64)[documents] - 1
    documents, pairs = documents[pairs > 0], pairs[pairs > 0]
    ends = np.cumsum(pairs)  # on the line of all pairs, where the documents end
    total = int(ends[-1]) if len(ends) else 0
    row_edges = np.arange(0, total, seq)
    cuts = np.sort(np.concatenate([ends - pairs, row_edges]), kind="stable")  # merges the two; np.union1d is many times slower
    cuts = cuts[np.diff(cuts, prepend=-1) > 0]  # where pieces begin
    of = np.searchsorted(ends, cuts, side="right")
    return Plan(
        seq=seq,
        document=documents[of],
        start=cuts - (ends - pairs)[of],
        length=np.diff(cuts, append=total),
        context=_no_context(cuts),
        row_start=np.append(np.searchsorted(cuts, row_edges), len(cuts)),
    )


def plan_best_fit(lengths: npt.ArrayLike, seq: int, order: npt.ArrayLike) -> Plan:
    """Documents whole: longest first, each goes into the fullest row that still takes it (best-fit decreasing; Ding et al.
    2024, arXiv:2404.10830). Only documents longer than a row are cut, into pieces of `seq` pairs and a rest.

    How many rows there are depends on the lengths alone, whatever the `order`; among pieces of one length the order decides
    which row they share.

    **Arguments:** as in `plan_concat`.
    """
    document, start, length = _cut_long(lengths, seq, order)
    row = _best_fit(length, seq)
    by_row = np.argsort(row, kind="stable")
    first_of_row = np.searchsorted(row[by_row], np.arange(row.max(initial=-1) + 2))
    return Plan(seq, document[by_row], start[by_row], length[by_row], _no_context(by_row), first_of_row)


def plan_pad(lengths: npt.ArrayLike, seq: int, order: npt.ArrayLike) -> Plan:
    """A row for every document, and for every piece of `seq` pairs of a longer one; padding fills it up.

    **Arguments:** as in `plan_concat`.
    """
    document, start, length = _cut_long(lengths, seq, order)
    return Plan(seq, document, start, length, _no_context(start), np.arange(len(document) + 1))


Packing = Literal["concat", "best_fit", "pad"]
PACKINGS: dict[Packing, Callable[[npt.ArrayLike, int, npt.ArrayLike], Plan]] = {
    "concat": plan_concat,
    "best_fit": plan_best_fit,
    "pad": plan_pad,
}


def plan_windows(lengths: npt.ArrayLike, seq: int, stride: int) -> Plan:
    """Every document alone, read through a window of `seq` pairs that advances by `stride`: the plan for evaluation.

    What a window shares with the one before is its context, so each pair's loss counts once, and from the second window
    on every counted pair has at least `seq - stride` pairs before it. A smaller stride is truer and slower. Windows
    shorter than a row share rows (best fit, longest first); rows stand in the order of their first documents.
    """
    require_positive(seq=seq, stride=stride)
    if stride > seq:
        raise ValueError(f"stride ({stride}) must be at most seq ({seq}), or the pairs between two windows have no loss")
    pairs = np.maximum(np.asarray(lengths, np.int64) - 1, 0)
    windows = np.where(pairs > 0, 1 + np.maximum(0, -(-(pairs - seq) // stride)), 0)
    document = np.repeat(np.arange(len(pairs)), windows)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(windows) - windows, windows)  # of its document
    start = nth * stride
    length = np.minimum(seq, pairs[document] - start)
    context = np.where(nth > 0, seq - stride, 0)
    row = _best_fit(length, seq)
    by_row = np.lexsort((start, document, row))
    first_of_row = np.searchsorted(row[by_row], np.arange(row.max(initial=-1) + 2))
    document, start, length, context = (a[by_row] for a in (document, start, length, context))
    return Plan(seq, document, start, length, context, first_of_row)


def build_row(plan: Plan, row: int, cache: Pieces) -> dict[str, np.ndarray]:
    """Row `row` of the plan as arrays of `plan.seq`: the fields of `data.pipeline.Batch`, without its batch axis."""
    tokens = np.full(plan.seq, cache.pad_id, np.int32)
    targets = tokens.copy()
    positions, segments = np.zeros((2, plan.seq), np.int32)
    loss_weights = np.zeros(plan.seq, np.float32)
    at = 0
    pieces = range(plan.row_start[row], plan.row_start[row + 1])
    for segment, i in enumerate(pieces, start=1):
        start, length, context = int(plan.start[i]), int(plan.length[i]), int(plan.context[i])
        end = at + length
        read = cache.piece(int(plan.document[i]), start, length + 1)
        tokens[at:end], targets[at:end] = read[:-1], read[1:]
        positions[at:end] = np.arange(length)
        segments[at:end] = segment
        loss_weights[at + context : end] = cache.weights(int(plan.document[i]), start + context, length - context)
        at = end
    return {
        "tokens": tokens,
        "targets": targets,
        "positions": positions,
        "segments": segments,
        "loss_weights": loss_weights,
    }


def row_documents(plan: Plan, row: int) -> np.ndarray:
    """The document (int32, [seq]) behind each position of row `row`, -1 for padding."""
    documents = np.full(plan.seq, -1, np.int32)
    pieces = slice(plan.row_start[row], plan.row_start[row + 1])
    filled = np.repeat(plan.document[pieces], plan.length[pieces])
    documents[: len(filled)] = filled
    return documents


def describe(plan: Plan) -> dict[str, int | float]:
    """Counts of what a plan holds, for a run's record."""
    per_document = np.unique(plan.document, return_counts=True)[1]
    places = plan.rows * plan.seq
    filled = int(plan.length.sum())
    return {
        "documents": len(per_document),
        "documents_cut": int((per_document > 1).sum()),  # into more than one piece or window
        "pieces": len(plan.document),
        "pairs": filled - int(plan.context.sum()),  # that carry loss
        "context_pairs": int(plan.context.sum()),  # read a second time, without loss
        "rows": plan.rows,
        "padding": places - filled,
        "fill_fraction": filled / places if places else 0.0,
    }


def _cut_long(lengths: npt.ArrayLike, seq: int, order: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Document, start and length of each piece of at most `seq` pairs, documents in `order`."""
    require_positive(seq=seq)
    documents = np.asarray(order, np.int64)
    pairs = np.asarray(lengths, np.int64)[documents] - 1
    pieces = -(-pairs // seq)
    nth = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # of its document
    start = nth * seq
    return np.repeat(documents, pieces), start, np.minimum(seq, np.repeat(pairs, pieces) - start)


def _no_context(pieces: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.int64(0), len(pieces))  # takes no memory


def _best_fit(length: np.ndarray, seq: int) -> np.ndarray:
    """The row of each piece, longest pieces first, each into the fullest row that still takes it.

    All pieces of one length are placed together: the row that takes the first of them stays the fullest that takes the
    next, until it has no room for another. Sorting is the longest part of the work. Rows are numbered in the order in which
    their earliest pieces stand in `length`.
    """
    if not len(length):
        return np.empty(0, np.int64)
    row = np.empty(len(length), np.int64)
    rows = 0
    open_rows: dict[int, list[np.ndarray]] = {}  # pairs still free → the rows that have so many
    rooms = 0  # bit r is set where open_rows has r

    def leave_open(some: np.ndarray, room: int) -> None:
        nonlocal rooms
        if len(some) and room:
            open_rows.setdefault(room, []).append(some)
            rooms |= 1 << room

    descending = np.argsort(-length, kind="stable")
    needs, first = np.unique(-length[descending], return_index=True)
    for need, pieces in zip((-needs).tolist(), np.split(descending, first[1:]), strict=True):
        while len(pieces):
            if fitting := rooms >> need:
                room = need + (fitting & -fitting).bit_length() - 1  # the smallest that is large enough
                found = np.concatenate(open_rows.pop(room))
                rooms ^= 1 << room
            else:
                room, found = seq, rows + np.arange(-(-len(pieces) // (seq // need)))
                rows += len(found)
            each = room // need
            placed = min(len(pieces), each * len(found))
            full, over = divmod(placed, each)
            row[pieces[:placed]] = np.repeat(found, each)[:placed]
            leave_open(found[:full], room - each * need)
            if over:
                leave_open(found[full : full + 1], room - over * need)
            leave_open(found[full + (over > 0) :], room)
            pieces = pieces[placed:]
    earliest = np.full(rows, len(length))
    np.minimum.at(earliest, row, np.arange(len(length)))
    number = np.empty(rows, np.int64)
    number[np.argsort(earliest)] = np.arange(rows)
    return number[row]


def require_positive(**sizes: int) -> None:
    """`require_positive(seq=seq)`: a `ValueError` naming the first size below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
