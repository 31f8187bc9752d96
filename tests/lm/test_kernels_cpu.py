"""The `cpu` backend computes the reference, and so do its gradients: attention over blocks, windows and packed rows; norm; rotation."""

import math
import re
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tiny import facts_of, packed_batch, tiny

import lm
import lm.kernels_cpu_attention as attention_module
from lm.flight import Flight, put_on_flight
from lm.kernels_cpu import FEW, FEW_PACKED
from lm.kernels_cpu_attention import BLOCK, LONG, SLOTS
from lm.quant import Int8Rows

HEAD_DIM, SCALE = 8, 0.3
ROUNDING = 2e-6  # fp32, over the largest entry: sums of at most 300 terms, taken in another order; measured 6e-7
CPU, REFERENCE = lm.BACKENDS["cpu"].attention, lm.REFERENCE.attention


def packed_facts(seq, rows=(), padding=0):
    """Two documents cut at another place in each row, then padding."""
    segments, positions = np.zeros((*rows, seq), np.int32), np.zeros((*rows, seq), np.int32)
    for i, row in enumerate(np.ndindex(*rows)):
        cuts = [0, seq // 3 + i, seq - padding]
        for document, (start, stop) in enumerate(pairwise(cuts), start=1):
            segments[row][start:stop] = document
            positions[row][start:stop] = np.arange(stop - start)
    return lm.Facts(jnp.asarray(positions), jnp.asarray(segments))


def inputs(seq, rows=(), heads=6, kv_heads=2, head_dim=HEAD_DIM, seed=0):
    """q, k, v and the cotangent of the output."""
    rng = np.random.default_rng(seed)  # numpy: jax would compile its generator anew for every shape
    shapes = [(*rows, h, seq, head_dim) for h in (heads, kv_heads, kv_heads, heads)]
    return [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]


def value_and_gradients(attention, facts, arrays, window=None, dtype=jnp.float32, softcap=None):
    """Output, dq, dk, dv. Nothing flows into padding, whose output means nothing."""
    *qkv, cotangent = arrays
    real = (facts.segments > 0)[..., None, :, None]

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(lambda q, k, v: jnp.where(real, attention(q, k, v, facts, facts, SCALE, window, softcap), 0), q, k, v)
        return out, *pull(cotangent.astype(dtype))

    return [np.float32(x) for x in run(*(x.astype(dtype) for x in qkv))]


def error(got, expected):
    """Of each array, over the largest entry of the expected one, or over 1 where that is smaller: a window of 1 has dq = 0."""
    return [float(np.abs(g - e).max() / max(1.0, np.abs(e).max())) for g, e in zip(got, expected, strict=True)]


def assert_equals_reference(facts, arrays, window=None):
    got, expected = (value_and_gradients(attention, facts, arrays, window) for attention in (CPU, REFERENCE))
    assert max(error(got, expected)) < ROUNDING


@pytest.mark.parametrize("seq", [1, 7, BLOCK, BLOCK + 1, 300, LONG + 70])
def test_equals_reference_at_any_length(seq):
    rows = (2,) if seq > 1 else ()
    assert_equals_reference(packed_facts(seq, rows, padding=seq // 5), inputs(seq, rows))


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 1)])
def test_equals_reference_with_as_many_key_heads_and_with_one(heads, kv_heads):
    assert_equals_reference(packed_facts(150, (2,), padding=11), inputs(150, (2,), heads, kv_heads))


@pytest.mark.parametrize("window", [1, 50, BLOCK, BLOCK + 1, 200])
def test_equals_reference_in_a_window(window):
    one_document = lm.Facts(jnp.arange(300), jnp.ones(300, jnp.int32))
    assert_equals_reference(one_document, inputs(300), window)


@pytest.mark.parametrize(("seq", "window"), [(23, None), (300, 50)])
def test_equals_reference_with_soft_capped_scores(seq, window):
    """Scores here are of order 1, so that a cap of 0.7 bends most of them."""
    facts, arrays = packed_facts(seq, (2,), padding=seq // 5), inputs(seq, (2,))
    got, expected = (value_and_gradients(attention, facts, arrays, window, softcap=0.7) for attention in (CPU, REFERENCE))
    assert max(error(got, expected)) < ROUNDING
    assert max(error(expected, value_and_gradients(REFERENCE, facts, arrays, window))) > 0.1  # the cap is felt


def test_equals_reference_in_a_window_over_a_long_row():
    assert_equals_reference(packed_facts(LONG + 70, padding=13), inputs(LONG + 70), window=200)


@pytest.mark.parametrize("window", [None, 20, 70])
def test_longer_blocks_in_longer_rows_equal_the_reference(monkeypatch, window):
    monkeypatch.setattr(attention_module, "BLOCK", 8)
    monkeypatch.setattr(attention_module, "LONG", 100)
    assert [attention_module.block_of(310, each) for each in (None, 20, 7)] == [16, 16, 8]
    assert_equals_reference(packed_facts(310, (2,), padding=13), inputs(310, (2,)), window)


def test_a_long_row_needs_no_square_matrix():
    def temporary_bytes(seq):
        facts, (q, k, v, _) = packed_facts(seq), inputs(seq)
        pull = jax.grad(lambda q, k, v: jnp.sum(CPU(q, k, v, facts, facts, SCALE)), argnums=(0, 1, 2))
        return jax.jit(pull).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4 * LONG) < 2.5 * temporary_bytes(2 * LONG)  # as a square it would be 4 times as much


