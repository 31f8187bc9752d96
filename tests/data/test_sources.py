"""Facts about `data.sources` and `data.documents`."""

import gzip
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grain
import pytest

from data.documents import Source, is_held_out
from data.sources import folder, jsonl, open_source, stdlib, text_file


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def all_of(part: grain.MapDataset) -> dict[str, str]:
    return {part[i]["name"]: part[i]["text"] for i in range(len(part))}


def check_counts(source: Source) -> None:
    train, held_out, record = all_of(source.train), all_of(source.held_out), source.record
    assert not set(train) & set(held_out)
    for name, part in (("train", train), ("held_out", held_out)):
        assert record[f"{name}_documents"] == len(part)
        assert record[f"{name}_bytes"] == sum(len(text.encode()) for text in part.values())
    assert record["bytes"] == record["train_bytes"] + record["held_out_bytes"]
    json.dumps(record)


@pytest.fixture(scope="module")
def library() -> Source:
    return stdlib()


def test_stdlib_is_this_pythons_own_source(library: Source) -> None:
    check_counts(library)
    texts = all_of(library.train) | all_of(library.held_out)
    assert texts["heapq.py"] == Path(sys.modules["heapq"].__file__ or "").read_bytes().decode()
    assert library.record["python"].split()[1] == ".".join(map(str, sys.version_info[:3]))
    assert library.record["documents"] == len(texts) > 500
    assert not any({"test", "tests", "site-packages", "lib2to3"} & set(name.split("/")[:-1]) for name in texts)
    assert not any(os.sep + "home" in str(value) or sys.prefix in str(value) for value in library.record.values())


def test_stdlib_holds_out_by_the_hash_of_the_path(library: Source) -> None:
    for part, held_out in ((library.train, False), (library.held_out, True)):
        for name in all_of(part):
            assert (int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0) is held_out


def test_stdlib_twice_is_the_same(library: Source) -> None:
    again = open_source("stdlib")
    assert again.record == library.record
    assert list(all_of(again.train)) == sorted(all_of(library.train))


def test_digest_is_over_names_and_bytes_in_order(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": "two"}, {"text": "three"}]
    one = jsonl(write_jsonl(tmp_path / "a.jsonl", rows)).record["sha256"]
    (tmp_path / "elsewhere").mkdir()
    assert jsonl(write_jsonl(tmp_path / "elsewhere" / "a.jsonl", rows)).record["sha256"] == one
    assert jsonl(write_jsonl(tmp_path / "b.jsonl", rows)).record["sha256"] != one
    assert jsonl(write_jsonl(tmp_path / "a.jsonl", rows[::-1])).record["sha256"] != one


def test_folder_takes_text_and_counts_what_it_leaves_out(tmp_path: Path) -> None:
    files = ["b.py", "a/deep/x.md", "a/y.TXT", ".git/config.txt", ".hidden.py", "picture.png", "more.png", "Makefile"]
    for i, name in enumerate([*files, "void.txt", "blank.txt"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"line\r\n" * i)
    (tmp_path / "void.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "b.py").write_text("pass\n")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    source = open_source(str(tmp_path))
    check_counts(source)
    texts = all_of(source.train) | all_of(source.held_out)
    assert sorted(texts) == ["a/deep/x.md", "a/y.TXT", "b.py"]
    assert texts["a/y.TXT"] == "line\r\nline\r\n"  # bytes as they are
    assert source.record["left_out"] == {"hidden": 2, "linked folders": 1, "*.png": 2, "*": 1}
    assert source.record["empty_documents"] == 2


def test_adding_a_file_moves_no_other_to_the_other_side(tmp_path: Path) -> None:
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    before = set(all_of(folder(tmp_path).held_out))
    (tmp_path / "extra.txt").write_text("more")
    after = folder(tmp_path)
    assert before == {name for name in all_of(after.held_out) if name != "extra.txt"} == set(filter(is_held_out, before))
    assert after.record["held_out_rule"] == "sha256(name) % 20 == 0"


def test_few_documents_hold_out_the_last(tmp_path: Path) -> None:
    source = jsonl(write_jsonl(tmp_path / "few.jsonl", [{"text": f"document {i}"} for i in range(3)]))
    check_counts(source)
    assert not any(is_held_out(f"few.jsonl:{i}") for i in (1, 2, 3))
    assert all_of(source.held_out) == {"few.jsonl:3": "document 2"}
    assert source.record["held_out_rule"].startswith("the last 1 of 3 documents")


@pytest.mark.parametrize(
    ("text", "tail"),
    [
        ("a line of text\n" * 40, "a line of text\n" * 2),  # 95 % is where a line begins
        ("x" * 200, "x" * 10),
        ("漢" * 100, "漢" * 5),
        ("é" * 71 + "\n", "é" * 3 + "\n"),  # its only line break is the last byte
    ],
)
def test_single_document_gives_its_tail_and_loses_nothing(tmp_path: Path, text: str, tail: str) -> None:
    (tmp_path / "book.txt").write_text(text)
    source = open_source(str(tmp_path / "book.txt"))
    check_counts(source)
    assert source.train[0]["text"] + source.held_out[0]["text"] == text
    assert source.held_out[0] == {"text": tail, "name": "book.txt#tail"}
    assert source.record["held_out_rule"] == "the last 5 % of the only document"


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_jsonl_reads_text_and_names_by_line(tmp_path: Path, suffix: str) -> None:
    lines = b'{"text": "first", "id": 7}\n\n{"text": "line\\u2028sep \\ud83d\\ude00"}\n{"text": ""}\n{"id": 1, "text": "last"}'
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(lines) if suffix.endswith("gz") else lines)
    source = open_source(str(path))
    texts = all_of(source.train) | all_of(source.held_out)
    assert texts == {f"rows{suffix}:1": "first", f"rows{suffix}:3": "line\u2028sep 😀", f"rows{suffix}:5": "last"}
    assert (source.record["blank_lines"], source.record["empty_documents"]) == (1, 1)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"content": "x", "id": 1}', r"line 2 of '.*rows.jsonl' has the keys \['content', 'id'\]: expected"),
        (b'{"text": 5}', r"line 2 of .* has `text` of type int"),
        (b'{"text": null}', r"line 2 of .* has `text` of type NoneType"),
        (b'["text"]', r"line 2 of .* has a list"),
        (b"9" * 5000, r"line 2 of .* is not JSON: Exceeds the limit .*one object a line with a `text` field"),
        (b"[" * 100_000, r"line 2 of .* is not JSON: .*one object a line with a `text` field"),
        (b"\0\0\0", r"line 2 of .* is not JSON"),
        (b"{'text': 1}", r"line 2 of .* is not JSON: .*one object a line with a `text` field"),
        (b'{"text": "\xff"}', r"line 2 of .* is not UTF-8: byte 0xff at offset 10"),
        (b'{"text": "ab\\ud800"}', r"`text` in line 2 of .* is not UTF-8: byte 0xed at offset 2"),
    ],
)
def test_bad_jsonl_line_is_named(tmp_path: Path, line: bytes, words: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=words):
        open_source(str(tmp_path / "rows.jsonl"))


