"""Facts about `data.packing`."""

import doctest
import time
from collections import Counter

import numpy as np
import pytest

import data.packing
from data.packing import PACKINGS, Plan, build_row, describe, plan_best_fit, plan_concat, plan_pad, plan_windows, row_documents

LENGTHS = [23, 2, 8, 3, 51, 15, 1, 9, 2]  # tokens; the document of one token has no pair
PAIRS = {(d, start) for d, n in enumerate(LENGTHS) for start in range(n - 1)}
PAD = -7


class Numbered:
    """Documents whose token t of document d is 100 d + t, so every token says where it is from."""

    pad_id = PAD

    def piece(self, i: int, start: int, length: int) -> np.ndarray:
        assert start + length <= LENGTHS[i]
        return 100 * i + np.arange(start, start + length, dtype=np.int32)

    def weights(self, i: int, start: int, length: int) -> np.ndarray:
        return np.ones(length, np.float32)


def pairs_with_loss(plan: Plan) -> Counter:
    """(document, first token) of every pair that carries loss, read back from the rows, targets checked."""
    seen: Counter = Counter()
    for row in range(plan.rows):
        built = build_row(plan, row, Numbered())
        counted = built["loss_weights"] > 0
        tokens, targets = built["tokens"][counted], built["targets"][counted]
        assert (targets == tokens + 1).all()
        assert (row_documents(plan, row)[counted] == tokens // 100).all()
        seen.update((int(t) // 100, int(t) % 100) for t in tokens)
    return seen


def test_the_example_in_the_docstring() -> None:
    result = doctest.testmod(data.packing)
    assert result.attempted > 5
    assert result.failed == 0


@pytest.mark.parametrize("seq", [1, 2, 7, 22, 64, 200])
def test_concat_places_every_pair_once_with_its_target(seq: int) -> None:
    order = [4, 0, 8, 6, 2, 1, 7, 5, 3]
    assert pairs_with_loss(plan_concat(LENGTHS, seq, order)) == Counter(PAIRS)


@pytest.mark.parametrize("seq", [2, 7, 22])
def test_concat_fills_every_row_but_the_last(seq: int) -> None:
    plan = plan_concat(LENGTHS, seq, range(len(LENGTHS)))
    filled = np.add.reduceat(plan.length, plan.row_start[:-1])
    assert (filled[:-1] == seq).all()
    assert filled[-1] == (len(PAIRS) - 1) % seq + 1
    assert describe(plan)["padding"] == seq - filled[-1]


def test_concat_keeps_the_order_given() -> None:
    order = [5, 3, 0, 8, 7, 4, 2, 1]
    plan = plan_concat(LENGTHS, 7, order)
    seen = [d for d, before in zip(plan.document, [-1, *plan.document[:-1]], strict=True) if d != before]
    assert seen == order


ROWS = [plan(LENGTHS, 7, [3, 4, 0, 1, 2]) for plan in PACKINGS.values()] + [plan_windows(LENGTHS, 7, 3)]


@pytest.mark.parametrize("plan", ROWS, ids=[*PACKINGS, "windows"])
def test_rows_are_well_formed(plan: Plan) -> None:
    for row in range(plan.rows):
        built = build_row(plan, row, Numbered())
        assert {name: a.dtype for name, a in built.items()} == dict.fromkeys(["tokens", "targets", "positions", "segments"], np.int32) | {
            "loss_weights": np.float32
        }
        assert all(a.shape == (7,) for a in built.values())
        segments, positions = built["segments"], built["positions"]
        filled = segments > 0
        assert (np.diff(segments[filled]) >= 0).all()
        assert set(segments[filled]) == set(range(1, segments.max() + 1))
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            assert positions[inside].tolist() == list(range(inside.sum()))
            assert (np.diff(built["tokens"][inside]) == 1).all()  # one stretch of one document
        assert not filled[filled.sum() :].any()  # padding is at the end only
        assert (built["tokens"][~filled] == PAD).all()
        assert (built["targets"][~filled] == PAD).all()
        assert (positions[~filled] == 0).all()
        assert (built["loss_weights"][~filled] == 0).all()
        assert ((row_documents(plan, row) >= 0) == filled).all()


@pytest.mark.parametrize(("seq", "stride"), [(1, 1), (7, 7), (7, 3), (7, 1), (22, 5), (22, 21), (60, 30)])
def test_windows_count_each_pair_once(seq: int, stride: int) -> None:
    assert pairs_with_loss(plan_windows(LENGTHS, seq, stride)) == Counter(PAIRS)


@pytest.mark.parametrize(("seq", "stride"), [(7, 3), (22, 5)])
def test_windows_give_each_counted_pair_its_context(seq: int, stride: int) -> None:
    plan = plan_windows(LENGTHS, seq, stride)
    for row in range(plan.rows):
        built = build_row(plan, row, Numbered())
        counted = built["loss_weights"] > 0
        in_document = built["tokens"][counted] % 100
        assert (built["positions"][counted] >= np.minimum(in_document, seq - stride)).all()


def test_windows_that_fit_share_a_row_and_rows_follow_the_documents() -> None:
    plan = plan_windows([4, 8, 5, 4, 2], 7, 7)  # 3, 7, 4, 3 and 1 pairs
    rows = [plan.document[a:b].tolist() for a, b in zip(plan.row_start[:-1], plan.row_start[1:], strict=True)]
    assert rows == [[0, 2], [1], [3, 4]]
    assert describe(plan)["padding"] == 3


@pytest.mark.parametrize("packing", ["best_fit", "pad"])
@pytest.mark.parametrize("seq", [1, 2, 7, 22, 64, 200])
def test_whole_documents_place_every_pair_once_and_cut_only_the_long(packing, seq: int) -> None:
    plan = PACKINGS[packing](LENGTHS, seq, [4, 0, 8, 6, 2, 1, 7, 5, 3])
    assert pairs_with_loss(plan) == Counter(PAIRS)
    pieces = Counter(plan.document.tolist())
    assert pieces == {d: -(-(n - 1) // seq) for d, n in enumerate(LENGTHS) if n > 1}
    assert describe(plan)["documents_cut"] == sum(n - 1 > seq for n in LENGTHS)
    assert (plan.length[plan.start + plan.length < np.take(LENGTHS, plan.document) - 1] == seq).all()  # short pieces end documents


def sequential_best_fit(pieces: list[int], seq: int) -> int:
    """Rows of best-fit decreasing, as a book writes it: one piece at a time."""
    room: list[int] = []
    for need in sorted(pieces, reverse=True):
        fitting = [i for i, free in enumerate(room) if free >= need]
        if fitting:
            room[min(fitting, key=room.__getitem__)] -= need
        else:
            room.append(seq - need)
    return len(room)


@pytest.mark.parametrize(("seq", "longest"), [(5, 6), (31, 40), (64, 20), (100, 101), (257, 90)])
def test_best_fit_makes_the_rows_of_the_sequential_algorithm_in_any_order(seq: int, longest: int) -> None:
    rng = np.random.default_rng(seq)
    lengths = rng.integers(1, longest + 1, 400)
    expected = None
    for _ in range(3):
        plan = plan_best_fit(lengths, seq, rng.permutation(400))
        expected = expected or sequential_best_fit(plan.length.tolist(), seq)
        assert plan.rows == expected
        filled = np.add.reduceat(plan.length, plan.row_start[:-1])
        assert (filled <= seq).all()
        assert (filled > 0).all()


def test_best_fit_shares_rows_otherwise_in_another_order() -> None:
    lengths = np.full(40, 4)
    rows = [plan_best_fit(lengths, 7, order).document.reshape(-1, 2).tolist() for order in (np.arange(40), np.arange(40)[::-1])]
    assert rows[0][0] == [0, 1]
    assert rows[1][0] == [39, 38]


def test_pad_gives_every_piece_its_own_row() -> None:
    plan = plan_pad([5, 4, 12], 5, [1, 2, 0])
    assert plan.row_start.tolist() == [0, 1, 2, 3, 4, 5]
    assert plan.document.tolist() == [1, 2, 2, 2, 0]
    assert plan.length.tolist() == [3, 5, 5, 1, 4]
    assert describe(plan)["padding"] == 25 - 18


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_million_documents_are_planned_in_a_few_seconds(packing) -> None:
    lengths = np.random.default_rng(0).integers(2, 700, 1_000_000)
    began = time.process_time()
    plan = PACKINGS[packing](lengths, 512, np.arange(len(lengths))[::-1])
    assert time.process_time() - began < 5  # seconds of CPU; about one on an idle core
    assert plan.length.sum() == (lengths - 1).sum()
    assert describe(plan)["fill_fraction"] > (0.5 if packing == "pad" else 0.99)


def test_describe_counts() -> None:
    assert describe(plan_concat([5, 4, 3], 5, [1, 0, 2])) == {
        "documents": 3,
        "documents_cut": 1,
        "pieces": 4,
        "pairs": 9,
        "context_pairs": 0,
        "rows": 2,
        "padding": 1,
        "fill_fraction": 0.9,
    }
    assert all(describe(plan([], 5, []))["rows"] == 0 for plan in PACKINGS.values())
    assert describe(plan_windows([], 5, 2))["rows"] == 0


def test_errors_in_words() -> None:
    with pytest.raises(ValueError, match="seq must be at least 1, got 0"):
        plan_concat(LENGTHS, 0, [0])
    with pytest.raises(ValueError, match="seq must be at least 1, got -3"):
        plan_best_fit(LENGTHS, -3, [0])
    with pytest.raises(ValueError, match="stride must be at least 1, got -2"):
        plan_windows(LENGTHS, 7, -2)
    with pytest.raises(ValueError, match=r"stride \(8\) must be at most seq \(7\)"):
        plan_windows(LENGTHS, 7, 8)
