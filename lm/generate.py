"""From a prompt to more tokens: prefill once, then decode one token at a time from the caches. Ids in, ids out.

Prompts of a batch may have different lengths: they are padded on the left with segment 0, which nothing may attend to. Lengths are rounded
up to a few sizes, so that the compiled programs are used again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from lm.base import AbstractLM
from lm.kernels import BACKENDS, REFERENCE, Ops, with_ops
from lm.masks import PADDING, Facts

PROMPT_ROUNDING = 32  # tokens; prompts are padded to a multiple
SLOT_ROUNDING = 128  # tokens; caches are as long as a multiple


@dataclass(frozen=True)
class Sampler:
    """How the next token is drawn from the logits.

    `temperature` 0 is greedy. `top_k` keeps the k most likely tokens (Fan et al. 2018, arXiv:1805.04833); `top_p` the fewest tokens that
    hold that much probability (Holtzman et al. 2020, arXiv:1904.09751); `min_p` those at least that fraction as likely as the likeliest
    (Nguyen et al. 2024, arXiv:2407.01082). They are taken in this order, after `temperature`.

    Before all of them, greedy or not: `logit_bias` is added, then the logits of tokens that stand in the prompt or were drawn are divided
    by `repetition_penalty`, or multiplied where negative (Keskar et al. 2019, arXiv:1909.05858, section 4.1; the sign as in
    `transformers`).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0  # 1: none
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added); -inf forbids it

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 (greedy) or above, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 (or None for all tokens), got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1] (or be None), got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1] (or be None), got {self.min_p}")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty must be above 0 (1: none; above 1: fewer repetitions), got {self.repetition_penalty}")
        if unusable := [(token, bias) for token, bias in self.logit_bias if not bias < float("inf")]:
            raise ValueError(f"logit_bias must be numbers, or -inf to forbid a token, got {unusable}")

    def __call__(
        self, logits: Float[Array, "batch vocab"], keys: Key[Array, " batch"], seen: Bool[Array, "batch vocab"] | None = None
    ) -> Int[Array, " batch"]:
        """A token for each row, each by its own key. `seen` marks the tokens that `repetition_penalty` is for."""
        logits = self.adjusted(logits, seen)
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.vmap(jr.categorical)(keys, self.filtered(logits)).astype(jnp.int32)

    def adjusted(self, logits: Float[Array, "batch vocab"], seen: Bool[Array, "batch vocab"] | None) -> Float[Array, "batch vocab"]:
        """Logits with bias and penalty."""
        if self.logit_bias:
            tokens, bias = zip(*self.logit_bias, strict=True)
            logits = logits.at[:, jnp.asarray(tokens)].add(jnp.asarray(bias, logits.dtype))
        if self.repetition_penalty != 1 and seen is not None:
            penalised = jnp.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = jnp.where(seen, penalised, logits)
        return logits

    def filtered(self, logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
        """Logits of the distribution that is really sampled: scaled, and -inf where cut off."""
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kth = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits < kth, -jnp.inf, logits)
        if self.top_p is not None and self.top_p < 1:
            ordered = jnp.sort(logits, axis=-1, descending=True)
            probabilities = jax.nn.softmax(ordered, axis=-1)
            before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of the tokens more likely than this one
            least = jnp.min(jnp.where(before < self.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.min_p is not None and self.min_p > 0:
            least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(self.min_p)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return logits


GREEDY = Sampler(temperature=0.0)


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


def generate(
    model: AbstractLM,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int,
    sampler: Sampler = GREEDY,
    stop_ids: Sequence[int] = (),
    key: Key[Array, ""] | None = None,
    n: int = 1,
    seeds: Sequence[int] | None = None,
    ops: Ops | None = None,
) -> list[list[int]]:
    """Continue each prompt, `n` times; the new ids only, without the stop id. The n continuations of a prompt stand together.

    **Arguments:**

    - `prompts`: token ids, of any lengths above 0. A batch is decoded together.
    - `max_new_tokens`: the most that is drawn for a prompt.
    - `sampler`: greedy unless said otherwise; anything else needs a `key`.
    - `stop_ids`: a row ends where one of these is drawn.
    - `n`: continuations of each prompt, which is run through the model once.
    - `seeds`: a number for each row, of which its draws depend (with `key`), and not on its neighbours; `None`: 0, 1, 2, …
    - `ops`: the backend to compute with (`lm.BACKENDS`); `None`: `cpu` where JAX runs on a CPU, `reference` elsewhere.

    **Raises:** `ValueError` where prompt and new tokens would pass `model.config.context`, where a prompt is empty, or an id is not in the
    vocabulary.
    """
    ops = _ops(ops)
    state = _start(model, prompts, max_new_tokens, sampler, key, n, seeds, ops)
    _, out = decode(model, state, _stops(stop_ids), sampler, max_new_tokens, ops)
    return [[int(token) for token in row if token >= 0] for row in np.asarray(out)]


def stream(
    model: AbstractLM,
    prompt: Sequence[int] | np.ndarray,
    *,
    max_new_tokens: int,
    sampler: Sampler = GREEDY,
    stop_ids: Sequence[int] = (),
    key: Key[Array, ""] | None = None,
    seed: int = 0,
    chunk: int = 4,
    ops: Ops | None = None,
) -> Iterator[int]:
    """The ids `generate` would give for one prompt under that seed, as they are drawn, `chunk` at a time."""
    ops = _ops(ops)
    state = _start(model, [prompt], max_new_tokens, sampler, key, 1, [seed], ops)
    left = max_new_tokens
    while left > 0:
        state, out = decode(model, state, _stops(stop_ids), sampler, min(chunk, left), ops)
        yield from (int(token) for token in np.asarray(out)[0] if token >= 0)
        left -= chunk
        if bool(state.done[0]):
            return


def _start(
    model: AbstractLM,
    prompts: Sequence[Sequence[int] | np.ndarray],
    max_new_tokens: int,
    sampler: Sampler,
    key: Key[Array, ""] | None,
    n: int,
    seeds: Sequence[int] | None,
    ops: Ops,
) -> Decoding:
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise ValueError("each prompt needs at least one token (the BOS id where there is no text)")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if n < 1:
        raise ValueError(f"n (continuations of each prompt) must be at least 1, got {n}")
    rows = len(lengths) * n
    if seeds is not None and len(seeds) != rows:
        raise ValueError(f"seeds must be one for each of the {rows} rows ({len(lengths)} prompts, {n} of each), got {len(seeds)}")
    if key is None and sampler.temperature != 0:
        raise ValueError(f"sampling at temperature {sampler.temperature} needs key=jax.random.key(seed); greedy is temperature 0")
    config = model.config
    if max(lengths) + max_new_tokens > config.context:
        raise ValueError(
            f"prompt ({max(lengths)} tokens) and max_new_tokens ({max_new_tokens}) pass the model's context of {config.context}: "
            "shorten the prompt or ask for fewer tokens"
        )
    highest = max(int(np.max(prompt)) for prompt in prompts)
    if highest >= config.vocab or min(int(np.min(prompt)) for prompt in prompts) < 0:
        raise ValueError(f"token ids must lie in 0 … {config.vocab - 1}, the model's vocabulary; got up to {highest}")

    outside = [token for token, _ in sampler.logit_bias if not 0 <= token < config.vocab]
    if outside:
        raise ValueError(f"logit_bias names tokens outside 0 … {config.vocab - 1}, the model's vocabulary: {outside}")

    width = _round_up(max(lengths), PROMPT_ROUNDING)
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    slots = _round_up(width + max_new_tokens, SLOT_ROUNDING)
    key = jr.key(0) if key is None else key  # greedy: never looked at
    keys = jax.vmap(jr.fold_in, (None, 0))(key, jnp.asarray(range(rows) if seeds is None else seeds, jnp.uint32))
    dtype = model.blocks[0].attn.k_proj.weight.dtype
    return prefill(model, jnp.asarray(tokens), jnp.asarray(lengths), slots, keys, dtype, sampler.repetition_penalty != 1, ops)


def _stops(stop_ids: Sequence[int]) -> Array:
    return jnp.asarray(list(stop_ids), jnp.int32).reshape(-1)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _ops(asked: Ops | None) -> Ops:
    if asked is not None:
        return asked
    return BACKENDS["cpu"] if jax.default_backend() == "cpu" else REFERENCE
