"""The push, by the official client, to a Hub on this machine."""

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from hub_server import serving
from hub_state import Repository, problems
from huggingface_hub import constants
from huggingface_hub.utils import _http

from train.card import Card
from train.hub import HubError, open_hub
from train.lineage import given
from train.publish import EVIDENCE_FILE, files_of, finish
from train.push import check_free, lfs_expected, push

TOKEN = "hf_" + "writerwriterwriterwriter"
READER = "hf_" + "readerreaderreaderreader"

MODEL = {"model_type": "llama", "parameters": 12_345, "n_layers": 3, "d_model": 24, "n_heads": 6, "n_kv_heads": 2}
MODEL |= {"d_ff": 40, "vocab": 97, "context": 64}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The Hub, and a client that knows it alone and does not really wait."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the server has no Xet storage
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
    huggingface_hub.close_session()
    with serving(tmp_path / "hub", {TOKEN: ("me", True), READER: ("me", False)}, seconds=60) as state:
        yield state
    huggingface_hub.close_session()


@pytest.fixture
def folder(tmp_path):
    """Small files of text, two large ones."""
    return published(tmp_path / "mine")


def published(folder: Path, weights: bytes = b"weights", **more: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}" + weights)
    (folder / "loss.png").write_bytes(b"\x89PNG picture")
    finish(folder, Card("mine", MODEL, "float32", [given("somewhere")], licence={"license": "mit"}, **more), {"made_with": "zmaj-lm"})
    return folder


def hub_of(server, waits=None):
    return open_hub(server.address, pauses_s=(1, 2), sleep=(waits if waits is not None else []).append)


def downloaded(server, repository, tmp_path, revision="main"):
    api = huggingface_hub.HfApi(endpoint=server.address, token=TOKEN)
    return Path(api.snapshot_download(repository, revision=revision, local_dir=tmp_path / "down", force_download=True))


def same_files(ours: Path, theirs: Path) -> bool:
    others = {".gitattributes"}
    names = {name for name in files_of(theirs) if not name.startswith(".cache/")} - others
    return names == set(files_of(ours)) and all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in names)


def test_what_was_sent_comes_back_byte_for_byte(server, folder, tmp_path):
    pushed = push(folder, "mine", hub_of(server), private=True, message="first")
    assert pushed.url == f"{server.address}/me/mine"
    repository = server.repositories["me/mine"]
    assert repository.private
    assert repository.messages[pushed.commit] == "first"
    assert {name for name, blob in repository.commits[pushed.commit].items() if blob.lfs} == {"model.safetensors", "loss.png"}
    assert {name for name in files_of(folder) if lfs_expected(folder / name)} == {"model.safetensors", "loss.png"}
    assert same_files(folder, downloaded(server, "me/mine", tmp_path))
    assert [len([path for how, path in server.seen if how == "PUT"]), server.count("POST", "verify$")] == [2, 2]


def test_the_same_again_is_nothing_new_and_a_changed_model_is_a_commit_more(server, folder, tmp_path):
    hub = hub_of(server)
    check_free("mine", hub)
    first = push(folder, "me/mine", hub)
    check_free("mine", hub)
    again = push(folder, "me/mine", hub)
    assert (first.changed, again.changed, again.commit) == (True, False, first.commit)
    (folder / "loss.png").rename(folder / "curve.png")
    third = push(published(folder, b"others", note="new"), "me/mine", hub)
    files = server.repositories["me/mine"].commits[third.commit]
    assert third.changed
    assert set(files) == {*files_of(folder), ".gitattributes"}


def test_a_file_we_wrote_and_write_no_more_goes_and_others_files_stay(server, folder):
    hub = hub_of(server)
    push(folder, "me/mine", hub)
    api = huggingface_hub.HfApi(endpoint=server.address, token=TOKEN)
    api.upload_file(path_or_fileobj=b"a note", path_in_repo="notes.txt", repo_id="me/mine")
    (folder / "loss.png").unlink()
    evidence = json.loads((folder / EVIDENCE_FILE).read_text())
    (folder / EVIDENCE_FILE).write_text(json.dumps(evidence | {"files": {}}))
    files = server.repositories["me/mine"].commits[push(folder, "me/mine", hub).commit]
    assert "loss.png" not in files
    assert "notes.txt" in files


