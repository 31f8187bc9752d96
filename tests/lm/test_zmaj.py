"""Our own drawing: each switch does what it says, off it is a drawing that others know, and it goes wherever a model goes. (The tests of
`test_model.py` and `test_generate.py` run with all switches on.)"""

import json
from functools import lru_cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tiny import SIZES, facts_of, logits_of, packed_batch, tiny

import lm
from lm.base import leaves_by_path
from lm.flight import Flight, Stack, put_on_flight
from lm.hf_config import NotInTransformers
from lm.models.llama import Llama
from lm.models.qwen3 import Qwen3
from lm.models.zmaj import Given, ZmajConfig, window_pattern
from lm.surgery import grow_vocab
from train.losses import next_token
from train.optimizers import is_matrix

OFF = SIZES | {"n_layers": 2}
TOKENS = jnp.array([5, 17, 3, 60, 2, 8, 41])


def plain(**switches):
    """A model with only these switches on, all arrays as `init` draws them."""
    return lm.build(ZmajConfig(**OFF | {"init_std": 0.2} | switches), key=jr.key(3))


# ------------------------------------------------------------------------------------------- off


@pytest.mark.parametrize(("qk_norm", "kind"), [(False, Llama), (True, Qwen3)])
def test_with_the_switches_off_it_is_exported_as_the_model_it_equals(qk_norm, kind, tmp_path):
    model = plain(qk_norm=qk_norm, tied=qk_norm)
    lm.save_pretrained(model, tmp_path)
    again = lm.load_pretrained(tmp_path)
    assert type(again) is kind
    np.testing.assert_array_equal(logits_of(again, TOKENS), logits_of(model, TOKENS))


def test_switches_that_others_lack_are_named_and_a_folder_of_ours_keeps_them(tmp_path):
    model = tiny("zmaj")
    with pytest.raises(NotInTransformers, match="no qwen3 with mlp = 'relu2', embed_norm = True, stream_lambdas = True, value_residual"):
        lm.save_pretrained(model, tmp_path)
    lm.save_native(model, tmp_path)
    assert eqx.tree_equal(lm.load_pretrained(tmp_path), model)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["zmaj"]["architecture"]) == ("zmaj", "zmaj")
    assert "architectures" not in config


def test_what_only_the_start_depends_on_is_no_reason_to_refuse():
    assert ZmajConfig(**OFF, zero_init=True, embed_init_std=0.5).to_hf()["model_type"] == "llama"
    np.testing.assert_allclose(np.std(plain(embed_init_std=0.5).embed.weight), 0.5, rtol=0.05)  # of 97 · 24 numbers: 1/√(2n) = 0.015


# ------------------------------------------------------------------------------------------- each switch


def test_zero_init_begins_with_blocks_that_change_nothing():
    model = plain(zero_init=True)
    hidden, _, _ = model.hidden(TOKENS)
    np.testing.assert_array_equal(hidden, model.norm(model.embed(TOKENS)))


def test_stream_lambdas_weigh_the_stream_and_what_the_first_block_took():
    """Blocks that add nothing: x ← 2x + 3x₀ gives 5x₀ after one layer and 2 · 5x₀ + 3x₀ = 13x₀ after two."""
    model = plain(zero_init=True, stream_lambdas=True, embed_norm=True)
    model = eqx.tree_at(lambda m: [b.stream_lambdas for b in m.blocks], model, [jnp.array([2.0, 3.0])] * 2)
    x0 = model.embed_norm(model.embed(TOKENS))
    rms = jnp.sqrt(jnp.mean(jnp.square(x0), axis=-1))
    np.testing.assert_allclose(rms, 1.0, rtol=1e-4)
    facts = lm.masks.default_facts(TOKENS)
    facts = lm.Facts(facts.positions, facts.segments, own=Given(x0, ()))
    x, _, _ = model.blocks[0](x0, facts)
    np.testing.assert_allclose(x, 5 * x0, rtol=1e-5)
    x, _, _ = model.blocks[1](x, facts)
    np.testing.assert_allclose(x, 13 * x0, rtol=1e-5)


