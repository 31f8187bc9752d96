"""Facts about `data.pipeline`."""

from collections import Counter

import grain
import numpy as np
import pytest

from data.cache import TokenCache
from data.packing import PACKINGS
from data.pipeline import Batch, batch_at, evaluation_batches, train_batches
from data.rows import PackedRows, _permutation

BATCH, SEQ, SEED = 6, 17, 5


@pytest.fixture(scope="module")
def cache(documents, tokenizer, tmp_path_factory) -> TokenCache:
    folder = tmp_path_factory.mktemp("cache")
    return TokenCache.build_or_open(documents, tokenizer, folder, source_digest="d1", split="train")


def equal(a: Batch, b: Batch) -> bool:
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def batches(cache: TokenCache, **options) -> list[Batch]:
    with train_batches(cache, **{"batch": BATCH, "seq": SEQ, "seed": SEED} | options) as found:
        return list(found)


def pairs_of(cache: TokenCache) -> Counter:
    documents = [cache.document(i) for i in range(len(cache))]
    return Counter(pair for d in documents for pair in zip(d[:-1].tolist(), d[1:].tolist(), strict=True))


def test_batches_have_the_shapes_and_types_promised(cache) -> None:
    for batch in batches(cache, stop_step=3):
        assert isinstance(batch, Batch)
        assert all(field.shape == (BATCH, SEQ) for field in batch)
        assert [field.dtype for field in batch] == [np.int32] * 4 + [np.float32]


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_epoch_has_every_document_whole_and_once(cache, packing) -> None:
    rows = PackedRows(cache, seq=SEQ, seed=SEED, packing=packing)
    assert rows.describe()["packing"] == packing
    for epoch in (0, 1, 3):
        seen: Counter = Counter()
        documents: dict[tuple[int, int], np.ndarray] = {}
        plan, dealt = rows.epoch(epoch)
        assert sorted(dealt) == list(range(rows.rows_per_epoch))
        for within in range(rows.rows_per_epoch):
            row = rows[epoch * rows.rows_per_epoch + within]
            real = row["loss_weights"] > 0
            seen.update(zip(row["tokens"][real].tolist(), row["targets"][real].tolist(), strict=True))
            pieces = range(plan.row_start[dealt[within]], plan.row_start[dealt[within] + 1])
            for segment, i in enumerate(pieces, start=1):
                documents[plan.document[i], plan.start[i]] = row["targets"][row["segments"] == segment]
        assert seen == pairs_of(cache)
        for i in range(len(cache)):
            targets = np.concatenate([piece for (d, _), piece in sorted(documents.items()) if d == i])
            assert targets.tolist() == cache.document(i)[1:].tolist()


def test_epochs_and_seeds_differ_in_order(cache) -> None:
    rows = PackedRows(cache, seq=SEQ, seed=SEED)
    first, second, other = rows.epoch(0), rows.epoch(1), PackedRows(cache, seq=SEQ, seed=SEED + 1).epoch(0)
    for a, b in ((first, second), (first, other)):
        assert a[0].document.tolist() != b[0].document.tolist()
        assert a[1].tolist() != b[1].tolist()


def test_order_of_a_seed_is_fixed_for_ever() -> None:
    """A stored number on purpose: if it changes, every run resumed across that change sees other rows."""
    assert _permutation(11, 5, 2, "rows").tolist() == [6, 10, 5, 2, 4, 7, 9, 8, 1, 3, 0]


@pytest.mark.parametrize("packing", PACKINGS)
def test_batch_depends_on_the_step_alone(cache, packing) -> None:
    stop = 3 * PackedRows(cache, seq=SEQ, seed=SEED, packing=packing).rows_per_epoch // BATCH + 2  # into the fourth epoch
    straight = batches(cache, packing=packing, stop_step=stop)
    assert len(straight) == stop
    for start in (0, 1, 4, stop - 1, stop):
        resumed = batches(cache, packing=packing, start_step=start, stop_step=stop, prefetch=start % 3 + 1)
        assert len(resumed) == stop - start
        assert all(equal(a, b) for a, b in zip(resumed, straight[start:], strict=True))
    for step in (stop - 1, 0, 5):
        assert equal(batch_at(cache, step, batch=BATCH, seq=SEQ, seed=SEED, packing=packing), straight[step])


