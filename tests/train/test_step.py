"""One step: what it computes whatever the pieces, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from stepping import OPTIMIZERS, RECORDER, assert_close, copied, small, step_for
from tiny import facts_of, logits_of, packed_batch, tiny

import lm
from lm.flight import Flight
from train.step import init_state, make_token_nats

# ------------------------------------------------------------------------------------------- the gradient


@pytest.mark.parametrize("k", [4, pytest.param(2, marks=pytest.mark.heavy)])
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


# ------------------------------------------------------------------------------------------- what the blocks report


def sparse(**changes):
    return tiny("mixtral", n_layers=1, **changes)


def test_the_routers_balance_is_told_and_trained_on_by_its_weight():
    batch = packed_batch()
    batch.loss_weights[:] = np.arange(13) == 3  # one token a row is supervised; the balance is of all that are real
    batch.loss_weights[1] = 0.0

    def balance(model):
        _, _, aux = model.hidden(jnp.asarray(batch.tokens), facts_of(batch))
        return {name: total / count for name, (total, count) in aux.items()}

    told = jax.jit(balance)(sparse())
    states = {}
    for weights in [(0.0, 0.0), (0.5, 0.0), (0.0, 0.25)]:
        model = sparse(balance=weights[0], router_z=weights[1])
        states[weights], metrics = step_for(RECORDER, clip_norm=1e9)(init_state(model, RECORDER), batch, 0.0)
        for name, value in told.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5)
    plain, balanced, small_z = ([np.asarray(g) for g in jax.tree.leaves(state.optimizer)] for state in states.values())
    for name, weight, pulled in (("router_balance", 0.5, balanced), ("router_z", 0.25, small_z)):
        slope = jax.tree.leaves(jax.jit(jax.grad(lambda model, name=name: balance(model)[name]))(sparse()))
        for without, with_it, expected in zip(plain, pulled, slope, strict=True):
            np.testing.assert_allclose(with_it - without, weight * expected, atol=1e-5 * max(np.abs(without).max(), 1))
    router = states[(0.5, 0.0)].optimizer.blocks[0].mlp.router.weight - states[(0.0, 0.0)].optimizer.blocks[0].mlp.router.weight
    assert jnp.abs(router).max() > 1e-3


def test_micro_batches_report_the_mean_of_all_tokens_and_pull_by_the_tokens_they_have():
    batch = packed_batch(batch=4)
    batch.loss_weights[2:] = 0.0  # the second micro-batch has nothing to learn from: its router is not pulled either
    model = sparse(balance=0.5)
    state, metrics = step_for(RECORDER, micro_batches=2)(init_state(copied(model), RECORDER), batch, 0.0)
    halves = [jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], batch) for i in range(2)]
    first_state, first = step_for(RECORDER)(init_state(copied(model), RECORDER), halves[0], 0.0)
    assert_close(state.optimizer, first_state.optimizer, 1e-5)
    _, second = step_for(RECORDER)(init_state(copied(model), RECORDER), halves[1], 0.0)
    real = [np.sum(half.segments > 0) for half in halves]
    expected = np.average([first["router_balance"], second["router_balance"]], weights=real)
    np.testing.assert_allclose(metrics["router_balance"], expected, rtol=1e-5)


# ------------------------------------------------------------------------------------------- running


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["adamw", "muon", "lion", "adafactor", "schedule_free"])
def test_one_batch_is_learned_by_heart(optimizer):
    state, step, batch = init_state(small(), optimizer), step_for(optimizer), packed_batch()
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch, 0.02)
        losses.append(float(metrics["loss"]))
    assert losses[0] > np.log(97) - 1  # knows nothing at first
    assert losses[-1] < 0.1, losses
    assert int(state.step) == 60
    assert int(state.stats.skipped) == 0


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

    def update(gradient, state, params, *, learning_rate):
        traced.append(1)
        return RECORDER.update(gradient, state, params, learning_rate=learning_rate)

    optimizer = optax.GradientTransformationExtraArgs(RECORDER.init, update)
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