def test_values_are_mixed_by_their_lambdas():
    """2 · 3 + 0.5 · 8 + 0.25 · 4 = 11; the first block has no first to mix in: 2 · 3 + 0.25 · 4 = 7."""
    three, eight, four = (jnp.full((2, 7, 8), number) for number in (3.0, 8.0, 4.0))
    model = plain(value_residual=True, value_embeddings=1)
    facts = lm.Facts(jnp.zeros(7, jnp.int32), jnp.ones(7, jnp.int32), own=Given(jnp.zeros((7, 24)), (four,)))
    first = eqx.tree_at(lambda b: b.value_lambdas, model.blocks[0], jnp.array([2.0, 0.25]))
    last = eqx.tree_at(lambda b: b.value_lambdas, model.blocks[1], jnp.array([2.0, 0.5, 0.25]))
    np.testing.assert_allclose(first.mixed_values(three, None, facts), 7.0)
    np.testing.assert_allclose(last.mixed_values(three, eight, facts), 11.0)
    with pytest.raises(ValueError, match="this block mixes 3 kinds of values and got 2: has it become the first"):
        last.mixed_values(three, None, facts)


def test_half_of_a_layer_s_values_is_its_own_at_the_start():
    blocks = plain(n_layers=5, value_residual=True, value_embeddings=2).blocks
    assert [np.asarray(b.value_lambdas).tolist() for b in blocks] == [[0.5, 0.5], [0.5, 0.25, 0.25], [0.5, 0.5], *[[0.5, 0.25, 0.25]] * 2]
    assert [block.table for block in blocks] == [0, 1, None, 0, 1]


def test_what_the_first_layer_values_reaches_the_last():
    """With the first layer's output map at 0, its values can get to the second layer's attention by this path alone."""

    def change(value_residual):
        model = plain(value_residual=value_residual)
        model = eqx.tree_at(lambda m: m.blocks[0].attn.o_proj.weight, model, replace_fn=jnp.zeros_like)
        other = eqx.tree_at(lambda m: m.blocks[0].attn.v_proj.weight, model, replace_fn=lambda w: w + 1)
        return jnp.abs(logits_of(model, TOKENS) - logits_of(other, TOKENS)).max()

    assert change(False) == 0
    assert change(True) > 0.01


def test_rows_of_the_tables_begin_as_long_as_values_are():
    """A normed vector has length √d_model, so v_proj gives entries of √d_model · init_std."""
    model = plain(d_model=72, value_embeddings=1)
    np.testing.assert_allclose(np.std(model.value_embeds[0].weight), 72**0.5 * 0.2, rtol=0.08)  # 97 · 16 numbers: 1/√(2n) = 0.018
    values = model.blocks[0].attn.values(model.blocks[0].attn_norm(model.embed(jnp.arange(97))))
    np.testing.assert_allclose(np.std(values), 72**0.5 * 0.2, rtol=0.08)


def test_relu2_is_two_matrices_and_squares():
    """down(relu(up x)²) with up = 2 · 1 (3 wide) and down = 1: an x of ones, d of them, gives 3 · (2d)² each; of minus ones nothing."""
    block = plain(mlp="relu2", d_ff=3).blocks[0]
    mlp = eqx.tree_at(
        lambda m: (m.up_proj.weight, m.down_proj.weight), block.mlp, (jnp.full((3, 24), 2.0), jnp.ones((24, 3)))
    )  # fmt: skip
    np.testing.assert_allclose(mlp(jnp.ones(24)), 3 * 48.0**2)
    np.testing.assert_array_equal(mlp(-jnp.ones(24)), 0)


def test_logits_are_scaled_and_capped():
    model, scaled = plain(), plain(logit_scale=0.25)
    np.testing.assert_allclose(logits_of(scaled, TOKENS), 0.25 * logits_of(model, TOKENS), rtol=1e-5, atol=1e-6)
    capped = logits_of(plain(logit_softcap=0.5), TOKENS)
    np.testing.assert_allclose(capped, 0.5 * jnp.tanh(logits_of(model, TOKENS) / 0.5), rtol=1e-5, atol=1e-6)


