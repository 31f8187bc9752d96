"""One step: what it computes whatever the pieces, what it refuses, and that it learns."""

from dataclasses import replace
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
from lm.base import leaves_by_path, role
from lm.flight import Flight
from train.averages import AverageConfig, average_rate
from train.optimizers import OptimizerConfig, build_optimizer
from train.step import SPIKE_WINDOW, Stats, StepConfig, init_state, make_step, make_token_nats

# Remembers the gradient it was given, to be looked at, and moves against it.
RECORDER = optax.GradientTransformationExtraArgs(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, state, params, *, learning_rate: (jax.tree.map(lambda g: -learning_rate * g, gradient), gradient),
)


def small(n_layers=1, **changes):
    return tiny("llama", n_layers=n_layers, **changes)


@lru_cache  # one step compiles once for all tests
def step_for(optimizer, flight=Flight(), ops=lm.REFERENCE, **config):  # noqa: B008
    return make_step(optimizer, StepConfig(**config), flight, ops, jr.key(5))


ADAMW, MUON, *_, SCHEDULE_FREE = OPTIMIZERS = [
    build_optimizer(OptimizerConfig(name=name)) for name in ("adamw", "muon", "lion", "adafactor", "schedule_free")
]


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


# ------------------------------------------------------------------------------------------- the state


def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_does():
    optimizer, step = ADAMW, step_for(ADAMW)
    good, bad = packed_batch(), packed_batch()
    bad.loss_weights[1, 3] = np.nan
    state, _ = step(init_state(small(), optimizer), good, 0.1)
    before = copied(state)
    state, metrics = step(state, bad, 0.1)
    assert_same((state.trainable, state.optimizer), (before.trainable, before.optimizer))
    assert (int(state.step), int(state.stats.skipped), int(metrics["skipped"])) == (2, 1, 1)
    assert int(state.stats.seen) == 1

    before = replace(before, step=jnp.array(2), stats=copied(state.stats))
    state, metrics = step(state, good, 0.1)
    expected, _ = step(before, good, 0.1)
    assert_same(state, expected)
    assert (int(state.step), int(metrics["skipped"])) == (3, 1)
    assert np.isfinite(metrics["loss"])
    assert not np.array_equal(state.trainable.embed.weight, expected.optimizer[0].mu.embed.weight)


def test_a_batch_without_a_token_to_learn_from_changes_nothing_and_is_counted():
    empty = packed_batch()
    empty.loss_weights[:] = 0.0
    state, _ = step_for(ADAMW)(init_state(small(), ADAMW), packed_batch(), 0.1)
    before = copied(state)
    state, metrics = step_for(ADAMW)(state, empty, 0.1)
    assert_same((state.trainable, state.optimizer), (before.trainable, before.optimizer))
    assert (int(metrics["skipped"]), float(metrics["tokens"]), int(state.stats.seen)) == (1, 0.0, 1)


def test_a_weight_that_is_not_finite_is_left_as_it_is():
    broken = eqx.tree_at(lambda m: m.blocks[0].mlp.up_proj.weight, small(), replace_fn=lambda w: w.at[2, 3].set(jnp.inf))
    before = copied(broken)
    state, metrics = step_for(ADAMW)(init_state(broken, ADAMW), packed_batch(), 0.1)
    assert_same(state.trainable, before)
    assert int(metrics["skipped"]) == 1


def test_the_state_passed_in_is_used_up_but_for_what_is_frozen():
    model = small()
    first = init_state(model, RECORDER, frozen=["embed.weight", "unembed.weight", "*norm.scale", "blocks/0/attn/*"])
    assert set(leaves_by_path(first.trainable)) == {f"blocks/0/mlp/{name}_proj/weight" for name in ("gate", "up", "down")}
    frozen_before, trainable_before = copied(first.frozen), copied(first.trainable)
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


def test_what_is_to_be_frozen_must_be_there_and_leave_something():
    with pytest.raises(ValueError, match=r"frozen: nothing here is called embedding; the roles are .*embed\.weight"):
        init_state(small(), RECORDER, frozen=["embedding", "embed.*"])
    with pytest.raises(ValueError, match=r"frozen \(\*\) leaves nothing to train"):
        init_state(small(), RECORDER, frozen=["*"])


