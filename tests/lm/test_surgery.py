"""A grown vocabulary leaves what was there as it was."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import logits_of, tiny

import lm
from lm.surgery import grow_vocab

TOKENS = jnp.arange(7)


@pytest.mark.parametrize("name", ["llama", "qwen3"])  # a head of its own, a tied one
def test_new_rows_are_the_mean_and_old_logits_stay(name: str, tmp_path) -> None:
    model = tiny(name, n_layers=1)
    grown = grow_vocab(model, 103)
    assert grown.config.vocab == 103
    np.testing.assert_allclose(grown.embed.weight[100], model.embed.weight.mean(axis=0), atol=1e-6)
    assert (grown.unembed is None) == (model.unembed is None)
    logits = logits_of(grown, TOKENS)
    np.testing.assert_allclose(logits[:, :97], logits_of(model, TOKENS), atol=1e-6)
    np.testing.assert_allclose(logits[:, 98], logits[:, :97].mean(axis=-1), atol=1e-4)
    lm.save_pretrained(grown, tmp_path)
    np.testing.assert_array_equal(lm.load_pretrained(tmp_path).unembedding, grown.unembedding)


def test_it_grows_by_nothing_or_says_why_not() -> None:
    model = tiny("llama", n_layers=1)
    assert grow_vocab(model, 97) is model
    with pytest.raises(ValueError, match="has 97 rows in its embedding, more than the 96"):
        grow_vocab(model, 96)
    with pytest.raises(ValueError, match="a packed embedding cannot grow"):
        grow_vocab(lm.quantised(tiny("qwen3", n_layers=1)), 103)
