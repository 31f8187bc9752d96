"""What `recipes.plan_rl` computes and says: the real programs of a step, and what lives beside each."""

import json
from dataclasses import replace

import pytest
from targets import skip_without_compiler
from tiny import tiny_config

from recipes import plan_rl
from recipes.plan import memory_of
from recipes.plan_rl import Config, asked, main, plan
from train.gpus import CARDS


@pytest.fixture
def flags(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("qwen3", n_layers=1).to_hf()))
    return ["--target", "cpu", "--width", "7", "--model", str(tmp_path), "--prompts", "3", "--n", "4", "--max-new-tokens", "5",
            "--step.micro-batches", "2", "--remat", "none", "--dtype", "float32"]  # fmt: skip


def test_flags_of_the_plan_and_of_the_recipe_go_their_ways():
    config, rl = asked(["--target", "a6000", "--preset", "qwen3-1.7b", "--prompts", "8", "--width", "300"])
    assert (config.target, config.width) == ("a6000", 300)
    assert (str(rl.model), rl.prompts, rl.n) == ("Qwen/Qwen3-1.7B", 8, 8)
    assert plan_rl.skeleton_of(plan_rl.shape_of(rl.model)).config.d_model == 2048
    with pytest.raises(SystemExit):
        asked(["--no-such-flag", "1"])


def test_what_lives_beside_each_program_is_counted_once(flags):
    found = plan(*asked(flags))
    weights = 4 * found.parameters
    assert found.held["the model it began with"] == weights
    assert 3 * weights < found.held["state of training"] < 3 * weights + 2000  # masters, two moments, counters
    programs = {program.name: program for program in found.programs}
    always = sum(found.held.values())
    cache = 2 * 12 * 2 * 8 * (7 + 5) * 4  # k and v of 12 answers, 2 heads of 8, 12 slots, fp32
    reading, drawing = programs["sampler: prompts"], programs["sampler: answers"]
    assert reading.memory.outputs > cache
    assert drawing.memory.arguments > weights + cache
    assert drawing.memory.outputs < cache  # it is written over the one it was given
    for name in ("sampler: prompts", "sampler: answers", "log-probabilities"):
        assert programs[name].live == always + programs[name].memory.peak - weights
    update = programs["update"]
    assert update.live == always + update.memory.peak - found.held["state of training"]
    assert found.peak == max(program.live for program in found.programs)
    fewer = {program.name: program for program in plan(*asked([*flags, "--kl-weight", "0"])).programs}
    assert fewer["update"].memory.arguments == update.memory.arguments - 12 * 11 * 4  # the reference's log-probs: rows, targets, fp32


def test_a_plan_is_told_and_what_does_not_fit_is_said(flags, capsys, monkeypatch):
    config, rl = asked(flags)
    assert main(config, rl)
    told = capsys.readouterr().out
    assert "computed, nothing is measured" in told
    assert "3 prompts of up to 7 tokens, 4 answers of up to 5 to each, updates in 2 pieces of 6 answers" in told
    for name in (
        "state of training",
        "the model it began with",
        "sampler: prompts",
        "sampler: answers",
        "log-probabilities",
        "update",
        "peak",
    ):
        assert any(line.startswith(name) and "GB" in line for line in told.splitlines()), name
    monkeypatch.setattr(plan_rl, "memory_of", lambda target: replace(memory_of(target), bytes=1000))
    assert not main(config, rl)
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.heavy
@pytest.mark.parametrize("preset", ["qwen3-0.6b", "qwen3-1.7b"])
def test_a_preset_fits_an_h100(preset):
    skip_without_compiler("h100")
    config, rl = asked(["--preset", preset])
    assert plan(config, rl).peak <= memory_of("h100").bytes < CARDS["h100"].memory_bytes
    assert config == Config()
