import json
from pathlib import Path

import pytest

from train.lineage import continued_from, given, lineage, public, read, record_of, stage_of, stages_behind

SESSION = {
    "start_step": 0,
    "command": ["python", "-m", "recipes.pretrain_small", "--data", "/somewhere/of/mine/books", "--steps", "3"],
    "commit": "c0ffee",
    "settings": {"data": "/somewhere/of/mine/books:0.7,hf://owner/name/train:0.3", "optimizer": {"name": "muon"}},
    "device": {"platform": "cpu", "cpu": "A CPU", "cpu_cores": 2, "system": "this very machine", "jax": "0.10.2"},
}
MANIFEST = {
    "corpus": {"spec": "/somewhere/of/mine/books", "kind": "folder", "sha256": "5" * 64},
    "mixture": {"/somewhere/of/mine/books": {"tokens": 7}, "hf://owner/name/train": {"tokens": 3}},
    "model": {"model_type": "qwen3", "parameters": 12},
    "steps": 3,
    "tokens": 10,
    "seed": 0,
    "sessions": [SESSION],
}
RESULTS = {"bits_per_byte": 2.5, "train_s": 7200.0, "samples": ["a", "b"], "after": {"new": {"bits_per_byte": 2.0, "each": [1, 2]}}}


def run_folder(folder: Path, **more) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(MANIFEST | more))
    (folder / "results.json").write_text(json.dumps(RESULTS))
    (folder / "checkpoints").mkdir()
    return folder


def test_a_stage_says_what_was_done_and_nothing_of_the_machine():
    stage = stage_of(MANIFEST, RESULTS)
    assert (stage["stage"], stage["steps"], stage["tokens"], stage["hours"]) == ("pretrain_small", 3, 10, 2.0)
    assert stage["began_with"] is None
    assert stage["mixture"] == {"books": {"tokens": 7}, "hf://owner/name/train": {"tokens": 3}}
    assert stage["settings"] == {"data": "books:0.7,hf://owner/name/train:0.3", "optimizer": {"name": "muon"}}
    assert stage["hardware"] == {"platform": "cpu", "cpu": "A CPU", "cpu_cores": 2}
    assert stage["results"] == {"bits_per_byte": 2.5, "train_s": 7200.0, "after": {"new": {"bits_per_byte": 2.0}}}
    assert "mine" not in json.dumps(stage)
    assert "command" not in stage


def test_later_stages_append_themselves(tmp_path):
    first = run_folder(tmp_path / "pretrain")
    begun_with = continued_from(first, "d" * 64)
    assert (begun_with["source"], begun_with["digest"]) == ("pretrain", "d" * 64)
    second = run_folder(tmp_path / "continue", continued_from=begun_with)
    # The third begins with an export, as it would come from the Hub, and brings something of its own.
    export = tmp_path / "export"
    export.mkdir()
    (export / "lineage.json").write_text(json.dumps(stages_behind(second)))
    session = SESSION | {"command": ["python", "-m", "recipes.sft_chat"]}
    third = MANIFEST | {"continued_from": continued_from(export, "e" * 64), "conversations": {"train": 9}, "sessions": [session]}
    stages = lineage(third, {})
    assert [stage["stage"] for stage in stages] == ["pretrain_small", "pretrain_small", "sft_chat"]
    assert [stage["began_with"] for stage in stages[1:]] == [
        {"source": "pretrain", "digest": "d" * 64},
        {"source": "export", "digest": "e" * 64},
    ]
    assert stages[2]["conversations"] == {"train": 9}
    assert stages[2]["hours"] is None


def test_a_model_without_a_record_is_given(tmp_path):
    (tmp_path / "smol").mkdir()
    assert stages_behind(tmp_path / "smol") == [{"stage": "given", "source": "smol"}]
    assert stages_behind(tmp_path / "file.gguf") == [{"stage": "given", "source": "file.gguf"}]
    before_lineages = MANIFEST | {"continued_from": {"source": "smol", "digest": "d"}}
    assert lineage(before_lineages, {})[0] == given("smol", "d")


def test_a_manifest_from_before_has_the_settings_of_its_run(tmp_path):
    run = run_folder(tmp_path / "run", sessions=[{name: value for name, value in SESSION.items() if name != "settings"}])
    (run / "config.json").write_text('{"seq": 64}')
    assert stage_of(*record_of(run))["settings"] == {"seq": 64}


def test_what_is_no_lineage_is_told(tmp_path):
    (tmp_path / "lineage.json").write_text('[{"name": "x"}]')
    with pytest.raises(ValueError, match=r"lineage.json is no lineage: expected a list of stages"):
        read(tmp_path / "lineage.json")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/a/b/texts", "texts"),
        ("~/texts/", "texts"),
        ("../x/y.jsonl#column=body", "y.jsonl#column=body"),
        ("--xla_dump_to=/a/b/dump --other=1", "--xla_dump_to=dump --other=1"),
        ("hf://owner/name/train", "hf://owner/name/train"),
        ("owner/name", "owner/name"),
        ("tokens/s", "tokens/s"),
        ("{{ bos }}</s> /think", "{{ bos }}</s> /think"),
        (7, 7),
    ],
)
def test_paths_are_shortened_and_nothing_else(text, told):
    assert public(text) == told
    assert public({"a": [text]}) == {"a": [told]}


def test_a_place_that_is_there_is_shortened_and_names_stay_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert public("owner/name") == "name"
    assert public({"/a/b/x": 1, "/a/c/x": 2}) == {"x (1)": 1, "x (2)": 2}