def test_a_pattern_of_windows_ends_in_a_layer_that_sees_all():
    assert window_pattern("SSL", 4, 5) == (4, 4, None, 4, None)
    assert window_pattern("L", 4, 2) == (None, None)
    with pytest.raises(ValueError, match=r"made of S .* and L .*; got 'SXL'"):
        window_pattern("SXL", 4, 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"value_embeddings": 2, "n_layers": 3}, r"value_embeddings \(2\) may be at most half of n_layers \(3\)"),
        ({"window_by_layer": (4,)}, "window_by_layer must be 2 numbers above 0"),
        ({"mlp": "gelu"}, "gated_silu"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(changes, words):
    with pytest.raises(ValueError, match=words):
        ZmajConfig(**OFF | changes)


# ------------------------------------------------------------------------------------------- where a model goes


DEEP = {"n_layers": 5, "window_by_layer": None}


@lru_cache
def gradient(flight, backend):
    model, batch = tiny("zmaj", **DEEP), packed_batch()

    def loss(model):
        flying = put_on_flight(model, flight, lm.BACKENDS[backend])
        hidden, _, _ = flying.hidden(jnp.asarray(batch.tokens), facts_of(batch))
        settings = {"ops": lm.BACKENDS[backend], "softcap": flying.logit_softcap}
        return next_token(hidden, flying.unembedding, jnp.asarray(batch.targets), jnp.asarray(batch.loss_weights), **settings).total

    return jax.tree.leaves(eqx.filter_jit(jax.grad(loss))(model))


@pytest.mark.parametrize(("flight", "backend"), [(Flight(layers="scan"), "reference"), (Flight(remat="full"), "cpu")], ids=str)
def test_every_flight_learns_the_same(flight, backend):
    for got, expected in zip(gradient(flight, backend), gradient(Flight(), "reference"), strict=True):
        np.testing.assert_allclose(got, expected, atol=5e-5 * np.abs(expected).max() + 1e-7)


def test_layers_between_those_with_tables_are_stacked():
    flying = put_on_flight(tiny("zmaj", **DEEP), Flight(layers="scan"), lm.REFERENCE)
    assert [(type(block) is Stack, block.depth) for block in flying.blocks] == [(False, 1), (True, 3), (False, 1)]


def test_tables_and_lambdas_are_no_matrices_and_multiply_nothing():
    model = tiny("zmaj", tied=False)
    leaves = leaves_by_path(model)
    chosen = {path for path, leaf in leaves.items() if is_matrix(path, leaf)}
    maps = [*(f"attn/{name}_proj" for name in "qkvo"), "mlp/up_proj", "mlp/down_proj"]
    assert chosen == {f"blocks/{layer}/{name}/weight" for layer in range(3) for name in maps}
    assert {"value_embeds/0/weight", "blocks/1/value_lambdas", "blocks/0/stream_lambdas", "embed_norm/scale"} <= leaves.keys()
    assert model.n_params - model.n_active_params == 97 * (24 + 16)  # the embedding, and 2 · 8 values a token


def test_a_grown_vocabulary_grows_the_tables_too():
    model = tiny("zmaj")
    grown = grow_vocab(model, 103)
    np.testing.assert_allclose(grown.value_embeds[0].weight[100], model.value_embeds[0].weight.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(logits_of(grown, TOKENS)[:, :97], logits_of(model, TOKENS), atol=1e-6)


def test_packed_it_generates_and_comes_back_as_it_was(tmp_path):
    packed = lm.quantised(tiny("zmaj"), "int8")
    lm.save_native(packed, tmp_path)
    again = lm.load_pretrained(tmp_path)
    assert eqx.tree_equal(again, packed)
    assert len(lm.generate(again, [[1, 2, 3]], max_new_tokens=4)[0]) == 4
