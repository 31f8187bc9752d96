"""Facts about `data.readers` and `data.store`."""

import gzip
import io
import json
import os
import resource
import sys
from pathlib import Path

import pytest

from data.documents import Source
from data.sources import open_source
from data.store import Place, TextStore

pa = pytest.importorskip("pyarrow", reason="needs the extra `data`")
zstandard = pytest.importorskip("zstandard", reason="needs the extra `data`")
import pyarrow.parquet as pq  # noqa: E402

TEXTS = [f"document {i}: " + "the cat 漢😀 " * (i % 9) for i in range(200)]


def all_of(source: Source) -> dict[str, str]:
    parts = (source.train, source.held_out)
    return {part[i]["name"]: part[i]["text"] for part in parts for i in range(len(part))}


def lines_of(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write_parquet(path: Path, texts: list, column: str = "text", **options) -> Path:
    pq.write_table(pa.table({"id": list(range(len(texts))), column: texts}), path, row_group_size=30, **options)
    return path


def write_array_record(path: Path, texts: list[bytes]) -> Path:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for text in texts:
        writer.write(text)
    writer.close()
    return path


def write(folder: Path, suffix: str) -> Path:
    path = folder / f"rows{suffix}"
    if suffix == ".parquet":
        return write_parquet(path, TEXTS)
    if suffix == ".array_record":
        return write_array_record(path, [text.encode() for text in TEXTS])
    packed = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.ZstdCompressor().compress}[suffix]
    path.write_bytes(packed(lines_of(TEXTS)))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".array_record"])
def test_every_format_gives_the_same_documents(tmp_path: Path, suffix: str) -> None:
    source = open_source(str(write(tmp_path, suffix)))
    assert all_of(source) == {f"rows{suffix}:{i}": text for i, text in enumerate(TEXTS, start=1)}
    assert source.record["documents"] == 200
    assert source.record["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert [source.held_out[i]["name"] for i in range(3)] == sorted(
        (d["name"] for d in source.held_out), key=lambda n: int(n.split(":")[1])
    )[:3]


def test_a_folder_takes_them_all(tmp_path: Path) -> None:
    for suffix in (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".array_record"):
        write(tmp_path, suffix)
    (tmp_path / "one.txt").write_text("a text of its own")
    source = open_source(str(tmp_path))
    assert source.record["documents"] == 5 * 200 + 1
    assert all_of(source)["rows.parquet:7"] == TEXTS[6]
    assert source.record["left_out"] == {}


def test_another_column_is_named_in_the_spec(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS, column="body")
    assert all_of(open_source(f"{path}#column=body"))["a.parquet:1"] == TEXTS[0]
    with pytest.raises(ValueError, match=r"a.parquet' has no column 'text': its columns are \['id', 'body'\].*#column=NAME"):
        open_source(str(path))
    with pytest.raises(ValueError, match=r"column 'id' of .* holds int64: expected strings"):
        open_source(f"{path}#column=id")
    rows = tmp_path / "b.jsonl"
    rows.write_text("".join(json.dumps({"content": text}) + "\n" for text in TEXTS))
    assert all_of(open_source(f"{rows}#column=content"))["b.jsonl:200"] == TEXTS[-1]
    with pytest.raises(ValueError, match=r"line 1 of .* has the keys \['content'\]: expected an object whose `text`"):
        open_source(str(rows))


def test_rows_without_a_text_are_counted(tmp_path: Path) -> None:
    source = open_source(str(write_parquet(tmp_path / "a.parquet", ["one", None, "", "four"])))
    assert (source.record["null_texts"], source.record["empty_documents"], source.record["documents"]) == (1, 1, 2)


