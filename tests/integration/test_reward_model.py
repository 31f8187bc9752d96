"""A reward model from end to end: pairs of a file and of a model's own, going on from the middle, adapters, and scoring answers with it."""

import json

import jax.random as jr
import numpy as np
import pytest
from integration.recipe_runs import curve_of, left_at, run_here
from safetensors.numpy import load_file
from tiny import tiny

import lm
from data.preferences import read_pairs
from data.tasks.problems import Problem, Task, score
from data.tokenizer import Tokenizer
from lm.flight import Flight
from lm.generate import Sampler
from recipes import reward_model
from recipes.command_line import load_config
from recipes.loading import load
from recipes.prompting import Prompting
from recipes.reward_model import Config, best_of_n, main
from recipes.rl_stages import Drawing
from recipes.score import Config as ScoreConfig
from recipes.score import Scorer
from recipes.score import main as score_file
from train.logs import read_metrics
from train.reward_model import HEAD_FILE, load_reward_model


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A random model of bytes, and a file in which y's are preferred to n's."""
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = Tokenizer.train([], 265)
    lm.save_pretrained(tiny("qwen3", vocab=265, n_layers=1), folder / "model")
    tokenizer.save(folder / "model")
    rng = np.random.default_rng(0)
    pairs = [{"prompt": f"{i}?", "chosen": "y" * int(rng.integers(3, 6)), "rejected": "n" * int(rng.integers(1, 4))} for i in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def judge(start, folder, **changes):
    settings = {"data": start / "pairs.jsonl", "batch": 8, "steps": 8, "validate_every": 4, "sample_every": 8, "save_every": 4}
    settings |= {"seq": 16, "backend": "reference", "dtype": "float32", "schedule": {"peak": 0.01, "shape": "constant"}} | changes
    main(Config(source=start / "model", run_dir=folder, **settings))
    return [{name: value for name, value in line.items() if not name.endswith("_s")} for line in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def run(start):
    return judge(start, start / "run")


def test_the_chosen_answers_come_to_be_worth_more(start, run) -> None:
    assert run[0]["val_loss"] == pytest.approx(np.log(2), abs=1e-6)  # a head of zeros
    assert run[0]["val_accuracy"] == 0.5
    steps = [line for line in run if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert {"accuracy", "margin", "rewards_chosen", "rewards_rejected", "grad_norm", "learning_rate"} <= steps[0].keys()
    results = json.loads((start / "run" / "results.json").read_text())
    assert results["accuracy"]["value"] == 1
    assert results["accuracy"]["low"] < 1
    assert results["margin"]["low"] > 0.1
    assert results["margin"]["value"] == pytest.approx(results["rewards_chosen"] - results["rewards_rejected"], abs=1e-5)
    assert results["margin"]["value"] == pytest.approx([line for line in run if "val_margin" in line][-1]["val_margin"], abs=1e-5)
    assert (start / "run" / "rewards.png").read_bytes().startswith(b"\x89PNG")
    assert "A reward model" in (start / "run" / "export" / "README.md").read_text()


def test_a_resumed_run_is_the_same_run(start, run, tmp_path) -> None:
    judge(start, tmp_path / "run", steps=4)
    with pytest.raises(ValueError, match="--resume to go on with it"):
        judge(start, tmp_path / "run")
    saved = load_config(Config, tmp_path / "run")
    curve = curve_of(start / "run", tmp_path / "curves")
    main(saved.model_copy(update={"resume": True, "run_dir": tmp_path / "run", "steps": 8, "curve": curve}))
    assert left_at(tmp_path / "run") == []
    lines = [
        {name: value for name, value in line.items() if not name.endswith("_s")}
        for line in read_metrics(tmp_path / "run" / "metrics.jsonl")
    ]
    assert [line for line in lines if "loss" in line] == [line for line in run if "loss" in line]
    for name in ("model.safetensors", HEAD_FILE):
        one, other = (load_file(folder / "export" / name) for folder in (start / "run", tmp_path / "run"))
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def test_an_unfinished_run_is_no_model_yet(start, run, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(start / "run" / "checkpoints")
    with pytest.raises(ValueError, match="trains a reward model and has not ended"):
        load(tmp_path / "run")
    with pytest.raises(ValueError, match="has not ended, so there is no export/"):
        Scorer.load(tmp_path / "run")


def test_adapters_and_the_head_alone_are_trained(start, tmp_path) -> None:
    judge(start, tmp_path / "run", adapter={"kind": "lora", "rank": 3}, steps=4)
    before, after = (load_file(folder / "model.safetensors") for folder in (start / "model", tmp_path / "run" / "export"))
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed
    assert all("_proj" in name for name in changed)
    assert np.any(load_reward_model(tmp_path / "run" / "export").head != 0)


def test_on_a_task_the_best_of_several_answers_is_taken(start, tmp_path, monkeypatch) -> None:
    """The verifier likes answers that do not begin with a letter: some of a random model's do, some do not."""
    problems = [Problem(f"{i}=") for i in range(40)]
    rewards = {"no_letter": lambda p, a: float(not a[:1].isalpha())}
    task = Task("t", problems, problems[:16], rewards, {"no_letter": 1.0}, verifier="no_letter")
    monkeypatch.setitem(reward_model.TASKS, "arithmetic", lambda: task)
    judge(start, tmp_path / "run", data=None, problems=40, answers=4, max_new_tokens=3, batch=8, steps=2)
    assert all(not pair.chosen[:1].isalpha() and pair.rejected[:1].isalpha() for pair in read_pairs(tmp_path / "run" / "pairs.jsonl"))
    best = json.loads((tmp_path / "run" / "results.json").read_text())["best_of_n"]
    assert (best["n"], best["problems"]) == (4, 16)
    assert 0 < best["random"][0] < best["any"][0]

    # The same answers again, with a judge that knows what is right, and one that takes what is wrong wherever it can.
    model, tokenizer, _ = load(start / "model")
    drawing = Drawing(task, Prompting.of(tokenizer), 4, 3, Sampler(), Flight(), lm.REFERENCE)
    solved = drawing.solved(model, task.held_out, 4, jr.key(1), rows=1024)

    class Judge:
        def __init__(self, sign):
            self.sign = sign

        def score(self, prompts, answers):
            return self.sign * np.array([rewards["no_letter"](None, answer) for answer in answers])

    for sign, expected in ((1, solved.any(axis=1)), (-1, solved.all(axis=1))):
        found = best_of_n(Judge(sign), model, drawing, n=4, key=jr.key(1))
        assert found["best"][0] == pytest.approx(expected.mean())
        assert found["random"] == pytest.approx(best["random"])  # the recipe's seed is 0, and the key of its answers 1


