"""Facts about `data.cache` and `data.atomic`."""

import json
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import grain
import numpy as np
import pytest

from data.cache import TokenCache
from data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]


def build(documents: grain.MapDataset, tokenizer: Tokenizer, folder: Path, **options) -> TokenCache:
    options = {"source_digest": "d1", "split": "train"} | options
    return TokenCache.build_or_open(documents, tokenizer, folder, **options)


def equal(a: TokenCache, b: TokenCache) -> bool:
    return a.names == b.names and len(a) == len(b) and all((a.document(i) == b.document(i)).all() for i in range(len(a)))


def test_documents_stand_between_bos_and_eos(documents, tokenizer, tmp_path) -> None:
    cache = build(documents, tokenizer, tmp_path)
    assert len(cache) == len(documents) == 13
    for i in range(len(documents)):
        whole = cache.document(i)
        assert whole.dtype == np.int32
        assert whole.tolist() == [tokenizer.bos_id, *tokenizer.encode(documents[i]["text"]), tokenizer.eos_id]
        assert cache.names[i] == documents[i]["name"]
        assert json.loads((cache.folder / "names.json").read_text())[i] == documents[i]["name"]
        assert cache.text_bytes[i] == len(documents[i]["text"].encode())
        assert cache.lengths[i] == len(whole)
        assert cache.piece(i, 1, len(whole) - 1).tolist() == whole[1:].tolist()
    assert cache.total_tokens == cache.lengths.sum() == len(cache.tokens)
    assert cache.max_token == max(cache.document(i).max() for i in range(13)) < cache.vocab_size == tokenizer.vocab_size
    assert (cache.tokens.dtype, cache.pad_id) == (np.uint16, tokenizer.pad_id)


def test_second_time_opens_and_encodes_nothing(documents, tokenizer, tmp_path) -> None:
    progress: list[tuple[int, int]] = []
    first = build(documents, tokenizer, tmp_path, on_progress=lambda done, of: progress.append((done, of)))
    assert progress[-1] == (13, 13)
    again = build(documents, tokenizer, tmp_path, on_progress=lambda *_: pytest.fail("encoded again"))
    assert again.folder == first.folder
    assert equal(again, first)


def test_another_tokenizer_source_or_split_is_another_cache(documents, tokenizer, tmp_path) -> None:
    other = Tokenizer.train(["completely different"], 270)
    folders = {
        build(documents, tokenizer, tmp_path).folder,
        build(documents, other, tmp_path).folder,
        build(documents, tokenizer, tmp_path, source_digest="d2").folder,
        build(documents, tokenizer, tmp_path, split="held_out").folder,
    }
    assert len(folders) == 4
    assert sorted(tmp_path.iterdir()) == sorted(folders)


def test_without_bos_the_eos_opens_and_without_eos_it_is_refused(documents, tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path / "tok")
    file, config = tmp_path / "tok" / "tokenizer.json", tmp_path / "tok" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
    config.write_text(json.dumps({"eos_token": "<|eos|>"}))
    cache = build(documents, Tokenizer.load(tmp_path / "tok"), tmp_path / "cache")
    assert cache.document(0)[[0, -1]].tolist() == [tokenizer.eos_id] * 2
    assert cache.pad_id == tokenizer.eos_id
    config.unlink()
    with pytest.raises(ValueError, match=r"has no EOS token, .* expected eos_token in the tokenizer_config.json"):
        build(documents, Tokenizer.load(tmp_path / "tok"), tmp_path / "cache")


