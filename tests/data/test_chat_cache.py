"""Conversations on disk: what is trained on is marked, what is too long is cut by rule and counted, rows keep conversations apart."""

import json

import grain
import numpy as np
import pytest

from data.chat import CHATML, ChatFormat
from data.chat_cache import chat_cache
from data.pipeline import batch_at
from data.rows import training_rows

SYSTEM = {"role": "system", "content": "ab"}


@pytest.fixture(scope="module")
def form(tokenizer) -> ChatFormat:
    return ChatFormat(tokenizer.changed(chat_template=CHATML))


def talk(*turns: tuple[str, str], system: bool = False):
    messages = [SYSTEM] if system else []
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return {"messages": messages}


def built(form: ChatFormat, rows, folder, **options):
    documents = grain.MapDataset.source([{"text": json.dumps(row), "name": f"row{i}"} for i, row in enumerate(rows)])
    settings = {"source_digest": "x", "split": "train", "seq": 400} | options
    return chat_cache(documents, form, folder, **settings)


def test_marks_are_kept_and_found_again(form, tmp_path) -> None:
    rows = [talk(("1", "one")), talk(("2", "two"), ("3", "three"))]
    cache = built(form, rows, tmp_path)
    from data.conversations import read_conversation

    for i, row in enumerate(rows):
        example = form.encode(read_conversation(row))[0]
        np.testing.assert_array_equal(cache.document(i), example.tokens)
        np.testing.assert_array_equal(cache.weights(i, 0, len(example.tokens) - 1), example.trained[1:])
        np.testing.assert_array_equal(cache.weights(i, 3, 5), example.trained[4:9])
    counts = cache.record["counts"]
    assert (counts["rows"], counts["examples"], counts["tokens"]) == (2, 2, cache.total_tokens)
    assert counts["trained_tokens"] == cache.trained.sum()
    again = built(form, rows, tmp_path)
    assert (again.folder, again.record["counts"]) == (cache.folder, counts)
    assert built(form, rows, tmp_path, seq=399).folder != cache.folder
    (cache.folder / "trained.bin").write_bytes(bytes(len(cache.tokens)))
    assert built(form, rows, tmp_path).trained.sum() == counts["trained_tokens"]  # damage is noticed, and mended


def test_what_is_too_long_is_dropped_cut_or_split_and_counted(form, tmp_path) -> None:
    rows = [talk(("1", "one")), talk(*[(f"{i}", "word") for i in range(5)], system=True)]
    lengths = built(form, rows, tmp_path).lengths
    seq = int(lengths[1]) // 2
    drop, truncate, split = (built(form, rows, tmp_path, seq=seq, overlong=how) for how in ("drop", "truncate", "split"))
    assert (drop.record["counts"]["dropped_overlong"], len(drop)) == (1, 1)
    assert truncate.record["counts"] | {"truncated": 1, "tokens_cut": int(lengths[1]) - seq - 1} == truncate.record["counts"]
    assert max(truncate.lengths) == seq + 1
    assert split.record["counts"] | {"split": 1, "truncated": 0, "tokens_cut": 0} == split.record["counts"]
    assert split.names[1:] == [f"row1#{i}" for i in range(len(split) - 1)]
    texts = [form.tokenizer.decode(split.document(i)) for i in range(1, len(split))]
    assert all(text.startswith("system\nab\nuser\n") for text in texts)
    assert "".join(texts).count("word") == 5
    assert split.trained.sum() == built(form, rows, tmp_path).trained.sum()  # nothing to learn is lost
    assert max(split.lengths) <= seq + 1


def test_a_row_of_which_nothing_is_left_to_learn_is_counted_or_an_error(form, tmp_path) -> None:
    rows = [talk(("1", "one")), talk(("a very long question, which has no end" * 4, "no"))]
    cache = built(form, rows, tmp_path, seq=60)
    assert cache.record["counts"] | {"dropped_nothing_trained": 1, "examples": 1} == cache.record["counts"]
    with pytest.raises(ValueError, match="none of the 1 rows of the split 'train' is left to learn from: dropped_nothing_trained 1"):
        built(form, rows[1:], tmp_path, seq=60, source_digest="y")
    assert all(cache.weights(i, 0, int(cache.lengths[i]) - 1).any() for i in range(len(cache)))


def test_bad_rows_stop_the_run_or_are_skipped_with_their_reason(form, tmp_path) -> None:
    rows = [talk(("1", "one")), {"messages": [{"role": "user", "content": "?"}]}]
    with pytest.raises(ValueError, match=r"row1: no assistant turn among .* Mend it, or leave such rows out \(on_bad_row skip\)"):
        built(form, rows, tmp_path)
    cache = built(form, rows, tmp_path, on_bad_row="skip")
    assert cache.record["counts"]["bad_rows_skipped"] == 1
    assert cache.record["bad_rows"][0].startswith("row1: no assistant turn")


@pytest.mark.parametrize("packing", ["best_fit", "pad"])
def test_rows_hold_whole_conversations_and_learn_the_answers_alone(form, tmp_path, packing: str) -> None:
    cache = built(form, [talk((f"{i}", "one two" * (i % 3))) for i in range(1, 12) if i % 3], tmp_path, seq=60)
    rows = training_rows(cache, seq=60, seed=0, packing=packing)
    whole = batch_at(cache, 0, batch=rows.rows_per_epoch, seq=60, seed=0, packing=packing)
    assert whole.loss_weights.sum() == cache.trained.sum()
    assert (whole.segments.max() > 1) == (packing == "best_fit")
    for tokens, targets, segments, positions, weights in zip(
        whole.tokens, whole.targets, whole.segments, whole.positions, whole.loss_weights, strict=True
    ):
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            assert positions[inside].tolist() == list(range(inside.sum()))
            text = form.tokenizer.decode(np.append(tokens[inside], targets[inside][-1]), skip_special_tokens=False)
            assert text.startswith("<|bos|><|im_start|>user\n")
            assert text.endswith("<|im_end|>\n")
            answer = form.tokenizer.decode(targets[inside & (weights > 0)], skip_special_tokens=False)
            assert answer.startswith("one two")
            assert answer.endswith("<|im_end|>")
        assert not weights[segments == 0].any()
