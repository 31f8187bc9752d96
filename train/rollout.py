"""Answers drawn from the model that learns: the same weights, in the same flight, on the same device, many prompts and answers at once.

Each prompt is run through the model once; its keys and values are copied for its `n` answers (`lm.generate.prefill`), and all rows decode
together in one compiled loop that ends when the last one has. With each token are kept its log-probability *under the distribution that
was really sampled* (temperature and truncation included) and that distribution's entropy.

    prompts     P of them, left-padded to `width`
    rows        P · n, the n answers to a prompt side by side
    columns     the tokens of an answer, its stop id included, -1 after its end
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from lm.base import AbstractLM
from lm.flight import Flight, put_on_flight
from lm.generate import Decoding, Sampler, prefill
from lm.kernels import Ops
from lm.masks import PADDING, Facts

AsIs = Sampler(temperature=1.0)  # the model's own distribution, nothing cut off


@dataclass(frozen=True)
class ToolCalls:
    """A tool, in token ids."""

    ends_call: int  # the model hands over with this token, which it has drawn itself
    reply: Callable[[np.ndarray], np.ndarray]  # the tokens it drew since the last hand-over, without `ends_call` → the tokens it is to read
    max_calls: int  # in one answer
    max_tokens: int  # of a reply; a longer one is an error


@dataclass(frozen=True)
class Rollouts:
    """Answers of one batch. Rows `[prompts · n]`, columns up to the longest there may be."""

    prompts: list[np.ndarray]  # token ids, one entry a prompt
    n: int  # answers to each
    tokens: Int[np.ndarray, "rows columns"]  # -1 after the end
    drawn: Bool[np.ndarray, "rows columns"]  # by the model; False for what a tool said, and after the end
    log_probs: Float[np.ndarray, "rows columns"]  # of the drawn ones, at the moment they were drawn
    entropies: Float[np.ndarray, "rows columns"]  # nats, of the distribution each was drawn from
    ended: Bool[np.ndarray, " rows"]  # by a stop id; else the answer was cut off

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Int[np.ndarray, " rows"]:
        """Tokens of each answer, stop id and tool's replies included."""
        return np.sum(self.tokens >= 0, axis=1)

    def length_of(self, row: int) -> int:
        return int(np.sum(self.tokens[row] >= 0))

    def prompt_of(self, row: int) -> np.ndarray:
        return self.prompts[row // self.n]

    def answer(self, row: int) -> np.ndarray:
        """The tokens of one answer, without the stop id it ended with."""
        tokens = self.tokens[row, : self.length_of(row)]
        return tokens[:-1] if self.ended[row] else tokens


def roll_out(
    model: AbstractLM,
    prompts: Sequence[np.ndarray],
    *,
    n: int,
    width: int,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    key: Key[Array, ""],
    flight: Flight,
    ops: Ops,
    sampler: Sampler = AsIs,
    tool: ToolCalls | None = None,
) -> Rollouts:
    """Draw `n` answers to each prompt.

    **Arguments:**

    - `width`: what prompts are padded to, in tokens. Keep it through a run: each width is compiled anew.
    - `max_new_tokens`: the most that is drawn for an answer, its stop id included.
    - `flight`: of the trainer; its dtype is what matters here. Decoding itself is always a loop over the layers.
    - `sampler`: how tokens are drawn. Greedy has no distribution, and a repetition penalty makes one that depends on more than the logits:
      both are refused.

    **Raises:** `ValueError` where a prompt is longer than `width`, or `width` and new tokens pass the model's context.
    """
    _check(model, prompts, n, width, max_new_tokens, sampler, tool)
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    rows, calls = len(prompts) * n, 0 if tool is None else tool.max_calls
    slots = width + (calls + 1) * max_new_tokens + (0 if tool is None else calls * tool.max_tokens)
    keys = jr.split(key, rows)
    decoding = Flight(layers="loop", dtype=flight.dtype)
    state = _start(model, jnp.asarray(tokens), jnp.asarray([len(p) for p in prompts]), slots, keys, decoding, ops)
    stops = jnp.asarray([*stop_ids, *([] if tool is None else [tool.ends_call])], jnp.int32)

    written = _Written.empty(rows, max_new_tokens + (0 if tool is None else calls * tool.max_tokens))
    left = np.full(rows, max_new_tokens)
    for call in range(calls + 1):
        state, drawn = _draw(model, state, jnp.asarray(left, jnp.int32), stops, sampler, max_new_tokens, decoding, ops)
        tokens_drawn, log_probs, entropies = jax.device_get(drawn)
        left = left - written.add(tokens_drawn, log_probs, entropies, stop_ids)
        if tool is None or call == calls:
            break
        waiting = ~written.ended & (written.last == tool.ends_call) & (left > 0)
        if not waiting.any():
            break
        said = written.reply(waiting, tool)
        state = _read(model, state, jnp.asarray(said), jnp.asarray(waiting), decoding, ops)
    return Rollouts(list(prompts), n, written.tokens, written.drawn, written.log_probs, written.entropies, written.ended)


def _check(
    model: AbstractLM, prompts: Sequence[np.ndarray], n: int, width: int, max_new_tokens: int, sampler: Sampler, tool: ToolCalls | None
) -> None:
    if n < 1 or max_new_tokens < 1 or not prompts or min(map(len, prompts)) < 1:
        raise ValueError(f"rollouts need prompts of at least one token, n ({n}) and max_new_tokens ({max_new_tokens}) of at least 1")
    if (longest := max(map(len, prompts))) > width:
        raise ValueError(f"a prompt has {longest} tokens, more than the {width} kept for prompts: shorten it, or widen what is kept")
    tools = 0 if tool is None else tool.max_calls * tool.max_tokens
    if width + max_new_tokens + tools > model.config.context:
        raise ValueError(
            f"prompts of up to {width} tokens and answers of up to {max_new_tokens + tools} pass the model's context of "
            f"{model.config.context}: shorten the prompts or ask for fewer new tokens"
        )
    if sampler.temperature == 0:
        raise ValueError("rollouts are drawn from a distribution, and greedy (temperature 0) is none: take a temperature above 0")
    if sampler.repetition_penalty != 1:
        raise ValueError("rollouts cannot have a repetition penalty: the trainer's log-probs would not be those of the same distribution")


def start_program(slots: int, flight: Flight, ops: Ops) -> Callable[..., Decoding]:
    """What `roll_out` runs first, to be compiled for a device that is not there: `(model, prompts, lengths, keys) → Decoding`."""
    return lambda model, tokens, lengths, keys: _start(model, tokens, lengths, slots, keys, flight, ops)


def draw_program(sampler: Sampler, most: int, flight: Flight, ops: Ops) -> Callable[..., Any]:
    """What it runs then: `(model, Decoding, left, stop ids) → (Decoding, what was drawn)`; the Decoding is donated."""
    return lambda model, state, left, stop_ids: _draw(model, state, left, stop_ids, sampler, most, flight, ops)


@eqx.filter_jit
def _start(model: AbstractLM, tokens: Array, lengths: Array, slots: int, keys: Array, flight: Flight, ops: Ops) -> Decoding:
    return prefill(put_on_flight(model, flight, ops), tokens, lengths, slots, keys, jnp.dtype(flight.dtype), False, ops)


@eqx.filter_jit(donate="all-except-first")
def _draw(
    model: AbstractLM, state: Decoding, left: Array, stop_ids: Array, sampler: Sampler, most: int, flight: Flight, ops: Ops
) -> tuple[Decoding, tuple[Array, Array, Array]]:
    """Draw until each row has met a stop id or has none left: the tokens, stop ids included and -1 after, log-probs, entropies."""
    arrays, static = eqx.partition(put_on_flight(model, flight, ops), eqx.is_array)
    batch = state.positions.shape[0]

    def unfinished(carry: tuple[Array, Decoding, Array, Any]) -> Array:
        return ~jnp.all(carry[1].done)

    def draw(carry: tuple[Array, Decoding, Array, Any]) -> tuple[Array, Decoding, Array, Any]:
        i, state, left, (tokens, log_probs, entropies) = carry
        weights, i = jax.lax.optimization_barrier((arrays, i))  # see `lm.generate.decode`
        flying = eqx.combine(weights, static)
        log_p = jax.nn.log_softmax(sampler.filtered(sampler.adjusted(state.logits, None)), axis=-1)
        token = jax.vmap(jr.categorical)(jax.vmap(jr.fold_in, (0, None))(state.keys, state.drawn), log_p).astype(jnp.int32)
        chosen = jnp.take_along_axis(log_p, token[:, None], axis=-1)[:, 0]
        entropy = -jnp.sum(jnp.where(jnp.isfinite(log_p), jnp.exp(log_p) * log_p, 0.0), axis=-1)
        column = (jnp.where(state.done, -1, token), jnp.where(state.done, 0.0, chosen), jnp.where(state.done, 0.0, entropy))
        out = tuple(
            jax.lax.dynamic_update_slice(whole, new[:, None], (0, i))
            for whole, new in zip((tokens, log_probs, entropies), column, strict=True)
        )
        left = left - jnp.where(state.done, 0, 1)
        # A row that is done goes on writing into the cache, as padding: after a tool's reply it must not see that.
        facts = Facts(state.positions[:, None], jnp.where(state.done, PADDING, 1)[:, None].astype(jnp.int32))
        hidden, cache, _ = flying.hidden(token[:, None], facts, state.cache)
        logits = jnp.where(state.done[:, None], state.logits, flying.logits(hidden[:, -1], ops))
        positions = state.positions + jnp.where(state.done, 0, 1).astype(jnp.int32)
        done = state.done | jnp.any(token[:, None] == stop_ids, axis=-1) | (left <= 0)
        state = Decoding(cache, logits, positions, done, state.keys, state.drawn + 1, None)
        return i + 1, state, left, out

    empty = (jnp.full((batch, most), -1, jnp.int32), jnp.zeros((batch, most)), jnp.zeros((batch, most)))
    state = eqx.tree_at(lambda s: s.done, state, state.done | (left <= 0))
    _, state, _, out = jax.lax.while_loop(unfinished, draw, (jnp.zeros((), jnp.int32), state, left, empty))
    return state, out


@eqx.filter_jit(donate="all-except-first")
def _read(
    model: AbstractLM, state: Decoding, said: Int[Array, "rows columns"], waiting: Bool[Array, " rows"], flight: Flight, ops: Ops
) -> Decoding:
    """Let the waiting rows read what a tool said (padded with -1 on the left) and draw again; the others stay as they are."""
    flying = put_on_flight(model, flight, ops)
    there = said >= 0
    lengths = jnp.sum(there, axis=1).astype(jnp.int32)
    positions = state.positions[:, None] + jnp.arange(said.shape[1], dtype=jnp.int32) - (said.shape[1] - lengths)[:, None]
    facts = Facts(jnp.maximum(positions, 0), jnp.where(there, 1, PADDING).astype(jnp.int32))
    hidden, cache, _ = flying.hidden(jnp.maximum(said, 0), facts, state.cache)
    logits = jnp.where(waiting[:, None], flying.logits(hidden[:, -1], ops), state.logits)
    return Decoding(cache, logits, state.positions + lengths, ~waiting, state.keys, state.drawn, None)


@dataclass
class _Written:
    """What the answers consist of so far, on the host."""

    tokens: np.ndarray
    drawn: np.ndarray
    log_probs: np.ndarray
    entropies: np.ndarray
    ended: np.ndarray
    lengths: np.ndarray
    since: np.ndarray  # where each row's text since its last hand-over begins

    @staticmethod
    def empty(rows: int, columns: int) -> "_Written":
        shape = (rows, columns)
        numbers = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        return _Written(
            np.full(shape, -1, np.int32), np.zeros(shape, bool), *numbers, np.zeros(rows, bool), np.zeros(rows, int), np.zeros(rows, int)
        )

    @property
    def last(self) -> np.ndarray:
        return self.tokens[np.arange(len(self.tokens)), np.maximum(self.lengths - 1, 0)]

    def add(self, tokens: np.ndarray, log_probs: np.ndarray, entropies: np.ndarray, stop_ids: Sequence[int]) -> np.ndarray:
        """What was drawn, behind what is there; how much it was of each row."""
        new = np.sum(tokens >= 0, axis=1)
        row, column = np.nonzero(tokens >= 0)
        place = self.lengths[row] + column
        self.tokens[row, place], self.drawn[row, place] = tokens[row, column], True
        self.log_probs[row, place], self.entropies[row, place] = log_probs[row, column], entropies[row, column]
        self.lengths = self.lengths + new
        self.ended |= (new > 0) & np.isin(self.last, list(stop_ids))
        return new

    def reply(self, waiting: np.ndarray, tool: ToolCalls) -> np.ndarray:
        """Ask the tool for each waiting row, and write down what it says; the same padded on the left, for the model to read."""
        said = np.full((len(waiting), tool.max_tokens), -1, np.int32)
        for row in np.flatnonzero(waiting):
            end = self.lengths[row]
            tokens = tool.reply(self.tokens[row, self.since[row] : end - 1])
            if not 0 < len(tokens) <= tool.max_tokens:
                raise ValueError(f"a tool's reply must have 1 to {tool.max_tokens} tokens, got {len(tokens)}")
            said[row, -len(tokens) :] = tokens
            self.tokens[row, end : end + len(tokens)] = tokens
            self.lengths[row] = self.since[row] = end + len(tokens)
        return said
