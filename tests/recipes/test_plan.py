"""What `recipes.plan` computes and says."""

import dataclasses

import pytest
from targets import skip_without_compiler

from recipes.plan import asked, main, memory_of, plan, variants
from train.gpus import CARDS

TINY = [
    *("--vocab", "400", "--d-model", "32", "--n-layers", "2", "--n-heads", "4", "--n-kv-heads", "2", "--d-ff", "48"),
    *("--seq", "64", "--batch", "8", "--step.micro-batches", "2"),
]


def test_flags_of_the_plan_and_of_the_recipe_go_their_ways():
    config, experiment = asked(["pretrain_1b", "--target", "a6000", "--batch", "256", "--mfu", "0.3"])
    assert (config.recipe, config.target, config.mfu, experiment.batch, experiment.preset) == ("pretrain_1b", "a6000", 0.3, 256, "a6000")
    assert asked(["pretrain_1b", "--target", "a6000", "--preset", "h100"])[1].preset == "h100"
    assert asked(["pretrain_124m"])[1].preset == "h100"
    assert asked(["pretrain_small", "--target", "cpu"])[1].preset == "4m"
    with pytest.raises(SystemExit):
        asked(["pretrain_124m", "--no-such-flag"])


def test_a_plan_for_this_machine_is_told_with_the_source_of_every_figure(capsys):
    assert main(*asked(["pretrain_124m", "--target", "cpu", *TINY]))
    words = capsys.readouterr().out
    lines = dict(line.split("  ", 1) for line in words.splitlines() if "  " in line.strip())
    for name in ("parameters", "arguments", "temporaries", "peak", "measuring", "there is", "FLOPs a step"):
        assert len(lines[name].split()) > 2, name
    assert "computed, nothing is measured" in words
    assert "2 micro-batches of 4 rows of 64 tokens" in words
    assert "28,352" in lines["parameters"]
    # 8 rows of 64 tokens, 6 FLOPs a parameter and 12 · layers · width · context a token
    assert f"{8 * 64 * (6 * 28_352 + 12 * 2 * 32 * 64):.4g}" in lines["FLOPs a step"]


def test_a_step_that_does_not_fit_is_said_and_answered_with_false(capsys, monkeypatch):
    found = plan(asked(["pretrain_124m", "--target", "cpu", *TINY])[1], "cpu")
    limit = dataclasses.replace(memory_of("cpu"), bytes=found.peak - 10**7)
    monkeypatch.setattr("recipes.plan.memory_of", lambda target: limit)
    assert not main(*asked(["pretrain_124m", "--target", "cpu", *TINY]))
    assert "does not fit: 0.01 GB too much" in capsys.readouterr().out


def test_the_memory_of_a_card_is_what_jax_takes_of_it(monkeypatch):
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    assert memory_of("h100").bytes == int(0.75 * CARDS["h100"].memory_bytes)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
    assert memory_of("a6000").bytes == int(0.9 * CARDS["a6000"].memory_bytes)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "90")
    with pytest.raises(ValueError, match="XLA_CLIENT_MEM_FRACTION must be a fraction of the GPU's memory"):
        memory_of("a6000")


def test_a_sweep_has_each_policy_with_batches_in_pieces_that_divide_them():
    seen = [(each.remat, each.step.micro_batches) for each in variants(asked(["pretrain_124m", *TINY])[1])]
    assert seen == [(remat, pieces) for remat in ("none", "dots", "full") for pieces in (1, 2, 4, 8)]


@pytest.mark.heavy
@pytest.mark.parametrize("target", ["h100", "a6000"])
@pytest.mark.parametrize("recipe", ["pretrain_124m", "pretrain_1b"])
def test_a_preset_fits_its_card(recipe, target):
    skip_without_compiler(target)
    found = plan(asked([recipe, "--target", target])[1], target)
    assert found.peak <= memory_of(target).bytes
    # Muon keeps one copy of a matrix of the blocks and two of the rest: the state is 8 to 12 bytes a parameter.
    assert 8 * found.parameters < found.step.arguments < 12 * found.parameters
