"""Changes of structure: a model in, another model out, with the config that describes it."""

from dataclasses import replace

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from lm.base import AbstractLM
from lm.quant import Quantised


def grow_vocab(model: AbstractLM, vocab: int) -> AbstractLM:
    """The model with `vocab` rows in its embedding, and in its head and other tables by token where there are any; `config.vocab` says so.

    New rows are the mean of the old ones: a new token is then about as likely as a token of middling likelihood, where a random row may
    outweigh all others (Hewitt 2021, "Initializing new word embeddings for pretrained language models"). What the model says of old tokens
    changes by the new ones' share of the softmax and nothing else.

    **Raises:** `ValueError` for fewer rows than there are, and packed matrices.
    """
    embedding, head = model.embed.weight, getattr(model, "unembed", None)
    if isinstance(embedding, Quantised):
        raise ValueError("a packed embedding cannot grow: grow the model first, then pack it")
    if vocab < len(embedding):
        raise ValueError(f"the model has {len(embedding)} rows in its embedding, more than the {vocab} it is to grow to")
    if vocab == len(embedding):
        return model
    grown = eqx.tree_at(lambda m: m.embed.weight, model, _with_mean_rows(embedding, vocab))
    if head is not None:
        grown = eqx.tree_at(lambda m: m.unembed.weight, grown, _with_mean_rows(head.weight, vocab))
        if head.bias is not None:
            grown = eqx.tree_at(lambda m: m.unembed.bias, grown, _with_mean_rows(head.bias, vocab))
    if tables := getattr(model, "value_embeds", ()):
        longer = [_with_mean_rows(table.weight, vocab) for table in tables]
        grown = eqx.tree_at(lambda m: [table.weight for table in m.value_embeds], grown, longer)
    return replace(grown, config=model.config.model_copy(update={"vocab": vocab}))


def _with_mean_rows(rows: Float[Array, "vocab *rest"], vocab: int) -> Float[Array, "grown *rest"]:
    """In fp32, since a bf16 sum of many rows would be rounded away."""
    mean = jnp.mean(rows.astype(jnp.float32), axis=0).astype(rows.dtype)
    return jnp.concatenate([rows, jnp.broadcast_to(mean, (vocab - len(rows), *mean.shape))])