def test_a_branch_is_made_and_main_stays(server, folder):
    hub = hub_of(server)
    first = push(folder, "me/mine", hub)
    other = push(published(folder, b"trial"), "me/mine", hub, revision="trial")
    assert server.repositories["me/mine"].branches == {"main": first.commit, "trial": other.commit}


def test_a_repository_with_other_things_is_left_alone_unless_said(server, folder):
    theirs = server.repositories["me/other"] = Repository(private=False)
    head = theirs.commit({name: server.keep(b"{}", False) for name in ("config.json", "pytorch_model.txt")}, "main", "theirs")
    with pytest.raises(HubError, match=r"holds other things, not written from here: config.json, pytorch_model.txt\. .* say --overwrite"):
        push(folder, "me/other", hub_of(server))
    with pytest.raises(HubError, match="holds other things"):
        check_free("other", hub_of(server))
    assert theirs.branches["main"] == head
    pushed = push(folder, "me/other", hub_of(server), overwrite=True)
    assert set(theirs.commits[pushed.commit]) == set(files_of(folder))


def test_a_card_that_somebody_edited_is_not_written_over_unless_said(server, folder):
    hub = hub_of(server)
    push(folder, "me/mine", hub)
    api = huggingface_hub.HfApi(endpoint=server.address, token=TOKEN)
    api.upload_file(path_or_fileobj=(folder / "README.md").read_bytes() + b"\nMy words.\n", path_in_repo="README.md", repo_id="me/mine")
    with pytest.raises(HubError, match=r"in me/mine somebody changed README.md since it was written from here"):
        push(folder, "me/mine", hub)
    assert push(folder, "me/mine", hub, overwrite=True).changed


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/revision/"),
        ("POST", "/api/repos/create"),
        ("POST", "/api/validate-yaml"),
        ("POST", "/preupload/"),
        ("POST", "/objects/batch"),
        ("PUT", "/lfs/"),
        ("POST", "/verify"),
        ("POST", "/commit/"),
        ("GET", "/tree/"),
    ],
)
@pytest.mark.parametrize("status", [500, None])
def test_a_server_in_trouble_is_asked_again(server, folder, tmp_path, method, path, status):
    server.fail(method, path, status)
    push(folder, "me/mine", hub_of(server))
    assert all(fault.left == 0 for fault in server.faults)
    assert same_files(folder, downloaded(server, "me/mine", tmp_path))


def test_pauses_double_and_end_in_words(server, folder):
    waits: list[float] = []
    hub = hub_of(server, waits)
    server.fail("POST", "/commit/", 503, times=99)
    with pytest.raises(HubError, match=r"the commit to me/mine at http.*: status 503: in trouble, 3 times\. What arrived stays there"):
        push(folder, "me/mine", hub)
    assert waits == [1, 2]


def test_an_upload_that_broke_off_goes_on_and_sends_no_large_file_twice(server, folder, tmp_path):
    hub = hub_of(server)
    push(folder, "me/mine", hub)  # the repository and its first model
    published(folder, b"other weights")
    (folder / "loss.png").write_bytes(b"\x89PNG another picture")
    server.seen.clear()
    server.fail("PUT", "/lfs/", None, times=1)
    server.fail("POST", "/commit/", 503, times=99)
    with pytest.raises(HubError, match="run the same command again"):
        push(folder, "me/mine", hub)
    assert len(server.repositories["me/mine"].commits) == 2  # the one it was made with, and the first model
    assert server.count("PUT", "/lfs/") == 3  # one of the two broke off
    server.faults.clear()
    server.seen.clear()
    push(folder, "me/mine", hub)
    assert server.count("PUT", "/lfs/") == 0
    assert same_files(folder, downloaded(server, "me/mine", tmp_path))