def test_vocabulary_above_uint16_is_stored_as_uint32(documents, tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path / "tok")
    file = tmp_path / "tok" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 1 << 16, "content": "<|far|>"})
    content["model"]["vocab"]["<|far|>"] = 1 << 16
    file.write_text(json.dumps(content))
    wide = Tokenizer.load(tmp_path / "tok")
    assert wide.vocab_size == (1 << 16) + 1
    cache = build(documents, wide, tmp_path / "cache")
    assert cache.tokens.dtype == np.uint32
    assert equal(cache, build(documents, tokenizer, tmp_path / "cache"))


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "text_bytes.bin", "names.json", "names.bin", "record.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_noticed_and_repaired(documents, tokenizer, tmp_path, warnings, name: str, damage: str) -> None:
    sound = build(documents, tokenizer, tmp_path / "sound")
    file = build(documents, tokenizer, tmp_path / "hurt").folder / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0b100
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    repaired = build(documents, tokenizer, tmp_path / "hurt")
    assert any("is damaged" in message and "Building it again" in message for message in warnings)
    assert equal(repaired, sound)
    assert [entry.name for entry in (tmp_path / "hurt").iterdir()] == [sound.folder.name]


def test_cache_of_another_number_of_documents_is_not_used(documents, tokenizer, tmp_path, warnings) -> None:
    build(documents[:5], tokenizer, tmp_path)
    assert len(build(documents, tokenizer, tmp_path)) == 13
    assert any("it holds 5 documents where the source has 13" in message for message in warnings)


SLOW_BUILD = """
import sys, time, grain
from data.cache import TokenCache
from data.tokenizer import Tokenizer
rows = [{"text": f"{i} " + "the cat " * 40_000, "name": f"doc{i}"} for i in range(9)]
def wait(done, of):
    print(done, flush=True)
    time.sleep(float(sys.argv[3]))
documents = grain.MapDataset.source(rows)
tokenizer = Tokenizer.load(sys.argv[1])
print(TokenCache.build_or_open(documents, tokenizer, sys.argv[2], source_digest="d1", split="train", on_progress=wait))
"""


def slow_build(tokenizer: Tokenizer, tmp_path: Path, wait_s: float) -> subprocess.Popen:
    tokenizer.save(tmp_path / "tok")
    command = [sys.executable, "-c", SLOW_BUILD, tmp_path / "tok", tmp_path / "cache", str(wait_s)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_build_leaves_nothing_that_counts_and_is_cleared_away(documents, tokenizer, tmp_path) -> None:
    process = slow_build(tokenizer, tmp_path, wait_s=60)
    assert process.stdout.readline() == "4\n"  # some documents are written, others are not
    left = [entry.name for entry in (tmp_path / "cache").iterdir()]
    assert len(left) == 1
    assert left[0].startswith(".")
    build(documents, tokenizer, tmp_path / "cache", source_digest="another")
    assert (tmp_path / "cache" / left[0]).exists()  # its process is alive: hands off
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / "cache" / left[0]).exists()
    cache = build(documents, tokenizer, tmp_path / "cache")
    assert len(cache) == 13
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.name.startswith(".")]


def test_two_processes_at_once_both_get_the_cache(tokenizer, tmp_path) -> None:
    both = [slow_build(tokenizer, tmp_path, wait_s=0.3) for _ in range(2)]
    for process in both:
        said, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert "TokenCache('train-" in said
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_two_repairs_of_one_damaged_cache_both_succeed(documents, tokenizer, tmp_path) -> None:
    cache = build(documents, tokenizer, tmp_path)
    (cache.folder / "tokens.bin").write_bytes(b"")
    opened: list[TokenCache] = []
    threads = [threading.Thread(target=lambda: opened.append(build(documents, tokenizer, tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 3
    assert all(equal(one, opened[0]) for one in opened)
    assert list(tmp_path.iterdir()) == [cache.folder]


def test_full_disk_leaves_no_half_cache_and_says_so(documents, tokenizer, tmp_path) -> None:
    """A limit on file size stands in for a full disk: the kernel refuses the write in the same place."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        with pytest.raises(OSError, match=r"could not write 'train-.*MB free.*choose another folder"):
            build(documents, tokenizer, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
    assert len(build(documents, tokenizer, tmp_path)) == 13


def test_interrupted_build_leaves_nothing(documents, tokenizer, tmp_path) -> None:
    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(documents, tokenizer, tmp_path, on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_no_documents_is_refused(documents, tokenizer, tmp_path) -> None:
    with pytest.raises(ValueError, match="no documents in the split 'train'"):
        build(documents[:0], tokenizer, tmp_path)
