"""Many steps, and the measure of a model on text it has not seen."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.pipeline import Batch
from train.step import Metrics, Step, TrainState


def steps(
    step: Step, state: TrainState, batches: Iterable[Batch], learning_rate: Callable[[int], float], *, start: int, stop: int
) -> Iterator[tuple[int, TrainState, dict[str, float] | None]]:
    """Train from step `start` to `stop`, yielding `(done, state, metrics)` after each one.

    `state` is that after `done` steps, valid until the next one is asked for (its arrays are donated to it). `metrics` are those of the
    step *before* (`metrics["step"] == done - 2`, counted from 0; `None` at first): fetching the newest would make the device wait for
    Python. After the last step they come once more, so that none is lost: `done` then repeats.
    """
    iterator = iter(batches)
    pending: tuple[int, float, Metrics] | None = None
    clock = time.perf_counter()
    for index in range(start, stop):
        waiting = time.perf_counter()
        batch = next(iterator)
        wait_s = time.perf_counter() - waiting
        rate = learning_rate(index)
        state, device_metrics = step(state, jax.tree.map(jnp.asarray, batch), rate)
        metrics = None
        if pending is not None:
            metrics, clock = _fetch(*pending, clock=clock)
            metrics["wait_s"] = wait_s
        pending = (index, rate, device_metrics)
        yield index + 1, state, metrics
    if pending is not None:
        metrics, _ = _fetch(*pending, clock=clock)
        metrics["wait_s"] = 0.0
        yield stop, state, metrics


def _fetch(index: int, rate: float, device_metrics: Metrics, *, clock: float) -> tuple[dict[str, float], float]:
    """Wait for a step's numbers. Its time is that since the last fetch: with steps back to back, one step."""
    values: dict[str, float] = {name: np.asarray(value).item() for name, value in device_metrics.items()}
    now = time.perf_counter()
    tokens = values.pop("tokens")
    return {"step": index, **values, "lr": rate, "tokens": tokens, "step_s": now - clock, "tokens_per_s": tokens / (now - clock)}, now


def nats_by_document(
    token_nats: Callable[[Any, Batch], Any],
    model: Any,
    batches: Iterable[tuple[Batch, np.ndarray]],
    on_batch: Callable[[int], None] | None = None,
) -> tuple[dict[int, float], dict[int, int]]:
    """Nats and tokens of each document, every token counted as often as its loss weight says (once).

    **Arguments:**

    - `token_nats`: `train.step.make_token_nats`.
    - `batches`: pairs of a batch and, for each place in it, the index of its document (-1 for padding).
    - `on_batch`: told the number of batches done.
    """
    nats: dict[int, float] = defaultdict(float)
    tokens: dict[int, int] = defaultdict(int)
    for done, (batch, documents) in enumerate(batches, start=1):
        losses = np.asarray(token_nats(model, batch), np.float64)
        counted = batch.loss_weights > 0
        indices = documents[counted]
        for document, total, count in zip(*_sums(indices, losses[counted] * batch.loss_weights[counted]), strict=True):
            nats[int(document)] += float(total)
            tokens[int(document)] += int(count)
        if on_batch is not None:
            on_batch(done)
    return dict(nats), dict(tokens)


def _sums(indices: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    unique, inverse = np.unique(indices, return_inverse=True)
    return unique, np.bincount(inverse, values, len(unique)), np.bincount(inverse, minlength=len(unique))


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Nats / ln 2 / UTF-8 bytes: what a coder driven by the model would need, comparable across tokenizers and with `xz`."""
    return nats / math.log(2) / text_bytes
