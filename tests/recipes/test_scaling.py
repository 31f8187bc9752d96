"""The ladders: foretold before it is run, and the best rate of a grid."""

import numpy as np
import pytest

from recipes import scaling
from recipes.scaling import Config, main, widened
from recipes.scaling_table import marks
from recipes.trial import Trial, read_lines

WORDS = ["the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "with", "his", "they", "hot", "word", "what"]


def test_a_wider_run_is_the_base_as_the_rule_says():
    config = Config(part="widths", widths=(64, 256), optimizer="muon", tokens=8192, seq=64, batch=4)
    base, wide = widened(config, "mup", 64, 0.004), widened(config, "mup", 256, 0.004)
    assert (base.schedule.peak, base.steps, base.init_std, base.logit_scale) == (0.004, 32, 0.02, 1.0)
    assert (wide.init_std, wide.logit_scale, wide.embed_init_std) == (0.01, 0.25, 0.02)
    assert wide.optimizer.learning_rate_of == {"attn.*_proj.weight": 0.5, "mlp.*.weight": 0.5}
    assert wide.optimizer.weight_decay == 0.2
    assert (wide.n_heads, wide.d_ff) == (8, 688)
    assert widened(config, "constant", 256, 0.004).optimizer.learning_rate_of == {}
    power = widened(config.model_copy(update={"exponent": 0.5}), "power", 256, 0.004)
    assert (power.optimizer.learning_rate_of, power.schedule.peak) == ({}, 0.002)


def test_a_grid_of_batches_takes_the_rate_along_and_one_of_decays_leaves_it():
    """The same tokens: 8192 / (64 · 16) = 8 steps of four times the batch, at twice the rate."""
    how = {"widths": (64, 256), "optimizer": "muon", "tokens": 8192, "seq": 64, "batch": 4, "rate": 0.004}
    batch = widened(Config(part="batches", **how), "mup", 256, 16)
    assert (batch.batch, batch.steps, batch.schedule.peak, batch.optimizer.weight_decay) == (16, 8, 0.008, 0.2)
    decay = widened(Config(part="decays", **how), "mup", 256, 0.05)
    assert (decay.batch, decay.schedule.peak, decay.optimizer.weight_decay) == (4, 0.004, 0.1)
    assert widened(Config(part="decays", **how), "constant", 256, 0.05).optimizer.weight_decay == 0.05


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"sizes": ("64x2", "70x2", "128x2")}, "a size is WIDTHxLAYERS"), ({"widths": (64, 100)}, "widths must be multiples of 32")],
)
def test_sizes_that_cannot_be_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Config(**changes)


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.setenv("ZMAJ_CACHE_DIR", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    (tmp_path / "texts").mkdir()
    for i in range(24):
        (tmp_path / "texts" / f"{i}.txt").write_text(" ".join(rng.choice(WORDS, 300)))
    return str(tmp_path / "texts")


def fake(law):
    """A trial that costs nothing: a law of the parameters, or of width and rate."""

    def run(experiment, text, told=None):
        n = scaling.parameters(experiment, text)
        bits = law(experiment, n) + 0.001 * (experiment.seed - 0.5)
        return Trial([3.0] * experiment.steps, bits, {}, experiment.steps * experiment.batch * experiment.seq, n, 0.1, 0.1, 1.0)

    return run


def test_the_largest_is_foretold_before_it_is_run_and_checked(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "run_trial", fake(lambda experiment, n: 1.1 + 40 / n**0.4))
    config = Config(data=texts, sizes=("32x1", "64x1", "64x3", "96x3", "160x4"), seeds=(0, 1), vocab=300, seq=32, batch=2,
                    tokens_per_parameter=0.02, file=tmp_path / "it.jsonl", page=None, picture=tmp_path / "it.png")  # fmt: skip
    found = main(config)
    kinds = [(line["kind"], line["size"]) for line in read_lines(config.file)]
    assert kinds[8:] == [("prediction", "160x4"), ("run", "160x4"), ("run", "160x4")]
    told = found["foretold"]
    n = found["parameters"]["160x4"]
    assert told["value"] == pytest.approx(1.1 + 40 / n**0.4, abs=0.003)
    assert told["low"] < 1.1 + 40 / n**0.4 < told["high"]
    assert len(found["came_to"]) == 2
    assert (tmp_path / "it.png").exists()
    monkeypatch.setattr(scaling, "run_trial", None)  # nothing is run, or foretold, twice
    assert main(config)["foretold"]["value"] == told["value"]
    assert len(read_lines(config.file)) == 11


def test_the_exponent_follows_from_the_best_rates_of_a_grid(texts, tmp_path, monkeypatch):
    """Losses whose best rate is 4e-3 · (64 / width)^½ without a rule; with the rule the same at every width."""

    def law(experiment, n):
        factor = experiment.optimizer.learning_rate_of.get("mlp.*.weight", 1.0)
        best = 4e-3 * (64 / experiment.d_model) ** 0.5
        return 2 + 0.1 * np.log(experiment.schedule.peak * factor / best) ** 2

    monkeypatch.setattr(scaling, "run_trial", fake(law))
    page = tmp_path / "page.md"
    page.write_text("\n".join(marks("widths")))
    how = {"data": texts, "vocab": 300, "seq": 32, "batch": 2, "file": tmp_path / "it.jsonl", "page": page}
    config = Config(part="widths", widths=(64, 128, 256), rates=(1e-3, 2e-3, 4e-3, 8e-3), layers=1, tokens=128, **how)
    found = main(config)
    assert found["exponents"] == {"constant": pytest.approx(-0.5, abs=0.01), "mup": pytest.approx(0.0, abs=0.01)}
    assert "| constant | 0.004 (" in page.read_text()
    assert (tmp_path / "images" / "scaling_widths.png").exists()


def test_at_equal_computation_the_best_size_of_each_budget_is_found(texts, tmp_path, monkeypatch):
    """Losses that are least at √budget / 40 parameters: the exponent is a half, and tokens a parameter follow from 6ND."""

    def law(experiment, n):
        budget = 6 * n * experiment.steps * experiment.batch * experiment.seq
        return 2 + 0.1 * np.log(n / (budget**0.5 / 40)) ** 2

    monkeypatch.setattr(scaling, "run_trial", fake(law))
    page = tmp_path / "page.md"
    page.write_text("\n".join(marks("tokens")))
    sizes = ("32x1", "64x1", "96x1", "96x3", "160x3")  # 0.02 to 1 M parameters
    config = Config(part="tokens", sizes=sizes, budgets=(4e12, 1.6e13, 6.4e13), data=texts, vocab=300, seq=32, batch=2,
                    file=tmp_path / "it.jsonl", page=page)  # fmt: skip
    found = main(config)
    assert found["best"] == {budget: pytest.approx(budget**0.5 / 40, rel=0.02) for budget in config.budgets}
    assert found["exponent"] == pytest.approx(0.5, abs=0.02)
    n = found["best"][4e12]
    assert f"| {4e12 / (6 * n) / n:.2f} |" in page.read_text()
    assert "to the power 0.50" in page.read_text()
    assert (tmp_path / "images" / "scaling_tokens.png").exists()


@pytest.mark.heavy
def test_a_tiny_ladder_runs_for_real(texts, tmp_path):
    how = {"data": texts, "vocab": 300, "seq": 32, "batch": 2, "file": tmp_path / "it.jsonl", "page": None}
    config = Config(sizes=("32x1", "64x1", "96x1"), tokens_per_parameter=0.005, base={"schedule.peak": "0.01"}, **how)
    found = main(config)
    assert [line["bits_per_byte"] < 9 for line in found["lines"]] == [True] * 3
    assert found["foretold"]["law"]["name"] == "power"  # two sizes below the largest
