"""Attention sinks: a score more for each head, of a place with nothing in it. Kernels equal the reference, gradients of the sinks too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lm
from lm.kernels_cpu_attention import BLOCK, SLOTS

HEADS, KV_HEADS, HEAD_DIM, SCALE = 6, 2, 4, 0.4
ROUNDING = 3e-6  # fp32 over the largest entry, as in test_kernels_cpu
SINKS = jnp.asarray([-3.0, 0.0, 0.5, 1.0, 4.0, 30.0])  # from hardly felt to the taker of all


def arrays(seq, rows=2, queries=None):
    rng = np.random.default_rng(seq)
    shapes = (HEADS, queries or seq), (KV_HEADS, seq), (KV_HEADS, seq), (HEADS, queries or seq)
    return [jnp.asarray(rng.standard_normal((rows, *shape, HEAD_DIM)), jnp.float32) for shape in shapes]


def two_documents(seq, rows=2, padding=0):
    places = np.arange(seq)
    cuts = seq // 3 + np.arange(rows)[:, None]
    segments = np.where(places >= seq - padding, 0, np.where(places < cuts, 1, 2))
    positions = np.where(places < cuts, places, places - cuts) * (segments > 0)
    return lm.Facts(jnp.asarray(positions, jnp.int32), jnp.asarray(segments, jnp.int32))


def test_the_reference_is_a_softmax_over_one_place_more_whose_value_is_zero():
    q, k, v, _ = (np.asarray(x) for x in arrays(5))
    k, v = (np.repeat(x, HEADS // KV_HEADS, axis=1) for x in (k, v))
    facts = lm.Facts(jnp.arange(5), jnp.ones(5, jnp.int32))
    scores = np.where(np.tril(np.ones((5, 5), bool)), SCALE * np.einsum("bhqd,bhkd->bhqk", q, k), -np.inf)
    weights = np.exp(scores) / (np.exp(scores).sum(-1, keepdims=True) + np.exp(np.asarray(SINKS))[:, None, None])
    got = lm.REFERENCE.attention(*arrays(5)[:3], facts, facts, SCALE, sinks=SINKS)
    np.testing.assert_allclose(got, weights @ v, atol=1e-6)


@pytest.mark.parametrize(("seq", "window", "softcap"), [(7, None, None), (BLOCK + 30, 50, None), (2 * BLOCK + 3, None, 0.9)])
def test_the_blocked_kernel_and_its_gradients_are_the_reference_s(seq, window, softcap):
    facts, (q, k, v, cotangent) = two_documents(seq, padding=seq // 6), arrays(seq)
    real = (facts.segments > 0)[:, None, :, None]

    def value_and_gradients(attention):
        @jax.jit
        def run(*arguments):
            def output(q, k, v, sinks):
                return jnp.where(real, attention(q, k, v, facts, facts, SCALE, window, softcap, sinks=sinks), 0)

            out, pull = jax.vjp(output, *arguments)
            return out, *pull(cotangent)

        return run(q, k, v, SINKS)

    got, expected = (value_and_gradients(lm.BACKENDS[name].attention) for name in ("cpu", "reference"))
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=ROUNDING * max(1, np.abs(other).max()))
    assert np.abs(expected[-1][:5]).min() > 1e-3  # the gradient of every sink that leaves anything over


@pytest.mark.parametrize("window", [None, 9])
def test_queries_looking_into_a_cache_feel_the_sinks(window):
    slots, written, queries = 3 * SLOTS, SLOTS + 20, 2
    q, k, v, _ = arrays(slots, queries=queries)
    places = np.arange(slots)
    keys = [jnp.asarray(np.broadcast_to(x, (2, slots)), jnp.int32) for x in (places, np.where(places < written, 1, -1))]
    query_facts = lm.Facts(*(x[:, written - queries : written] for x in keys))
    got, expected = (
        jax.jit(lambda f=lm.BACKENDS[name].attention: f(q, k, v, query_facts, lm.Facts(*keys), SCALE, window, sinks=SINKS))()
        for name in ("cpu", "reference")
    )
    np.testing.assert_allclose(got, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())


@pytest.mark.parametrize("backend", ["xla", "cudnn"])
def test_a_backend_without_sinks_says_which_has_them(backend):
    facts = lm.Facts(jnp.arange(5), jnp.ones(5, jnp.int32))
    with pytest.raises(ValueError, match=f"{backend}.* has no attention sinks: use 'reference' or 'cpu'"):
        lm.BACKENDS[backend].attention(*arrays(5)[:3], facts, facts, SCALE, sinks=SINKS)
