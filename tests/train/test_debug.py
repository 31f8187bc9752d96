"""A step that is not finite names the operation, the line, the weights and the gradients."""

from functools import lru_cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from tiny import packed_batch, tiny

import lm
from lm.base import leaves_by_path, mark
from lm.flight import Flight
from train.debug import GRADIENT, NonFinite, Search, debug_nans
from train.step import StepConfig, init_state, make_step


def gradient_descent(scale=1.0):
    def update(gradient, state, params, *, learning_rate):
        return jax.tree.map(lambda g: -learning_rate * (scale * g), gradient), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


SGD = gradient_descent()
BATCH = packed_batch()


def start(n_layers=1):
    return init_state(tiny("llama", n_layers=n_layers), SGD)


@lru_cache  # one step compiles once for all tests
def watched(flight=Flight(), ops=lm.REFERENCE, optimizer=SGD):  # noqa: B008
    """A step that leaves its input alive."""
    return debug_nans(make_step(optimizer, StepConfig(), flight, ops, jr.key(0), donate=False))


def down_proj(layer):
    return lambda state: state.trainable.blocks[layer].mlp.down_proj.weight


def complaint(step, state, batch=BATCH, learning_rate=0.1):
    with pytest.raises(NonFinite) as raised:
        step(state, batch, learning_rate)
    return str(raised.value).splitlines()


def test_a_finite_step_is_the_step_itself():
    watched_state, watched_metrics = watched()(start(), BATCH, 0.1)
    state, metrics = make_step(SGD, StepConfig(), Flight(), lm.REFERENCE, jr.key(0))(start(), BATCH, 0.1)
    for one, other in zip(jax.tree.leaves((watched_state, watched_metrics)), jax.tree.leaves((state, metrics)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_poisoned_weight_is_named_with_the_operation_it_spoils():
    poisoned = eqx.tree_at(down_proj(0), start(), replace_fn=lambda w: w.at[1, 2].set(jnp.nan))
    lines = complaint(watched(), poisoned)
    assert lines[0] == "step 1 is not finite: loss nan, gradient norm nan, learning rate 0.1"
    assert lines[1] == f"  weights not finite before it (1 of {len(jax.tree.leaves(poisoned.trainable))}): blocks/0/mlp/down_proj/weight"
    assert lines[2].startswith("  gradients not finite (12 of 12): embed/weight, ")
    assert lines[4] == "  first NaN: given so, in blocks/0/mlp/down_proj/weight"
    assert lines[5].startswith("  then NaN: dot_general of float32[26, 40] (up to ±")
    assert lines[5].endswith("blocks/0/mlp/down_proj/weight float32[24, 40] (1 of 960 not finite)")
    assert lines[6].startswith("    at lm/kernels.py:")
    assert "jax.lax.dot_general(" in lines[6]


def test_an_overflow_in_a_scan_with_kernels_of_their_own_names_the_layer():
    """`jax_debug_nans` says nothing at all here."""
    huge = eqx.tree_at(down_proj(1), start(n_layers=3), replace_fn=lambda w: w * 2e38)
    lines = complaint(watched(Flight(layers="scan", remat="full"), lm.BACKENDS["cpu"]), huge)
    assert not any("before it" in line for line in lines)
    assert lines[1].startswith("  gradients not finite (30 of 30): ")
    assert "dot_general of float32[26, 40]" in lines[2]
    assert "    at lm/" in lines[3]
    assert lines[3].endswith("in round 1 (of 0 to 2) of a scan")


def test_an_update_that_overflows_is_caught_in_its_own_step():
    """Loss and gradient are finite then, and the step would go on with such weights."""
    lines = complaint(watched(optimizer=gradient_descent(1e4)), start(), learning_rate=1e38)
    assert "loss nan" not in lines[0]
    assert any(line.startswith("  weights not finite after it") for line in lines)
    assert any(line.startswith("    at tests/train/test_debug.py:") and "learning_rate * (scale * g)" in line for line in lines)


def test_a_step_that_took_its_input_cannot_be_searched_and_says_why():
    donating = debug_nans(make_step(SGD, StepConfig(), Flight(), lm.REFERENCE, jr.key(0)))
    poisoned = eqx.tree_at(down_proj(0), start(), replace_fn=lambda w: w.at[1, 2].set(jnp.nan))
    assert complaint(donating, poisoned)[1].endswith("make the step with make_step(..., donate=False)")


# ------------------------------------------------------------------------------------------- the search


def origin_of(function, *arguments):
    return Search().of(jax.jit(function), *map(jnp.asarray, arguments))


def test_an_infinity_that_a_mask_removes_does_not_count():
    def masked(x):
        scores = jnp.where(x > 0, jnp.log(x), -jnp.inf)  # log 0 here, -inf there
        return jax.nn.softmax(scores)

    x = np.array([0.0, 1.0, 2.0], np.float32)
    assert np.isfinite(masked(x)).all()
    assert origin_of(masked, x) is None


def test_a_nan_tells_of_the_infinity_it_was_made_of():
    origin = origin_of(lambda x: jnp.exp(x) - jnp.exp(x + 1), np.float32(100.0))
    assert (origin.what, origin.before.what) == ("NaN", "infinity")
    assert origin.before.by.startswith("exp of argument 0 float32[] (up to ±100)")
    assert origin.by.startswith("sub of ")


def test_the_backward_pass_is_named():
    origin = origin_of(jax.grad(lambda x: jnp.sum(jnp.sqrt(x))), np.array([0.0, 1.0], np.float32))
    assert origin.what == "infinity"
    assert origin.by.splitlines()[0].startswith("div of ")


def test_loops_and_branches_are_looked_into():
    def looping(x):
        x = jax.lax.fori_loop(0, jnp.int32(3) + x.astype(jnp.int32) * 0, lambda i, y: y * 1e15, x)
        x = jax.lax.while_loop(lambda y: y < 2e38, lambda y: y + 1e38, jnp.minimum(x, 1e38))
        return jax.lax.cond(x > 0, lambda y: y * y, lambda y: y, x)

    origin = origin_of(looping, np.float32(1.0))
    assert origin.by.startswith("mul of float32[] (up to ±")
    assert "lambda y: y * y" in origin.by
    assert origin.before is None


def test_marked_gradients_are_kept_by_path():
    def step(weights, x):
        gradients = jax.grad(lambda w: jnp.sum(jnp.sqrt(w["bad"] * x)) + jnp.sum(w["good"]))(weights)
        return {name: mark(gradient, GRADIENT + name) for name, gradient in gradients.items()}

    search = Search()
    assert search.of(step, {"bad": jnp.zeros(3), "good": jnp.ones(2)}, jnp.ones(3)) is not None
    assert {path: bool(jnp.isfinite(value).all()) for path, value in search.gradients.items()} == {"bad": False, "good": True}


def test_the_search_computes_what_the_function_computes():
    batch, state = BATCH, start()
    step = make_step(SGD, StepConfig(micro_batches=2), Flight(remat="full"), lm.REFERENCE, jr.key(0))

    def outcome(state):
        after, metrics = step(state, batch, 0.1)
        return {name: mark(value, GRADIENT + name) for name, value in (leaves_by_path(after.trainable) | {"loss": metrics["loss"]}).items()}

    search = Search()
    assert search.of(outcome, state) is None
    after, metrics = step(state, batch, 0.1)
    for name, value in (leaves_by_path(after.trainable) | {"loss": metrics["loss"]}).items():
        np.testing.assert_allclose(search.gradients[name], value, rtol=2e-5, atol=1e-6)  # fp32 sums in another order
