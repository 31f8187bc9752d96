"""What a drawing computes, whoever asks and however."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from tiny import SIZES, facts_of, logits_of, packed_batch, tiny, tiny_config

import lm
from lm.base import leaves_by_path, role

# fp32 sums in another order differ in the last bits only; logits here are of order 10.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def test_batch_axes_come_as_they_are(model):
    tokens = jr.randint(jr.key(3), (2, 5, 7), 0, SIZES["vocab"])
    full = logits_of(model, tokens)
    assert full.shape == (2, 5, 7, SIZES["vocab"])
    np.testing.assert_allclose(logits_of(model, tokens[1, 3]), full[1, 3], **CLOSE)
    np.testing.assert_allclose(jax.vmap(lambda row: logits_of(model, row))(tokens)[0], full[0], **CLOSE)


def test_a_token_does_not_see_later_ones(model):
    tokens = jr.randint(jr.key(4), (11,), 0, SIZES["vocab"])
    changed = tokens.at[6].set((tokens[6] + 1) % SIZES["vocab"])
    before, after = logits_of(model, tokens), logits_of(model, changed)
    np.testing.assert_array_equal(before[:6], after[:6])
    assert jnp.all(jnp.any(before[6:] != after[6:], axis=-1))


def test_packed_documents_equal_documents_alone(model):
    batch = packed_batch()
    together = logits_of(model, jnp.asarray(batch.tokens), facts_of(batch))
    for row, document in ((0, 1), (0, 2), (1, 1), (1, 2)):  # of 4, 5, 5 and 4 tokens: two programs
        places = np.flatnonzero(batch.segments[row] == document)
        alone = logits_of(model, jnp.asarray(batch.tokens[row, places]))
        np.testing.assert_allclose(together[row, places], alone, **CLOSE)


def test_cached_decode_equals_full_forward(model):
    tokens = jr.randint(jr.key(5), (2, 11), 0, SIZES["vocab"])
    full = logits_of(model, tokens)

    @eqx.filter_jit
    def step(model, tokens, cache):
        hidden, cache, _ = model.hidden(tokens, cache=cache)
        return model.logits(hidden), cache

    first, cache = step(model, tokens[:, :6], model.empty_cache((2,), 17))  # a prefill of six, then one at a time
    pieces = [first]
    for place in range(6, 11):
        logits, cache = step(model, tokens[:, place : place + 1], cache)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), full, **CLOSE)


def test_tied_models_have_one_matrix_and_untied_two():
    tied, untied = tiny("llama", tied=True), tiny("llama", tied=False)
    assert untied.n_params - tied.n_params == SIZES["vocab"] * SIZES["d_model"]
    gradient = jax.eval_shape(jax.grad(lambda m: jnp.sum(m(jnp.arange(7)) ** 2)), tied)
    assert gradient.unembed is None
    assert tied.unembedding is tied.embed.weight


def test_a_new_model_is_drawn_as_its_config_says():
    """Normal weights of `init_std`, smaller by √(2 · n_layers) where a map writes into the stream; norms 1, biases 0."""
    config = tiny_config("qwen3", attention_bias=True, tied=False, d_model=72, d_ff=120)
    for path, leaf in leaves_by_path(eqx.filter_jit(lambda key: lm.build(config, key=key))(jr.key(0))).items():
        if path.endswith("weight"):
            std = 0.2 / 6**0.5 if "o_proj" in path or "down_proj" in path else 0.2
            # The standard deviation of n normal numbers is itself off by 1/√(2n): 0.02 for the smallest matrix here, 72 · 16.
            np.testing.assert_allclose(np.std(leaf), std, rtol=0.08, err_msg=path)
        else:
            np.testing.assert_array_equal(leaf, 1.0 if path.endswith("scale") else 0.0, err_msg=path)


def test_grouped_keys_equal_repeated_keys():
    grouped = tiny("llama")
    full = tiny("llama", n_kv_heads=6)

    def repeat(weight):  # (kv_heads head_dim, d_model): each key head copied for the query heads it serves
        heads = weight.reshape(2, 8, -1)
        return jnp.repeat(heads, 3, axis=0).reshape(6 * 8, -1)

    pairs = leaves_by_path(grouped)
    leaves = [repeat(pairs[path]) if ("k_proj" in path or "v_proj" in path) else pairs[path] for path in leaves_by_path(full)]
    full = jax.tree.unflatten(jax.tree.structure(full), leaves)
    tokens = jnp.arange(9)
    np.testing.assert_allclose(logits_of(grouped, tokens), logits_of(full, tokens), **CLOSE)


def test_the_stream_keeps_its_dtype_when_linears_are_bf16(model):
    flying = lm.put_on_flight(model, lm.Flight(dtype="bfloat16"), lm.REFERENCE)
    hidden, _, _ = eqx.filter_eval_shape(lambda model: model.hidden(jnp.arange(7)), flying)
    assert hidden.dtype == jnp.float32
    assert flying.blocks[0].mlp.up_proj.weight.dtype == jnp.bfloat16
    assert flying.blocks[0].mlp_norm.scale.dtype == jnp.float32


def test_dropout_needs_a_key_to_drop_and_depends_on_it():
    dropping = tiny("llama", dropout=0.5)
    tokens = jnp.arange(7)
    np.testing.assert_array_equal(logits_of(dropping, tokens), logits_of(dropping, tokens))
    one, same, other = (logits_of(dropping, tokens, key=jr.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other)
    assert not np.allclose(one, logits_of(dropping, tokens))


def test_wrong_shapes_are_named():
    model = tiny("qwen3")
    with pytest.raises(TypeCheckError, match="batch seq"):
        model(jnp.ones((2, 3)))  # floats are no token ids
    with pytest.raises(TypeCheckError, match="segments"):
        lm.Facts(jnp.zeros((2, 7), jnp.int32), jnp.zeros(7, jnp.int32))
    broken = eqx.tree_at(lambda m: m.blocks[1].mlp.up_proj.weight, model, jnp.ones((5, 5)))
    with pytest.raises(TypeCheckError, match=r"up_proj|linear|Linear"):
        jax.eval_shape(broken, jnp.arange(7))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_kv_heads": 4}, r"n_heads \(6\) must be a multiple of n_kv_heads \(4\)"),
        ({"head_dim": 7}, r"head_dim \(7\) must be even"),
        ({"n_layers": 0}, "greater than 0"),
        ({"d_modle": 3}, "d_modle"),
    ],
)
def test_impossible_configs_are_refused_in_words(changes, words):
    with pytest.raises(ValueError, match=words):
        tiny_config("llama", **changes)


def test_roles_forget_where_a_leaf_stands():
    assert role("blocks/3/attn/q_proj/weight") == "attn.q_proj.weight"
    assert role("blocks/0/block/attn/q_proj/base/weight") == "attn.q_proj.weight"
    assert role("1/0/mu/blocks/3/mlp_norm/scale") == "mlp_norm.scale"
    assert role("embed/weight") == "embed.weight"
    with pytest.raises(ValueError, match="no role"):
        role("1/0")