@pytest.mark.parametrize(
    "settings", [{}, {"frozen": ["embed.*", "blocks/0/attn/*"]}, {"average": True}, {"frozen": ["mlp.*"], "average": True}]
)
def test_a_state_comes_back_from_what_a_checkpoint_holds(settings):
    def fresh():
        return init_state(small(), ADAMW, **settings)

    state, _ = step_for(ADAMW)(fresh(), packed_batch(), 0.1, 0.5)
    items = copied(state.items())
    back = jax.eval_shape(fresh).with_items(items, 1)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert_same(back, state)
    assert jax.tree.structure(items["model"]) == jax.tree.structure(small())  # whole, whatever is frozen


@pytest.mark.parametrize("settings", [{}, {"frozen": ["embed.*"], "average": True}])
def test_a_state_from_a_checkpoint_compiles_one_step(settings, caplog):
    """A checkpoint's arrays are committed to their device, as a fresh state's are not."""

    def fresh():
        return init_state(small(), ADAMW, **settings)

    items = jax.device_put(copied(fresh().items()), jax.devices()[0])
    state, step = jax.eval_shape(fresh).with_items(items, 3), step_for(ADAMW)
    with jax.log_compiles():
        for _ in range(3):
            state, _ = step(state, packed_batch(), 0.1, 0.5)
    assert len([record for record in caplog.records if record.getMessage().startswith("Compiling jit(step) ")]) == 1


# ------------------------------------------------------------------------------------------- averages


