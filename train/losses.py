"""What is minimised. Each loss gives a weighted **sum** and its count; the step divides once, by the count of the whole global batch.

Logits of all tokens at once, `[batch, seq, vocab]`, would be the largest array of the run. They are made here for `chunk` tokens at a time
and thrown away: `next_token` takes the gradient with respect to them while they are there, `token_log_probs` makes them again in its
backward pass.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lm.generate import Sampler
from lm.kernels import Ops, soft_cap

CHUNK = 1024  # tokens unembedded at a time; 512 and 2048 are a little slower on a CPU, and a GPU does not care


class Loss(NamedTuple):
    """Sums over the supervised tokens of a batch."""

    total: Array  # what is differentiated: cross_entropy + z_loss · Σ w log² Z
    cross_entropy: Array  # Σ w · (-log p), nats; reported only, no gradient flows from it
    count: Array  # type: ignore[assignment]  # Σ w; hides tuple.count, which nobody calls here


def next_token(
    hidden: Float[Array, "*batch seq d_model"],
    unembedding: Float[Array, "vocab d_model"],
    targets: Int[Array, "*batch seq"],
    loss_weights: Float[Array, "*batch seq"],
    *,
    ops: Ops,
    dtype: Any = jnp.float32,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk: int = CHUNK,
) -> Loss:
    """Weighted sum of -log p(target), with an optional pull of the log-normaliser Z towards 0.

    **Arguments:**

    - `loss_weights`: 0 where a token is not learned from (padding, prompts).
    - `ops`: the backend of the matrix products.
    - `dtype`: of their operands; logits, sums and the softmax stay fp32.
    - `z_loss`: weight of log² Z (Chowdhery et al. 2022, arXiv:2204.02311, section 5: 1e-4).
    - `softcap`: logits x are bent to softcap · tanh(x / softcap) first (the model's `logit_softcap`); `None`: taken as they are.
    - `chunk`: tokens unembedded at a time. Memory: chunk · vocab · 4 bytes, three times over.
    """
    flat_hidden, flat_targets, flat_weights = _flat(hidden, targets, loss_weights, chunk)
    flat_weights = jax.lax.stop_gradient(flat_weights)
    total, cross_entropy = _fused(ops, dtype, float(z_loss), softcap, flat_hidden, unembedding, flat_targets, flat_weights)
    return Loss(total, jax.lax.stop_gradient(cross_entropy), jnp.sum(loss_weights))


def token_log_probs(
    hidden: Float[Array, "*batch seq d_model"],
    unembedding: Float[Array, "vocab d_model"],
    targets: Int[Array, "*batch seq"],
    *,
    ops: Ops,
    dtype: Any = jnp.float32,
    softcap: float | None = None,
    chunk: int = CHUNK,
    sampler: Sampler | None = None,
) -> Float[Array, "*batch seq"]:
    """log p(target) of every token, differentiable; the logits are made again in the backward pass instead of being kept.

    `sampler`: p is the distribution it draws from, with its temperature and what it cuts off, instead of the model's own. A target that was
    inside when it was drawn and is outside now is added to what is kept.
    """
    flat_hidden, flat_targets, _ = _flat(hidden, targets, jnp.ones(targets.shape), chunk)
    weight = unembedding.astype(dtype)

    @jax.checkpoint
    def of_chunk(h: Array, target: Array) -> Array:
        logits = _capped(ops.linear(h.astype(dtype), weight, jnp.float32), softcap)
        if sampler is not None:
            scaled = sampler.adjusted(logits, None)
            hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == target[:, None]
            logits = jnp.where(hit, scaled / sampler.temperature, sampler.filtered(scaled))
        return _target_logit(logits, target) - jax.nn.logsumexp(logits, axis=-1)

    log_probs = jax.lax.map(lambda pair: of_chunk(*pair), (flat_hidden, flat_targets))
    return log_probs.reshape(-1)[: targets.size].reshape(targets.shape)


def _flat(hidden: Array, targets: Array, weights: Array, chunk: int) -> tuple[Array, Array, Array]:
    """`*batch seq …` → `chunks chunk …`; the last chunk is filled up with tokens of weight 0."""
    tokens = targets.size
    chunk = min(chunk, tokens)
    spare = -tokens % chunk
    hidden = jnp.pad(hidden.reshape(tokens, hidden.shape[-1]), ((0, spare), (0, 0)))
    targets, weights = (jnp.pad(x.reshape(tokens), (0, spare)) for x in (targets, weights))
    return hidden.reshape(-1, chunk, hidden.shape[-1]), targets.reshape(-1, chunk), weights.reshape(-1, chunk)


def _capped(logits: Array, softcap: float | None) -> Array:
    return logits if softcap is None else soft_cap(logits, softcap)


def _target_logit(logits: Array, targets: Array) -> Array:
    # A masked sum instead of a gather: it fuses with the passes over the logits that are made anyway.
    hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
    return jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _fused(
    ops: Ops, dtype: Any, z_loss: float, softcap: float | None, hidden: Array, unembedding: Array, targets: Array, weights: Array
) -> tuple[Array, Array]:
    """(total, cross entropy) over chunks, without gradients: what evaluation runs."""
    weight = unembedding.astype(dtype)

    def of_chunk(sums: tuple[Array, Array], chunk: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        h, target, w = chunk
        logits = _capped(ops.linear(h.astype(dtype), weight, jnp.float32), softcap)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        cross_entropy = jnp.sum(w * (log_z - _target_logit(logits, target)))
        return (sums[0] + cross_entropy + z_loss * jnp.sum(w * jnp.square(log_z)), sums[1] + cross_entropy), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(of_chunk, (zero, zero), (hidden, targets, weights))[0]


def _fused_forward(
    ops: Ops, dtype: Any, z_loss: float, softcap: float | None, hidden: Array, unembedding: Array, targets: Array, weights: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    """The same, and d total / d hidden, d total / d unembedding while the logits of a chunk are at hand:

    d total / d logits = w (p - onehot(target)) + 2 z w log Z · p,  p = softmax(logits);
    soft-capped logits c tanh(x / c) hand it on to x times their slope, 1 - (logits / c)².
    """
    weight = unembedding.astype(dtype)

    def of_chunk(sums: tuple[Array, Array, Array], chunk: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array, Array], Array]:
        h, target, w = chunk
        h = h.astype(dtype)
        logits = _capped(ops.linear(h, weight, jnp.float32), softcap)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == target[:, None]
        cross_entropy = jnp.sum(w * (log_z - jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)))
        slope = jnp.exp(logits - log_z[:, None]) * (w * (1 + 2 * z_loss * log_z))[:, None] - jnp.where(hit, w[:, None], 0.0)
        if softcap is not None:
            slope = slope * (1 - jnp.square(logits / softcap))
        slope = slope.astype(dtype)
        d_hidden = ops.input_gradient(slope, weight)
        d_weight = sums[2] + ops.weight_gradient(slope, h)
        total = sums[0] + cross_entropy + z_loss * jnp.sum(w * jnp.square(log_z))
        return (total, sums[1] + cross_entropy, d_weight), d_hidden

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, jnp.zeros(unembedding.shape, jnp.float32))
    (total, cross_entropy, d_weight), d_hidden = jax.lax.scan(of_chunk, start, (hidden, targets, weights))
    return (total, cross_entropy), (d_hidden.astype(hidden.dtype), d_weight.astype(unembedding.dtype), weights)


def _fused_backward(
    ops: Ops, dtype: Any, z_loss: float, softcap: float | None, saved: tuple[Array, Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None, Array]:
    d_hidden, d_weight, weights = saved
    cotangent, _ = cotangents  # that of the reported cross entropy is cut off in `next_token`
    return (d_hidden * cotangent).astype(d_hidden.dtype), (d_weight * cotangent).astype(d_weight.dtype), None, jnp.zeros_like(weights)


_fused.defvjp(_fused_forward, _fused_backward)
