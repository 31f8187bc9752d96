"""Facts about `data.mixture` and `data.rows`."""

from fractions import Fraction

import grain
import numpy as np
import pytest

from data.cache import TokenCache
from data.mixture import parse_mixture
from data.packing import PACKINGS
from data.pipeline import batch_at, train_batches
from data.rows import MixedRows, Mixture, PackedRows, training_rows
from data.sources import open_source

SEQ, SEED = 17, 5


@pytest.fixture(scope="module")
def caches(tokenizer, tmp_path_factory) -> list[TokenCache]:
    """Three sources of different sizes; the first letter of a document says which."""
    folder = tmp_path_factory.mktemp("caches")
    found = []
    for letter, documents in (("a", 40), ("b", 9), ("c", 3)):
        rows = [{"text": f"{letter} " + "the cat sat " * (1 + i % 5), "name": f"{letter}{i}"} for i in range(documents)]
        found.append(TokenCache.build_or_open(grain.MapDataset.source(rows), tokenizer, folder, source_digest=letter, split="train"))
    return found


def mixture(caches, weights=(0.6, 0.3, 0.1), on_end="repeat") -> Mixture:
    return Mixture(("a", "b", "c")[: len(weights)], tuple(caches[: len(weights)]), weights, on_end)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("A:0.7,B:0.3", [("A", 0.7), ("B", 0.3)]),
        ("stdlib:1, my/books:2e0", [("stdlib", 1.0), ("my/books", 2.0)]),
        ("hf://owner/name/train:0.5,C:/x.txt:.5", [("hf://owner/name/train", 0.5), ("C:/x.txt", 0.5)]),
        ("rows.jsonl:9:0.5,one, two.txt:3", [("rows.jsonl:9", 0.5), ("one, two.txt", 3.0)]),
    ],
)
def test_a_mixture_is_told_by_its_weights(spec: str, parts: list) -> None:
    assert parse_mixture(spec) == parts


@pytest.mark.parametrize("spec", ["stdlib", "a.txt", "hf://owner/name/train", "one, two.txt", "x:5"])
def test_a_single_source_is_none(spec: str) -> None:
    assert parse_mixture(spec) is None


def test_a_file_with_such_a_name_is_that_file(tmp_path) -> None:
    path = tmp_path / "a:1,b:2.txt"
    path.write_text("a line of text\n" * 40)
    assert open_source(str(path)).record["kind"] == "text_file"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("A:0.7,B", "part 'B' of 'A:0.7,B' has no weight: expected SOURCE:WEIGHT"),
        ("A:0,B:1", "weight of 'A' must be above 0 and finite, got 0"),
        ("A:1,B:-0.5", "weight of 'B' must be above 0 and finite, got -0.5"),
        ("A:nan,B:1", "weight of 'A' must be above 0 and finite, got nan"),
        ("A:1,B:NaN", "weight of 'B' must be above 0 and finite, got NaN"),
        ("A:inf,B:1", "weight of 'A' must be above 0 and finite, got inf"),
        ("A:1,B:1e999", "weight of 'B' must be above 0 and finite, got 1e999"),
        ("A,B:0.3", "If a mixture is meant, each of its parts, two or more, needs a weight"),
        ("A:1,A:2", "'A' stands in the mixture twice"),
        ("stdlib:1,nowhere.txt:2", "'nowhere.txt' does not exist"),
        ("stdlib:1,s3://bucket/x:2", "unknown scheme 's3:' in 's3://bucket/x'"),
    ],
)
def test_bad_mixtures_are_refused(spec: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        open_source(spec)


def test_one_text_under_two_names_is_refused(tmp_path) -> None:
    (tmp_path / "one.txt").write_text("a line of text\n" * 40)
    with pytest.raises(ValueError, match=r"one.txt' and '.*/../.*one.txt' are the same text: name it once"):
        open_source(f"{tmp_path}/one.txt:1,{tmp_path}/../{tmp_path.name}/one.txt:1")


def test_a_mixture_counts_what_its_parts_left_out(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n{"text": "n\xe9"}\n{"text": ""}\n')
    for name in ("one.txt", "two.txt", "three.png"):
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / name).write_text(f"{name} line of text\n")
    (tmp_path / "b" / "empty.txt").touch()
    source = open_source(f"{tmp_path}/a.jsonl:1,{tmp_path}/b:1", on_invalid_utf8="replace")
    expected = {"documents": 4, "blank_lines": 1, "empty_documents": 2, "characters_replaced": 1, "left_out": {"*.png": 1}}
    assert expected.items() <= source.record.items()
    own = {"kind", "on_invalid_utf8"}  # of each part, and there to be read
    assert set(open_source(f"{tmp_path}/a.jsonl", on_invalid_utf8="replace").record) - own <= set(source.record)


def test_the_source_of_a_mixture_has_the_documents_of_its_parts(tmp_path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"{name} line of text\n" * 40)
    source = open_source(f"{tmp_path}/one.txt:3,{tmp_path}/two.txt:1")
    assert [part.weight for part in source.parts] == [3, 1]
    assert [source.train[i]["name"] for i in range(len(source.train))] == ["one.txt", "two.txt"]
    assert [source.held_out[i]["name"] for i in range(len(source.held_out))] == ["one.txt#tail", "two.txt#tail"]
    assert [part["weight"] for part in source.record["parts"]] == [0.75, 0.25]
    assert source.record["train_bytes"] == sum(part.source.record["train_bytes"] for part in source.parts)
    other = open_source(f"{tmp_path}/one.txt:1,{tmp_path}/two.txt:1")
    assert other.record["sha256"] == source.record["sha256"]  # the weights are not the text


@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.6, 0.3, 0.1), (1.0, 1.0, 1.0), (1e-3, 1.0)])
def test_every_row_is_the_next_one_of_its_part_and_shares_hold_at_all_times(caches, weights) -> None:
    rows = training_rows(mixture(caches, weights), seq=SEQ, seed=SEED)
    assert isinstance(rows, MixedRows)
    seen = [0] * len(weights)
    for g in range(300):
        part, within = rows.locate(g)
        assert within == seen[part]
        seen[part] += 1
        assert all(abs(n - (g + 1) * share) < len(weights) for n, share in zip(seen, rows.row_shares, strict=True))
    far = 10**15
    assert sum(rows.dealt(far)) == far
    assert all(abs(n - far * share) < len(weights) for n, share in zip(rows.dealt(far), rows.row_shares, strict=True))
    assert sum(rows.row_shares) == Fraction(1)


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_share_in_tokens_follows_the_weights_with_any_padding(caches, packing) -> None:
    rows = training_rows(mixture(caches), seq=SEQ, seed=SEED, packing=packing)
    n = 600
    realised = rows.realised(n)
    counted = dict.fromkeys(realised, 0)
    for g in range(n):
        counted["abc"[rows.locate(g)[0]]] += int(rows[g]["loss_weights"].sum())
    assert counted == {name: part["tokens"] for name, part in realised.items()}
    assert rows.pairs_in(n) == sum(counted.values())
    assert [part["token_share"] for part in realised.values()] == pytest.approx([0.6, 0.3, 0.1], abs=0.01)
    assert sum(part["rows"] for part in realised.values()) == n
    assert realised["c"]["epochs"] > 1 > realised["c"]["weight"]  # a small part repeats, and that is said


