"""Reinforcement learning from end to end: what is logged, what is left behind, and going on from the middle."""

import json
import random
import re
import signal
import time

import numpy as np
import pytest
from integration.recipe_runs import finish, run_here, start
from loguru import logger
from safetensors.numpy import load_file

import lm
from data.tasks import TASKS
from data.tasks.problems import Problem, RewardError, Task
from recipes import grpo_arithmetic
from recipes.command_line import load_config
from recipes.grpo_arithmetic import Config, main
from recipes.loading import load
from recipes.reinforcement import rate_at
from train.logs import read_metrics

# Words written backwards: letters in their place are worth something, so that even a model of a few thousand weights has what to learn.
SIZES = {
    "d_model": 32,
    "n_layers": 1,
    "n_heads": 2,
    "d_ff": 40,
    "prompts": 4,
    "n": 3,
    "max_new_tokens": 10,
    "answers": 2,
    "dtype": "float32",
}
WARM = {"warm_examples": 64, "warm_batch": 16, "warm_steps": 30, "warm_every": 30, "warm_peak": 0.01}
OFTEN = {"cooldown": 0.0, "rise": 10, "validate_every": 2, "validate_rows": 8, "sample_every": 2, "save_every": 2, "control": False}
SMALL = {"task": "reversal", "reward_weights": {"letters": 1.0}, "steps": 4, "peak": 0.01, "backend": "reference"} | SIZES | WARM | OFTEN

EVERY_STEP = [
    "reward",
    "reward_std",
    "reward/correct",
    "reward/letters",
    "groups_all_right",
    "groups_all_wrong",
    "length",
    "length_min",
    "length_max",
    "truncated",
    "entropy",
    "clipped_low",
    "clipped_high",
    "ratio",
    "ratio_max",
    "gap",
    "gap_max",
    "grad_norm",
    "learning_rate",
    "tokens_generated",
    "rollout_s",
    "reward_s",
    "check_s",
    "update_s",
]


def play(folder, **changes):
    """The recipe in this process, with the words it said."""
    said = []
    sink = logger.add(lambda message: said.append(message.record["message"]))
    try:
        main(Config(run_dir=folder, **(SMALL | changes)))
    finally:
        logger.remove(sink)
    return "\n".join(said)