@pytest.mark.parametrize("process_count", [1, 2, 3, 6])
def test_shares_of_all_processes_make_the_same_global_batch(cache, process_count: int) -> None:
    whole = batches(cache, stop_step=9)
    shares = [batches(cache, stop_step=9, process_index=i, process_count=process_count) for i in range(process_count)]
    for step, batch in enumerate(whole):
        assert shares[0][step].tokens.shape == (BATCH // process_count, SEQ)
        together = Batch(*map(np.concatenate, zip(*(share[step] for share in shares), strict=True)))
        assert equal(together, batch)


def test_rows_are_a_grain_source(cache) -> None:
    rows = PackedRows(cache, seq=SEQ, seed=SEED)
    far = 10 * rows.rows_per_epoch + 3
    first = grain.MapDataset.source(rows)[far : far + 4].batch(2)[0]
    assert first["tokens"].tolist() == [rows[far]["tokens"].tolist(), rows[far + 1]["tokens"].tolist()]
    assert "rows an epoch" in repr(rows)


def test_closing_early_and_twice_is_fine(cache) -> None:
    found = train_batches(cache, batch=BATCH, seq=SEQ, seed=SEED, stop_step=10**9)
    next(found)
    found.close()
    found.close()


def test_corpus_smaller_than_a_batch_is_refused_with_numbers(cache) -> None:
    pairs = cache.total_tokens - len(cache)
    words = rf"13 documents hold {pairs} \(token, target\) pairs, less than one batch of 600 rows of 17 .*--batch.*--seq"
    with pytest.raises(ValueError, match=words):
        train_batches(cache, batch=600, seq=SEQ, seed=SEED, stop_step=1)
    with pytest.raises(ValueError, match="less than one batch"):
        batch_at(cache, 0, batch=600, seq=SEQ, seed=SEED)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start_step": 4}, "start_step 4 and stop_step 3"),
        ({"start_step": -1}, "start_step -1 and stop_step 3"),
        ({"process_count": 4}, "process_count 4, batch 6"),
        ({"process_index": 2, "process_count": 2}, "process_index 2"),
        ({"packing": "tight"}, "packing must be one of concat, best_fit, pad, got 'tight'"),
        ({"seq": 0}, "seq must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(cache, options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        batches(cache, **{"stop_step": 3} | options)


@pytest.mark.parametrize("stride", [17, 6])
def test_evaluation_scores_each_pair_once_and_knows_its_document(cache, stride: int) -> None:
    found = evaluation_batches(cache, batch=4, seq=SEQ, stride=stride)
    scored = np.zeros(len(cache))
    seen: Counter = Counter()
    for batch, documents in found:
        assert all(field.shape == (4, SEQ) for field in (*batch, documents))
        assert ((documents == -1) == (batch.segments == 0)).all()
        real = batch.loss_weights > 0
        seen.update(zip(batch.tokens[real].tolist(), batch.targets[real].tolist(), strict=True))
        np.add.at(scored, documents[real], 1)
    assert seen == pairs_of(cache)
    assert scored.tolist() == found.scored_pairs.tolist() == (cache.lengths - 1).tolist()
    assert found.describe()["pairs_left_out"] == found.describe()["rows_left_out"] == 0


def test_evaluation_of_some_rows_counts_what_it_leaves_out(cache) -> None:
    every, some = (evaluation_batches(cache, batch=4, seq=SEQ, stride=9, max_rows=n) for n in (None, 5))
    assert (len(some), len(list(some))) == (2, 2)
    assert len(every) == -(-every.plan.rows // 4)
    assert (some[1][0].segments[1:] == 0).all()  # one row of five, three of padding
    counted = sum(int(batch.loss_weights.sum()) for batch, _ in some)
    assert counted == some.scored_pairs.sum() == every.scored_pairs.sum() - some.describe()["pairs_left_out"]
    assert some.describe()["rows_left_out"] == every.plan.rows - 5
    with pytest.raises(IndexError):
        some[2]
    with pytest.raises(ValueError, match="max_rows must be at least 1"):
        evaluation_batches(cache, batch=4, seq=SEQ, stride=9, max_rows=0)
