"""Models of the Hub, against a small one on this machine; each client is a process of its own, since settings are read at its start."""

import json
from pathlib import Path

import pytest
from small_hub import COMMIT, Hub, environment, fingerprint, in_a_client, load_models, serving
from tiny import tiny

import lm


def loaded(hub: type[Hub], home: Path, *asked: str | tuple[str, str], **more: str) -> list[str | float]:
    """What each source gives: the sum of all weights, or the words of the error."""
    pairs = [(each, None) if isinstance(each, str) else each for each in asked]
    return in_a_client(environment(hub, home, **more), load_models, pairs)


def repository(folder: Path, **how) -> dict[str, bytes]:
    lm.save_pretrained(tiny("llama"), folder, **how)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fetched(hub: type[Hub]) -> set[str]:
    return {path.split(f"{COMMIT}/")[1] for command, path, _ in hub.seen if command == "GET" and "/resolve/" in path}


@pytest.mark.parametrize("max_shard_bytes", [20_000, 10**9])
def test_a_repository_is_fetched_once_and_only_what_is_needed_of_it(tmp_path, max_shard_bytes):
    files = repository(tmp_path / "made", max_shard_bytes=max_shard_bytes)
    others = {"README.md": b"#", "pytorch_model.bin": b"", "consolidated.safetensors": b"", "onnx/model.safetensors": b""}
    wanted = files | {
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        "chat_template.jinja": b"{{ text }}",
        "generation_config.json": b"{}",
    }
    with serving("models", "someone/small", wanted | others) as hub:
        first, pinned = loaded(hub, tmp_path / "home", "someone/small", ("someone/small", COMMIT))
        assert first == pinned == fingerprint(tiny("llama"))
        assert fetched(hub) == set(wanted)
        hub.seen.clear()
        again, pinned, other = loaded(
            hub, tmp_path / "home", "someone/small", ("someone/small", COMMIT), "someone/else", HF_HUB_OFFLINE="1"
        )
        assert hub.seen == []
        assert again == pinned == first
        assert other.startswith(
            "ValueError: someone/else is no folder here, and as a repository it could not be fetched, nor is all of it in"
        )


def test_what_is_not_there_is_said(tmp_path):
    (tmp_path / "file.safetensors").touch()
    (tmp_path / "folder").mkdir()
    with serving("models", "someone/small", repository(tmp_path / "made")) as hub:
        no_repo, no_revision, no_name, a_file, revised = loaded(
            hub,
            tmp_path / "home",
            "runs/export",
            ("someone/small", "v9"),
            "./runs/export",
            str(tmp_path / "file.safetensors"),
            (str(tmp_path / "folder"), "main"),
        )
    assert no_repo.startswith("ValueError: runs/export is no folder here and no repository on the Hub, or a private one: check the name")
    assert no_revision == "ValueError: the repository someone/small has no revision 'v9'"
    assert no_name.startswith("FileNotFoundError: ./runs/export does not exist: expected the folder of a model, or owner/name of a repo")
    assert "file.safetensors is a file: expected the folder of a model" in a_file
    assert "folder is a folder here, which has no revision 'main'" in revised


def test_a_gated_repository_asks_for_the_token_of_the_environment(tmp_path):
    with serving("models", "someone/small", repository(tmp_path / "made"), token="hf_sesame") as hub:
        (refused,) = loaded(hub, tmp_path / "home", "someone/small")
        assert refused.startswith("ValueError: the repository someone/small is gated: give your consent on its page, then set HF_TOKEN")
        (taken,) = loaded(hub, tmp_path / "home", "someone/small", HF_TOKEN="hf_sesame")
        assert taken == fingerprint(tiny("llama"))


def test_a_repository_of_pickles_is_refused_without_fetching_them(tmp_path):
    files = repository(tmp_path / "made")
    del files["model.safetensors"]
    with serving("models", "someone/small", files | {"pytorch_model.bin": b"\x80"}) as hub:
        (refused,) = loaded(hub, tmp_path / "home", "someone/small")
        assert refused.startswith("ValueError: the repository someone/small has its weights as pickles only (pytorch_model.bin). Opening a")
        assert fetched(hub) == {"config.json"}


def test_an_index_that_leads_elsewhere_is_refused_before_anything_is_fetched_for_it(tmp_path):
    files = repository(tmp_path / "made", max_shard_bytes=20_000)
    files["model.safetensors.index.json"] = json.dumps({"weight_map": {"model.norm.weight": "../../secret.safetensors"}}).encode()
    with serving("models", "someone/small", files) as hub:
        (refused,) = loaded(hub, tmp_path / "home", "someone/small")
    assert "names '../../secret.safetensors': expected names of .safetensors files in its own folder" in refused


def test_a_hub_out_of_reach_is_said(tmp_path):
    with serving("models", "someone/small", {}) as hub:
        (found,) = loaded(hub, tmp_path, "someone/small", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_ETAG_TIMEOUT="1")
    assert "someone/small is no folder here, and as a repository it could not be fetched" in found
