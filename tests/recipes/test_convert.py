import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import tiny

import lm
from data.tokenizer import Tokenizer
from recipes import convert
from recipes.convert import Config, main
from train import parity


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    lm.save_pretrained(tiny("llama"), folder)
    return folder


@pytest.fixture
def alone(monkeypatch):
    """No other implementation is installed."""
    monkeypatch.setattr(parity, "is_installed", lambda *packages: False)
    monkeypatch.setattr(convert, "is_installed", lambda *packages: False)


def report_of(folder):
    return json.loads((folder / "parity.json").read_text())


def test_a_folder_is_written_read_back_and_held_against_the_golden_models(source, alone, tmp_path):
    out = tmp_path / "out"
    assert main(Config(source=str(source), out=out))
    report = report_of(out)
    assert report["read_back_equal"] is True
    assert report["words"].startswith(
        "these weights were not compared: no independent reference is installed. The golden models of the family pass"
    )
    assert report["compared"][0]["max_difference"] < 1e-4
    assert report["source"] == "source"  # and no path
    theirs, ours = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_without_any_reference_nothing_is_said_to_have_passed(source, alone, monkeypatch, tmp_path):
    monkeypatch.setattr(convert, "GOLDEN", tmp_path)
    main(Config(source=str(source), out=tmp_path / "out"))
    report = report_of(tmp_path / "out")
    assert report["words"] == "not compared: no independent reference"
    assert report["compared"] == []


def test_a_reference_that_disagrees_fails(source, monkeypatch, tmp_path):
    monkeypatch.setattr(convert, "can_compare", lambda python: True)
    wrong = tiny("llama", seed=1)
    monkeypatch.setattr(convert, "transformers_logits", lambda folder, tokens, python: ("another", np.asarray(wrong(jnp.asarray(tokens)))))
    assert not main(Config(source=str(source), out=tmp_path / "out"))
    assert report_of(tmp_path / "out")["words"] == "FAILED: compared with another, on the source"


def test_tensors_are_written_in_the_dtype_asked_for_norms_too(source, alone, tmp_path):
    main(Config(source=str(source), out=tmp_path / "out", dtype="bfloat16"))
    assert {str(tensor.dtype) for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {"bfloat16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_tokenizer_goes_along_and_must_be_the_models(source, alone, tmp_path):
    tokenizer = Tokenizer.train(["def f(x):\n    return x\n" * 9], 270)
    tokenizer.save(source)
    with pytest.raises(ValueError, match=r"below the model's vocabulary of 97: is it this model's\?"):
        main(Config(source=str(source), out=tmp_path / "out"))
    lm.save_pretrained(tiny("llama", vocab=tokenizer.vocab_size), source)
    assert main(Config(source=str(source), out=tmp_path / "out"))
    assert Tokenizer.load(tmp_path / "out").digest == Tokenizer.load(source).digest


def test_nothing_is_overwritten(source, tmp_path):
    with pytest.raises(ValueError, match="is not an empty folder: choose another, nothing is overwritten"):
        main(Config(source=str(source), out=source))


def test_a_source_that_is_nowhere_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist: expected the folder of a model, or owner/name"):
        main(Config(source=str(tmp_path / "no" / "where" / "here"), out=tmp_path / "out"))