@pytest.mark.parametrize("status", [409, 412])
def test_somebody_who_was_faster_is_told_and_not_written_over(server, folder, status):
    server.fail("POST", "/commit/", status)
    with pytest.raises(HubError, match="changed by somebody else at the same time: look at it, and run again"):
        push(folder, "me/mine", hub_of(server))


def test_a_commit_in_between_is_not_written_over(server, folder, monkeypatch):
    hub = hub_of(server)
    push(folder, "me/mine", hub)
    published(folder, b"ours")
    repository = server.repositories["me/mine"]
    create = hub.api.create_commit

    def late(*arguments, **settings):
        repository.commit(repository.commits[repository.branches["main"]], "main", "theirs")
        return create(*arguments, **settings)

    monkeypatch.setattr(hub.api, "create_commit", late)
    with pytest.raises(HubError, match="changed by somebody else"):
        push(folder, "me/mine", hub)
    assert list(repository.messages.values())[-1] == "theirs"


def test_no_token_a_wrong_one_and_one_that_may_not_write(server, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(HubError, match=r"the token may not do that.*status 403.*rights to write in the namespace me"):
        push(folder, "me/mine", hub_of(server))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(HubError, match="the token may not do that: check the owner in the name"):
        push(folder, "you/mine", hub_of(server))
    monkeypatch.setenv("HF_TOKEN", "hf_" + "nobodysnobodysnobodys")
    with pytest.raises(HubError, match="the token is not valid, or no longer") as caught:
        hub_of(server)
    assert "nobodys" not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="no token of the Hub: log in with `hf auth login`, or set HF_TOKEN"):
        hub_of(server)


def test_no_network_is_words(server, monkeypatch):
    waits: list[float] = []
    with pytest.raises(HubError, match=r"who we are at http://127.0.0.1:9: .*, 3 times\. .* run the same command again"):
        open_hub("http://127.0.0.1:9", pauses_s=(1, 2), sleep=waits.append)  # the port of "discard": nobody listens
    assert waits == [1, 2]
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set: unset it to push, or say --dry-run"):
        hub_of(server)


def test_a_hub_without_xet_storage_is_told_how_to_do_without(server, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    pytest.importorskip("hf_xet")
    with pytest.raises(HubError, match=r"xet-write-token/main.*for a Hub without Xet storage set HF_HUB_DISABLE_XET=1"):
        push(folder, "me/mine", hub_of(server))


def test_a_card_that_the_hub_refuses_stops_before_anything_is_sent(server, folder):
    finish(folder, Card("mine", MODEL, "float32", [given("somewhere")], licence={"license": "MIT"}), {})
    with pytest.raises(HubError, match=r'Invalid metadata in README.md. - "license" must be one of'):
        push(folder, "me/mine", hub_of(server))
    assert server.count("PUT", "") == 0
    assert problems("# no front matter") == ["no front matter"]


@pytest.mark.parametrize("what", ["token", "ours", "home", "folder"])
def test_what_is_of_this_machine_alone_is_not_sent(server, folder, what):
    words = {"token": "hf_" + "x" * 34, "ours": TOKEN, "home": f"{Path.home()}/texts", "folder": f"{folder.resolve()}"}[what]
    (folder / "lineage.json").write_text(json.dumps([{"stage": words}]))
    with pytest.raises(HubError, match=r"is not sent, it holds what is of this machine alone:\n  lineage.json: ") as caught:
        push(folder, "me/mine", hub_of(server))
    assert TOKEN not in str(caught.value)
    assert server.count("POST", "") == 0


def test_no_token_is_in_any_word_or_file(server, folder, tmp_path, capfd):
    server.fail("POST", "/preupload/", 500)
    server.fail("POST", "/commit/", 500)
    push(folder, "me/mine", hub_of(server))
    told = capfd.readouterr()
    assert TOKEN not in told.out + told.err
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]