def test_a_byte_order_mark_before_json_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two\\r\\n"}\r\n')
    source = open_source(str(tmp_path / "rows.jsonl"))
    assert all_of(source.train) | all_of(source.held_out) == {"rows.jsonl:1": "one", "rows.jsonl:2": "two\r\n"}
    assert source.record["bytes"] == len("onetwo\r\n")


def test_text_is_taken_with_its_byte_order_mark_and_line_ends(tmp_path: Path) -> None:
    text = "\ufeffone line\r\n" * 20
    (tmp_path / "a.txt").write_bytes(text.encode())
    source = open_source(str(tmp_path / "a.txt"))
    assert source.train[0]["text"] + source.held_out[0]["text"] == text


def test_nul_characters_are_taken_counted_and_said(tmp_path: Path, warnings: list[str]) -> None:
    (tmp_path / "a.txt").write_bytes("UTF-16 without a mark".encode("utf-16-le"))
    (tmp_path / "b.txt").write_text("ordinary text")
    source = open_source(str(tmp_path))
    assert source.record["documents_with_nul"] == 1
    assert any(message.startswith("1 of 2 documents of") and "NUL characters" in message for message in warnings)
    assert "\0" in (all_of(source.train) | all_of(source.held_out))["a.txt"]


def test_invalid_utf8_stops_is_replaced_or_is_skipped(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"good {i} \ufffd")  # a U+FFFD of its own is not counted
    (tmp_path / "bad.txt").write_bytes("né \ufffd".encode() + b"\xff\xfe end \xc3")
    with pytest.raises(ValueError, match=r"bad.txt' is not UTF-8: byte 0xff at offset 7 .*'replace' .*'skip'"):
        folder(tmp_path)
    replaced = folder(tmp_path, on_invalid_utf8="replace")
    assert (all_of(replaced.train) | all_of(replaced.held_out))["bad.txt"] == "né \ufffd\ufffd\ufffd end \ufffd"
    assert (replaced.record["invalid_documents_replaced"], replaced.record["characters_replaced"]) == (1, 3)
    skipped = folder(tmp_path, on_invalid_utf8="skip")
    assert (skipped.record["invalid_documents_skipped"], skipped.record["documents"]) == (1, 3)
    with pytest.raises(ValueError, match=r"no text in .*invalid_documents_skipped 1"):
        text_file(tmp_path / "bad.txt", on_invalid_utf8="skip")


