"""`recipes.quantise`, in process, on a tiny random model."""

import json

import equinox as eqx
import jax.numpy as jnp
import pytest
from tiny import tiny

import lm
from data.tokenizer import Tokenizer
from recipes import quantise
from recipes.loading import kept_as, load
from recipes.quantise import Config, main


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    tokenizer = Tokenizer.train(["def f(x):\n    return x + 1\n" * 20, "import os\n"], 300)
    lm.save_pretrained(tiny("qwen3", n_layers=1, vocab=tokenizer.vocab_size), folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setattr(quantise, "compilation_cache", lambda: None)


def test_a_folder_is_written_that_the_recipes_open_and_its_cost_is_told(source, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("import os\ndef f(x):\n    return x + 1\n" * 60)
    out = tmp_path / "out"
    report = main(Config(source=str(source), out=out, kind="int4", group=8, data=str(text), max_bytes=1000, seq=16, device="cpu"))
    before, after = report["bits_per_byte"]["before"], report["bits_per_byte"]["after"]
    assert before > 0
    assert 1e-4 < abs(after / before - 1) < 0.3
    assert report["text_bytes"] == 1000
    assert report["bytes"]["before"] > 4 * report["bytes"]["after"] > 0
    assert json.loads((out / "quantisation.json").read_text()) == report
    told = capsys.readouterr().out
    assert f"{after:.4f}" in told
    assert "int4, group 8" in told

    model, tokenizer, _ = load(out)
    assert tokenizer.vocab_size == model.config.vocab
    assert model.blocks[0].mlp.up_proj.weight.record()["group"] == 8
    kept, words = kept_as(model, "auto", "bfloat16")
    assert words == "int4"
    assert kept.embed.weight.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="packed as int4, and cannot be had as int8"):
        kept_as(model, "int8", "bfloat16")
    with pytest.raises(ValueError, match="is packed already"):
        main(Config(source=str(out), out=tmp_path / "twice", kind="int8", device="cpu"))


def test_weights_are_kept_as_asked(source):
    model, _, _ = load(source)
    assert eqx.tree_equal(kept_as(model, "auto", "float32")[0], model)
    assert kept_as(model, "nf4", "bfloat16")[0].blocks[0].attn.q_proj.weight.record()["kind"] == "nf4"


def test_what_cannot_be_written_is_said(source, tmp_path):
    (tmp_path / "there").write_text("")
    with pytest.raises(ValueError, match="is not an empty folder"):
        main(Config(source=str(source), out=tmp_path, device="cpu"))
    with pytest.raises(ValueError, match="one scale a row"):
        main(Config(source=str(source), out=tmp_path / "out", kind="int8", group=32, device="cpu"))
    assert not (tmp_path / "out").exists()
