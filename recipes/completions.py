"""Prompts continued together, each up to its stop string."""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key

from data.tokenizer import Tokenizer
from lm.base import AbstractLM
from lm.decoding import cache_dtype, decode, prefill
from lm.generate import PROMPT_ROUNDING, SLOT_ROUNDING
from lm.kernels import Ops
from lm.sampling import GREEDY, Sampler
from recipes.stop_strings import before_stop

PIECE = 32  # tokens drawn between two looks for stop strings


class Written(NamedTuple):
    """What a model wrote."""

    text: str  # up to the stop string
    tokens: int  # drawn, those behind the stop string too
    ended_by: str  # "end of text", "stop string" or "max_new_tokens"


def complete(
    model: AbstractLM,
    prompts: Sequence[np.ndarray],
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int,
    stops: Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    sampler: Sampler = GREEDY,
    key: Key[Array, ""] | None = None,
    ops: Ops,
) -> list[Written]:
    """Continuations of prompts, decoded as one batch, greedily unless a `sampler` and its `key` are given. It ends when every row has.

    **Arguments:**

    - `stops`: strings at which a row ends; neither they nor what follows is part of the text.
    - `stop_ids`: tokens at which it does; `None`: the tokenizer's EOS.
    """
    if stop_ids is None:
        stop_ids = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    longest = max(map(len, prompts))
    if longest + max_new_tokens > model.config.context:
        raise ValueError(
            f"prompt ({longest} tokens) and max_new_tokens ({max_new_tokens}) pass the model's context of {model.config.context}"
        )
    width = -(-longest // PROMPT_ROUNDING) * PROMPT_ROUNDING
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    slots = -(-(width + max_new_tokens) // SLOT_ROUNDING) * SLOT_ROUNDING
    lengths = jnp.asarray([len(prompt) for prompt in prompts])
    penalised = sampler.repetition_penalty != 1
    keys = jr.split(jr.key(0) if key is None else key, len(prompts))
    state = prefill(model, jnp.asarray(tokens), lengths, slots, keys, cache_dtype(model), penalised, ops)

    drawn: list[list[int]] = [[] for _ in prompts]
    found: list[Written | None] = [None for _ in prompts]
    left = max_new_tokens
    while left > 0 and None in found:
        state, out = decode(model, state, jnp.asarray(list(stop_ids), jnp.int32).reshape(-1), sampler, min(PIECE, left), ops)
        left -= PIECE
        ended = np.asarray(state.done)
        for i, row in enumerate(np.asarray(out)):
            if found[i] is None:
                drawn[i] += [int(token) for token in row if token >= 0]
                found[i] = _ended(tokenizer.decode(drawn[i]), len(drawn[i]), stops, bool(ended[i]))
        state = eqx.tree_at(lambda s: s.done, state, jnp.asarray([each is not None for each in found]))
    return [
        Written(tokenizer.decode(ids), len(ids), "max_new_tokens") if each is None else each for ids, each in zip(drawn, found, strict=True)
    ]


def _ended(text: str, tokens: int, stops: Sequence[str], at_stop_id: bool) -> Written | None:
    """What was written, if it has come to an end."""
    kept, met = before_stop(text, stops)
    if met is not None:
        return Written(kept, tokens, "stop string")
    return Written(text, tokens, "end of text") if at_stop_id else None