def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    def refuses(spec: object, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            open_source(str(spec))

    (tmp_path / "empty").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"\x89PNG")
    (tmp_path / "void.txt").touch()
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "short.txt").write_text("one short line\n")
    (tmp_path / "model.bin").write_bytes(b"\x00")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "x" * 50}).encode())[:-9])
    (tmp_path / "fake.jsonl.gz").write_text('{"text": "not compressed"}')
    (tmp_path / "blank.jsonl").write_text("\n \n\n")
    (tmp_path / "void.jsonl.gz").write_bytes(gzip.compress(b""))
    os.mkfifo(tmp_path / "pipe.txt")
    refuses(tmp_path / "nope" / "x.txt", rf"does not exist; its nearest existing parent is '{tmp_path}'.*stdlib.*\.jsonl")
    refuses("s3://bucket/x", r"unknown scheme 's3:' .*Accepted: 'stdlib'")
    refuses("foo:bar", r"unknown scheme 'foo:' in 'foo:bar'. Accepted: 'stdlib'")
    refuses("", r"no source is named: expected one of 'stdlib'")
    refuses("~nobody-has-this-name/a.txt", r"'~nobody-has-this-name/a.txt' does not exist")
    refuses(f"{tmp_path}/short.txt,{tmp_path}/blank.txt:0.3", r"If a mixture is meant, each of its parts, .* needs a weight")
    refuses(f"{tmp_path}/short.txt:1", r"If a mixture is meant, each of its parts, two or more")
    refuses(f"{tmp_path}/short.txt#column=body", r"short.txt' has no columns, but .* names one: leave out #column=body")
    refuses(tmp_path / "pipe.txt", r"expected a regular file, but .* is a pipe or a device")
    refuses("/dev/null", r"expected a regular file, but '/dev/null' is a pipe or a device")
    refuses(tmp_path / "blank.jsonl", r"no text in .*\(blank_lines 3\): expected at least one document")
    refuses(tmp_path / "void.jsonl.gz", r"no text in .*\(it holds no documents\)")
    refuses(tmp_path / "model.bin", r"unknown suffix '.bin'. Accepted")
    refuses(tmp_path / "void.txt", r"is empty \(0 bytes\)")
    refuses(tmp_path / "blank.txt", r"no text in .*empty_documents 1")
    refuses(tmp_path / "empty", r"no text files in .*holds nothing at all")
    refuses(tmp_path / "pictures", r"no text files in .*holds 1 \*\.png. Taken are \.txt")
    refuses(tmp_path / "short.txt", r"one document of 15 bytes, too little .*at least 100 bytes")
    refuses(tmp_path / "cut.jsonl.gz", r"not a whole gzip file: .*gzip -t")
    refuses(tmp_path / "fake.jsonl.gz", r"not a whole gzip file")
    with pytest.raises(ValueError, match=r"expected a regular file, but .* is a folder"):
        text_file(tmp_path)
    with pytest.raises(ValueError, match=r"expected a folder, but .* is a file"):
        folder(tmp_path / "short.txt")


def test_a_pipe_in_a_folder_is_left_out_and_counted(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "nowhere.txt").symlink_to("missing.txt")
    (tmp_path / "a.txt").write_text("a line of text\n" * 20)
    assert folder(tmp_path).record["left_out"] == {"not a regular file": 2}


@contextmanager
def without_roots_rights() -> Iterator[None]:
    """Permissions do not apply to root, as whom containers often run tests."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.mark.parametrize("what", ["file", "file in a folder", "folder"])
def test_what_may_not_be_read_is_named(what: str) -> None:
    with tempfile.TemporaryDirectory() as name:  # not in tmp_path, whose parents are closed to others
        Path(name).chmod(0o755)
        file = Path(name) / "texts" / "a.txt"
        file.parent.mkdir(mode=0o755)
        file.write_text("a line of text\n" * 20)
        closed = file.parent if what == "folder" else file
        closed.chmod(0)
        with without_roots_rights(), pytest.raises(ValueError, match=rf"no permission to read '{closed}': change it"):
            open_source(str(file if what == "file" else file.parent))
        closed.chmod(0o755)


def test_file_names_that_are_not_utf8_still_make_records(tmp_path: Path) -> None:
    for name in (b"caf\xe9.txt", b"plain.txt"):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_text(f"text of {name!r}")
    source = folder(tmp_path)
    check_counts(source)
    assert sorted(all_of(source.train) | all_of(source.held_out)) == ["caf\\xe9.txt", "plain.txt"]
