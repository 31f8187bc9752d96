"""Preference optimisation from end to end: pairs of a model's own and from a file, references alike, going on from the middle."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from integration.recipe_runs import curve_of
from safetensors.numpy import load_file
from tiny import tiny

import lm
from data.preferences import Pair, pair_of, read_pairs
from data.tasks.problems import Problem, Task
from data.tokenizer import Tokenizer
from recipes import dpo
from recipes.command_line import load_config
from recipes.dpo import Config, main
from recipes.preferring import identity_of_pairs
from train.logs import read_metrics


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A random model of bytes, and a file in which long words are preferred to short ones."""
    folder = tmp_path_factory.mktemp("dpo")
    tokenizer = Tokenizer.train([], 265)
    lm.save_pretrained(tiny("qwen3", vocab=265), folder / "model")
    tokenizer.save(folder / "model")
    rng = np.random.default_rng(0)
    pairs = [{"prompt": f"{i}?", "chosen": "y" * int(rng.integers(3, 6)), "rejected": "n"} for i in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def prefer(start, folder, **changes):
    settings = {"data": start / "pairs.jsonl", "batch": 8, "steps": 6, "validate_every": 3, "sample_every": 6, "save_every": 3}
    settings |= {"seq": 16, "backend": "reference", "dtype": "float32", "schedule": {"peak": 3e-3, "shape": "constant"}} | changes
    main(Config(run_dir=folder, **({"source": start / "model"} | settings)))
    return [{name: value for name, value in line.items() if not name.endswith("_s")} for line in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def run(start):
    return prefer(start, start / "run")


def test_the_preferred_answer_becomes_likelier(run) -> None:
    first, last = run[0], [line for line in run if "val_margin" in line][-1]
    assert first["val_margin"] == pytest.approx(0, abs=1e-5)  # the policy is the reference
    assert first["val_loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert last["val_margin"] > 0.05
    assert last["val_accuracy"] == 1
    steps = [line for line in run if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    told = {
        "rewards_chosen",
        "rewards_rejected",
        "margin",
        "accuracy",
        "log_probs_chosen",
        "log_probs_rejected",
        "learning_rate",
        "grad_norm",
    }
    assert told <= steps[0].keys()


def test_a_copy_of_the_start_is_the_same_reference_and_a_resumed_run_the_same_run(start, run) -> None:
    prefer(start, start / "copied", reference="copy", steps=3)
    saved = load_config(Config, start / "copied")
    going_on = saved.model_copy(update={"resume": True, "run_dir": start / "copied", "steps": 6})
    with pytest.raises(ValueError, match="is not the curve of this run: another reference"):
        main(going_on.model_copy(update={"curve": curve_of(start / "run", start / "curves")}))
    main(going_on)
    one, other = (load_file(start / name / "export" / "model.safetensors") for name in ("run", "copied"))
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-5)


def test_adapters_are_trained_against_the_model_without_them(start, tmp_path) -> None:
    lines = prefer(start, tmp_path / "run", reference="lora_off", adapter={"kind": "lora", "rank": 3}, steps=4, save_every=4)
    assert lines[0]["val_margin"] == pytest.approx(0, abs=1e-5)
    assert [line for line in lines if "val_margin" in line][-1]["val_margin"] > 0.01
    before, after = (load_file(folder / "model.safetensors") for folder in (start / "model", tmp_path / "run" / "export"))
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed
    assert all("_proj" in name for name in changed)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    with pytest.raises(ValueError, match="takes the adapters off, and there are none"):
        Config(source=start, reference="lora_off")


def test_pairs_of_the_models_own(start, tmp_path, monkeypatch) -> None:
    """The verifier likes answers that do not begin with a letter: some of a random model's do, some do not."""
    problems = [Problem(f"{i}=") for i in range(40)]
    rewards = {"no_letter": lambda p, a: float(not a[:1].isalpha())}
    task = Task("t", problems, problems[:4], rewards, {"no_letter": 1.0}, verifier="no_letter")
    monkeypatch.setitem(dpo.TASKS, "arithmetic", lambda: task)
    lines = prefer(start, tmp_path / "run", data=None, problems=40, answers=4, max_new_tokens=3, batch=4, steps=2)
    pairs = read_pairs(tmp_path / "run" / "pairs.jsonl")
    assert all(not pair.chosen[:1].isalpha() and pair.rejected[:1].isalpha() for pair in pairs)
    assert "pass@1" in lines[0]
    none = Task("t", problems, problems[:4], {"never": lambda p, a: 0.0}, {"never": 1.0}, verifier="never")
    monkeypatch.setitem(dpo.TASKS, "arithmetic", lambda: none)
    with pytest.raises(ValueError, match="none both right and wrong ones"):
        prefer(start, tmp_path / "none", data=None, problems=8, answers=4, max_new_tokens=3, batch=4, steps=2)


def test_too_few_or_too_long_pairs_are_said(start, tmp_path) -> None:
    with pytest.raises(ValueError, match="are less than one batch of 64"):
        prefer(start, tmp_path / "few", batch=64)
    with pytest.raises(ValueError, match="every one of the 40 pairs is longer than --seq 3"):
        prefer(start, tmp_path / "long", seq=3)


USER, GOOD, BAD = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}, {"role": "assistant", "content": "What?"}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello!"},
            "rejected": {"from": "gpt", "value": "What?"},
        },
    ],
)
def test_every_shape_of_a_pair_is_the_same_pair(record) -> None:
    pair = pair_of(record)
    assert (pair.messages, pair.chosen, pair.rejected) == ([USER], "Hello!", "What?")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "Hi", "chosen": "Hello!"}', "record 1 of '.*' is no preference pair: 'rejected'"),
        ('[{"chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]}]', "must end with one"),
        ("", "has no records"),
        ('{"prompt": ', "line 1 is not JSON"),
        ("[1", "is not JSON"),
        ('{"prompt": "Hi", "chosen": ["Hello!"], "rejected": "What?"}', "record 1 of .* expected a text, a message or a list of messages"),
    ],
)
def test_what_is_no_file_of_pairs_is_named(tmp_path, text: str, words: str) -> None:
    (tmp_path / "pairs.jsonl").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_pairs(tmp_path / "pairs.jsonl")
    with pytest.raises(ValueError, match="no file at"):
        read_pairs(tmp_path / "absent.jsonl")


def test_a_model_kept_in_bf16_is_trained_in_fp32(start, tmp_path) -> None:
    """Steps of 1e-5 would be rounded away in bf16."""
    lm.save_pretrained(tiny("qwen3", vocab=265), tmp_path / "half", dtype=jnp.bfloat16)
    Tokenizer.train([], 265).save(tmp_path / "half")
    prefer(start, tmp_path / "run", source=tmp_path / "half", steps=1, schedule={"peak": 1e-5, "shape": "constant"})
    trained = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert any((array != array.astype(ml_dtypes.bfloat16)).any() for array in trained.values())


def test_what_the_pairs_are_is_part_of_what_a_run_was_trained_on(tmp_path) -> None:
    pairs = [Pair([{"role": "user", "content": f"{i}"}], chosen="yes", rejected="no") for i in range(3)]
    own, of_file = Config(source=tmp_path), Config(source=tmp_path, data=tmp_path / "pairs.jsonl")
    assert identity_of_pairs(own, pairs) == "arithmetic"
    assert identity_of_pairs(of_file, pairs) == identity_of_pairs(of_file, list(pairs)) != identity_of_pairs(of_file, pairs[:2])