@pytest.mark.parametrize(
    "config",
    [AverageConfig(name="ema", decay=0.7), AverageConfig(name="swa", start=0.35, every=2), AverageConfig(name="swa", start=0.0)],
    ids=["ema", "swa", "swa of all"],
)
def test_the_average_is_that_of_the_weights_after_each_update(config):
    steps_done, rate = 8, average_rate(config, 8)
    state = init_state(small(), ADAMW, average=True)
    seen = []
    for index in range(steps_done):
        state, _ = step_for(ADAMW)(state, packed_batch(seed=index), 0.05, rate(index))
        seen.append(np.array(state.model.embed.weight, np.float64))
    if config.name == "swa":
        first = int(np.ceil(config.start * steps_done))
        expected = np.mean(seen[first :: config.every], axis=0)
    else:
        expected = seen[0] * 0.0
        for index, weights in enumerate(seen):
            past = min(0.7, (1 + index) / (10 + index))
            expected = past * (expected if index else np.asarray(small().embed.weight, np.float64)) + (1 - past) * weights
    np.testing.assert_allclose(state.averaged.embed.weight, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(expected - seen[-1]).max() > 0.01  # else it could be the last weights


def test_a_step_that_changes_nothing_leaves_the_average():
    bad = packed_batch()
    bad.loss_weights[1, 3] = np.nan
    state, _ = step_for(ADAMW)(init_state(small(), ADAMW, average=True), packed_batch(), 0.1, 0.3)
    before = copied(state.average)
    state, _ = step_for(ADAMW)(state, bad, 0.1, 0.3)
    assert_same(state.average, before)


def test_no_average_no_averaged_model_but_a_schedule_free_optimizer_brings_its_own():
    assert init_state(small(), ADAMW).averaged is None
    state, losses = init_state(small(), SCHEDULE_FREE), []
    for _ in range(3):
        state, _ = step_for(SCHEDULE_FREE)(state, packed_batch(), 0.05)
        losses.append(np.abs(np.asarray(state.averaged.embed.weight) - np.asarray(state.model.embed.weight)).max())
    assert jax.tree.structure(state.averaged) == jax.tree.structure(small())
    assert losses[0] < 1e-6 < losses[1]  # after one step x and z are one


# ------------------------------------------------------------------------------------------- spikes


def used_to(state, loss, grad_norm):
    """As if the run had seen enough steps of about these numbers."""
    rng = np.random.default_rng(0)
    losses, norms = (jnp.asarray(mean * (1 + 0.01 * rng.normal(size=SPIKE_WINDOW)), jnp.float32) for mean in (loss, grad_norm))
    return replace(state, stats=replace(Stats.empty(), seen=jnp.array(SPIKE_WINDOW, jnp.int32), losses=losses, grad_norms=norms))


@pytest.mark.parametrize("rule", ["warn", "skip", "stop"])
@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_step_that_jumps_is_counted_and_taken_or_not_by_rule(rule, what):
    _, usual = step_for(ADAMW)(init_state(small(), ADAMW), packed_batch(), 0.1)
    loss, norm = float(usual["loss"]), float(usual["grad_norm"])
    expected = (loss / 2, norm) if what == "loss" else (loss, norm / 2)  # what the run is used to: this step is twice that
    state = used_to(init_state(small(), ADAMW), *expected)
    before = copied(state)
    state, metrics = step_for(ADAMW, on_spike=rule)(state, packed_batch(), 0.1)
    past = np.asarray(before.stats.losses if what == "loss" else before.stats.grad_norms, np.float64)
    value = loss if what == "loss" else norm
    np.testing.assert_allclose(metrics["sigmas"], (value - past.mean()) / past.std(), rtol=1e-3)
    assert metrics["sigmas"] > 6
    assert (int(metrics["spikes"]), int(metrics["skipped"]), int(state.step)) == (1, 0, 1)
    if rule == "warn":
        assert not np.array_equal(state.trainable.embed.weight, before.trainable.embed.weight)
    else:
        assert_same((state.trainable, state.optimizer), (before.trainable, before.optimizer))
    assert state.stats.losses[0] == metrics["loss"]  # remembered all the same


def test_usual_steps_are_no_jump_and_nothing_is_one_before_the_window_is_full():
    _, usual = step_for(ADAMW)(init_state(small(), ADAMW), packed_batch(), 0.1)
    assert np.isnan(usual["sigmas"])
    state = used_to(init_state(small(), ADAMW), float(usual["loss"]), float(usual["grad_norm"]))
    _, metrics = step_for(ADAMW, on_spike="skip")(state, packed_batch(), 0.1)
    assert abs(metrics["sigmas"]) < 3
    assert int(metrics["spikes"]) == 0
    young = used_to(init_state(small(), ADAMW), 0.1, 0.1)
    young = replace(young, stats=replace(young.stats, seen=jnp.array(SPIKE_WINDOW - 1, jnp.int32)))
    young, metrics = step_for(ADAMW, on_spike="skip")(young, packed_batch(), 0.1)
    assert int(metrics["spikes"]) == 0
    assert young.stats.losses[SPIKE_WINDOW - 1] == metrics["loss"]


# ------------------------------------------------------------------------------------------- update ratios


def test_update_ratios_are_the_length_of_the_update_over_that_of_the_weights_by_role():
    step = step_for(ADAMW, ratios_every=2)
    state, first = step(init_state(small(n_layers=2), ADAMW), packed_batch(), 0.1)
    before = copied(state.trainable)
    state, second = step(state, packed_batch(seed=1), 0.05)
    assert all(np.isnan(value) for value in first["update_ratio"].values())
    old, new = leaves_by_path(before), leaves_by_path(state.trainable)
    for name, paths in {
        "embed.weight": ["embed/weight"],
        "attn.q_proj.weight": [f"blocks/{i}/attn/q_proj/weight" for i in range(2)],
        "norm.scale": ["norm/scale"],
    }.items():
        change = np.sqrt(sum(np.sum(np.square(np.asarray(new[path] - old[path], np.float64))) for path in paths))
        length = np.sqrt(sum(np.sum(np.square(np.asarray(old[path], np.float64))) for path in paths))
        np.testing.assert_allclose(second["update_ratio"][name], change / length, rtol=1e-4)
    assert set(second["update_ratio"]) == {role(path) for path in new}
    assert "update_ratio" not in step_for(ADAMW, ratios_every=0)(init_state(small(), ADAMW), packed_batch(), 0.1)[1]


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
