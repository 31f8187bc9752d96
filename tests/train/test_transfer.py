"""What goes along with the width: the rules, and that a step then moves the stream by as much at any width."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lm
from lm.base import leaves_by_path
from lm.models.zmaj import ZmajConfig
from recipes.pretrain_small import PRESETS, Config
from train.optimizers import OptimizerConfig, build_optimizer
from train.transfer import PEAK, POWER, changes, transferred


@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 1 / 4), ("muon", 1 / 2)], ids=["entries add up", "singular values are alike"])
def test_factors_at_four_times_the_width(optimizer, rate):
    found = transferred("mup", optimizer, 512, 128)
    assert found == (rate, 1 / 2, 1 / 4, 1 / rate, 1)
    assert transferred("mup", optimizer, 512, 128, exponent=0.0).rate == 1
    assert transferred("constant", optimizer, 512, 128) == (1, 1, 1, 1, 1)
    assert transferred("mup", optimizer, 128, 128) == (1, 1, 1, 1, 1)
    assert transferred("power", optimizer, 512, 128, exponent=0.5) == (1, 1, 1, 1, 1 / 2)


def moved(rule, width):
    """How far one step of Muon moves what the first MLP writes, root mean square, over that of what it wrote."""
    sizes = {"n_layers": 1, "n_heads": width // 8, "n_kv_heads": width // 8, "head_dim": 8, "vocab": 61, "context": 16, "tied": True}
    change = changes(transferred(rule, "muon", width, 32), init_std=0.1, weight_decay=0.0)
    if rule == "constant":
        change = {"init_std": 0.1, "embed_init_std": 0.1, "logit_scale": 1.0, "optimizer": {"weight_decay": 0.0}}
    config = ZmajConfig(
        d_model=width, d_ff=2 * width, init_std=change["init_std"], embed_init_std=0.1, logit_scale=change["logit_scale"], **sizes
    )
    model = lm.build(config, key=jr.key(0))
    optimizer = build_optimizer(OptimizerConfig(name="muon", **change["optimizer"]))
    tokens = jnp.arange(16)

    @jax.jit
    def run(model):
        gradient = jax.grad(lambda m: -jnp.mean(jax.nn.log_softmax(m(tokens))[jnp.arange(15), tokens[1:]]))(model)
        updates, _ = optimizer.update(gradient, optimizer.init(model), model, learning_rate=0.02)
        mlp, change = model.blocks[0].mlp, leaves_by_path(updates)["blocks/0/mlp/up_proj/weight"]
        x = model.blocks[0].mlp_norm(model.embed(tokens))
        return jnp.sqrt(jnp.mean(jnp.square(x @ change.T)) / jnp.mean(jnp.square(mlp.up_proj(x))))

    return float(run(model))


def test_under_mup_a_step_moves_features_as_far_at_eight_times_the_width():
    """Without a rule Muon's step at root mean square 0.2 grows as a map as √width; under the rule it stays (a factor of 1.5 for what
    chance leaves in so small models)."""
    narrow, wide = moved("mup", 32), moved("mup", 256)
    assert 1 / 1.5 < wide / narrow < 1.5
    assert moved("constant", 256) > 0
    np.testing.assert_allclose(moved("constant", 32), narrow, rtol=1e-5)


def test_the_peak_goes_with_a_power_of_the_width_through_the_defaults():
    assert PEAK.at(256) == Config().schedule.peak
    assert PEAK.at(512) / PEAK.at(256) == pytest.approx(2**-POWER)
    assert PRESETS["30m"]["schedule"].peak == pytest.approx(PEAK.at(512), rel=0.02)
    assert transferred("power", "muon", 512, 256).all == pytest.approx(PEAK.at(512) / PEAK.at(256))
