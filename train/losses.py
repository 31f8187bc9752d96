"""What is minimised. Each loss gives a weighted **sum** and its count; the step divides once, by the count of the whole global batch.

Logits of all tokens at once, `[batch, seq, vocab]`, would be the largest array of the run. They are made here for `chunk` tokens at a time
and thrown away: `next_token` takes the gradient with respect to them while they are there, `token_log_probs` makes them again in its
backward pass. `token_scores` is for evaluation alone.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lm.generate import Sampler
from lm.kernels import Ops, soft_cap
from lm.quant import Quantised, unpacked

CHUNK = 1024  # tokens unembedded at a time; 512 and 2048 are a little slower on a CPU, and a GPU does not care


class Loss(NamedTuple):
    """Sums over the supervised tokens of a batch."""

    total: Array  # what is differentiated: cross_entropy + z_loss · Σ w log² Z
    cross_entropy: Array  # Σ w · (-log p), nats; reported only, no gradient flows from it
    count: Array  # type: ignore[assignment]  # Σ w; hides tuple.count, which nobody calls here
    correct: Array | None = None  # Σ w · [the target is the likeliest token]; `None` where not measured
    entropy: Array | None = None  # Σ w · entropy of the prediction, nats; `None` where not measured


def next_token(
    hidden: Float[Array, "*batch seq d_model"],
    unembedding: Float[Array, "vocab d_model"] | Quantised,
    targets: Int[Array, "*batch seq"],
    loss_weights: Float[Array, "*batch seq"],
    *,
    ops: Ops,
    dtype: Any = jnp.float32,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk: int = CHUNK,
    measured: bool = False,
) -> Loss:
    """Weighted sum of -log p(target), with an optional pull of the log-normaliser Z towards 0.

    **Arguments:**

    - `unembedding`: its gradient is computed only where something asks for it; a packed one has none.
    - `loss_weights`: 0 where a token is not learned from (padding, prompts).
    - `ops`: the backend of the matrix products.
    - `dtype`: of their operands; logits, sums and the softmax stay fp32.
    - `z_loss`: weight of log² Z (Chowdhery et al. 2022, arXiv:2204.02311, section 5: 1e-4).
    - `softcap`: logits x are bent to softcap · tanh(x / softcap) first (the model's `logit_softcap`); `None`: taken as they are.
    - `chunk`: tokens unembedded at a time. Memory: chunk · vocab · 4 bytes, three times over.
    - `measured`: also count the tokens that were guessed right, and sum the entropies: two more passes over the logits.
    """
    flat_hidden, flat_targets, flat_weights = _flat(hidden, targets, loss_weights, chunk)
    flat_weights = jax.lax.stop_gradient(flat_weights)
    total, reported = _fused(ops, dtype, float(z_loss), softcap, measured, flat_hidden, unpacked(unembedding), flat_targets, flat_weights)
    cross_entropy, *more = jax.tree.map(jax.lax.stop_gradient, reported)
    return Loss(total, cross_entropy, jnp.sum(loss_weights), *more)


def token_log_probs(
    hidden: Float[Array, "*batch seq d_model"],
    unembedding: Float[Array, "vocab d_model"] | Quantised,
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
    weight = unpacked(unembedding).astype(dtype)

    @jax.checkpoint
    def of_chunk(h: Array, target: Array) -> Array:
        logits = capped(ops.linear(h.astype(dtype), weight, jnp.float32), softcap)
        if sampler is not None:
            scaled = sampler.adjusted(logits, None)
            hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == target[:, None]
            logits = jnp.where(hit, scaled / sampler.temperature, sampler.filtered(scaled))
        return target_logit(logits, target) - jax.nn.logsumexp(logits, axis=-1)

    log_probs = jax.lax.map(lambda pair: of_chunk(*pair), (flat_hidden, flat_targets))
    return log_probs.reshape(-1)[: targets.size].reshape(targets.shape)


def token_scores(
    hidden: Float[Array, "*batch seq d_model"],
    unembedding: Float[Array, "vocab d_model"] | Quantised,
    targets: Int[Array, "*batch seq"],
    *,
    ops: Ops,
    dtype: Any = jnp.float32,
    softcap: float | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "*batch seq"], Bool[Array, "*batch seq"]]:
    """log p(target) of every token, as `token_log_probs`, and whether the target is the likeliest token. Nothing to differentiate."""
    flat_hidden, flat_targets, _ = _flat(hidden, targets, jnp.ones(targets.shape), chunk)
    weight = unpacked(unembedding).astype(dtype)

    def of_chunk(h: Array, target: Array) -> tuple[Array, Array]:
        logits = capped(ops.linear(h.astype(dtype), weight, jnp.float32), softcap)
        return target_logit(logits, target) - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == target

    log_probs, likeliest = jax.lax.map(lambda pair: of_chunk(*pair), (flat_hidden, flat_targets))
    return tuple(x.reshape(-1)[: targets.size].reshape(targets.shape) for x in (log_probs, likeliest))


def _flat(hidden: Array, targets: Array, weights: Array, chunk: int) -> tuple[Array, Array, Array]:
    """`*batch seq …` → `chunks chunk …`; the last chunk is filled up with tokens of weight 0."""
    return in_chunks(hidden, targets.ndim, chunk), in_chunks(targets, targets.ndim, chunk), in_chunks(weights, targets.ndim, chunk)


def in_chunks(x: Array, leading: int, chunk: int) -> Array:
    """`*batch seq …` → `chunks chunk …`, where `leading` axes count the tokens; the last chunk is filled up with zeros."""
    tokens, rest = math.prod(x.shape[:leading]), x.shape[leading:]
    chunk = min(chunk, tokens)
    padding = [(0, -tokens % chunk), *((0, 0) for _ in rest)]
    return jnp.pad(x.reshape(tokens, *rest), padding).reshape(-1, chunk, *rest)


def capped(logits: Array, softcap: float | None) -> Array:
    """Bent to ± `softcap` where there is one."""
    return logits if softcap is None else soft_cap(logits, softcap)


def target_logit(logits: Array, targets: Array) -> Array:
    # A masked sum instead of a gather: it fuses with the passes over the logits that are made anyway.
    hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
    return jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)


def _reported(logits: Array, log_z: Array, target: Array, w: Array, hit: Array, measured: bool) -> tuple[Array, ...]:
    """Σ w · (-log p), and where measured Σ w · [right] and Σ w · entropy: log Z - Σ p · logit. Without a gradient."""
    cross_entropy = jnp.sum(w * (log_z - jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)))
    if not measured:
        return (cross_entropy,)
    right = jnp.argmax(logits, axis=-1) == target
    entropy = log_z - jnp.sum(jnp.exp(logits - log_z[:, None]) * logits, axis=-1)
    return cross_entropy, jnp.sum(w * right), jnp.sum(w * entropy)


def _nothing_yet(measured: bool) -> tuple[Array, ...]:
    return (jnp.zeros((), jnp.float32),) * (3 if measured else 1)


def _scores(ops: Ops, h: Array, weight: Array, target: Array, softcap: float | None) -> tuple[Array, Array, Array]:
    """Logits of a chunk, log Z, and where each row's target stands."""
    logits = capped(ops.linear(h, weight, jnp.float32), softcap)
    return logits, jax.nn.logsumexp(logits, axis=-1), jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == target[:, None]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _fused(
    ops: Ops,
    dtype: Any,
    z_loss: float,
    softcap: float | None,
    measured: bool,
    hidden: Array,
    unembedding: Array,
    targets: Array,
    weights: Array,
) -> tuple[Array, tuple[Array, ...]]:
    """(total, what is only reported) over chunks, without gradients: what evaluation runs."""
    weight = unembedding.astype(dtype)

    def of_chunk(sums: tuple[Array, tuple[Array, ...]], chunk: tuple[Array, Array, Array]) -> tuple[tuple[Array, tuple[Array, ...]], None]:
        h, target, w = chunk
        logits, log_z, hit = _scores(ops, h.astype(dtype), weight, target, softcap)
        reported = _reported(logits, log_z, target, w, hit, measured)
        total = sums[0] + reported[0] + z_loss * jnp.sum(w * jnp.square(log_z))
        return (total, jax.tree.map(jnp.add, sums[1], reported)), None

    start = (jnp.zeros((), jnp.float32), _nothing_yet(measured))
    return jax.lax.scan(of_chunk, start, (hidden, targets, weights))[0]


def _fused_forward(
    ops: Ops, dtype: Any, z_loss: float, softcap: float | None, measured: bool, hidden: Any, unembedding: Any, targets: Any, weights: Any
) -> tuple[tuple[Array, tuple[Array, ...]], tuple[Array, Array | None, Array]]:
    """The same, and d total / d hidden, d total / d unembedding while the logits of a chunk are at hand:

    d total / d logits = w (p - onehot(target)) + 2 z w log Z · p,  p = softmax(logits);
    soft-capped logits c tanh(x / c) hand it on to x times their slope, 1 - (logits / c)².

    A frozen unembedding (JAX tells by `perturbed`) has no gradient: its product would be a third of the work here, and its sum an array as
    large as the matrix.
    """
    trained = unembedding.perturbed
    hidden, unembedding, targets, weights = (primal.value for primal in (hidden, unembedding, targets, weights))
    weight = unembedding.astype(dtype)

    def of_chunk(sums: tuple[Array, Any, Array | None], chunk: tuple[Array, Array, Array]) -> tuple[tuple[Array, Any, Array | None], Array]:
        h, target, w = chunk
        h = h.astype(dtype)
        logits, log_z, hit = _scores(ops, h, weight, target, softcap)
        reported = _reported(logits, log_z, target, w, hit, measured)
        slope = jnp.exp(logits - log_z[:, None]) * (w * (1 + 2 * z_loss * log_z))[:, None] - jnp.where(hit, w[:, None], 0.0)
        if softcap is not None:
            slope = slope * (1 - jnp.square(logits / softcap))
        slope = slope.astype(dtype)
        d_hidden = ops.input_gradient(slope, weight)
        d_weight = sums[2] if sums[2] is None else sums[2] + ops.weight_gradient(slope, h)
        total = sums[0] + reported[0] + z_loss * jnp.sum(w * jnp.square(log_z))
        return (total, jax.tree.map(jnp.add, sums[1], reported), d_weight), d_hidden

    start = (jnp.zeros((), jnp.float32), _nothing_yet(measured), jnp.zeros(unembedding.shape, jnp.float32) if trained else None)
    (total, reported, d_weight), d_hidden = jax.lax.scan(of_chunk, start, (hidden, targets, weights))
    d_weight = None if d_weight is None else d_weight.astype(unembedding.dtype)
    return (total, reported), (d_hidden.astype(hidden.dtype), d_weight, weights)


def _fused_backward(
    ops: Ops,
    dtype: Any,
    z_loss: float,
    softcap: float | None,
    measured: bool,
    saved: tuple[Array, Array | None, Array],
    cotangents: tuple[Any, Any],
) -> tuple[Array, Array | None, None, Array]:
    d_hidden, d_weight, weights = saved
    cotangent, _ = cotangents  # that of what is reported is cut off in `next_token`
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        cotangent = jnp.zeros(())
    d_weight = None if d_weight is None else (d_weight * cotangent).astype(d_weight.dtype)
    return (d_hidden * cotangent).astype(d_hidden.dtype), d_weight, None, jnp.zeros_like(weights)


_fused.defvjp(_fused_forward, _fused_backward, symbolic_zeros=True)