@pytest.mark.parametrize(("suffix", "kind"), [(".jsonl.gz", "gzip"), (".jsonl.zst", "zstd"), (".parquet", "parquet")])
@pytest.mark.parametrize("damage", ["cut", "flip", "other"])
def test_damaged_files_are_named(tmp_path: Path, suffix: str, kind: str, damage: str) -> None:
    path = write(tmp_path, suffix)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if damage == "flip":  # the whole middle, as a bad sector does
        content[middle - 200 : middle + 200] = os.urandom(400)
    path.write_bytes({"cut": content[:middle], "flip": content, "other": b"no such file at all, but text\n" * 9}[damage])
    if kind == "parquet" and damage == "flip":
        path.write_bytes(content[:-20] + b"\x00" * 12 + content[-8:])  # its footer; pages carry sums only where asked for
    with pytest.raises(ValueError, match=rf"rows{suffix}' is not a whole {kind} file"):
        open_source(str(path))


def test_damage_is_told_before_what_it_makes_of_a_line(tmp_path: Path) -> None:
    """Stored without compression, a bad byte passes as text, and only the sum at the end tells of it."""
    content = bytearray(gzip.compress(lines_of(TEXTS), compresslevel=0))
    content[content.index(b'{"text"', 2000) + 1] = ord("'")
    (tmp_path / "rows.jsonl.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"rows.jsonl.gz' is not a whole gzip file: CRC check failed"):
        open_source(str(tmp_path / "rows.jsonl.gz"))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(gzip.decompress(gzip.compress(lines_of(TEXTS))) + b"no json"))
    with pytest.raises(ValueError, match=r"line 201 of .*rows.jsonl.gz' is not JSON"):
        open_source(str(tmp_path / "rows.jsonl.gz"))


def test_damaged_array_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.array_record"
    path.write_bytes(b"not records " * 9000)
    with pytest.raises(ValueError, match=r"rows.array_record' is not a whole ArrayRecord file"):
        open_source(str(path))


def test_zstd_of_several_frames_is_one_text(tmp_path: Path) -> None:
    pack = zstandard.ZstdCompressor().compress
    half = lines_of(TEXTS[:100]), lines_of(TEXTS[100:])
    (tmp_path / "rows.jsonl.zst").write_bytes(pack(half[0]) + pack(half[1]))
    assert open_source(str(tmp_path / "rows.jsonl.zst")).record["documents"] == 200


@pytest.mark.parametrize(("suffix", "module"), [(".jsonl.zst", "zstandard"), (".parquet", "pyarrow")])
def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch, suffix: str, module: str) -> None:
    path = write(tmp_path, suffix)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"rows{suffix}' needs {module}, .* `uv sync --extra data`"):
        open_source(str(path))


def test_plain_texts_stay_where_they_are_and_others_are_kept_once(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("one 漢 two".encode())
    store = TextStore()
    store.append("first", "漢".encode(), Place(store.file(path), 4, 3))
    store.append("second", b"kept")
    assert [(store.name(i), store.text(i), store.size(i)) for i in (1, 0)] == [("second", "kept", 4), ("first", "漢", 3)]
    with pytest.raises(IndexError):
        store.text(2)


def test_a_file_that_changed_meanwhile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(TEXTS))
    source = open_source(str(path))
    path.write_bytes(lines_of(TEXTS[:50]))
    with pytest.raises(ValueError, match=r"a.jsonl' has changed since this run listed its documents"):
        source.train[0]


def test_bad_bytes_are_replaced_in_the_text_that_is_read_later(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "n\xe9"}\n{"text": "fine \xef\xbf\xbd"}\n{"text": "half \\ud800"}\n')
    source = open_source(str(tmp_path / "a.jsonl"), on_invalid_utf8="replace")
    assert list(all_of(source).values()) == ["n\ufffd", "fine \ufffd", "half \ufffd\ufffd\ufffd"]


def test_full_disk_while_unpacking_says_so(tmp_path: Path) -> None:
    """A limit on file size stands in for a full disk."""
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines_of(["x" * 100_000] * 20)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"no room for the unpacked texts: .*TMPDIR"):
            open_source(str(tmp_path / "rows.jsonl.gz"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_zstd_reader_is_an_ordinary_stream() -> None:
    from data.readers import _Zstd

    packed = zstandard.ZstdCompressor().compress(b"line\n" * 100_000)
    assert io.BufferedReader(_Zstd(io.BytesIO(packed))).read() == b"line\n" * 100_000