@pytest.mark.parametrize("packing", PACKINGS)
def test_batches_of_a_mixture_depend_on_the_step_alone(caches, packing) -> None:
    options = {"batch": 4, "seq": SEQ, "seed": SEED, "packing": packing}
    with train_batches(mixture(caches), stop_step=30, **options) as straight:
        whole = list(straight)
    for start in (0, 1, 13, 29):
        with train_batches(mixture(caches), start_step=start, stop_step=30, **options) as resumed:
            for a, b in zip(resumed, whole[start:], strict=True):
                assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    at = batch_at(mixture(caches), 13, **options)
    assert all(np.array_equal(x, y) for x, y in zip(at, whole[13], strict=True))


def test_a_part_that_may_not_repeat_ends_the_mixture(caches) -> None:
    rows = training_rows(mixture(caches, on_end="stop"), seq=SEQ, seed=SEED)
    assert isinstance(rows, MixedRows)
    most = rows.rows_before_an_end()
    seen = [rows.locate(g) for g in range(most + 1)]
    ends = [part.rows_per_epoch for part in rows.parts]
    assert all(within < ends[part] for part, within in seen[:-1])
    assert seen[-1][1] == ends[seen[-1][0]]
    options = {"batch": 2, "seq": SEQ, "seed": SEED}
    with train_batches(mixture(caches, on_end="stop"), stop_step=most // 2, **options) as batches:
        assert len(list(batches)) == most // 2
    with pytest.raises(ValueError, match=rf"'[abc]' ends early: its \d+ rows last for {most} rows .*on_end repeat"):
        train_batches(mixture(caches, on_end="stop"), stop_step=most // 2 + 1, **options)


def test_a_mixture_that_cannot_be_is_refused(caches) -> None:
    with pytest.raises(ValueError, match="weight of 'b' must be above 0, got 0"):
        mixture(caches, (1.0, 0.0))
    with pytest.raises(ValueError, match="on_end must be repeat or stop, got 'wait'"):
        mixture(caches, (1.0, 1.0), "wait")


def test_parts_of_one_source_are_dealt_differently(caches) -> None:
    rows = training_rows(Mixture(("x", "y"), (caches[0], caches[0]), (1.0, 1.0)), seq=SEQ, seed=SEED)
    assert isinstance(rows, MixedRows)
    assert rows.parts[0].epoch(0)[1].tolist() != rows.parts[1].epoch(0)[1].tolist()
    assert PackedRows(caches[0], seq=SEQ, seed=SEED).realised(7) == {}
