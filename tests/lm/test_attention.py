"""What attention can be asked for: windows, soft-capped scores, dropout of probabilities; and which backend refuses what."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tiny import facts_of, logits_of, packed_batch, tiny, tiny_config

import lm
from lm.attention import Attention
from lm.flight import Flight, put_on_flight
from lm.masks import default_facts

FACTS = default_facts(jnp.zeros(5, jnp.int32))


def one_head(seq=5, seed=0):
    return [jnp.asarray(np.random.default_rng(seed + i).normal(size=(1, seq, 4)), jnp.float32) for i in range(3)]


def with_window(model, window):
    return eqx.tree_at(lambda m: [block.attn for block in m.blocks], model, [set_window(block.attn, window) for block in model.blocks])


def set_window(attn, window):
    fields = {name: getattr(attn, name) for name in attn.__dataclass_fields__}
    return Attention(**(fields | {"window": window}))


def test_a_window_hides_what_lies_further_back():
    """With 3 layers of window 3, token 9 knows of tokens 3 to 9 and of nothing before."""
    model = with_window(tiny("llama"), 3)
    tokens = jnp.arange(10)
    near, far = (logits_of(model, tokens.at[place].set(50))[9] for place in (3, 2))
    full = logits_of(model, tokens)[9]
    np.testing.assert_array_equal(far, full)
    assert not np.allclose(near, full)


@pytest.mark.parametrize("backend", ["xla", "cpu"])
def test_a_window_is_one_rule_in_every_backend_and_in_the_cache(backend):
    model, batch = with_window(tiny("qwen3"), 4), packed_batch()
    tokens = jnp.asarray(batch.tokens)
    expected = logits_of(model, tokens, facts_of(batch))
    flying = put_on_flight(model, Flight(), lm.BACKENDS[backend])
    real = batch.segments > 0
    np.testing.assert_allclose(logits_of(flying, tokens, facts_of(batch))[real], expected[real], rtol=2e-5, atol=2e-5)
    row = tokens[0]
    _, cache, _ = eqx.filter_jit(lambda m, t: m.hidden(t, cache=m.empty_cache((), 16)))(model, row[:9])
    last = eqx.filter_jit(lambda m, t, c: m.logits(m.hidden(t, cache=c)[0]))(model, row[9:10], cache)
    np.testing.assert_allclose(last[0], logits_of(model, row)[9], rtol=2e-5, atol=2e-5)


def test_scores_are_capped_before_the_softmax():
    q, k, v = one_head()
    scores = 2.0 * np.tanh(3.0 * np.einsum("hqd,hkd->hqk", q, k) / 2.0)
    scores = np.where(np.tril(np.ones((5, 5), bool)), scores, -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    got = lm.REFERENCE.attention(q, k, v, FACTS, FACTS, 3.0, softcap=2.0)
    np.testing.assert_allclose(got, weights @ np.asarray(v), atol=1e-5)


def test_a_model_with_caps_trains_alike_on_every_backend_that_can():
    model, batch = tiny("llama", attention_softcap=0.8, logit_softcap=2.5), packed_batch(seq=24)
    assert float(jnp.abs(logits_of(model, jnp.asarray(batch.tokens))).max()) <= 2.5

    def gradient(ops):
        def loss(model):
            hidden, _, _ = put_on_flight(model, Flight(), ops).hidden(jnp.asarray(batch.tokens), facts_of(batch))
            return jnp.sum(jnp.square(hidden) * batch.loss_weights[..., None])

        return jax.tree.leaves(jax.jit(jax.grad(loss))(model))

    for got, expected in zip(gradient(lm.BACKENDS["cpu"]), gradient(lm.REFERENCE), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5 * (float(jnp.abs(expected).max()) or 1.0))


@pytest.mark.parametrize("backend", ["xla", "cudnn"])
def test_a_backend_without_soft_cap_says_which_has_it(backend):
    with pytest.raises(ValueError, match=f"{backend}.* cannot soft-cap.*'reference' or 'cpu'"):
        lm.BACKENDS[backend].attention(*one_head(), FACTS, FACTS, 1.0, softcap=2.0)


@pytest.mark.parametrize("backend", ["xla", "cudnn", "cpu"])
def test_a_backend_without_dropout_refuses_it_only_where_it_would_drop(backend):
    attention = lm.BACKENDS[backend].attention
    with pytest.raises(ValueError, match=f"{backend}.* cannot drop attention probabilities .rate 0.5.*'reference'"):
        attention(*one_head(), FACTS, FACTS, 1.0, dropout=0.5, key=jr.key(0))
    if backend != "cudnn":  # which needs its card to run at all
        expected = lm.REFERENCE.attention(*one_head(), FACTS, FACTS, 1.0)
        np.testing.assert_allclose(attention(*one_head(), FACTS, FACTS, 1.0, dropout=0.5), expected, atol=1e-5)


def test_probabilities_are_dropped_at_their_rate_and_scaled_up():
    """Values all one: a row's output is its kept probability over 1 - rate, 1 on average."""
    facts = default_facts(jnp.zeros(400, jnp.int32))
    q, k, _ = one_head(400)
    out = lm.REFERENCE.attention(0 * q, k, jnp.ones_like(k), facts, facts, 1.0, dropout=0.3, key=jr.key(0))
    # The last rows average 400 independent draws, and there are 100 of them: a standard deviation of 0.004.
    assert abs(float(out[0, 300:].mean()) - 1) < 0.015
    assert float(out[0, 300:].std()) > 0.01
    same = lm.REFERENCE.attention(0 * q, k, jnp.ones_like(k), facts, facts, 1.0, dropout=0.3)  # no key: evaluation
    np.testing.assert_allclose(same, 1.0, atol=1e-5)


def test_attention_dropout_of_a_model_needs_its_key():
    model, tokens = tiny("llama", attention_dropout=0.4), jnp.arange(7)
    plain = logits_of(tiny("llama"), tokens)
    np.testing.assert_allclose(logits_of(model, tokens), plain, atol=1e-5)
    assert not np.allclose(logits_of(model, tokens, key=jr.key(1)), plain)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_attention_dropout_is_exported_and_caps_are_refused(name):
    config = tiny_config(name, attention_dropout=0.25)
    assert config.to_hf()["attention_dropout"] == 0.25
    assert type(config).from_hf(config.to_hf()) == config
    with pytest.raises(ValueError, match=r"no \w+ with attention_softcap = 50.0, logit_softcap = 30.0"):
        tiny_config(name, attention_softcap=50.0, logit_softcap=30.0).to_hf()


@pytest.mark.parametrize(
    ("setting", "words"), [({"window": 0}, "window must be at least 1"), ({"softcap": 0.0}, "softcap must be above 0")]
)
def test_impossible_attention_is_refused_in_words(setting, words):
    with pytest.raises(ValueError, match=words):
        Attention.init(6, 2, 1, 4, std=0.1, out_std=0.1, key=jr.key(0), **setting)