@pytest.fixture(scope="module", autouse=True)
def few_held_out():
    """A look at 256 held-out words would take most of the time here."""
    whole = TASKS["reversal"]()
    small = Task(**(vars(whole) | {"train": whole.train[:300], "held_out": whole.held_out[:8]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(grpo_arithmetic.TASKS, "reversal", lambda: small)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo") / "run"
    said = play(folder, kl_weight=0.01, parts=2)
    return folder, said


def lasting(folder):
    """The numbers of a run that do not depend on the hour."""
    hours = ("minutes", "rollout_s", "reward_s", "check_s", "update_s", "rollout_tokens_per_s")
    return [{name: value for name, value in line.items() if name not in hours} for line in read_metrics(folder / "metrics.jsonl")]


def test_every_step_is_told_in_full(run) -> None:
    folder, _ = run
    steps = [line for line in read_metrics(folder / "metrics.jsonl") if "reward" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for line in steps:
        assert not [name for name in [*EVERY_STEP, "kl"] if not np.isfinite(line[name])]
        assert line["gap_max"] < 1e-4 == load_config(Config, folder).gap_limit  # written down by the run
        assert line["grad_norm"] > 0
    assert steps[0]["reward"] > 0
    looks = [line for line in read_metrics(folder / "metrics.jsonl") if "pass@1" in line]
    assert [line["step"] for line in looks] == [0, 2, 4]
    assert all(line["pass@2_low"] <= line["pass@2"] <= line["pass@2_high"] for line in looks)


def test_the_best_and_worst_answers_are_kept_and_shown(run) -> None:
    folder, _ = run
    kept = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert {(line["step"], line["kind"]) for line in kept} == {(step, kind) for step in (2, 4) for kind in ("best", "worst")}
    for line in kept:
        assert len(line["tokens"]) == len(line["advantage"]) == len(line["log p"]) == len(line["entropy"])
        prompt = line["tokens"].index("=") + 1
        assert line["advantage"][:prompt] == [None] * prompt
        assert None not in line["advantage"][prompt:]
    page = (folder / "rollouts" / "step-000004.html").read_text()
    assert page.count("<h2>") == len([line for line in kept if line["step"] == 4])
    assert (folder / "learning.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_left_is_a_model_like_any_other(run) -> None:
    folder, _ = run
    model, tokenizer, _ = load(folder)
    assert len(lm.generate(model, [tokenizer.encode("reverse: bad=")], max_new_tokens=3)[0]) == 3
    before, after = (load_file(folder / name / "model.safetensors") for name in ("start", "export"))
    assert any((before[name] != after[name]).any() for name in before)


def test_stopped_and_resumed_it_is_the_same_run(run, tmp_path) -> None:
    """Optimizer, keys, prompts, the reference of the KL: all go on where they were."""
    folder, _ = run
    play(tmp_path / "run", kl_weight=0.01, parts=2, steps=2)
    saved = load_config(Config, tmp_path / "run")
    main(saved.model_copy(update={"resume": True, "run_dir": tmp_path / "run", "steps": 4}))
    whole, resumed = lasting(folder), lasting(tmp_path / "run")
    assert [line for line in resumed if "reward" in line] == [line for line in whole if "reward" in line]
    one, other = (load_file(each / "export" / "model.safetensors") for each in (folder, tmp_path / "run"))
    assert all((one[name] == other[name]).all() for name in one)


def test_in_bfloat16_the_limit_of_the_gap_is_measured_and_written_down(tmp_path) -> None:
    """Three times the largest of the three runs that are told, each of draws of its own."""
    said = play(tmp_path / "run", dtype="bfloat16", warm_examples=0, steps=1)
    told = re.search(r"largest gaps of three runs of draws (\S+), (\S+), (\S+) nats; the limit is", said)
    assert told is not None
    gaps = [float(each) for each in told.groups()]
    assert len(set(gaps)) > 1
    assert load_config(Config, tmp_path / "run").gap_limit == pytest.approx(3 * max(gaps), rel=0.01)
    assert 0 < max(gaps) < 1  # where a CPU multiplies bf16 in units of its own (AMX), sampler and trainer hardly differ
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["sessions"][-1]["ran_with"]["dtype"] == "bfloat16"


def test_a_task_whose_answers_are_all_worth_the_same_is_noticed(tmp_path, monkeypatch) -> None:
    problems = [Problem(f"reverse: {word}=", solution=word) for word in ("ab", "cd", "ef", "gh")]
    easy = Task("easy", problems, problems, {"any": lambda p, a: 1.0}, {"any": 1.0}, verifier="any")
    monkeypatch.setitem(grpo_arithmetic.TASKS, "reversal", lambda: easy)
    said = play(tmp_path / "run", reward_weights={}, warm_examples=0, algorithm="dapo", steps=1, most_draws=2)
    assert "steps so far with nothing to learn from: 1. " in said
    assert "100% of groups all right" in said
    strange = Task("strange", problems, problems, {"any": lambda p, a: "right"}, {"any": 1.0}, verifier="any")
    monkeypatch.setitem(grpo_arithmetic.TASKS, "reversal", lambda: strange)
    with pytest.raises(RewardError, match="returned 'right' \\(str\\)"):
        play(tmp_path / "strange", reward_weights={}, warm_examples=0, steps=1)


def test_settings_that_cannot_work_are_refused_at_the_door() -> None:
    with pytest.raises(ValueError, match="needs at least 2 of them, got n = 1"):
        Config(n=1)
    assert Config(n=1, algorithm="reinforce").n == 1
    with pytest.raises(ValueError, match="must be a multiple of parts"):
        Config(prompts=3, n=3, parts=2)
    with pytest.raises(ValueError, match="has no reward called style"):
        TASKS["arithmetic"]().weighted({"style": 1.0})


FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in (SIZES | WARM).items() if name != "warm_examples"]
FLAGS += ["--task=reversal", "--warm-examples=0", "--steps=1", "--backend=reference", "--no-control"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--n=1"], "grpo compares the answers to one prompt, so it needs at least 2 of them, got n = 1"),
        (["--kl=k1"], "kl k1 says how a KL is estimated, and kl_weight 0 asks for none: add a --kl-weight"),
        (["--max-new-tokens=250"], "answers of up to 250 are more than the model's context of 256: take a smaller --max-new-tokens"),
        (["--algorithm=dapo", "--overlong-buffer=11"], "overlong_buffer (11 tokens) must be no more than max_new_tokens (10)"),
        (["--warm-examples=300"], "--warm-examples 300 takes all 300 problems of reversal, and RL would have none"),
        (["--reward-weights", "style", "1"], "task 'reversal' has no reward called style; it has correct, letters"),
        (["--temperature=0"], "temperature: Input should be greater than 0"),
        (["--model=nowhere"], "nowhere does not exist: expected the folder of a model"),
        (["--prompts=5", "--parts=2"], "prompts x n (15) must be a multiple of parts x step.micro_batches"),
    ],
)
def test_what_cannot_work_ends_in_words(tmp_path, flags, words) -> None:
    status, said = run_here([*FLAGS, "--run-dir", tmp_path / "run", *flags], "grpo_arithmetic")
    assert status == 2, said
    assert words in " ".join(said.split())  # tyro writes a box of narrow lines
    assert "Traceback" not in said


def test_a_reward_that_gives_a_text_ends_in_words_with_the_sample(tmp_path, monkeypatch) -> None:
    problems = [Problem(f"reverse: {word}=") for word in ("ab", "cd", "ef", "gh")]
    strange = Task("strange", problems, problems, {"any": lambda p, a: "right"}, {"any": 1.0}, verifier="any")
    monkeypatch.setitem(TASKS, "reversal", lambda: strange)
    status, said = run_here([*FLAGS, "--run-dir", tmp_path / "run"], "grpo_arithmetic")
    assert status == 2, said
    assert "error: reward 'any' of task 'strange' returned 'right' (str), expected a finite number or None\n  prompt: 'reverse: " in said
    assert "Traceback" not in said


@pytest.mark.heavy
def test_killed_in_the_middle_it_resumes_to_the_identical_result(tmp_path) -> None:
    """SIGKILL at random moments of reinforcement, four times."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (SIZES | WARM | {"steps": 12, "peak": 0.01}).items()]
    flags += ["--task=reversal", "--reward-weights", "letters", "1.0", "--kl-weight=0.01", "--passes=2", "--algorithm=dapo"]
    flags += ["--validate-every=4", "--validate-rows=8", "--sample-every=3", "--save-every=2", "--no-control", "--backend=reference"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert finish(start([*flags, "--run-dir", whole], tmp_path / "cache", "grpo_arithmetic"))[0] == 0
    rng, kills = random.Random(0), 0
    while kills < 4:
        resume = ["--resume"] if (killed / "config.json").exists() else []
        process = start([*flags, "--run-dir", killed, *resume], tmp_path / "cache", "grpo_arithmetic")
        wanted = rng.randrange(1, 12)
        while process.poll() is None and not any(line["step"] >= wanted for line in _written(killed)):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        finish(process)
        kills += 1
    status, output = finish(start([*flags, "--run-dir", killed, "--resume"], tmp_path / "cache", "grpo_arithmetic"))
    assert status == 0, output
    assert lasting(killed) == lasting(whole)
    one, other = (load_file(each / "export" / "model.safetensors") for each in (whole, killed))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def _written(folder):
    path = folder / "metrics.jsonl"
    return read_metrics(path) if path.is_file() else []


def test_the_learning_rate_rises_stays_and_falls_in_straight_lines() -> None:
    """10 steps up; over the last tenth of 100 steps down to a tenth: 1 - 0.9 · k/10 after k of them."""
    config = Config(steps=100, peak=2.0, rise=10, cooldown=0.1)
    assert [rate_at(config, index) for index in (0, 4, 9, 50, 89)] == pytest.approx([0.2, 1.0, 2.0, 2.0, 2.0])
    assert [rate_at(config, index) for index in (90, 94, 99)] == pytest.approx([2 * 0.91, 2 * 0.55, 2 * 0.1])
    assert rate_at(Config(steps=100, peak=2.0, rise=10, cooldown=0.0), 99) == 2.0
