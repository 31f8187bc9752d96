"""Each backend computes the reference, and so do its gradients."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tiny import facts_of, packed_batch, tiny

import lm
from lm.flight import Flight, put_on_flight

RUNS_HERE = ["xla", "cpu"]  # cudnn needs an NVIDIA card


@lru_cache
def gradients(drawing, ops, dtype):
    model = tiny(drawing)
    batch = packed_batch(seq=24)

    @jax.jit
    def run(model):
        def loss(model):
            flying = put_on_flight(model, Flight(dtype=dtype), ops)
            hidden, _, _ = flying.hidden(jnp.asarray(batch.tokens), facts_of(batch))
            return jnp.sum(jnp.square(hidden) * batch.loss_weights[..., None])

        return jax.value_and_grad(loss)(model)

    return run(model)


def worst(one, other):
    """Largest error of any leaf, over its largest entry."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    # np.max, not max, lets a NaN through; a gradient may be all zeros (an unembedding nobody used).
    return np.max([np.abs(np.subtract(a, b)).max() / (np.abs(b).max() or 1.0) for a, b in pairs])


@pytest.mark.parametrize("name", RUNS_HERE)
@pytest.mark.parametrize("drawing", ["llama", "qwen3"])
def test_backend_equals_reference_in_fp32(name, drawing):
    value, gradient = gradients(drawing, lm.BACKENDS[name], "float32")
    expected_value, expected = gradients(drawing, lm.REFERENCE, "float32")
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    assert worst(gradient, expected) < 2e-5


@pytest.mark.parametrize("name", RUNS_HERE)
def test_backend_in_bf16_is_no_worse_than_the_reference_in_bf16(name):
    _, exact = gradients("qwen3", lm.REFERENCE, "float32")
    _, plain = gradients("qwen3", lm.REFERENCE, "bfloat16")
    _, fast = gradients("qwen3", lm.BACKENDS[name], "bfloat16")
    assert worst(plain, exact) > 1e-3  # else this test compares nothing
    assert worst(fast, exact) < 1.5 * worst(plain, exact)


@pytest.mark.parametrize("shape", [(7, 24, 5), (7, 5, 24), (1, 3, 2)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_cpu_linear_takes_odd_shapes_both_ways(shape, dtype):
    n, d_in, d_out = shape
    x = jr.normal(jr.key(0), (n, d_in), dtype)
    w = jr.normal(jr.key(1), (d_out, d_in), dtype)

    def run(linear):
        return jax.jit(jax.grad(lambda x, w: jnp.sum(linear(x, w, jnp.float32) ** 2), (0, 1)))(x, w)

    for one, other in zip(run(lm.BACKENDS["cpu"].linear), run(lm.REFERENCE.linear), strict=True):
        tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
        np.testing.assert_allclose(np.float32(one), np.float32(other), atol=tolerance * float(jnp.abs(other).max()))


def test_the_tree_at_rest_can_be_differentiated_forwards():
    model = tiny("llama")
    tokens = jnp.arange(7)
    tangent = jax.tree.map(jnp.ones_like, model)
    _, slope = jax.jit(lambda *trees: jax.jvp(lambda m: m(tokens), *trees))((model,), (tangent,))
    assert slope.shape == (7, 97)
    flying = lm.with_ops(model, lm.BACKENDS["cpu"])
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda m: m(tokens), (flying,), (lm.with_ops(tangent, lm.BACKENDS["cpu"]),))


def test_with_ops_reaches_every_layer_and_shares_the_arrays():
    model = tiny("qwen3")
    swapped = lm.with_ops(model, lm.BACKENDS["xla"])
    assert swapped.blocks[2].mlp.down_proj.ops.name == "xla"
    assert swapped.blocks[2].attn.q_norm.ops.name == "xla"
    assert swapped.norm.ops.name == "xla"
    assert swapped.blocks[0].attn.q_proj.weight is model.blocks[0].attn.q_proj.weight
    assert model.norm.ops.name == "reference"
