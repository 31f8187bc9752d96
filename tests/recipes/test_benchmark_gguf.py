"""`recipes.benchmark_gguf` refuses in words what it cannot measure, and measures a tiny model."""

import pytest
from tiny import tiny
from tiny_gguf import write_model

from recipes.benchmark_gguf import Config, main


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "model.safetensors"}, "expected a GGUF file, got model.safetensors"),
        ({"model": "nowhere.gguf"}, "expected a GGUF file, got nowhere.gguf"),
        ({"prompts": (100,), "new": 30, "slots": 128}, r"--prompts must be 1 to 98 each, what --slots leaves beside --new; got \(100,\)"),
        ({"prompts": ()}, "--prompts must be 1 to"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings, words, tmp_path):
    (tmp_path / "it.gguf").touch()
    with pytest.raises(ValueError, match=words):
        main(Config(**({"model": tmp_path / "it.gguf"} | settings)))


@pytest.mark.heavy
def test_a_tiny_model_is_measured(tmp_path):
    path = write_model(tmp_path / "it.gguf", tiny("llama"))
    figures = main(
        Config(model=path, prompts=(5, 9), new=3, slots=32, rounds=1, weights=("float32", "int8"), json_file=tmp_path / "out.json")
    )
    assert list(figures) == ["prompt5", "prompt9"]
    assert all(speed > 0 for found in figures.values() for who in found.values() for speed in who.values())
    assert (tmp_path / "out.json").is_file()