# ------------------------------------------------------------------------------------------- scoring


@pytest.fixture(scope="module")
def scorer(start, run):
    return Scorer.load(start / "run", rows=4, device="cpu", dtype="float32")


def test_a_scorer_gives_the_rewards_of_training_whatever_is_scored_beside(start, run, scorer) -> None:
    held_out = [pair for pair in read_pairs(start / "pairs.jsonl") if pair.is_held_out]
    prompts = [pair.messages for pair in held_out for _ in range(2)]
    rewards = scorer.score(prompts, [answer for pair in held_out for answer in (pair.chosen, pair.rejected)])
    results = json.loads((start / "run" / "results.json").read_text())
    assert np.mean(rewards[::2]) == pytest.approx(results["rewards_chosen"], abs=1e-4)
    assert np.mean(rewards[1::2]) == pytest.approx(results["rewards_rejected"], abs=1e-4)
    alone = [scorer.score([prompt], [answer])[0] for prompt, answer in (("1?", "yyy"), ("22?", "n"))]
    np.testing.assert_allclose(scorer.score(["1?", "22?", "3?"], ["yyy", "n", "nnn"])[:2], alone, atol=1e-5)
    assert scorer.best("7?", ["n", "yyyy", "nn"]) == 1
    with pytest.raises(ValueError, match="more than the model's context of 64"):
        scorer.score(["1?"], ["y" * 80])


def test_a_scorer_is_a_reward_of_a_task(scorer) -> None:
    problems = [Problem("1?"), Problem("2?")]
    task = Task("liked", problems, problems, {"learned": scorer.as_reward()}, {"learned": 1.0}, verifier="learned")
    found = score(task, problems, ["yyy", "n"]).total
    np.testing.assert_allclose(found, scorer.score(["1?", "2?"], ["yyy", "n"]), atol=1e-5)
    assert found[0] > found[1]


def test_a_file_of_answers_comes_back_with_rewards(start, run, tmp_path) -> None:
    records = [
        {"prompt": "1?", "answer": "yyy", "id": 7},
        {"prompt": "2?", "answers": ["n", "yyyy"]},
        {"messages": [{"role": "user", "content": "3?"}, {"role": "assistant", "content": "nn"}]},
        {"prompt": "4?", "chosen": "yyy", "rejected": "nn"},
    ]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    status, said = run_here([start / "run", tmp_path / "asked.jsonl", "--out", tmp_path / "scored.jsonl"], "score")
    assert status == 0, said
    assert "of 1 pairs the chosen one wins 100.0%" in said
    found = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert [record.keys() - {"reward", "rewards", "best"} for record in found] == [record.keys() for record in records]
    assert found[0]["reward"] > 0 > found[2]["reward"]
    assert found[1]["best"] == 1
    assert found[3]["rewards"][0] > found[3]["rewards"][1]
    assert run_here([start / "run", tmp_path / "asked.jsonl", "--out", tmp_path / "scored.jsonl"], "score")[0] == 2  # it is there


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "1?"}', "record 1 of .* expected prompt and either answer or answers, chosen and rejected, or messages; got prompt"),
        ('{"prompt": "1?", "answers": []}', "expected texts as answers"),
        ('{"prompt": "1?", "answer": 3}', "expected texts as answers"),
        ('{"messages": [{"role": "user", "content": "1?"}]}', "must end with one of the assistant"),
        ('["1?", "y"]', "record 1 of .* expected an object"),
        ("", "has no records"),
    ],
)
def test_what_cannot_be_scored_is_named(start, run, tmp_path, line, words) -> None:
    (tmp_path / "asked.jsonl").write_text(f"{line}\n")
    with pytest.raises(ValueError, match=words):
        score_file(ScoreConfig(model=start / "run", file=tmp_path / "asked.jsonl"))


def test_a_model_without_a_head_is_no_reward_model(start) -> None:
    with pytest.raises(FileNotFoundError, match=r"reward_head\.safetensors does not exist"):
        Scorer.load(start / "model")


def test_too_few_pairs_are_said(start, tmp_path) -> None:
    with pytest.raises(ValueError, match="are less than one batch of 64"):
        judge(start, tmp_path / "few", batch=64)
    with pytest.raises(ValueError, match="every one of the 40 pairs is longer than --seq 3"):
        judge(start, tmp_path / "long", seq=3)
    with pytest.raises(ValueError, match=r"batch \(8 pairs\) must be a multiple of step.micro_batches \(3\)"):
        judge(start, tmp_path / "pieces", step={"micro_batches": 3})
