"""Blocks of different shapes in one model: it caches, generates, packs and learns as any other."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tiny import facts_of, logits_of, packed_batch, tiny, tiny_config

import lm
from lm.flight import Flight, Stack, put_on_flight
from train.losses import next_token

MIXED = {"n_layers": 4, "n_heads_by_layer": (6, 2, 2, 4), "d_ff_by_layer": (40, 16, 16, 9), "window_by_layer": (None, 3, 3, None)}


def test_each_layer_has_its_own_shape():
    model = tiny("llama", **MIXED)
    assert [block.attn.q_proj.weight.shape[0] for block in model.blocks] == [48, 16, 16, 32]
    assert [block.mlp.up_proj.weight.shape[0] for block in model.blocks] == [40, 16, 16, 9]
    assert [block.attn.window for block in model.blocks] == [None, 3, 3, None]


def test_cached_greedy_decoding_equals_the_full_forward():
    model = tiny("llama", **MIXED)
    drawn = lm.generate(model, [[5, 17, 3], [60]], max_new_tokens=8)[0]
    row = [5, 17, 3, *drawn]
    logits = logits_of(model, jnp.array(row))
    assert drawn == [int(jnp.argmax(logits[i])) for i in range(2, len(row) - 1)]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_equal_neighbours_stack_and_every_flight_learns_the_same(backend):
    model, batch = tiny("llama", **MIXED), packed_batch()
    scan = Flight(layers="scan")
    flying = put_on_flight(model, scan, lm.REFERENCE)
    assert [type(block) is Stack for block in flying.blocks] == [False, True, False]

    def gradient(flight, ops):
        def loss(model):
            flying = put_on_flight(model, flight, ops)
            hidden, _, _ = flying.hidden(jnp.asarray(batch.tokens), facts_of(batch))
            return next_token(hidden, flying.unembedding, jnp.asarray(batch.targets), jnp.asarray(batch.loss_weights), ops=ops).total

        return jax.tree.leaves(eqx.filter_jit(jax.grad(loss))(model))

    for got, expected in zip(gradient(scan, lm.BACKENDS[backend]), gradient(Flight(), lm.REFERENCE), strict=True):
        np.testing.assert_allclose(got, expected, atol=3e-5 * float(jnp.abs(expected).max()) + 1e-7)


def test_a_few_steps_lower_the_loss():
    model = lm.build(tiny_config("llama", **MIXED), key=jr.key(0))
    tokens = jnp.asarray(packed_batch().tokens)

    @jax.jit
    def step(model):
        def loss(model):
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(model(tokens[:, :-1])), tokens[:, 1:, None], axis=-1))

        value, gradient = jax.value_and_grad(loss)(model)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, model, gradient)

    losses = []
    for _ in range(6):
        value, model = step(model)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("name", ["n_heads_by_layer", "d_ff_by_layer", "window_by_layer"])
def test_it_is_not_exported_and_survives_json(name):
    config = tiny_config("llama", n_layers=4, **{name: MIXED[name]})
    assert type(config).model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValueError, match=f"transformers has no llama with {name}"):
        config.to_hf()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d_ff_by_layer": (40, 16)}, "d_ff_by_layer must be 3 numbers above 0, one for each of n_layers; got .40, 16."),
        ({"window_by_layer": (None, 0, 3)}, "window_by_layer must be 3 numbers above 0"),
        ({"n_heads_by_layer": (6, 3, 2)}, r"n_heads .3. must be a multiple of n_kv_heads .2."),
    ],
)
def test_impossible_mixtures_are_refused_in_words(changes, words):
    with pytest.raises(ValueError, match=words):
        tiny_config("llama", **changes)