def test_equals_reference_in_a_window_over_packed_rows():
    assert_equals_reference(packed_facts(300, (2,), padding=13), inputs(300, (2,)), window=50)


@pytest.mark.parametrize("rows", [(), (3, 2)])
def test_any_leading_axes_do(rows):
    assert_equals_reference(packed_facts(23, rows, padding=4), inputs(23, rows))


def test_facts_of_one_row_serve_a_batch():
    assert_equals_reference(packed_facts(23), inputs(23, (3,)))


def test_heads_of_one_number_do():
    assert_equals_reference(packed_facts(131), inputs(131, head_dim=1))


def test_a_left_padded_prompt_equals_itself_alone():
    """As in `generate`'s ragged prompts: padding stands before, has position 0, and positions count from the first real token."""
    padding, seq = 9, 140
    places = np.arange(seq) - padding
    facts = lm.Facts(jnp.asarray(np.maximum(places, 0)), jnp.asarray((places >= 0).astype(np.int32)))
    arrays = inputs(seq)
    alone = [x[:, padding:] for x in arrays]
    got = value_and_gradients(CPU, facts, arrays, window=20)
    assert max(error(got, value_and_gradients(REFERENCE, facts, arrays, window=20))) < ROUNDING
    expected = value_and_gradients(REFERENCE, lm.Facts(facts.positions[padding:], facts.segments[padding:]), alone, window=20)
    assert max(error([x[:, padding:] for x in got], expected)) < ROUNDING
    assert all(np.all(x[:, :padding] == 0) for x in got)  # neither seen nor sending gradients


def test_padding_gives_finite_numbers():
    facts, (q, k, v, _) = packed_facts(24, padding=7), inputs(24)
    assert np.isfinite(CPU(q, k, v, facts, facts, SCALE)).all()


@pytest.mark.parametrize(("seq", "window"), [(23, None), (300, 50)])
def test_bf16_is_no_worse_than_the_reference_in_bf16(seq, window):
    facts, arrays = packed_facts(seq, (2,), padding=5), inputs(seq, (2,))
    arrays = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in arrays]  # numbers both precisions can hold
    exact = value_and_gradients(REFERENCE, facts, arrays, window)
    plain = error(value_and_gradients(REFERENCE, facts, arrays, window, jnp.bfloat16), exact)
    fast = error(value_and_gradients(CPU, facts, arrays, window, jnp.bfloat16), exact)
    assert min(plain) > 1e-4  # else this test compares nothing
    assert all(f < 1.5 * p for f, p in zip(fast, plain, strict=True)), (fast, plain)


def cache_facts(slots, written, rows, queries):
    """A cache that holds `written` tokens in `slots` places, the first few of each row padding, and the facts of the last `queries`."""
    places = np.arange(slots)
    padding = np.arange(rows)[:, None]
    segments = np.where(places >= written, -1, np.where(places < padding, 0, 1))
    positions = np.maximum(places - padding, 0) * (places < written)
    facts = [jnp.asarray(x, jnp.int32) for x in (positions, segments)]
    return lm.Facts(*(x[:, written - queries : written] for x in facts)), lm.Facts(*facts)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (7, None), (300, 1.5)])
@pytest.mark.parametrize(("slots", "written", "queries"), [(40, 30, 3), (600, 599, 2), (3 * SLOTS, 200, 1), (4 * SLOTS, SLOTS + 1, 1)])
def test_queries_looking_into_a_cache_see_what_the_reference_sees(slots, written, queries, window, softcap):
    _, k, v, _ = inputs(slots, (2,))
    q = inputs(queries, (2,), seed=1)[0]
    query_facts, key_facts = cache_facts(slots, written, 2, queries)
    got, expected = (attention(q, k, v, query_facts, key_facts, SCALE, window, softcap) for attention in (CPU, REFERENCE))
    assert max(error([got], [expected])) < ROUNDING


def test_slots_never_written_are_not_read():
    slots, written = 4 * SLOTS, SLOTS - 3
    _, k, v, _ = inputs(slots, (2,))
    q = inputs(1, (2,), seed=1)[0]
    k, v = (x.at[..., SLOTS:, :].set(jnp.nan) for x in (k, v))
    facts = cache_facts(slots, written, 2, 1)
    assert np.isnan(REFERENCE(q, k, v, *facts, SCALE)).all()  # 0 · NaN
    assert np.isfinite(CPU(q, k, v, *facts, SCALE)).all()


