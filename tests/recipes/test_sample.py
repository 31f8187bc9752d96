"""`recipes.sample`, in process, on a tiny random model."""

import pytest
from tiny import tiny

import lm
import recipes.sample as sample
from data.tokenizer import Tokenizer
from recipes import generating


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    tokenizer = Tokenizer.train(["def f(x):\n    return x + 1\n" * 20, "import os\n"], 300)
    lm.save_pretrained(tiny("qwen3", vocab=tokenizer.vocab_size), folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def draw(export, monkeypatch, capsys):
    monkeypatch.setattr(generating, "compilation_cache", lambda: None)

    def run(**settings):
        sample.main(sample.Config(model=export, prompt="def ", max_new_tokens=12, device="cpu", **settings))
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


def test_the_first_of_several_samples_is_the_one_shown_as_it_is_drawn(draw):
    settings = {"temperature": 1.0, "min_p": 0.01, "repetition_penalty": 1.2}
    one, words = draw(**settings)
    several, _ = draw(samples=3, **settings)
    assert one.startswith("def ")
    assert several.startswith(one.removesuffix("\n"))
    assert "12 tokens" in words
    assert "stopped by: max-new-tokens" in words


def test_a_bias_and_a_stop_string_end_a_continuation(draw, export):
    token = int(Tokenizer.load(export).encode("import")[-1])
    text, words = draw(temperature=0.0, logit_bias={token: 1e4}, stop=(Tokenizer.load(export).decode([token, token]),))
    assert text == "def \n"
    assert "stopped by: stop string" in words


def test_weights_are_kept_as_asked_and_it_is_said(draw):
    told = {weights: draw(temperature=0.0, weights=weights) for weights in ("float32", "bfloat16", "int8")}
    for weights, (text, words) in told.items():
        assert f"as {weights}]" in words
        assert len(text) > len("def \n")
    assert told["float32"][0] == draw(temperature=0.0, weights="float32")[0]
