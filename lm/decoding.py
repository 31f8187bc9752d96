"""Where a batch of texts stands, and the steps it takes: read a prompt, read more, draw tokens, go back. `lm.generate` is made of these.

`prefill` reads whole prompts of any lengths. A conversation keeps its `Decoding`: `begin`, `extend` by more tokens, `decode`, `rewind`;
`read` and `draw` are the loops over these for one sequence, in pieces.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from lm.base import AbstractLM
from lm.cache import LayerCache
from lm.kernels import BACKENDS, REFERENCE, Ops, with_ops
from lm.masks import PADDING, Facts
from lm.sampling import Sampler

CHUNKS = (32, 128, 512)  # tokens; the sizes in which a long text is read, with programs for these alone


class Decoding(eqx.Module):
    """Where a batch stands: what was remembered, what comes next, who has finished."""

    cache: Any
    logits: Float[Array, "batch vocab"]  # of the token to draw next
    positions: Int[Array, " batch"]  # that token will have
    done: Bool[Array, " batch"]
    keys: Key[Array, " batch"]  # a row's draws depend on its own only
    drawn: Int[Array, ""]  # tokens drawn so far
    seen: Bool[Array, "batch vocab"] | None  # tokens of prompt and continuation; None where no penalty asks for them


@eqx.filter_jit
def prefill(
    model: AbstractLM,
    tokens: Int[Array, "prompts seq"],
    lengths: Int[Array, " prompts"],
    slots: int,
    keys: Key[Array, " batch"],
    dtype: Any,
    penalised: bool = False,
    ops: Ops = REFERENCE,
) -> Decoding:
    """Run the left-padded prompts through the model, once each, and keep their keys and values; with more keys than prompts, copied for
    the several continuations of each. `penalised`: also keep which tokens stand in them."""
    model = with_ops(model, ops)
    batch, seq = tokens.shape
    positions = jnp.arange(seq)[None] - (seq - lengths)[:, None]
    facts = Facts(jnp.maximum(positions, 0).astype(jnp.int32), jnp.where(positions < 0, PADDING, 1).astype(jnp.int32))
    hidden, cache, _ = model.hidden(tokens, facts, model.empty_cache((batch,), slots, dtype))
    logits = model.logits(hidden[:, -1], ops)
    seen = None
    if penalised:  # padding is token 0 in the array, but stands for nothing
        seen = jnp.zeros(logits.shape, bool).at[jnp.arange(batch)[:, None], tokens].max(positions >= 0)

    def copied(x: Array) -> Array:
        return jnp.repeat(x, keys.shape[0] // batch, axis=0) if x.ndim else x  # a cache's write index belongs to all rows

    cache, logits, lengths, seen = jax.tree.map(copied, (cache, logits, lengths.astype(jnp.int32), seen))
    return Decoding(
        cache=cache,
        logits=logits,
        positions=lengths,
        done=jnp.zeros(len(lengths), bool),
        keys=keys,
        drawn=jnp.zeros((), jnp.int32),
        seen=seen,
    )


def begin(model: AbstractLM, batch: int, slots: int) -> Decoding:
    """A batch that has read nothing yet, with room for `slots` tokens a row: `extend` it before anything is drawn. Its caches do not count
    as fresh, so that what is read first and what is read later are one program."""
    return Decoding(
        cache=_rewound(model.empty_cache((batch,), slots, cache_dtype(model)), jnp.zeros((), jnp.int32)),
        logits=jnp.zeros((batch, model.config.vocab)),
        positions=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
        keys=jr.split(jr.key(0), batch),
        drawn=jnp.zeros((), jnp.int32),
        seen=None,
    )


@eqx.filter_jit(donate="all-except-first")
def extend(model: AbstractLM, state: Decoding, tokens: Int[Array, "batch seq"], count: Int[Array, ""], ops: Ops = REFERENCE) -> Decoding:
    """Run more tokens through the model, behind those it has read: the first `count` of each row. The rest of `tokens` leaves no trace; it
    makes the lengths for which a program is compiled few. They must fit into the cache, the rest too. Rows that were done are not any more.
    """
    model = with_ops(model, ops)
    batch, seq = tokens.shape
    place = jnp.arange(seq)
    positions = state.positions[:, None] + place
    segments = jnp.broadcast_to(jnp.where(place < count, 1, PADDING), positions.shape)
    hidden, cache, _ = model.hidden(tokens, Facts(positions, segments.astype(jnp.int32)), state.cache)
    last = jax.lax.dynamic_index_in_dim(hidden, count - 1, axis=1, keepdims=False)
    seen = None if state.seen is None else state.seen.at[jnp.arange(batch)[:, None], tokens].max(place < count)
    return Decoding(
        cache=_rewound(cache, seq - count),
        logits=model.logits(last, ops),
        positions=state.positions + count,
        done=jnp.zeros_like(state.done),
        keys=state.keys,
        drawn=state.drawn,
        seen=seen,
    )


@eqx.filter_jit(donate="all")
def rewind(state: Decoding, back: Int[Array, ""]) -> Decoding:
    """Where the batch stood `back` tokens ago, but for its logits: `extend` it before anything is drawn. `seen` stays as it is."""
    return eqx.tree_at(lambda s: (s.cache, s.positions), state, (_rewound(state.cache, back), state.positions - back))


def with_key(state: Decoding, key: Key[Array, ""], penalised: Sequence[int] | None = None) -> Decoding:
    """A single sequence that draws by another key from here on. `penalised`: tokens that a repetition penalty is for, which is then kept;
    `None`: no penalty will be asked for."""
    vocab = state.logits.shape[1]
    seen = None if penalised is None else jnp.zeros((1, vocab), bool).at[0, jnp.asarray(penalised, jnp.int32)].set(True)
    names = ("cache", "logits", "positions", "done")
    return Decoding(**{name: getattr(state, name) for name in names}, keys=key[None], drawn=jnp.zeros((), jnp.int32), seen=seen)


def _rewound(cache: Any, back: Array) -> Any:
    def is_cache(node: Any) -> bool:
        return isinstance(node, LayerCache)

    return jax.tree.map(lambda node: node.rewound(back) if is_cache(node) else node, cache, is_leaf=is_cache)


@eqx.filter_jit(donate="all-except-first")
def decode(
    model: AbstractLM, state: Decoding, stop_ids: Int[Array, " stops"], sampler: Sampler, most: int, ops: Ops = REFERENCE
) -> tuple[Decoding, Int[Array, "batch most"]]:
    """Draw up to `most` tokens a row, fewer when every row has met a stop id. Rows that are done, and places never reached, hold -1."""
    arrays, static = eqx.partition(with_ops(model, ops), eqx.is_array)
    batch = state.positions.shape[0]

    def unfinished(carry: tuple[Array, Decoding, Array]) -> Array:
        i, state, _ = carry
        return (i < most) & ~jnp.all(state.done)

    def draw(carry: tuple[Array, Decoding, Array]) -> tuple[Array, Decoding, Array]:
        i, state, out = carry
        # Ties the weights to the counter: else XLA moves their conversion to fp32 out of the loop and reads twice the bytes in each round.
        weights, i = jax.lax.optimization_barrier((arrays, i))
        flying = eqx.combine(weights, static)
        token = sampler(state.logits, jax.vmap(jr.fold_in, (0, None))(state.keys, state.drawn), state.seen)
        stopped = state.done | jnp.any(token[:, None] == stop_ids, axis=-1)
        out = jax.lax.dynamic_update_slice(out, jnp.where(stopped, -1, token)[:, None], (0, i))
        facts = Facts(state.positions[:, None], jnp.ones((batch, 1), jnp.int32))
        hidden, cache, _ = flying.hidden(token[:, None], facts, state.cache)
        seen = None if state.seen is None else state.seen.at[jnp.arange(batch), token].set(True)
        state = Decoding(cache, flying.logits(hidden[:, -1], ops), state.positions + 1, stopped, state.keys, state.drawn + 1, seen)
        return i + 1, state, out

    carry = (jnp.zeros((), jnp.int32), state, jnp.full((batch, most), -1, jnp.int32))
    _, state, out = jax.lax.while_loop(unfinished, draw, carry)
    return state, out


def read(
    model: AbstractLM, state: Decoding, tokens: Sequence[int] | np.ndarray, room: int, ops: Ops | None = None
) -> Iterator[tuple[Decoding, int]]:
    """`extend` a single sequence by a text of any length, by `CHUNKS`: after each the state, and how many of the tokens it has read. Each
    state uses up the one before. Memory is that of the longest chunk.

    **Arguments:**

    - `room`: slots of the cache that are free.

    **Raises:** `ValueError` where the tokens do not fit.
    """
    ops = chosen_ops(ops)
    if not 0 < len(tokens) <= room:
        raise ValueError(f"{len(tokens)} tokens to read: expected at least 1, and no more than the {room} that there is room for")
    done = 0
    while done < len(tokens):
        count = min(len(tokens) - done, CHUNKS[-1])
        size = next(size for size in CHUNKS if size >= count)
        chunk = np.zeros((1, min(size, room - done)), np.int32)  # near the end of the cache a length of its own
        chunk[0, :count] = tokens[done : done + count]
        state = extend(model, state, jnp.array(chunk), jnp.array(count, jnp.int32), ops)
        done += count
        state.logits.block_until_ready()
        yield state, done


def draw(
    model: AbstractLM,
    state: Decoding,
    sampler: Sampler,
    most: int,
    *,
    stop_ids: Sequence[int] = (),
    piece: int = 4,
    ops: Ops | None = None,
) -> Iterator[tuple[Decoding, list[int]]]:
    """`decode` a single sequence, `piece` tokens at a time: the state and what was drawn since the last, until a stop id or `most` tokens.
    Each state uses up the one before; it has read what was drawn, the stop id too."""
    ops = chosen_ops(ops)
    while most > 0:
        state, out = decode(model, state, stop_array(stop_ids), sampler, min(piece, most), ops)
        done = bool(state.done[0])
        yield state, [int(token) for token in np.asarray(out)[0] if token >= 0]
        most = 0 if done else most - piece


def stop_array(stop_ids: Sequence[int]) -> Array:
    return jnp.asarray(list(stop_ids), jnp.int32).reshape(-1)


def cache_dtype(model: AbstractLM) -> Any:
    """Keys and values are kept as the products give them."""
    return model.blocks[0].attn.k_proj.weight.dtype


def chosen_ops(asked: Ops | None) -> Ops:
    """The backend asked for; `None`: `cpu` where JAX runs on a CPU, `reference` elsewhere."""
    if asked is not None:
        return asked
    return BACKENDS["cpu"] if jax.default_backend() == "cpu" else REFERENCE