def largest_array(attention, window, seq=512):
    """Entries of the largest array anywhere in the compiled gradient."""
    facts, arrays = packed_facts(seq), inputs(seq)

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, facts, facts, SCALE, window) * arrays[3])

    program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays[:3]).compile().as_text()
    return max(math.prod(map(int, shape.split(","))) for shape in re.findall(r"\w+\[([\d,]+)\]", program))


def test_no_more_scores_are_made_than_a_block_of_queries_needs():
    heads, seq = 6, 512
    assert largest_array(REFERENCE, None) == heads * seq * seq
    assert largest_array(CPU, None) == heads * BLOCK * seq
    assert largest_array(CPU, 50) == heads * BLOCK * 2 * BLOCK  # its own block of keys and the one before


def model_gradients(flight, ops):
    model, batch = tiny("qwen3", n_layers=2), packed_batch(seq=BLOCK + 5)

    def loss(model):
        hidden, _, _ = put_on_flight(model, flight, ops).hidden(jnp.asarray(batch.tokens), facts_of(batch))
        return jnp.sum(jnp.square(hidden) * batch.loss_weights[..., None])

    return jax.tree.leaves(jax.jit(jax.grad(loss))(model))


@pytest.fixture(scope="module")
def reference_model_gradients():
    return model_gradients(Flight(), lm.REFERENCE)


@pytest.mark.parametrize(("layers", "remat"), [("scan", "none"), ("scan", "full")])
def test_gradients_are_those_of_the_reference_in_every_flight(layers, remat, reference_model_gradients):
    got = model_gradients(Flight(layers=layers, remat=remat), lm.BACKENDS["cpu"])
    for g, e in zip(got, reference_model_gradients, strict=True):
        np.testing.assert_allclose(g, e, atol=2e-5 * float(jnp.abs(e).max()))


def operation_and_gradients(run, arrays, dtype):
    """Output and the gradient of every argument; the first argument is in `dtype`, the tables and scales stay fp32."""
    first, *others, cotangent = arrays

    @jax.jit
    def both(*arguments):
        out, pull = jax.vjp(run, *arguments)
        return out, *pull(cotangent.astype(out.dtype))

    return [np.float32(x) for x in both(first.astype(dtype), *others)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 8e-3)])  # a unit in the last place
@pytest.mark.parametrize("rows", [(), (2, 3)])
def test_rotation_and_norm_equal_the_reference(rows, dtype, tolerance):
    heads, seq, head_dim = 4, 7, 6
    keys = jr.split(jr.key(0), 5)
    x, cotangent = (jr.normal(key, (*rows, heads, seq, head_dim)) for key in keys[:2])
    cos, sin = (jr.normal(key, (*rows, seq, head_dim)) for key in keys[2:4])
    scale = jr.normal(keys[4], (head_dim,))
    for name, arrays in (("rotate", (x, cos, sin, cotangent)), ("rms_norm", (x, scale, cotangent))):

        def run(*arguments, ops, name=name):
            return getattr(ops, name)(*arguments, *([1e-3] if name == "rms_norm" else []))

        got, expected = (operation_and_gradients(partial(run, ops=ops), arrays, dtype) for ops in (lm.BACKENDS["cpu"], lm.REFERENCE))
        assert max(error(got, expected)) < tolerance, name


# ------------------------------------------------------------------------------------------- a few rows


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, FEW - 1, FEW, 19])
def test_products_of_few_and_of_many_rows_are_the_reference_s_and_so_are_their_gradients(rows, dtype):
    rng = np.random.default_rng(rows)
    x, weight, dy = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((rows, 24), (40, 24), (rows, 40)))
    for dtype_out in (None, jnp.float32):
        results = []
        for ops in (lm.BACKENDS["cpu"], lm.REFERENCE):
            y, back = jax.vjp(lambda x, w, ops=ops, out=dtype_out: ops.linear(x, w, out), x, weight)
            results.append((y, *back(dy.astype(y.dtype))))
        for one, other in zip(*results, strict=True):
            assert one.dtype == other.dtype
            rounding = (
                ROUNDING if one.dtype == jnp.float32 and dtype == jnp.float32 else 2**-7
            )  # bf16: half a unit of its last place, and sums
            np.testing.assert_allclose(np.float32(one), np.float32(other), rtol=0, atol=rounding * np.abs(np.float32(other)).max())


@pytest.mark.parametrize("rows", [1, FEW_PACKED - 1, FEW_PACKED, 40])
def test_products_with_int8_are_the_reference_s(rows):
    rng = np.random.default_rng(rows)
    weight = Int8Rows.of(jnp.asarray(rng.standard_normal((40, 24)), jnp.bfloat16))
    x = jnp.asarray(rng.standard_normal((rows, 24)), jnp.bfloat16)
    one, other = (ops.linear(x, weight, jnp.float32) for ops in (lm.BACKENDS["cpu"], lm.REFERENCE))
    assert max(error([one], [other])) < ROUNDING
    unpacked = x.astype(jnp.float32) @ (weight.values * weight.scales[:, None]).T
    assert max(error([other], [unpacked])) < ROUNDING
