"""Log-likelihoods by the thousand: `Scorer` runs the rows of `data.requests` and gives each request its log p, and `Speed` counts what that
took.

Ids in, numbers out. What is asked, in which words, and what the numbers are worth stands in `data.tasks` and `recipes.evaluate`.
"""

import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from data.requests import RequestBatch, ScoredRows
from lm.base import AbstractLM
from lm.flight import Flight, put_on_flight
from lm.kernels import Ops
from lm.masks import Facts
from train.losses import CHUNK, token_scores


class Likelihood(NamedTuple):
    """What a model thinks of a continuation."""

    log_likelihood: float  # Σ log p(token), nats
    tokens: int  # of the continuation
    greedy: bool  # each token was the likeliest at its place: greedy decoding would have written it


@dataclass
class Speed:
    """Real tokens, places with padding, and time. Each shape's first run compiles, or loads what was compiled, and is kept apart."""

    tokens: int = 0
    places: int = 0
    steady_tokens: int = 0
    steady_s: float = 0.0
    total_s: float = 0.0
    _seen: set[Any] = field(default_factory=set)

    def add(self, shape: Any, tokens: int, places: int, seconds: float) -> None:
        self.tokens, self.places, self.total_s = self.tokens + tokens, self.places + places, self.total_s + seconds
        if shape in self._seen:
            self.steady_tokens, self.steady_s = self.steady_tokens + tokens, self.steady_s + seconds
        self._seen.add(shape)

    def record(self) -> dict[str, Any]:
        """`tokens_per_s`: real tokens, compilation left out where anything ran twice."""
        steady = self.steady_s > 0
        tokens, seconds = (self.steady_tokens, self.steady_s) if steady else (self.tokens, self.total_s)
        return {
            "tokens": self.tokens,
            "places": self.places,
            "real_share": self.tokens / self.places if self.places else None,
            "seconds": self.total_s,
            "tokens_per_s": tokens / seconds if seconds else None,
            "tokens_per_s_with_compilation": self.tokens / self.total_s if self.total_s else None,
        }


class Scorer:
    """`scorer(batch)`: the `Likelihood` of every request of a batch, by its number."""

    def __init__(self, model: AbstractLM, flight: Flight, ops: Ops, *, chunk: int = CHUNK) -> None:
        """**Arguments:**

        - `flight`, `ops`: how it is computed (`train.backends`). Weights are cast once, here, and take that much memory more.
        - `chunk`: places unembedded at a time.
        """
        self.model, self.ops, self.chunk = eqx.filter_jit(put_on_flight)(model, flight, ops), ops, chunk
        self.dtype = jnp.dtype(flight.dtype)

    def __call__(self, batch: RequestBatch, speed: Speed | None = None) -> dict[int, Likelihood]:
        """`speed` is told of the batch."""
        begin = time.perf_counter()
        cache = None
        if batch.heads is not None:
            slots = batch.heads.tokens.shape[1] + batch.passes[0].tokens.shape[1]
            cache = read_heads(self.model, *_of(batch.heads), slots, self.dtype)
        settings = (self.ops, self.dtype, self.chunk)
        scored = [score_tails(self.model, cache, *_of(rows), jnp.asarray(rows.targets), *settings) for rows in batch.passes]
        arrived = jax.device_get(scored)
        if speed is not None:
            shape = frozenset(rows.tokens.shape for rows in batch.all_rows)
            speed.add(shape, batch.real_tokens, batch.places, time.perf_counter() - begin)
        found: dict[int, Likelihood] = {}
        for rows, (log_probs, likeliest) in zip(batch.passes, arrived, strict=True):
            found |= _by_request(rows, log_probs, likeliest)
        return found


@eqx.filter_jit
def read_heads(
    model: AbstractLM,
    tokens: Int[Array, "rows places"],
    positions: Int[Array, "rows places"],
    segments: Int[Array, "rows places"],
    slots: int,
    dtype: Any,
) -> tuple[Any, ...]:
    """The caches after the heads, with room for a pass of tails."""
    _, cache, _ = model.hidden(tokens, Facts(positions, segments), model.empty_cache((tokens.shape[0],), slots, dtype))
    assert cache is not None
    return cache


@eqx.filter_jit
def score_tails(
    model: AbstractLM,
    cache: tuple[Any, ...] | None,
    tokens: Int[Array, "rows places"],
    positions: Int[Array, "rows places"],
    segments: Int[Array, "rows places"],
    targets: Int[Array, "rows places"],
    ops: Ops,
    dtype: Any,
    chunk: int,
) -> tuple[Float[Array, "rows places"], Bool[Array, "rows places"]]:
    """log p(target) of every place, and whether it is the likeliest there. The cache is looked at and left as it is."""
    hidden, _, _ = model.hidden(tokens, Facts(positions, segments), cache)
    return token_scores(hidden, model.unembedding, targets, ops=ops, dtype=dtype, softcap=model.logit_softcap, chunk=chunk)


def _of(rows: ScoredRows) -> tuple[Array, Array, Array]:
    return jnp.asarray(rows.tokens), jnp.asarray(rows.positions), jnp.asarray(rows.segments)


def _by_request(rows: ScoredRows, log_probs: np.ndarray, likeliest: np.ndarray) -> dict[int, Likelihood]:
    scored = rows.requests >= 0
    numbers, which = np.unique(rows.requests[scored], return_inverse=True)
    sums = np.bincount(which, log_probs[scored].astype(np.float64), len(numbers))
    counts = np.bincount(which, minlength=len(numbers))
    hits = np.bincount(which, likeliest[scored], len(numbers))
    return {
        int(number): Likelihood(float(total), int(count), bool(hit == count))
        for number, total, count, hit in zip(numbers, sums, counts, hits, strict=True)
    }
