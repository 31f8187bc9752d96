"""Facts about `data.streams`."""

import gzip
import json
from pathlib import Path

import grain
import numpy as np
import pytest

from data.packing import build_row, plan_concat
from data.pipeline import Batch
from data.streams import LineStream, StreamBatch, StreamBatches, _shaped_like

TEXTS = [f"{i}: " + "the cat sat on the mat, 漢 " * (i * i % 7) for i in range(12)] + ["", "x", " \n", "the end"]
SEQ, ROWS = 17, 3


class Written:
    """The documents as a cache has them, for comparison."""

    def __init__(self, tokenizer) -> None:
        self.pad_id = tokenizer.pad_id
        self.documents = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in TEXTS if text.strip()]

    def piece(self, i: int, start: int, length: int) -> np.ndarray:
        return np.array(self.documents[i][start : start + length])

    def weights(self, i: int, start: int, length: int) -> np.ndarray:
        return np.ones(length, np.float32)


@pytest.fixture(params=["grain", ".jsonl", ".jsonl.gz"])
def stream(request, tmp_path) -> grain.IterDataset:
    if request.param == "grain":
        return grain.MapDataset.source([{"text": text, "name": str(i)} for i, text in enumerate(TEXTS)]).to_iter_dataset()
    raw = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).replace("\n", "\n\n", 3).encode()
    path = tmp_path / f"rows{request.param}"
    path.write_bytes(gzip.compress(raw) if request.param.endswith("gz") else raw)
    return LineStream(path)


def all_of(stream, tokenizer, **options) -> list[StreamBatch]:
    batches = StreamBatches(stream, tokenizer, **{"batch": ROWS, "seq": SEQ} | options)
    found = list(batches)
    batches.close()
    return found


def equal(a: Batch, b: Batch) -> bool:
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("seq", [1, 2, 17, 40, 500])
def test_rows_are_those_of_the_plan(stream, tokenizer, seq: int) -> None:
    written = Written(tokenizer)
    plan = plan_concat([len(d) for d in written.documents], seq, range(len(written.documents)))
    found = all_of(stream, tokenizer, seq=seq)
    rows = [{name: field[r] for name, field in zip(Batch._fields, b.batch, strict=True)} for b in found for r in range(ROWS)]
    assert len(rows) == -(-plan.rows // ROWS) * ROWS
    for r in range(plan.rows):
        assert all(np.array_equal(rows[r][name], value) for name, value in build_row(plan, r, written).items())
    assert not any(row["segments"].any() for row in rows[plan.rows :])
    counts = found[-1].cursor["counts"]
    assert counts["documents"] == len(written.documents)
    assert counts["documents_cut"] == int((np.unique(plan.document, return_counts=True)[1] > 1).sum())
    assert counts["pairs"] == int(plan.length.sum())
    assert counts["rows"] == plan.rows
    assert counts["pairs"] + counts["padding"] == len(rows) * seq


@pytest.mark.parametrize("seq", [1, 17, 40])
def test_resumed_at_every_step_through_json_is_the_same(stream, tokenizer, seq: int) -> None:
    whole = all_of(stream, tokenizer, seq=seq)
    for done in range(0, len(whole), 1 if len(whole) < 40 else 11):
        cursor = json.loads(json.dumps(whole[done].cursor))
        rest = all_of(stream, tokenizer, seq=seq, cursor=cursor)
        assert len(rest) == len(whole) - done - 1
        for a, b in zip(rest, whole[done + 1 :], strict=True):
            assert equal(a.batch, b.batch)
            assert a.cursor == b.cursor


def test_cursor_is_exact_where_documents_end_on_rows(tokenizer) -> None:
    """The case in which Grain's own packer goes wrong: nothing of a document is left over."""
    text = "xyz"
    pairs = len(tokenizer.encode(text)) + 1
    rows = [{"text": text, "name": str(i)} for i in range(9)]
    stream = grain.MapDataset.source(rows).to_iter_dataset()
    whole = all_of(stream, tokenizer, batch=2, seq=pairs)
    for done, step in enumerate(whole):
        rest = all_of(stream, tokenizer, batch=2, seq=pairs, cursor=json.loads(json.dumps(step.cursor)))
        assert len(rest) == len(whole) - done - 1
        assert all(equal(a.batch, b.batch) for a, b in zip(rest, whole[done + 1 :], strict=True))


def test_a_shuffled_and_mixed_grain_stream_resumes_too(tokenizer) -> None:
    def part(letter: str) -> grain.IterDataset:
        rows = [{"text": f"{letter} {text}", "name": ""} for text in TEXTS]
        return grain.MapDataset.source(rows).shuffle(seed=3).repeat(3).to_iter_dataset()

    stream = grain.IterDataset.mix({"a": part("a"), "b": part("b")}, {"a": 0.75, "b": 0.25})
    whole = all_of(stream, tokenizer)
    for done in range(0, len(whole), 5):
        rest = all_of(stream, tokenizer, cursor=json.loads(json.dumps(whole[done].cursor)))
        assert len(rest) == len(whole) - done - 1
        assert all(equal(a.batch, b.batch) for a, b in zip(rest, whole[done + 1 :], strict=True))


def test_shares_of_all_processes_make_the_same_global_batch(stream, tokenizer) -> None:
    whole = all_of(stream, tokenizer)
    shares = [all_of(stream, tokenizer, process_index=i, process_count=3) for i in range(3)]
    for step, (batch, cursor) in enumerate(whole):
        assert equal(Batch(*map(np.concatenate, zip(*(share[step].batch for share in shares), strict=True))), batch)
        assert all(share[step].cursor == cursor for share in shares)


def test_states_from_json_get_their_tuples_back() -> None:
    state = {"a": (-1, -1), "b": [1, {"c": (2, (3,))}], "d": 5}
    assert _shaped_like(state, json.loads(json.dumps(state))) == state


def test_errors_in_words(tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a file ending in one of \.jsonl.*got 'x.txt'"):
        LineStream("x.txt")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "the cat sat " * 9}) + "\n" for _ in range(9)))
    stream = LineStream(path)
    with pytest.raises(ValueError, match="process_count 2, batch 3"):
        all_of(stream, tokenizer, process_count=2)
    with pytest.raises(ValueError, match=r"expected a cursor of StreamBatches .* got the keys \['step'\]"):
        all_of(stream, tokenizer, cursor={"step": 3})
    last = all_of(stream, tokenizer)[-2].cursor
    path.write_text('{"text": "the only one left"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl' has 1 lines where \d were read before: it has changed"):
        all_of(stream, tokenizer, cursor=last)
    path.write_text('{"text": "fine"}\n{"content": "x"}\n')
    with pytest.raises(ValueError, match=r"line 2 of .* has the keys \['content'\]"):
        all_of(stream, tokenizer)
