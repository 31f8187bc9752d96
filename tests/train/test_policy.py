"""Policy-gradient objectives agree with values worked out by hand, the equation beside them; and the trainer learns from them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny

from lm.flight import Flight
from lm.generate import Sampler
from lm.kernels import REFERENCE
from train import policy
from train.policy import ALGORITHMS, PolicyBatch, policy_objective

# Two answers of three and two tokens; the last place of the second is padding.
NEW = jnp.log(jnp.array([[0.5, 0.2, 0.9], [0.4, 0.1, 0.7]]))
OLD = jnp.log(jnp.array([[0.25, 0.4, 0.9], [0.5, 0.2, 0.1]]))
MASK = jnp.array([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
ADVANTAGES = jnp.array([[2.0, 2.0, 2.0], [-1.0, -1.0, 0.0]])


def close(value, expected) -> None:
    np.testing.assert_allclose(value, expected, atol=1e-6)


def test_ratios() -> None:
    close(policy.token_ratio(NEW, OLD, MASK), [[2.0, 0.5, 1.0], [0.8, 0.5, 1.0]])
    # (2 · 0.5 · 1)^(1/3) = 1 and (0.8 · 0.5)^(1/2)
    close(policy.sequence_ratio(NEW, OLD, MASK), [[1.0] * 3, [math.sqrt(0.4)] * 3])
    close(policy.importance(NEW, OLD, MASK, cap=1.5), [[1.5, 0.5, 1.0], [0.8, 0.5, 1.0]])


def test_the_clipped_surrogate() -> None:
    ratio = policy.token_ratio(NEW, OLD, MASK)
    # -min(w A, clip(w, 0.8, 1.3) A): 2 → 1.3 · 2; 0.5 · 2; 1 · 2; with A = -1: max(0.8, 0.8) and max(0.5, 0.8)
    close(policy.clipped(ratio, ADVANTAGES, 0.2, 0.3), [[-2.6, -1.0, -2.0], [0.8, 0.8, 0.0]])


def test_the_score_function_has_the_gradient_of_reinforce() -> None:
    ratio = policy.token_ratio(NEW, OLD, MASK)
    gradient = jax.grad(lambda x: jnp.sum(policy.score_function(x, ratio, ADVANTAGES, cap=1.5) * MASK))(NEW)
    close(gradient, [[-1.5 * 2, -0.5 * 2, -2.0], [0.8, 0.5, 0.0]])  # -min(w, 1.5) A


def test_normalisations() -> None:
    values = jnp.array([[3.0, 6.0, 9.0], [2.0, 4.0, 99.0]])
    close(policy.by_token(values, MASK, 3), (24, 5))  # over all five tokens
    close(policy.by_sequence(values, MASK, 3), (6 + 3, 2))  # of means
    close(policy.by_constant(values, MASK, 4), (24 / 4, 2))
    nothing = jnp.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])  # a left-out answer is no answer
    close(policy.by_sequence(values, nothing, 3), (6, 1))
    close(policy.by_constant(values, nothing, 3), (6, 1))


def test_estimators_of_the_kl() -> None:
    # p = 0.5, 0.2 against q = 0.25, 0.4
    p, q = NEW[0, :2], OLD[0, :2]
    close(policy.k1(p, q), [math.log(2), -math.log(2)])
    close(policy.k2(p, q), [math.log(2) ** 2 / 2] * 2)
    close(policy.k3(p, q), [0.5 - 1 + math.log(2), 2 - 1 - math.log(2)])


def test_k1_and_k3_are_unbiased_and_k2_has_the_gradient_of_the_kl() -> None:
    """Expectations over a distribution of four tokens, exactly."""
    logits, reference = jnp.array([0.3, -0.2, 1.0, 0.1]), jax.nn.log_softmax(jnp.array([1.0, 0.0, -0.5, 0.2]))

    def kl(x):
        log_p = jax.nn.log_softmax(x)
        return jnp.sum(jnp.exp(log_p) * (log_p - reference))

    log_p = jax.nn.log_softmax(logits)
    for estimator in (policy.k1, policy.k3):
        close(jnp.sum(jnp.exp(log_p) * estimator(log_p, reference)), kl(logits))
    frozen = jax.lax.stop_gradient(jnp.exp(log_p))  # the samples do not move with the policy
    of_loss = jax.grad(lambda x: jnp.sum(frozen * policy.k2(jax.nn.log_softmax(x), reference)))(logits)
    close(of_loss, jax.grad(kl)(logits))
    of_k1 = jax.grad(lambda x: jnp.sum(frozen * policy.k1(jax.nn.log_softmax(x), reference)))(logits)
    close(of_k1, np.zeros(4))  # why k1 goes into the reward


# ------------------------------------------------------------------------------------------- the objective


class Fixed:
    """Stands for a model in flight whose token log-probs are given."""

    def __init__(self, log_probs) -> None:
        self.log_probs = log_probs


def batch_of(reference=None, sampler=OLD) -> PolicyBatch:
    zeros = np.zeros((2, 3), np.int32)
    return PolicyBatch(zeros, zeros, zeros, zeros, MASK, ADVANTAGES, sampler, OLD, reference)


def told(monkeypatch, name: str, log_probs=NEW, batch=None, **how):
    monkeypatch.setattr(policy, "log_probs_of", lambda *args, **kwargs: lambda model, batch, key=None: model.log_probs)
    how = {"sampler": Sampler(), "most": 3} | how
    return policy_objective(ALGORITHMS[name], Flight(), REFERENCE, **how)(Fixed(log_probs), batch or batch_of(), jax.random.key(0))


@pytest.mark.parametrize(
    ("name", "total", "count"),
    [
        ("grpo", (-1.2 * 2 - 0.5 * 2 - 2) / 3 + (0.8 + 0.8) / 2, 2),
        ("dr_grpo", (-1.2 * 2 - 0.5 * 2 - 2 + 0.8 + 0.8) / 3, 2),
        ("dapo", -1.28 * 2 - 0.5 * 2 - 2 + 0.8 + 0.8, 5),
        # s = 1 and √0.4 < 1 - 3e-4: max of -s A and -clip(s) A
        ("gspo", -2.0 + (1 - 3e-4), 2),
        # -min(w, 2) A log π
        ("rloo", -(4 * math.log(0.5) + 1 * math.log(0.2) + 2 * math.log(0.9)) + 0.8 * math.log(0.4) + 0.5 * math.log(0.1), 5),
    ],
)
def test_each_algorithm_by_hand(monkeypatch, name: str, total: float, count: float) -> None:
    loss = told(monkeypatch, name).loss
    close(loss.total, total)
    close(loss.count, count)


def test_what_is_told_beside_the_loss(monkeypatch) -> None:
    found = told(monkeypatch, "grpo", batch=batch_of(reference=OLD), kl_weight=0.5)
    means = {name: float(a / b) for name, (a, b) in found.means.items()}
    assert means["ratio"] == pytest.approx((2 + 0.5 + 1 + 0.8 + 0.5) / 5, abs=1e-6)
    assert found.peaks["ratio_max"] == pytest.approx(2, abs=1e-6)
    assert means["clipped_high"] == pytest.approx(1 / 5)  # w = 2 with A > 0
    assert means["clipped_low"] == pytest.approx(1 / 5)  # w = 0.5 with A < 0; 0.8 stands on the edge
    per_token = [policy.k3(NEW, OLD)[i] for i in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))]
    assert means["kl"] == pytest.approx(float(sum(per_token)) / 5, abs=1e-6)
    # and in the loss, normalised as the rest: by answers
    in_loss = 0.5 * (sum(per_token[:3]) / 3 + sum(per_token[3:]) / 2)
    close(found.loss.total, told(monkeypatch, "grpo").loss.total + in_loss)


def test_truncated_importance_weights_multiply_the_surrogate(monkeypatch) -> None:
    sampler = OLD - jnp.log(4.0)  # the trainer finds every token four times as likely: cut off at 2
    assert told(monkeypatch, "dapo", batch=batch_of(sampler=sampler), importance_cap=2.0).loss.total == pytest.approx(
        2 * float(told(monkeypatch, "dapo").loss.total), abs=1e-5
    )


def test_a_kl_without_a_reference_is_refused(monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"a KL of weight 0\.1 needs reference_log_probs"):
        told(monkeypatch, "grpo", kl_weight=0.1)


def test_a_temperature_and_what_is_cut_off_are_part_of_the_log_probs() -> None:
    """The trainer's log-probs are those of the distribution that is drawn from."""
    model, sampler = tiny("qwen3"), Sampler(temperature=0.7, top_k=5)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 97, (2, 7)))
    logits = model(tokens)
    kept = jax.nn.log_softmax(jnp.stack([sampler.filtered(row) for row in logits]), axis=-1)
    targets = jnp.argsort(logits, axis=-1)[..., -3]  # the third likeliest
    ones = np.ones((2, 7), np.int32)
    batch = PolicyBatch(tokens, targets, np.arange(7)[None] * ones, ones, *[np.zeros((2, 7), np.float32)] * 4, None)
    found = policy.log_probs_of(Flight(), REFERENCE, sampler=sampler)(model, batch)
    close(found, jnp.take_along_axis(kept, targets[..., None], axis=-1)[..., 0])
    # A target that has since fallen out is added to what is kept.
    fallen = jnp.argsort(logits, axis=-1)[..., -9]
    found = policy.log_probs_of(Flight(), REFERENCE, sampler=sampler)(model, batch._replace(targets=fallen))
    assert np.isfinite(found).all()
