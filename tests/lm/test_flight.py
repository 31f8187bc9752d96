"""Every flight computes the same function: the loop, the scan, rematerialised or not, dropout included."""

from functools import lru_cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tiny import facts_of, logits_of, packed_batch, tiny

import lm
from lm.flight import Flight, Stack, put_on_flight

FLIGHTS = [Flight(layers=layers, remat=remat) for layers in ("loop", "scan") for remat in ("none", "dots", "full")]


@lru_cache
def loss_and_gradient(flight, dropout):
    model = tiny("qwen3", dropout=dropout, attention_dropout=dropout / 2)
    batch = packed_batch()

    @jax.jit
    def run(model):
        def loss(model):
            flying = put_on_flight(model, flight, lm.REFERENCE)
            hidden, _, _ = flying.hidden(jnp.asarray(batch.tokens), facts_of(batch), key=jr.key(7) if dropout else None)
            return jnp.mean(jnp.square(flying.logits(hidden)))

        return jax.value_and_grad(loss)(model)

    return run(model)


# With dropout each flight must also deal the same keys; without, there are none to scan over.
@pytest.mark.parametrize(("flight", "dropout"), [*((flight, 0.4) for flight in FLIGHTS[1:]), (FLIGHTS[-1], 0.0)], ids=str)
def test_every_flight_equals_the_loop(flight, dropout):
    expected_loss, expected = loss_and_gradient(FLIGHTS[0], dropout)
    loss, gradient = loss_and_gradient(flight, dropout)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max() + 1e-7)


def test_scan_really_stacks_and_the_tree_at_rest_stays_a_tuple():
    model = tiny("llama")
    flying = put_on_flight(model, Flight(layers="scan"), lm.REFERENCE)
    assert [type(block) for block in flying.blocks] == [Stack]
    assert flying.blocks[0].depth == 3
    assert len(model.blocks) == 3


def test_a_block_of_another_shape_breaks_the_stack_in_two_and_changes_nothing():
    model = tiny("llama")
    narrow = tiny("llama", d_ff=16).blocks[1]
    mixed = eqx.tree_at(lambda m: m.blocks[1], model, narrow)
    flying = put_on_flight(mixed, Flight(layers="scan"), lm.REFERENCE)
    assert [block.depth for block in flying.blocks] == [1, 1, 1]
    tokens = jnp.arange(7)
    np.testing.assert_allclose(logits_of(flying, tokens), logits_of(mixed, tokens), rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match="one structure"):
        Stack.of((model.blocks[0], lm.Remat(model.blocks[1], "full")))


def test_a_stack_fills_its_caches_as_its_layers_would():
    model = tiny("qwen3")
    stacked = put_on_flight(model, Flight(layers="scan"), lm.REFERENCE)
    tokens = jnp.arange(6)[None]
    filled = eqx.filter_jit(lambda model: model.hidden(tokens, cache=model.empty_cache((1,), 9)))
    hidden, cache, _ = filled(model)
    stacked_hidden, stacked_cache, _ = filled(stacked)
    np.testing.assert_allclose(stacked_hidden, hidden, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(stacked_cache[0].keys[2], cache[2].keys, rtol=2e-5, atol=2e-5)


def test_remat_keeps_less():
    """What the forward pass hands to the backward pass, the weights aside. (The temporaries of a compiled program would be a poor witness:
    on a CPU the compiler may undo the recomputation.)"""
    model = tiny("llama")
    tokens = jnp.arange(48).reshape(4, 12)
    weights = sum(leaf.size for leaf in jax.tree.leaves(model))

    def kept(remat):
        flying = put_on_flight(model, Flight(remat=remat), lm.REFERENCE)
        backward = jax.eval_shape(lambda model: jax.vjp(lambda model: model(tokens), model)[1], flying)  # shapes are enough
        return sum(leaf.size for leaf in jax.tree.leaves(backward)) - weights

    assert kept("full") < 0.5 * kept("dots") < 0.25 * kept("none")
