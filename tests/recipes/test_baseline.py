"""Both sides over one grid: the same windows, the best place of each, and how long each takes to the same bits per byte."""

import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny

import lm
from lm.flight import Flight
from recipes import baseline
from recipes.baseline import Config, best_place, check_torch, held_out_windows, main
from recipes.baseline_table import MARKS, ratios, seconds_to
from recipes.report import nats_of
from recipes.trial import Trial, material, read_lines
from train.parity import is_installed
from train.step import make_token_nats

WORDS = ["the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "with", "his", "they", "hot", "word", "what"]
TINY = {"vocab": "290", "d_model": "16", "n_layers": "1", "n_heads": "2", "n_kv_heads": "2", "d_ff": "24", "seq": "32"}


def test_minutes_are_read_between_runs_in_logarithms():
    """Theirs: 2.0 after 100 s, 1.8 after 400 s; ours: 2.1 after 50 s, 1.8 after 100 s. 1.9 is theirs after 200 s (half of the way in log
    seconds), ours after 50 · 2^(2/3) s; 1.8 after 400 and 100: 4 times as fast."""
    theirs, ours = [(100.0, 2.0), (400.0, 1.8)], [(50.0, 2.1), (100.0, 1.8)]
    assert seconds_to(theirs, 1.9) == pytest.approx(200)
    assert seconds_to(ours, 1.9) == pytest.approx(50 * 2 ** (2 / 3))
    assert seconds_to(ours, 1.7) is None
    assert seconds_to([(100.0, 2.0)], 2.0) == 100
    found = dict(ratios(ours, theirs))
    assert found == {2.0: pytest.approx(100 / (50 * 2 ** (1 / 3))), 1.8: pytest.approx(4.0)}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for i in range(24):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(WORDS, 30 + 60 * (i % 4))))
    return folder


@pytest.fixture
def how(texts, tmp_path, monkeypatch):
    monkeypatch.setenv("ZMAJ_CACHE_DIR", str(tmp_path / "cache"))
    page = tmp_path / "page.md"
    page.write_text("\n".join(MARKS))
    places = {"file": tmp_path / "it.jsonl", "page": page, "picture": tmp_path / "images" / "it.png"}
    return {"data": str(texts), "base": TINY, "rates": (0.01, 0.02), "batches": (2, 4), "tokens": 256, "budgets": (0.5, 1.0)} | places


def test_the_windows_of_the_other_side_count_what_ours_counts(how, tmp_path):
    """A model asked by those windows, one a row, says of each document what it says by our measure."""
    text = material(baseline.experiment(Config(**how), 0.01, 2, 1.0))
    model = tiny("llama", vocab=text.tokenizer.vocab_size, n_layers=1)
    expected, tokens = nats_of(make_token_nats(Flight(), lm.REFERENCE), model, text.held_out, batch=4, seq=32)
    with np.load(held_out_windows(text.held_out, 32, tmp_path / "windows.npz")) as windows:
        logits = model(jnp.asarray(windows["tokens"]))
        log_probs = np.asarray(logits - jnp.log(jnp.sum(jnp.exp(logits), axis=-1, keepdims=True)))
        nats = -np.take_along_axis(log_probs, windows["targets"][..., None], axis=-1)[..., 0] * windows["weights"]
        of = np.bincount(windows["document"], nats.sum(axis=1), len(text.held_out))
        assert int(windows["weights"].sum()) == sum(tokens.values())
    np.testing.assert_allclose(of, [expected[i] for i in range(len(of))], rtol=1e-4)


def test_the_best_of_each_side_is_raced_and_nothing_is_run_twice(how, monkeypatch):
    """Ours is best at 0.02 with 2 rows, theirs at 0.01 with 4; each halves its distance to 1 with the tokens."""
    ran = []

    def figures(side, run, best):
        ran.append((side, run.schedule.peak, run.batch, run.steps))
        tokens = run.steps * run.batch * run.seq
        bits = 1 + (0 if (run.schedule.peak, run.batch) == best else 0.3) + 128 / tokens + (0.2 if side == "torch" else 0.0)
        return bits, tokens, 10.0 * tokens / 128 * (3 if side == "torch" else 1)

    def ours(run, text, told=None):
        bits, tokens, seconds = figures("ours", run, (0.02, 2))
        return Trial([3.0] * run.steps, bits, {}, tokens, 7, 0.1, 0.1, seconds)

    def theirs(config, run, text, windows, told):
        bits, tokens, seconds = figures("torch", run, (0.01, 4))
        return {
            "bits_per_byte": bits,
            "tokens": tokens,
            "train_s": seconds,
            "parameters": 8,
            "last_loss": math.nan,
            "torch": "0",
            "steps": 1,
            "step_s": seconds,
        }

    monkeypatch.setattr(baseline, "run_trial", ours)
    monkeypatch.setattr(baseline, "torch_run", theirs)
    monkeypatch.setattr(baseline, "check_torch", lambda config: None)
    found = main(Config(**how))
    assert found["best"] == {"ours": (0.02, 2), "torch": (0.01, 4)}
    assert len(ran) == 2 * 4 + 2 * 2  # the grid, and the race of both
    assert found["courses"]["ours"] == [(10.0, 0.2, 2.0), (20.0, 0.4, 1.5)]
    assert found["courses"]["torch"] == [(30.0, 30.0, 2.2), (60.0, 60.0, pytest.approx(1.7))]
    page = how["page"].read_text()
    assert "| ours | 2 | 1.8000 | **1.5000** |" in page
    assert "| PyTorch | 4 | **1.7000** | 2.0000 |" in page
    assert "Seconds of PyTorch over ours" in page
    assert how["picture"].exists()
    assert best_place([], "ours") is None
    lines = read_lines(how["file"])
    main(Config(**how))
    assert read_lines(how["file"]) == lines


@pytest.mark.parametrize("changes", [{"batches": (4, 0)}, {"rates": (0.0,)}, {"budgets": (-1.0,)}], ids=["batch", "rate", "budget"])
def test_places_that_cannot_be_are_refused(how, changes):
    with pytest.raises(ValueError, match="greater than 0"):
        Config(**(how | changes))


def test_without_torch_it_is_said_what_to_do(how, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere cannot be run .* expected a Python interpreter"):
        check_torch(Config(**how, torch_python=tmp_path / "nowhere"))
    if not is_installed("torch"):
        with pytest.raises(ValueError, match=r"has no torch .*--sides ours runs ours alone"):
            main(Config(**how))


@pytest.mark.parity
def test_both_sides_run_for_real(how):
    """A grid of one place: their loss falls, and their bits per byte are of the same order as ours."""
    pytest.importorskip("torch")
    one = how | {"rates": (0.01,), "batches": (4,), "tokens": 8192, "budgets": (1.0,)}
    found = main(Config(**one, torch_python=sys.executable, torch_compile=False))
    of = {line["side"]: line["bits_per_byte"] for line in found["lines"]}
    assert 0.5 < of["torch"] / of["ours"] < 2
    assert of["torch"] < 4
