"""GSM8K by rewards from end to end, at the size of a toy: files, the loop, going on from the middle, and what a user does wrong."""

import gzip
import json

import numpy as np
import pytest
from integration.recipe_runs import curve_of, left_at, run_here
from safetensors.numpy import load_file
from tiny import tiny

import lm
from data.tasks import gsm8k
from data.tokenizer import Tokenizer
from recipes.command_line import load_config
from recipes.grpo_gsm8k import Config, main
from train.logs import read_metrics

SIZES = {"prompts": 2, "n": 3, "max_new_tokens": 4, "steps": 2, "validate_every": 2, "sample_every": 2, "save_every": 1, "answers": 1}
HOW = {"step": {"micro_batches": 2}, "backend": "reference", "dtype": "float32", "remat": "none", "peak": 1e-3, "ask": "="}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A random model of bytes, and problems in two files."""
    folder = tmp_path_factory.mktemp("gsm8k")
    lm.save_pretrained(tiny("qwen3", vocab=265, n_layers=1), folder / "model")
    Tokenizer.train([], 265).save(folder / "model")
    records = [{"question": f"{i} + 1?", "answer": f"{i} + 1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1:,}"} for i in range(1000, 1030)]
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[:24]))
    with gzip.open(folder / "test.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in records[24:])
    return folder


def learn(start, folder, **changes):
    files = {"model": start / "model", "data": start / "train.jsonl", "held_out": start / "test.jsonl.gz"}
    main(Config(run_dir=folder, **(files | SIZES | HOW | changes)))
    hours = ("minutes", "rollout_s", "reward_s", "check_s", "update_s", "rollout_tokens_per_s")
    return [{name: value for name, value in line.items() if name not in hours} for line in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def run(start):
    return learn(start, start / "run")


def test_it_learns_from_the_files_and_is_measured_on_the_other(start, run) -> None:
    steps = [line for line in run if "reward" in line]
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert {"reward/correct", "reward/has_answer", "reward/last_number", "kl", "clipped_high"} <= line.keys()
        assert line["gap_max"] < 1e-4
    assert json.loads((start / "run" / "manifest.json").read_text())["task"] == "gsm8k"
    assert (start / "run" / "learning.png").is_file()
    assert load_config(Config, start / "run").kl_weight == 0.001


def test_stopped_and_resumed_it_is_the_same_run(start, run, tmp_path) -> None:
    learn(start, tmp_path / "run", steps=1)
    saved = load_config(Config, tmp_path / "run")
    curve = curve_of(start / "run", tmp_path / "curves", "reward")
    main(saved.model_copy(update={"resume": True, "run_dir": tmp_path / "run", "steps": 2, "curve": curve}))
    assert left_at(tmp_path / "run") == []
    one, other = (load_file(folder / "export" / "model.safetensors") for folder in (start / "run", tmp_path / "run"))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_the_task_of_a_config_is_that_of_its_files(start) -> None:
    both = Config(data=start / "train.jsonl", held_out=start / "test.jsonl.gz").task
    assert (len(both.train), len(both.held_out)) == (24, 6)
    assert both.train[0].prompt == f"1000 + 1?{gsm8k.ASK} /no_think"
    assert both.train[0].facts == {"answer": "1001"}
    records = [{"question": f"{i}", "answer": "#### 1"} for i in range(400)]
    train, held_out = gsm8k.split(records)
    assert sorted([*train, *held_out], key=lambda record: int(record["question"])) == records
    assert 8 < len(held_out) < 32  # a twentieth, by hash
    assert gsm8k.split(records[::-1])[1] == held_out[::-1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--data is missing: name a file of GSM8K"),
        (["--data", "nowhere.jsonl"], "'nowhere.jsonl' is no file"),
        (["--data", "FOLDER/bad.jsonl"], "line 2 of 'FOLDER/bad.jsonl': no '#### number' in the answer of a GSM8K record: 'It is 72.'"),
        (["--data", "FOLDER/no.jsonl"], "line 1 of 'FOLDER/no.jsonl': `answer` must be a text that is not blank, and is missing"),
        (["--data", "FOLDER/train.jsonl", "--max-new-tokens", "60"], "answers of up to 60 are more than the model's context of 64"),
        (["--preset", "qwen3-70b"], "--preset"),
    ],
)
def test_what_cannot_work_ends_in_words(start, tmp_path, flags, words) -> None:
    good = {"question": "?", "answer": "#### 72"}
    (start / "bad.jsonl").write_text(json.dumps(good) + "\n" + json.dumps({"question": "?", "answer": "It is 72."}) + "\n")
    (start / "no.jsonl").write_text('{"question": "?"}\n')
    flags = [flag.replace("FOLDER", str(start)) for flag in flags]
    status, said = run_here(["--model", start / "model", "--run-dir", tmp_path / "run", "--ask", "=", *flags], "grpo_gsm8k")
    assert status == 2, said
    assert words.replace("FOLDER", str(start)) in said
    assert "Traceback" not in said
