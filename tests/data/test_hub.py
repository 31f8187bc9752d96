"""Facts about `data.hub`, against a small Hub on this machine."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_hub import COMMIT, Hub, environment, in_a_client, open_sources, serving


def lines_of(start: int, count: int) -> bytes:
    return "".join(json.dumps({"text": f"document {i} 漢", "body": f"body {i}"}) + "\n" for i in range(start, start + count)).encode()


FILES = {
    "README.md": b"# A dataset\n",
    "data/train-00000-of-00002.jsonl": lines_of(0, 400),
    "data/train-00001-of-00002.jsonl.gz": gzip.compress(lines_of(400, 100)),
    "data/training-notes.jsonl": b"not of the split\n",
    "test.jsonl": lines_of(1000, 30),
}


@pytest.fixture(scope="module")
def hub() -> Iterator[type[Hub]]:
    with serving("datasets", "someone/texts", FILES) as handler:
        yield handler


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


def opened(hub: type[Hub], home: Path, *specs: str, **more: str) -> list[dict]:
    return in_a_client(environment(hub, home, **more), open_sources, list(specs))


def test_a_split_is_fetched_file_by_file_and_then_read_from_the_cache(hub, home) -> None:
    hub.cut_once.add("data/train-00000-of-00002.jsonl")
    (found,) = opened(hub, home, "hf://someone/texts/train")
    names = [f"data/train-00000-of-00002.jsonl:{i}" for i in range(1, 401)] + [
        f"data/train-00001-of-00002.jsonl.gz:{i}" for i in range(1, 101)
    ]
    assert found["texts"] == {name: f"document {i} 漢" for i, name in enumerate(names)}
    assert found["name"] == "texts-train"
    assert (found["record"]["kind"], found["record"]["commit"], found["record"]["revision"]) == ("hub", COMMIT, "main")
    assert found["record"]["files"] == [name for name in FILES if name.startswith("data/train-")]
    fetched = [path for command, path, _ in hub.seen if command == "GET" and "/resolve/" in path]
    assert {path.split(COMMIT + "/")[1] for path in fetched} == set(found["record"]["files"])  # no other file
    assert [part for _, path, part in hub.seen if part and path.endswith("00000-of-00002.jsonl")]  # it went on where it was cut

    hub.seen.clear()
    offline, pinned, missing = opened(
        hub,
        home,
        "hf://someone/texts/train",
        f"hf://someone/texts@{COMMIT}/train#column=body",
        "hf://someone/texts/test",
        HF_HUB_OFFLINE="1",
    )
    assert hub.seen == []
    assert offline == found
    assert pinned["texts"][names[7]] == "body 7"
    assert "error" in missing  # another split, never fetched


def test_what_is_not_there_is_said(hub, home) -> None:
    no_split, no_repo, no_revision, no_spec, mixed = opened(
        hub,
        home,
        "hf://someone/texts/validation",
        "hf://someone/else/train",
        "hf://someone/texts@v9/train",
        "hf://texts",
        "hf://someone/texts/train:0.7,hf://someone/texts/test:0.3",
    )
    assert "no split 'validation' in the dataset someone/texts: it holds README.md, data/train-00000-of-00002.jsonl" in no_split["error"]
    assert "no dataset someone/else on the Hub" in no_repo["error"]
    assert "the dataset someone/texts has no revision 'v9'" in no_revision["error"]
    assert "expected hf://owner/name/split or hf://owner/name@revision/split, got 'hf://texts'" in no_spec["error"]
    assert [part["documents"] for part in mixed["record"]["parts"]] == [500, 30]


def test_a_hub_out_of_reach_is_said(hub, tmp_path) -> None:
    (found,) = opened(hub, tmp_path, "hf://someone/texts/train", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_ETAG_TIMEOUT="1")
    assert "'hf://someone/texts/train' could not be fetched" in found["error"]
