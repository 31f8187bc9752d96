"""Causal attention as the `cpu` backend computes it: of a row with itself, block by block, and of queries with a cache.

`lm.kernels` puts both in its table, beside the reference each of them equals; `lm.kernels_cpu` says what a CPU's fast products ask for.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lm.kernels_cpu import batched, by_rows
from lm.masks import UNWRITTEN, Facts, check_window, may_attend

SLOTS = 256  # of a cache, looked at at once
BLOCK = 128  # queries, or keys, worked on at once: scores of a block stay near the processor, and little above the diagonal is computed
LONG = 512  # tokens of a row above which attention's blocks wait for one another


def attention(
    q: Float[Array, "*batch heads seq head_dim"],
    k: Float[Array, "*batch kv_heads seq head_dim"],
    v: Float[Array, "*batch kv_heads seq head_dim"],
    segments: Int[Array, "*#batch seq"],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "*batch heads seq head_dim"]:
    """softmax(scale · q kᵀ, soft-capped where asked) v of a row with itself, block by block, never holding a `seq × seq` matrix.

    Of the facts it asks only for the segments: a token sees those of its own segment that stand before it in the row. That is `may_attend`
    for every row whose documents are whole and in order, positions counting up by one (packed, right-padded or left-padded). Padding alone
    may differ: its positions are all 0, so by the rule padding sees padding on both sides, and here only what stands before.

    The heads that share a key head are laid one below the other as further query rows (GQA), so keys and values are never repeated and
    dk, dv come out summed over them.
    """
    check_window(window)
    *batch, heads, seq, head_dim = q.shape
    kv_heads = k.shape[-3]
    flat_segments = jnp.broadcast_to(segments, (*batch, seq)).reshape(-1, seq)
    if sinks is not None:  # one for each row, so that the gradient's sum over rows is JAX's
        sinks = jnp.broadcast_to(sinks.astype(jnp.float32), (len(flat_segments), heads)).reshape(-1, heads // kv_heads)
    mixed = _blocked(
        q.reshape(-1, heads // kv_heads, seq, head_dim),
        k.reshape(-1, seq, head_dim),
        v.reshape(-1, seq, head_dim),
        flat_segments,
        sinks,
        scale,
        window,
        softcap,
    )
    # The caller next lays the heads of a token side by side. Written out here and turned back in name only, that is one good copy; left to
    # be fused with the reshape behind it, it is a slow loop, in both passes.
    by_token = by_rows(jnp.swapaxes(mixed.reshape(q.shape), -3, -2))
    return jnp.swapaxes(by_token, -3, -2)


def cached_attention(
    q: Float[Array, "*batch heads queries head_dim"],
    k: Float[Array, "*batch kv_heads slots head_dim"],
    v: Float[Array, "*batch kv_heads slots head_dim"],
    query_facts: Facts,
    key_facts: Facts,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "*batch heads queries head_dim"]:
    """softmax(scale · q kᵀ, soft-capped where asked) v of queries with a cache, up to the last slot that was written: the time of a step
    goes with the tokens there are, not with the places for them.

    Blocks of slots are taken one after the other with a running maximum and sum (Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm
    3), in a loop whose length is found at run time, and so it has no backward pass.
    """
    *batch, heads, queries, head_dim = q.shape
    kv_heads, slots = k.shape[-3:-1]
    stacked = (*batch, kv_heads, heads // kv_heads * queries)  # the heads that share a key head, one below the other
    q = q.reshape(*stacked, head_dim)
    written = jnp.max(jnp.where(key_facts.segments == UNWRITTEN, 0, jnp.arange(1, slots + 1)))
    size = min(SLOTS, slots)

    def look(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, mixed = carry
        start = jnp.minimum(i * size, slots - size)  # the last block reaches back where the slots are no multiple
        keys, values, positions, segments = (
            jax.lax.dynamic_slice_in_dim(x, start, size, axis)
            for x, axis in ((k, -2), (v, -2), (key_facts.positions, -1), (key_facts.segments, -1))
        )
        scores = jnp.einsum("...qd,...kd->...qk", q, keys, preferred_element_type=jnp.float32) * scale
        allowed = may_attend(query_facts, Facts(positions, segments), window) & (start + jnp.arange(size) >= i * size)
        scores = _capped(scores, softcap).reshape(*batch, kv_heads, -1, queries, size)
        scores = jnp.where(allowed[..., None, None, :, :], scores, jnp.finfo(jnp.float32).min).reshape(*stacked, size)
        new = jnp.maximum(highest, jnp.max(scores, axis=-1, keepdims=True))
        weights, earlier = jnp.exp(scores - new), jnp.exp(highest - new)
        seen = jnp.einsum("...qk,...kd->...qd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return new, total * earlier + jnp.sum(weights, axis=-1, keepdims=True), mixed * earlier + seen

    highest, total = jnp.full((*stacked, 1), jnp.finfo(jnp.float32).min), jnp.zeros((*stacked, 1))
    if sinks is not None:  # a score looked at before all others, whose value is 0
        sink = jnp.repeat(sinks.astype(jnp.float32), queries).reshape(kv_heads, -1, 1)
        highest, total = jnp.broadcast_to(sink, highest.shape), jnp.ones_like(total)
    nothing = (highest, total, jnp.zeros((*stacked, head_dim)))
    _, total, mixed = jax.lax.fori_loop(0, (written + size - 1) // size, look, nothing)
    return (mixed / total).astype(q.dtype).reshape(*batch, heads, queries, head_dim)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _blocked(
    q: Float[Array, "n group seq head_dim"],
    k: Float[Array, "n seq head_dim"],
    v: Float[Array, "n seq head_dim"],
    segments: Int[Array, "rows seq"],
    sinks: Float[Array, "n group"] | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Float[Array, "n group seq head_dim"]:
    """`attention` with all batch axes and key heads as one axis, n = rows · kv_heads.

    Softmax is taken a block of queries at a time; the backward pass makes the scores again from q, k and one number a query, the logarithm
    of its softmax's denominator (FlashAttention: Dao et al. 2022, arXiv:2205.14135, appendix B). Unlike there, a block of queries takes all
    its keys at once, so no running maximum is needed.
    """
    return _blocked_forward(q, k, v, segments, sinks, scale, window, softcap)[0]


Saved = tuple[Array, Array, Array, Array, Array | None, Array, Array]  # q, k, v, segments, sinks, output, log Σ exp(score) of each query


def _blocked_forward(
    q: Array, k: Array, v: Array, segments: Array, sinks: Array | None, scale: float, window: int | None, softcap: float | None
) -> tuple[Array, Saved]:
    group, seq = q.shape[1:3]
    block = block_of(seq, window)
    outs: list[Array] = []
    log_sums = []
    for lo in range(0, seq, block):
        hi = min(lo + block, seq)
        # With a window, keys before the first query's reach are left out, in whole blocks: the products keep regular sizes.
        first = 0 if window is None else max(0, lo - window + 1) // block * block
        queries, keys = slice(lo, hi), slice(first, hi)
        of_keys, of_values = _in_turn(seq, (k[:, keys], v[:, keys]), outs[-1:])
        scores = _capped(batched(_stacked(q[:, :, queries]), of_keys, 2, 2) * scale, softcap)
        allowed = _allowed(segments, queries, keys, window)[:, None, None]  # rows kv_heads group queries keys
        scores = jnp.where(allowed, scores.reshape(len(segments), -1, group, *allowed.shape[-2:]), jnp.finfo(jnp.float32).min)
        scores = scores.reshape(-1, group * (hi - lo), hi - first)
        highest = jnp.max(scores, axis=-1, keepdims=True)
        sink = None if sinks is None else jnp.repeat(sinks, hi - lo, axis=1)[..., None]
        highest = highest if sink is None else jnp.maximum(highest, sink)
        weights = jnp.exp(scores - highest)
        total = jnp.sum(weights, axis=-1, keepdims=True)  # at least 1, with the sink: every token sees itself
        total = total if sink is None else total + jnp.exp(sink - highest)
        mixed = batched(weights.astype(v.dtype), of_values, 2, 1) / total
        outs.append(mixed.astype(q.dtype).reshape(-1, group, hi - lo, q.shape[-1]))
        log_sums.append((highest + jnp.log(total)).reshape(-1, group, hi - lo))
    out = jnp.concatenate(outs, axis=2)
    return out, (q, k, v, segments, sinks, out, jnp.concatenate(log_sums, axis=2))


def _blocked_backward(
    scale: float, window: int | None, softcap: float | None, saved: Saved, d_out: Array
) -> tuple[Array, Array, Array, None, Array | None]:
    """A block of keys at a time, with all the queries that see it: its dk and dv are then complete, and only dq is a sum over blocks, of
    which the first queries are complete too. (Added into one array for all queries, XLA copies it whole for each block.)

    Scores are made transposed, Sᵀ = k qᵀ, keys down and queries across: then dv = Pᵀ dO and dk = dSᵀ q are plain row-major products, and
    dqᵀ = kᵀ dSᵀ asks only for the small k to be turned.
    """
    q, k, v, segments, sinks, out, log_sums = saved
    group, seq = q.shape[1:3]
    # Σ P dP over a query's keys, which the softmax's denominator takes away from dP; as in the paper, from dO · O.
    shift = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    d_out = d_out.astype(v.dtype)
    block = block_of(seq, window)
    dq, dk, dv = [], [], []
    sums = jnp.zeros((len(q), q.shape[-1], group, 0))  # dqᵀ so far, of the queries from `lo` on that some block has reached
    before: list[Array] = []
    for lo in range(0, seq, block):
        hi = min(lo + block, seq)
        # The last query that sees the block's last key is hi - 1 + window - 1; up to a whole block, as before.
        last = seq if window is None else min(seq, -(-(hi + window - 1) // block) * block)
        keys, queries = slice(lo, hi), slice(lo, last)
        of_query = (len(q), 1, group * (last - lo))  # a number a query, in a row over the columns of Sᵀ
        allowed = jnp.swapaxes(_allowed(segments, queries, keys, window), 1, 2)[:, None, :, None]  # rows kv_heads keys group queries
        q_rows, d_out_rows = _in_turn(seq, (_stacked(q[:, :, queries]), _stacked(d_out[:, :, queries])), before)

        scores = _capped(batched(k[:, keys], q_rows, 2, 2) * scale, softcap)
        weights = jnp.exp(scores - log_sums[:, :, queries].reshape(of_query))
        weights = jnp.where(allowed, weights.reshape(len(segments), -1, hi - lo, group, last - lo), 0).reshape(scores.shape)
        d_weights = batched(v[:, keys], d_out_rows, 2, 2)
        d_scores = weights * (d_weights - shift[:, :, queries].reshape(of_query)) * scale
        if softcap is not None:
            d_scores = d_scores * (1 - jnp.square(scores / softcap))  # the slope of c tanh(s / c), said by what came out
        d_scores = d_scores.astype(k.dtype)

        dv.append(batched(weights.astype(v.dtype), d_out_rows, 2, 1))
        dk.append(batched(d_scores, q_rows, 2, 1))
        columns = by_rows(batched(by_rows(jnp.swapaxes(k[:, keys], 1, 2)), d_scores, 2, 1))  # head_dim down, queries across
        columns = columns.reshape(-1, q.shape[-1], group, last - lo)
        sums = jnp.pad(sums, ((0, 0), (0, 0), (0, 0), (0, last - lo - sums.shape[-1]))) + columns
        dq.append(jnp.transpose(sums[..., : hi - lo], (0, 2, 3, 1)))  # these queries see no key further on
        before = [dk[-1], dv[-1], sums]
        sums = sums[..., hi - lo :]
    # A sink's probability times the gradient of its score, 0 - shift: its value is 0, and so is what comes back through it.
    d_sinks = None if sinks is None else -jnp.sum(jnp.exp(sinks[..., None] - log_sums) * shift, axis=-1)
    whole_dq, whole_dk, whole_dv = (jnp.concatenate(blocks, axis=-2) for blocks in (dq, dk, dv))
    return whole_dq.astype(q.dtype), whole_dk.astype(k.dtype), whole_dv.astype(v.dtype), None, d_sinks


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _capped(scores: Array, softcap: float | None) -> Array:
    """`lm.kernels.soft_cap`, or nothing."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _allowed(segments: Array, queries: slice, keys: slice, window: int | None) -> Bool[Array, "rows queries keys"]:
    """`may_attend` for these queries and keys of a row, places in the row standing for positions."""
    ahead = jnp.arange(queries.start, queries.stop)[:, None] - jnp.arange(keys.start, keys.stop)
    near = (ahead >= 0) if window is None else (ahead >= 0) & (ahead < window)
    return near & (segments[:, queries, None] == segments[:, None, keys])


def block_of(seq: int, window: int | None) -> int:
    """Queries, or keys, worked on at once: `BLOCK`, in long rows up to four times as many. Each block is a piece of program of its own: of
    8,192 tokens, blocks of 512 took 0.7 of the time of blocks of 128, and a fifth of the time to compile."""
    most = 4 * BLOCK if window is None else window
    return max(BLOCK, min(seq // 16, most) // BLOCK * BLOCK)


def _in_turn(seq: int, arrays: tuple[Array, ...], before: list[Array]) -> tuple[Array, ...]:
    """The same arrays, in a long row not to be had before those of the block before are: else XLA makes the scores of many blocks at once,
    and then there is the `seq × seq` matrix after all. An optimization barrier is gone before XLA puts a CPU's operations in order; a term
    that is 0 unless a sum is NaN is not. (Of a single entry XLA would compute that entry alone.)"""
    if seq <= LONG or not before:
        return arrays
    term = jnp.isnan(sum(jnp.sum(each, dtype=jnp.float32) for each in before))
    return tuple(each + term.astype(each.dtype) for each in arrays)


def _stacked(x: Float[Array, "n group seq head_dim"]) -> Float[Array, "n group*seq head_dim"]:
    return x.reshape(len(x), -1, x.shape[-1])
