"""The last hop of the data: rows to `Batch`es, for training without end (`train_batches`) and for evaluation.

The batch of a step is a pure function of (cache, packing, seed, step): rows are numbered for ever (see `data.rows`) and step s
takes the rows s * batch to (s + 1) * batch - 1. Resuming, a different number of processes and "what was in batch 1,234" are
index arithmetic, and no iterator has state to save.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple, Self

import grain
import numpy as np

from data.cache import TokenCache
from data.packing import Packing, Plan, build_row, describe, plan_windows, require_positive, row_documents
from data.rows import Mixture, Rows, training_rows


class Batch(NamedTuple):
    """Rows as the model and the loss take them; each field is `[batch, seq]`."""

    tokens: np.ndarray  # int32, what the model reads
    targets: np.ndarray  # int32, the token after each; pad_id in padding
    positions: np.ndarray  # int32, from 0 in every piece of a document
    segments: np.ndarray  # int32, 1, 2, 3, ... a row; 0 is padding. A token attends within its segment
    loss_weights: np.ndarray  # float32, 1 where the prediction counts; 0 in padding and in context


class TrainBatches:
    """An iterator over the batches of steps, filled from a background thread. Close it, or use it in a `with`."""

    def __init__(self, steps: grain.MapDataset, prefetch: int) -> None:
        # One thread: building rows from a memory map is cheap, and Grain's default of sixteen is ten times slower at it.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
        self._iterator = iter(steps.to_iter_dataset(options))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def close(self) -> None:
        """Stop the background thread."""
        self._iterator.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def train_batches(
    tokens: TokenCache | Mixture,
    *,
    batch: int,
    seq: int,
    seed: int,
    stop_step: int,
    packing: Packing = "concat",
    start_step: int = 0,
    prefetch: int = 2,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainBatches:
    """The batches of the steps `start_step` to `stop_step - 1`.

    **Arguments:**

    - `tokens`: of one source, or of several with their weights.
    - `batch`: rows in the global batch, all processes together.
    - `seq`: (token, target) pairs in a row.
    - `packing`: how documents make rows, see `data.packing`.
    - `prefetch`: batches made ahead.
    - `process_index`, `process_count`: this process's share, a contiguous block of `batch / process_count` rows. The
        blocks of all processes, one above the other, are the same global batch at any process count.

    **Raises:** `ValueError` if the tokens cannot fill one batch, a part of a mixture that may not repeat ends before
    `stop_step`, or the numbers do not fit together.
    """
    if not 0 <= start_step <= stop_step:
        raise ValueError(f"expected 0 <= start_step <= stop_step, got start_step {start_step} and stop_step {stop_step}")
    if not 0 <= process_index < process_count or batch % process_count:
        raise ValueError(
            f"expected a process_index below process_count and a batch it divides, got process_index {process_index}, "
            f"process_count {process_count}, batch {batch}"
        )
    rows = _rows_for(tokens, batch, seq, seed, packing, stop_step)
    share = batch // process_count
    offset = process_index * share

    def batch_of(step: int) -> Batch:
        first = step * batch + offset
        return _stack([rows[g] for g in range(first, first + share)])

    return TrainBatches(grain.MapDataset.range(start_step, stop_step).map(batch_of), prefetch)


def batch_at(tokens: TokenCache | Mixture, step: int, *, batch: int, seq: int, seed: int, packing: Packing = "concat") -> Batch:
    """The global batch that `train_batches` gives at `step`: to look at what the model saw when a loss jumped."""
    rows = _rows_for(tokens, batch, seq, seed, packing, step + 1)
    return _stack([rows[g] for g in range(step * batch, (step + 1) * batch)])


class EvaluationBatches:
    """A list of batches that count each pair's loss once, each with the document of every position.

    An item is `(batch, documents)`; `documents` (int32, `[batch, seq]`) is an index into the cache, -1 in padding. The last
    batch is filled up with rows of padding, so that all have one shape.
    """

    def __init__(self, cache: TokenCache, plan: Plan, rows: np.ndarray, batch: int) -> None:
        self.cache, self.plan, self.rows, self.batch = cache, plan, rows, batch
        self._with_empty_row = replace(plan, row_start=np.append(plan.row_start, plan.row_start[-1]))

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch)

    def __getitem__(self, i: int) -> tuple[Batch, np.ndarray]:
        if not 0 <= i < len(self):
            raise IndexError(f"batch {i} of {len(self)}")
        rows = self.rows[i * self.batch : (i + 1) * self.batch]
        rows = np.append(rows, np.full(self.batch - len(rows), self.plan.rows))  # the empty row
        plan = self._with_empty_row
        batch = _stack([build_row(plan, row, self.cache) for row in rows])
        return batch, np.stack([row_documents(plan, row) for row in rows])

    def __iter__(self) -> Iterator[tuple[Batch, np.ndarray]]:
        return (self[i] for i in range(len(self)))

    @property
    def scored_pairs(self) -> np.ndarray:
        """How many pairs of each document count here: `cache.lengths - 1`, less where `max_rows` left rows out."""
        in_rows = np.isin(np.repeat(np.arange(self.plan.rows), np.diff(self.plan.row_start)), self.rows)
        weights = (self.plan.length - self.plan.context) * in_rows
        return np.bincount(self.plan.document, weights, minlength=len(self.cache)).astype(np.int64)

    def describe(self) -> dict[str, int | float]:
        """Counts of the whole plan, and what `max_rows` left out of it."""
        counts = describe(self.plan)
        rows_left_out = counts["rows"] - len(self.rows)
        return counts | {"rows_left_out": rows_left_out, "pairs_left_out": counts["pairs"] - int(self.scored_pairs.sum())}


def evaluation_batches(cache: TokenCache, *, batch: int, seq: int, stride: int, max_rows: int | None = None) -> EvaluationBatches:
    """Every document alone, in windows of `seq` that advance by `stride` (see `plan_windows`), always in the same order.

    `max_rows` takes that many rows, evenly spaced over all, for a quick look; documents are then scored in part.
    """
    require_positive(batch=batch, max_rows=1 if max_rows is None else max_rows)
    plan = plan_windows(cache.lengths, seq, stride)
    taken = plan.rows if max_rows is None else min(max_rows, plan.rows)
    return EvaluationBatches(cache, plan, np.arange(taken) * plan.rows // max(taken, 1), batch)


def _rows_for(tokens: TokenCache | Mixture, batch: int, seq: int, seed: int, packing: Packing, stop_step: int) -> Rows:
    require_positive(batch=batch)
    rows = training_rows(tokens, seq=seq, seed=seed, packing=packing)
    if rows.rows_per_epoch < batch or (packing == "concat" and rows.pairs < batch * seq):  # concat: no row half empty, either
        raise ValueError(
            f"{rows.documents} documents hold {rows.pairs} (token, target) pairs, less than one batch of {batch} rows of {seq} "
            f"({batch * seq} pairs; packing {packing} makes {rows.rows_per_epoch} rows of them): "
            "take a smaller batch (--batch), shorter rows (--seq) or more data"
        )
    rows.require(stop_step * batch, f"{stop_step} steps of {batch} rows")
    return rows


def _stack(rows: list[dict[str, np.ndarray]]) -> Batch:
    return Batch(*(np.stack([row[name] for row in rows]) for name in Batch._fields))
