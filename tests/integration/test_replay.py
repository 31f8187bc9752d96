"""The first steps of the reference curves come again: weights, order of the text, step, schedule and optimizer are what they were."""

import importlib

import numpy as np
import pytest

from recipes.curves import CURVES, read_curve
from recipes.pretrain_small import Config
from recipes.trial import material, trained

WORDS = ["the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "with", "his", "they", "hot", "word", "what", "out"]

# Losses of a model of 7 thousand parameters on the text below (fp32, reference kernels), the same with jax 0.10.2 and 0.12.0.1 to four
# digits. Made by this very test.
TINY = {"vocab": 290, "d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "d_ff": 24, "seq": 32, "batch": 4, "steps": 40}
FIRST = {"muon": (5.666626, 5.632055, 5.564249, 5.465539), "adamw": (5.666626, 5.628373, 5.546512, 5.409902)}


def texts(folder):
    """Words in an order that is arithmetic: the same on every machine."""
    for i in range(24):
        (folder / f"{i}.txt").write_text(" ".join(WORDS[(i * i + 7 * j * j + j // 3) % len(WORDS)] for j in range(200)))
    return folder


@pytest.mark.parametrize("name", ["muon", pytest.param("adamw", marks=pytest.mark.heavy)])
def test_the_first_steps_of_a_tiny_run_are_what_they_were(name, tmp_path, monkeypatch):
    monkeypatch.setenv("ZMAJ_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "texts").mkdir()
    config = Config(**TINY, data=str(texts(tmp_path / "texts")), optimizer={"name": name}, backend="reference", dtype="float32")
    losses = [line["loss"] for line in trained(config, material(config), stop=4).lines]
    np.testing.assert_allclose(losses, FIRST[name], rtol=2e-3)


def of_pretraining():
    """Those that need nothing but the corpus. Others begin with a model."""
    return [path for path in sorted(CURVES.glob("*.json")) if read_curve(path).recipe in ("pretrain_small", "speedrun")]


def test_every_reference_curve_is_of_settings_that_still_are():
    paths = sorted(CURVES.glob("*.json"))
    assert paths
    for path in paths:
        curve = read_curve(path)
        kind = importlib.import_module(f"recipes.{curve.recipe}").Config
        needed = {name: "nowhere" for name, field in kind.model_fields.items() if field.is_required()}
        assert curve.why_not(curve.recipe, kind(**needed, **curve.settings, seed=curve.seeds[0]), curve.identity) is None


@pytest.mark.heavy
@pytest.mark.parametrize("path", of_pretraining(), ids=lambda path: path.stem)
def test_the_first_steps_of_a_reference_curve_come_again(path):
    curve = read_curve(path)
    kind = importlib.import_module(f"recipes.{curve.recipe}").Config
    config = kind(**curve.settings, seed=curve.seeds[0])
    text = material(config)
    if text.identity["corpus"] != curve.identity["corpus"]:
        pytest.skip("made on another corpus: that of another Python")
    losses = [line["loss"] for line in trained(config, text, stop=len(curve.first)).lines]
    np.testing.assert_allclose(losses, curve.first, atol=0.03)
