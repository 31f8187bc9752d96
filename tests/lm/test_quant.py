"""int8 weights: what rounding does to them, and that a model of them generates."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import logits_of, packed_batch, tiny

import lm
from lm.layers import Embedding, Linear
from lm.quant import INT8_MOST, Quantised
from train.step import make_token_nats


def weight(rows=40, columns=24, dtype=jnp.float32):
    spread = np.logspace(-3, 2, rows)[:, None]  # rows of unlike size: one scale for all would lose the small ones
    return jnp.asarray(spread * np.random.default_rng(0).standard_normal((rows, columns)), dtype)


def test_no_entry_moves_by_more_than_half_a_step_of_its_row():
    exact = weight()
    packed = Quantised.of(exact)
    step = np.abs(exact).max(axis=1, keepdims=True) / INT8_MOST
    assert (np.abs(packed.unpacked() - exact) <= 0.5001 * step).all()
    assert (np.abs(packed.values).max(axis=1) == INT8_MOST).all()  # the largest of each row uses the whole range


def test_a_row_of_zeros_stays_zero():
    packed = Quantised.of(weight().at[3].set(0.0))
    assert (packed.unpacked()[3] == 0).all()
    assert np.isfinite(packed.unpacked()).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_are_those_of_the_whole(dtype):
    packed = Quantised.of(weight(dtype=dtype))
    tokens = jnp.asarray([[3, 39], [0, 7]])
    assert packed.rows(tokens).dtype == dtype
    np.testing.assert_array_equal(packed.rows(tokens), packed.unpacked()[tokens])


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_a_model_of_int8_weights_is_nearly_the_model(name):
    model = tiny(name)
    packed = lm.quantised(model)
    matrices = [node for node in jax.tree.leaves(packed, is_leaf=lambda n: isinstance(n, Linear | Embedding)) if hasattr(node, "weight")]
    assert matrices
    assert all(isinstance(node.weight, Quantised) for node in matrices)
    tokens = jnp.asarray([[5, 3, 9, 11, 2]])
    exact, rounded = logits_of(model, tokens), logits_of(packed, tokens)
    deviation = float(jnp.sqrt(jnp.mean((rounded - exact) ** 2) / jnp.mean(exact**2)))
    assert 1e-4 < deviation < 0.05, deviation  # measured 0.01 to 0.02


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_it_generates_what_its_unpacked_weights_generate(backend):
    packed = lm.quantised(tiny("llama"))
    unpacked = jax.tree.map(
        lambda node: node.unpacked() if isinstance(node, Quantised) else node, packed, is_leaf=lambda node: isinstance(node, Quantised)
    )
    settings = {"max_new_tokens": 9, "ops": lm.BACKENDS[backend]}
    prompts = [[5, 3, 9], [7, 1, 2, 8, 4]]
    assert lm.generate(packed, prompts, **settings) == lm.generate(unpacked, prompts, **settings)


def test_packing_twice_changes_nothing_and_a_matrix_takes_a_quarter_of_the_bytes():
    once = lm.quantised(tiny("llama"))
    assert eqx.tree_equal(once, lm.quantised(once))
    packed = Quantised.of(weight())
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(packed)) == 40 * 24 + 4 * 40


def test_a_model_of_int8_weights_is_evaluated():
    model, batch = tiny("llama"), packed_batch()
    losses = []
    for each in (model, lm.quantised(model)):
        nats = make_token_nats(lm.Flight(dtype="bfloat16"), lm.BACKENDS["cpu"])(each, batch)
        losses.append(float(jnp.mean(nats)))
    assert 0 < abs(losses[1] - losses[0]) < 0.02 * losses[0], losses
