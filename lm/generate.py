"""From a prompt to more tokens: prefill once, then decode one token at a time from the caches. Ids in, ids out.

Prompts of a batch may have different lengths: they are padded on the left with segment 0, which nothing may attend to. Lengths are rounded
up to a few sizes, so that the compiled programs are used again.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key

from lm.base import AbstractLM
from lm.decoding import Decoding, cache_dtype, chosen_ops, decode, draw, prefill, stop_array
from lm.kernels import Ops
from lm.sampling import GREEDY, Sampler

PROMPT_ROUNDING = 32  # tokens; the shortest length that prompts are padded to
SLOT_ROUNDING = 128  # tokens; the shortest cache


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
    ops = chosen_ops(ops)
    state = _start(model, prompts, max_new_tokens, sampler, key, n, seeds, ops)
    _, out = decode(model, state, stop_array(stop_ids), sampler, max_new_tokens, ops)
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
    ops = chosen_ops(ops)
    state = _start(model, [prompt], max_new_tokens, sampler, key, 1, [seed], ops)
    for _, tokens in draw(model, state, sampler, max_new_tokens, stop_ids=stop_ids, piece=chunk, ops=ops):
        yield from tokens


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

    width = _rounded(max(lengths), PROMPT_ROUNDING)
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    slots = _rounded(width + max_new_tokens, SLOT_ROUNDING)
    key = jr.key(0) if key is None else key  # greedy: never looked at
    keys = jax.vmap(jr.fold_in, (None, 0))(key, jnp.asarray(range(rows) if seeds is None else seeds, jnp.uint32))
    return prefill(model, jnp.asarray(tokens), jnp.asarray(lengths), slots, keys, cache_dtype(model), sampler.repetition_penalty != 1, ops)


def _rounded(n: int, least: int) -> int:
    """The first of `least` times 1, 2, 3, 4, 6, 8, 12, 16, … that is not below `n`: two lengths an octave, so few programs serve all."""
    octave = least
    while n > 2 * octave:
        octave *= 2
    return next(size for size in (octave, octave + octave // 2 if octave > least else octave, 2 * octave) if size >= n)
