"""Preference losses agree with values worked out by hand, the equation beside them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.flight import Flight
from lm.kernels import REFERENCE
from train import preference
from train.preference import PreferenceBatch, PreferenceConfig, preference_objective


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def close(value, expected) -> None:
    np.testing.assert_allclose(value, expected, atol=1e-6)


def test_losses_of_a_margin() -> None:
    margin = jnp.array([2.0, -3.0])
    close(preference.dpo_sigmoid(margin, 0.5), [-math.log(sigmoid(1.0)), -math.log(sigmoid(-1.5))])
    smooth = [-0.9 * math.log(sigmoid(z)) - 0.1 * math.log(sigmoid(-z)) for z in (1.0, -1.5)]
    close(preference.dpo_sigmoid(margin, 0.5, 0.1), smooth)
    close(preference.dpo_hinge(margin, 0.5), [0, 2.5])  # max(0, 1 - β margin)
    close(preference.ipo(margin, 0.5), [(2 - 1) ** 2, (-3 - 1) ** 2])  # (margin - 1/(2β))²
    close(preference.bradley_terry(jnp.array([1.0]), jnp.array([-0.5]), 0.25), [-math.log(sigmoid(1.25))])


def test_losses_without_a_reference() -> None:
    chosen, rejected = jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.2]))
    close(preference.simpo(chosen, rejected, 2.0, 0.5), [-math.log(sigmoid(2 * math.log(2.5) - 0.5))])
    # odds 1 and 1/4: -log σ(log 4)
    close(preference.odds_ratio(chosen, rejected), [-math.log(sigmoid(math.log(4)))])
    assert np.isfinite(preference.odds_ratio(jnp.zeros(1), rejected)).all()  # p = 1


def test_kto_judges_each_answer_alone() -> None:
    # λ_D (1 - σ(β (chosen - z))) + λ_U (1 - σ(β (z - rejected))), z = max(0, mean)
    chosen, rejected = jnp.array([1.0, 2.0]), jnp.array([-1.0, 0.0])
    z = preference.kto_baseline(jnp.concatenate([chosen, rejected]))
    close(z, 0.5)
    close(preference.kto_baseline(jnp.array([-1.0])), 0)
    expected = [1.5 * (1 - sigmoid(0.5 * (c - 0.5))) + 0.75 * (1 - sigmoid(0.5 * (0.5 - r))) for c, r in ((1, -1), (2, 0))]
    close(preference.kto(chosen, rejected, z, 0.5, 1.5, 0.75), expected)
    assert jax.grad(lambda r: jnp.sum(preference.kto(chosen, rejected, preference.kto_baseline(r), 0.5)))(chosen).tolist() == [0, 0]


# Two pairs, the answers 2, 3, 1 and 2 tokens long.
TOKEN_LOG_PROBS = jnp.array([[-1.0, -2.0, -9.0], [-1.0, -1.0, -2.0], [-0.5, -9.0, -9.0], [-2.0, -2.0, -9.0]])
MASK = np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]], np.float32)
REFERENCE_SUMS = np.array([-4.0, -4.0, -1.0, -3.0], np.float32)
# log π - log ref: 1, 0, 0.5, -1


def told(monkeypatch, **config):
    monkeypatch.setattr(preference, "log_probs_of", lambda *args, **kwargs: lambda model, batch, key=None: TOKEN_LOG_PROBS)
    zeros = np.zeros((4, 3), np.int32)
    objective = preference_objective(PreferenceConfig(**config), Flight(), REFERENCE)
    return objective(None, PreferenceBatch(zeros, zeros, zeros, zeros, MASK, REFERENCE_SUMS), jax.random.key(0))


def nll(p: float, q: float) -> float:
    return -math.log(sigmoid(math.log(p / (1 - p)) - math.log(q / (1 - q))))


@pytest.mark.parametrize(
    ("config", "total"),
    [
        ({"beta": 0.5}, -math.log(sigmoid(0.5 * 1)) - math.log(sigmoid(0.5 * 1.5))),
        ({"beta": 0.5, "loss": "hinge"}, 0.5 + 0.25),
        ({"beta": 0.5, "loss": "ipo"}, 0 + 0.25),
        # a token: 1/2, 0, 1/2, -1/2
        ({"beta": 0.5, "loss": "ipo", "per_token": True}, 0.25 + 0),
        ({"beta": 2.0, "loss": "simpo", "gamma": 0.0}, -math.log(sigmoid(2 * (-1.5 + 4 / 3))) - math.log(sigmoid(2 * (-0.5 + 2)))),
        (
            {"loss": "orpo", "orpo_weight": 0.2},
            1.5 + 0.5 + 0.2 * (nll(math.exp(-1.5), math.exp(-4 / 3)) + nll(math.exp(-0.5), math.exp(-2))),
        ),
        ({"beta": 0.5, "sft_weight": 2.0}, -math.log(sigmoid(0.5 * 1)) - math.log(sigmoid(0.5 * 1.5)) + 2 * (1.5 + 0.5)),
    ],
)
def test_each_loss_of_a_batch_by_hand(monkeypatch, config: dict, total: float) -> None:
    found = told(monkeypatch, **config)
    close(found.loss.total, total)
    close(found.loss.count, 2)


def test_what_is_told_beside_the_loss(monkeypatch) -> None:
    means = {name: float(total / count) for name, (total, count) in told(monkeypatch, beta=0.5).means.items()}
    expected = {"rewards_chosen": 0.5 * 0.75, "rewards_rejected": 0.5 * -0.5, "margin": 0.5 * 1.25, "accuracy": 1.0}
    expected |= {"log_probs_chosen": (-3 - 0.5) / 2, "log_probs_rejected": (-4 - 4) / 2, "nll_chosen": (1.5 + 0.5) / 2}
    assert means == pytest.approx(expected, abs=1e-6)
