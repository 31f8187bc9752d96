"""What `recipes.plan_adapters` computes and says."""

import json

import jax
import pytest
from targets import skip_without_compiler
from tiny import tiny_config

import lm
from recipes import plan_adapters
from recipes.plan import memory_of
from recipes.plan_adapters import KINDS, Config, beginning, main, run, skeleton_of
from train.gpus import CARDS


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("llama", n_layers=1).to_hf()))
    return str(tmp_path)


def parameters(model):
    return sum(leaf.size for leaf in jax.tree.leaves(skeleton_of(model)))


def some_kinds(monkeypatch, *names):
    monkeypatch.setattr(plan_adapters, "KINDS", {name: KINDS[name] for name in names})


def test_the_table_has_what_the_compiler_says_of_each_kind(folder, capsys, monkeypatch):
    some_kinds(monkeypatch, "full", "QLoRA, NF4 base")
    found = main(Config(model=folder, batch=2, seq=13, rank=3))
    full, qlora = found["full"], found["QLoRA, NF4 base"]
    assert full.trained == parameters(folder)
    assert qlora.trained == 3 * sum(sum(shape) for shape in [(48, 24), (16, 24), (16, 24), (24, 48), (40, 24), (40, 24), (24, 40)])
    assert full.memory.arguments > 12 * full.trained > 2 * qlora.memory.arguments
    told = capsys.readouterr().out
    assert "2 rows of 13 tokens" in told
    for name, each in found.items():
        row = next(line for line in told.splitlines() if line.startswith(name))
        assert "does not fit" not in row
        assert f"{each.trained:,}" in row
        assert row.endswith(f"{each.memory.peak / 1e6:,.0f} MB")


def test_what_does_not_fit_is_said(folder, capsys, monkeypatch):
    some_kinds(monkeypatch, "LoRA, fp32 base")
    monkeypatch.setattr(plan_adapters, "memory_of", lambda target: type(memory_of(target))(1000, "a thousand bytes"))
    main(Config(model=folder, batch=2, seq=13))
    assert capsys.readouterr().out.endswith("MB  does not fit\n")


def test_steps_are_run_on_the_state_that_was_planned(folder):
    ran = run(Config(model=folder, batch=2, seq=13, rank=3, run_steps=2), KINDS["DoRA, NF4 base"])
    assert ran.held_bytes >= 0
    assert ran.step_s > 0


def test_wrong_wishes_are_refused_in_words(folder, tmp_path):
    with pytest.raises(ValueError, match=r"neither a folder with config\.json nor a preset; these are: gemma"):
        skeleton_of("smollm3-135m")
    with pytest.raises(ValueError, match="for h100 they are only compiled: leave out --run-steps"):
        Config(target="h100", run_steps=2)
    with pytest.raises(ValueError, match=r"no linear map of the blocks is called attn\.wq"):
        beginning(Config(model=folder, targets=("attn.wq",)), KINDS["LoRA, fp32 base"])
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match="is of model_type 'mamba'; known are gemma"):
        skeleton_of(folder)


@pytest.mark.heavy
@pytest.mark.parametrize("target", sorted(CARDS))
def test_on_a_card_a_packed_base_is_never_unpacked_whole(target, monkeypatch):
    skip_without_compiler(target)
    kinds = "LoRA, bf16 base", "QLoRA, NF4 base", "DoRA, NF4 base"
    some_kinds(monkeypatch, *kinds)
    plain, *packed = main(Config(model="llama-3.2-1b", target=target, batch=1, seq=512)).values()
    shape = lm.ARCHITECTURES["llama"].presets["llama-3.2-1b"]
    layer = (parameters("llama-3.2-1b") - shape.vocab * shape.d_model) / shape.n_layers * 2  # bytes, in bf16
    for each in packed:
        assert each.memory.temporaries - plain.memory.temporaries < 2 * layer
