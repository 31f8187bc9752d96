"""Losses that look at the logits, a chunk of tokens at a time: `over_chunks` for training, `each_token` for evaluation.

A loss is a function of the logits of some tokens and of what else is known of them, token by token. The logits of a chunk are made, the
gradient with respect to them is taken by JAX while they are there, and both are thrown away: `[tokens, vocab]` stands nowhere, and nothing
is made twice. `train.losses.next_token` works the same way, with a gradient written by hand.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lm.kernels import Ops
from lm.quant import Quantised, unpacked
from train.losses import CHUNK, capped, in_chunks

Tokens = Float[Array, " chunk"]
Scores = Callable[[Array, Any, Any], tuple[Array, dict[str, Array]]]
"""`(logits [chunk, vocab], known of each of these tokens, shared by all tokens) → (value [chunk], {name: [chunk]})`: what is minimised for
each token, and what is only told of it. Compared by identity: give the same one to be compiled once."""


def over_chunks(
    scores: Scores,
    hidden: Float[Array, "*batch seq d_model"],
    unembedding: Float[Array, "vocab d_model"] | Quantised,
    loss_weights: Float[Array, "*batch seq"],
    known: Any,
    shared: Any = None,
    *,
    ops: Ops,
    dtype: Any = jnp.float32,
    softcap: float | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Weighted sums over all tokens of a function of their logits, and of what it tells beside. The first is differentiable by `hidden` and
    `unembedding`, once.

    **Arguments:**

    - `scores`: see `Scores`.
    - `unembedding`: its gradient is computed only where something asks for it; a packed one has none.
    - `loss_weights`: 0 where a token is not learned from.
    - `known`: a tree of arrays that begin with the axes `*batch seq`; no gradient flows to it, nor to `shared`.
    - `ops`, `dtype`, `softcap`, `chunk`: as in `train.losses.next_token`.
    """
    cut = partial(in_chunks, leading=loss_weights.ndim, chunk=chunk)
    held = jax.lax.stop_gradient((cut(loss_weights), jax.tree.map(cut, known), shared))
    total, told = _summed(scores, ops, dtype, softcap, cut(hidden), unpacked(unembedding), *held)
    return total, jax.lax.stop_gradient(told)


def each_token(
    scores: Scores,
    hidden: Float[Array, "*batch seq d_model"],
    unembedding: Float[Array, "vocab d_model"] | Quantised,
    known: Any,
    shared: Any = None,
    *,
    ops: Ops,
    dtype: Any = jnp.float32,
    softcap: float | None = None,
    chunk: int = CHUNK,
) -> dict[str, Array]:
    """What `scores` tells of every token, `*batch seq …` each. Nothing to differentiate."""
    batch, cut = hidden.shape[:-1], partial(in_chunks, leading=hidden.ndim - 1, chunk=chunk)
    weight = unpacked(unembedding).astype(dtype)

    def of_chunk(given: tuple[Array, Any]) -> dict[str, Array]:
        h, tokens = given
        return scores(capped(ops.linear(h.astype(dtype), weight, jnp.float32), softcap), tokens, shared)[1]

    told = jax.lax.map(of_chunk, (cut(hidden), jax.tree.map(cut, known)))
    size = hidden.size // hidden.shape[-1]
    return {name: x.reshape(-1, *x.shape[2:])[:size].reshape(*batch, *x.shape[2:]) for name, x in told.items()}


# ------------------------------------------------------------------------------------------- forward and backward


Sums = tuple[Array, dict[str, Array]]


def _of_logits(scores: Scores, softcap: float | None, logits: Array, weights: Array, known: Any, shared: Any) -> Sums:
    value, told = scores(capped(logits, softcap), known, shared)
    return jnp.sum(weights * value), {name: jnp.sum(weights * each) for name, each in told.items()}


def _nothing_yet(of_chunk: Callable[..., Sums], *chunks: Any) -> Sums:
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), chunks)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_chunk, *first))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _summed(
    scores: Scores, ops: Ops, dtype: Any, softcap: float | None, hidden: Array, unembedding: Array, weights: Array, known: Any, shared: Any
) -> Sums:
    """The sums without a gradient."""
    matrix = unembedding.astype(dtype)

    def of_chunk(h: Array, w: Array, tokens: Any) -> Sums:
        return _of_logits(scores, softcap, ops.linear(h.astype(dtype), matrix, jnp.float32), w, tokens, shared)

    def add(sums: Sums, chunk: tuple[Array, Array, Any]) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, sums, of_chunk(*chunk)), None

    chunks = hidden, weights, known
    return jax.lax.scan(add, _nothing_yet(of_chunk, *chunks), chunks)[0]


def _forward(
    scores: Scores, ops: Ops, dtype: Any, softcap: float | None, hidden: Any, unembedding: Any, weights: Any, known: Any, shared: Any
) -> tuple[Sums, tuple[Array, Array | None]]:
    """The same, and the gradients by hidden states and unembedding while the logits of a chunk are at hand. A frozen unembedding (JAX tells
    by `perturbed`) has none: its product would be a third of the work here."""
    trained = unembedding.perturbed
    hidden, unembedding, weights, known, shared = jax.tree.map(lambda leaf: leaf.value, (hidden, unembedding, weights, known, shared))
    matrix = unembedding.astype(dtype)

    def of_chunk(h: Array, w: Array, tokens: Any) -> tuple[Sums, Array, Array | None]:
        h = h.astype(dtype)
        logits = ops.linear(h, matrix, jnp.float32)
        total, pull, told = jax.vjp(lambda x: _of_logits(scores, softcap, x, w, tokens, shared), logits, has_aux=True)
        slope = pull(jnp.ones_like(total))[0].astype(dtype)
        return (total, told), ops.input_gradient(slope, matrix), ops.weight_gradient(slope, h) if trained else None

    def add(carry: tuple[Sums, Array | None], chunk: tuple[Array, Array, Any]) -> tuple[tuple[Sums, Array | None], Array]:
        sums, d_hidden, d_matrix = of_chunk(*chunk)
        return jax.tree.map(jnp.add, carry, (sums, d_matrix)), d_hidden

    chunks = hidden, weights, known
    nothing = _nothing_yet(lambda *chunk: of_chunk(*chunk)[0], *chunks)
    start = nothing, jnp.zeros(unembedding.shape, jnp.float32) if trained else None
    (sums, d_matrix), d_hidden = jax.lax.scan(add, start, chunks)
    d_matrix = None if d_matrix is None else d_matrix.astype(unembedding.dtype)
    return sums, (d_hidden.astype(hidden.dtype), d_matrix)


def _backward(
    scores: Scores, ops: Ops, dtype: Any, softcap: float | None, saved: tuple[Array, Array | None], cotangents: tuple[Any, Any]
) -> tuple[Array, Array | None, None, None, None]:
    d_hidden, d_matrix = saved
    cotangent, _ = cotangents  # that of what is told is cut off in `over_chunks`
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        cotangent = jnp.zeros(())
    d_matrix = None if d_matrix is None else (d_matrix * cotangent).astype(d_matrix.dtype)
    return (d_hidden * cotangent).astype(d_hidden.dtype), d_matrix, None, None, None


_summed.defvjp(_forward, _backward, symbolic_zeros=True)
