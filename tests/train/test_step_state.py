"""The state that steps pass on: what changes it and what must not, averages, spikes, how far weights move."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stepping import ADAMW, RECORDER, SCHEDULE_FREE, assert_same, copied, small, step_for
from tiny import packed_batch

from lm.base import leaves_by_path, role
from train.averages import AverageConfig, average_rate
from train.step import SPIKE_WINDOW, Stats, init_state

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
