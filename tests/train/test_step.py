"""One step: what it computes whatever the pieces, what it refuses, and that it learns."""

from functools import lru_cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from tiny import facts_of, logits_of, packed_batch, tiny

import lm
from lm.flight import Flight
from train.optimizers import OptimizerConfig, build_optimizer
from train.step import StepConfig, TrainState, init_state, make_step, make_token_nats

# Remembers the gradient it was given, to be looked at, and moves against it.
RECORDER = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params), lambda gradient, state, params: (gradient, gradient)
)


def small(n_layers=1, **changes):
    return tiny("llama", n_layers=n_layers, **changes)


@lru_cache  # one step compiles once for all tests
def step_for(optimizer, flight=Flight(), ops=lm.REFERENCE, **config):  # noqa: B008
    return make_step(optimizer, StepConfig(**config), flight, ops, jr.key(5))


ADAMW, MUON = (build_optimizer(OptimizerConfig(name=name)) for name in ("adamw", "muon"))


def copied(tree):
    """Its own arrays: a step takes those it is given."""
    return jax.tree.map(jnp.array, tree)


def assert_close(one, other, rtol):
    """Every leaf, to a fraction of its largest entry."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


# ------------------------------------------------------------------------------------------- the gradient


@pytest.mark.parametrize("k", [2, 4])
def test_micro_batches_give_the_gradient_of_the_whole_batch(k):
    batch = packed_batch(batch=4)
    batch.loss_weights[1] = 0.0  # a row to learn nothing from, and one to learn half: a mean of means would be another number
    batch.loss_weights[3, 4:] = 0.0
    whole_state, whole = step_for(RECORDER)(init_state(small(), RECORDER), batch, 0.1)
    state, metrics = step_for(RECORDER, micro_batches=k)(init_state(small(), RECORDER), batch, 0.1)
    assert metrics["tokens"] == whole["tokens"] == batch.loss_weights.sum()
    np.testing.assert_allclose(metrics["loss"], whole["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], whole["grad_norm"], rtol=1e-5)
    assert_close(state.optimizer, whole_state.optimizer, 1e-5)  # fp32 sums in another order
    assert_close(state.trainable, whole_state.trainable, 1e-5)


def test_a_batch_that_cannot_be_cut_evenly_is_refused_in_words():
    with pytest.raises(ValueError, match=r"batch \(3 rows\) must be a multiple of micro_batches \(2\)"):
        step_for(RECORDER, micro_batches=2)(init_state(small(), RECORDER), packed_batch(batch=3), 0.1)


def test_the_gradient_is_that_of_the_mean_and_is_clipped_after_its_norm_is_told():
    batch, model = packed_batch(), small()

    @jax.jit
    @jax.grad
    def plain(model):
        log_p = jax.nn.log_softmax(model(jnp.asarray(batch.tokens), facts_of(batch)))
        nats = -jnp.take_along_axis(log_p, jnp.asarray(batch.targets)[..., None], axis=-1)[..., 0]
        return jnp.sum(nats * batch.loss_weights) / batch.loss_weights.sum()

    gradient = plain(model)
    norm = optax.tree.norm(gradient)
    before = copied(model)
    for clip_norm in (1e6, 0.01):
        state, metrics = step_for(RECORDER, clip_norm=clip_norm)(init_state(copied(model), RECORDER), batch, 0.5)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
        scaled = jax.tree.map(lambda g, clip=clip_norm: g * min(1.0, clip / norm), gradient)
        assert_close(state.optimizer, scaled, 2e-5)  # 1e-6 is added to the norm, and sums are in another order
        assert_close(state.trainable, jax.tree.map(lambda p, g: p - 0.5 * g, before, scaled), 1e-5)
    assert norm > 0.1  # else nothing was clipped


def test_the_z_loss_is_trained_on_and_not_reported():
    batch = packed_batch()
    (state, metrics), (pulled_state, pulled) = (step_for(RECORDER, z_loss=z)(init_state(small(), RECORDER), batch, 0.1) for z in (0.0, 0.1))
    np.testing.assert_allclose(pulled["loss"], metrics["loss"], rtol=1e-6)
    assert not np.allclose(pulled_state.optimizer.embed.weight, state.optimizer.embed.weight, rtol=0.01)


# ------------------------------------------------------------------------------------------- the state


def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_does():
    optimizer, step = ADAMW, step_for(ADAMW)
    good, bad = packed_batch(), packed_batch()
    bad.loss_weights[1, 3] = np.nan
    state, _ = step(init_state(small(), optimizer), good, 0.1)
    before = copied(state)
    state, metrics = step(state, bad, 0.1)
    assert_same((state.trainable, state.optimizer), (before.trainable, before.optimizer))
    assert (int(state.step), int(state.skipped), int(metrics["skipped"])) == (2, 1, 1)

    state, metrics = step(state, good, 0.1)
    expected, _ = step(TrainState(before.trainable, before.frozen, before.optimizer, jnp.array(2), jnp.array(1)), good, 0.1)
    assert_same(state, expected)
    assert (int(state.step), int(metrics["skipped"])) == (3, 1)
    assert np.isfinite(metrics["loss"])
    assert not np.array_equal(state.trainable.embed.weight, expected.optimizer[0].mu.embed.weight)


def test_a_weight_that_is_not_finite_is_left_as_it_is():
    broken = eqx.tree_at(lambda m: m.blocks[0].mlp.up_proj.weight, small(), replace_fn=lambda w: w.at[2, 3].set(jnp.inf))
    before = copied(broken)
    state, metrics = step_for(ADAMW)(init_state(broken, ADAMW), packed_batch(), 0.1)
    assert_same(state.trainable, before)
    assert int(metrics["skipped"]) == 1


def test_the_state_passed_in_is_used_up_but_for_what_is_frozen():
    model = small()
    trained = jax.tree.map(lambda _: False, model)
    trained = eqx.tree_at(lambda m: m.blocks[0].mlp, trained, replace_fn=lambda mlp: jax.tree.map(lambda _: True, mlp))
    trainable, frozen = eqx.partition(model, trained)
    first = TrainState(trainable, frozen, RECORDER.init(trainable), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
    frozen_before, trainable_before = copied(frozen), copied(trainable)
    second, _ = step_for(RECORDER)(first, packed_batch(), 0.5)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((first.trainable, first.optimizer, first.step)))
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(first.trainable.blocks[0].mlp.up_proj.weight)
    assert second.frozen is first.frozen
    assert_same(first.frozen, frozen_before)
    assert not np.array_equal(second.trainable.blocks[0].mlp.up_proj.weight, trainable_before.blocks[0].mlp.up_proj.weight)
    assert jax.tree.structure(second.model) == jax.tree.structure(model)


def test_full_training_freezes_nothing_and_every_leaf_gets_a_gradient():
    state = init_state(small(), RECORDER)
    assert jax.tree.leaves(state.frozen) == []
    state, _ = step_for(RECORDER)(state, packed_batch(), 0.1)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(state.optimizer))


# ------------------------------------------------------------------------------------------- running


@pytest.mark.parametrize("optimizer", [ADAMW, MUON], ids=["adamw", "muon"])
def test_one_batch_is_learned_by_heart(optimizer):
    state, step, batch = init_state(small(), optimizer), step_for(optimizer), packed_batch()
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch, 0.02)
        losses.append(float(metrics["loss"]))
    assert losses[0] > np.log(97) - 1  # knows nothing at first
    assert losses[-1] < 0.1, losses
    assert int(state.step) == 60
    assert int(state.skipped) == 0


def test_each_step_draws_its_own_dropout_and_draws_it_again_when_repeated():
    step = step_for(RECORDER)
    state = init_state(small(dropout=0.3), RECORDER)
    again = copied(state)
    batch = packed_batch()
    state, first = step(state, batch, 0.0)  # at learning rate 0 nothing else changes
    state, second = step(state, batch, 0.0)
    again, repeated = step(again, batch, 0.0)
    again, second_repeated = step(again, batch, 0.0)
    assert abs(first["loss"] - second["loss"]) > 1e-3
    assert (float(repeated["loss"]), float(second_repeated["loss"])) == (float(first["loss"]), float(second["loss"]))


def test_micro_batches_draw_different_dropout():
    batch = packed_batch(batch=2)
    twice = jax.tree.map(lambda x: np.stack([x[0], x[0]]), batch)
    row = jax.tree.map(lambda x: x[:1], batch)
    _, alone = step_for(RECORDER)(init_state(small(dropout=0.3), RECORDER), row, 0.0)
    _, both = step_for(RECORDER, micro_batches=2)(init_state(small(dropout=0.3), RECORDER), twice, 0.0)
    assert abs(both["loss"] - alone["loss"]) > 1e-3  # the same row twice with the same mask would be its mean


def test_another_learning_rate_compiles_nothing():
    traced = []

    def update(gradient, state, params):
        traced.append(1)
        return gradient, state

    optimizer = optax.GradientTransformation(RECORDER.init, update)
    state, step = init_state(small(), optimizer), step_for(optimizer)
    for rate in (0.1, 0.2, 0):
        state, _ = step(state, packed_batch(), rate)
    assert len(traced) == 1


@pytest.mark.parametrize("backend", ["reference", "xla", "cpu"])
def test_a_scanned_rematerialised_bf16_step_is_near_the_plain_one(backend):
    batch = packed_batch(batch=4)
    _, plain = step_for(RECORDER)(init_state(small(n_layers=2), RECORDER), batch, 0.1)  # compiled once
    flight = Flight(layers="scan", remat="full", dtype="bfloat16")
    # One micro-batch and two, one chunk of the loss and several: layouts of the CPU's products differ in each.
    for config in [{"micro_batches": 2, "loss_chunk": 8}, *([{}] if backend == "cpu" else [])]:
        state, metrics = step_for(RECORDER, flight, lm.BACKENDS[backend], **config)(init_state(small(n_layers=2), RECORDER), batch, 0.1)
        np.testing.assert_allclose(metrics["loss"], plain["loss"], rtol=0.01)  # bf16 has 8 bits, an error of 0.4 % a rounding
        np.testing.assert_allclose(metrics["grad_norm"], plain["grad_norm"], rtol=0.03)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((state.trainable, state.optimizer)))


def test_token_nats_are_log_softmax_at_the_target_with_dropout_off():
    model, batch = small(dropout=0.3), packed_batch()
    nats = make_token_nats(Flight(layers="scan"), lm.REFERENCE, chunk=7)(model, batch)
    log_p = jax.nn.log_softmax(logits_of(model, jnp.asarray(batch.tokens), facts_of(batch)))
    expected = -np.take_along_axis(np.asarray(log_p), batch.targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(nats, expected, rtol=2e-5, atol=2e-5)  # fp32 rounding
