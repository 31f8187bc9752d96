"""Many steps, and the measure of a model on text it has not seen."""

import math
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from loguru import logger

from data.pipeline import Batch
from train.step import Metrics, Step, TrainState


class SpikeError(RuntimeError):
    """The run was told to stop where loss or gradient norm jumps, and one did."""


def steps(
    step: Step,
    state: TrainState,
    batches: Iterable[Any],
    learning_rate: Callable[[int], float],
    *,
    start: int,
    stop: int,
    average_rate: Callable[[int], float] = lambda index: 0.0,
    pause: Callable[[int], bool] = lambda done: False,
    stop_at_spike: bool = False,
    describe: Callable[[int], str] = lambda index: f"batch {index}",
) -> Iterator[tuple[int, TrainState, list[dict[str, float]]]]:
    """Train from step `start` to `stop`, yielding `(done, state, metrics)` after each one.

    `state` is that after `done` steps, valid until the next one is asked for: its arrays are donated to it. `metrics` are those that have
    arrived since the last yield, usually one step late: fetching the newest at once would make the device wait for Python. Where
    `pause(done)` is true, and after the last step, the device is waited for and none is outstanding, so that a checkpoint never gets ahead
    of the log, and what the caller does there is not counted as the time of a step.

    Each metrics dictionary holds `step` (counted from 1: the updates done), `loss`, `grad_norm`, `learning_rate`, `tokens`, `step_s`,
    `tokens_per_s` (of those read), `wait_s` (seconds the step waited for its batch), `skipped` and `spikes` so far, and where they were
    measured `sigmas` and `update_ratio/ROLE` (see `train.step.make_step`).

    **Arguments:**

    - `learning_rate`, `average_rate`: of the step with this index (`train.optimizers`, `train.averages`).
    - `stop_at_spike`: raise `SpikeError` after a step whose loss or gradient norm jumped.
    - `describe`: words on the batch of a step, said where something is wrong with it.
    """
    iterator = iter(batches)
    pending: list[tuple[dict[str, float], Metrics]] = []
    counts: dict[str, float] = {"skipped": int(state.stats.skipped), "spikes": int(state.stats.spikes)}
    clock = time.perf_counter()
    for index in range(start, stop):
        asked = time.perf_counter()
        batch = jax.tree.map(jnp.asarray, next(iterator))
        known = {"step": index + 1, "learning_rate": learning_rate(index), "wait_s": time.perf_counter() - asked}
        state, device_metrics = step(state, batch, known["learning_rate"], average_rate(index))
        pending.append((known, device_metrics))
        synchronous = index + 1 == stop or pause(index + 1)
        kept = 0 if synchronous else 1
        ready, pending = pending[: len(pending) - kept], pending[len(pending) - kept :]
        arrived, clock = _fetch(ready, clock)
        for metrics in arrived:
            spiked = metrics["spikes"] > counts["spikes"]
            _warn(metrics, counts, describe)
            counts = {name: metrics[name] for name in counts}
            if spiked and stop_at_spike:
                raise SpikeError(f"stopped at step {metrics['step']}: {_spike(metrics)}; {describe(int(metrics['step']) - 1)}")
        yield index + 1, state, arrived
        if synchronous:
            clock = time.perf_counter()


def _warn(metrics: dict[str, float], before: dict[str, float], describe: Callable[[int], str]) -> None:
    """Say what was wrong with a step, and with which batch."""
    step = int(metrics["step"])
    if metrics["skipped"] > before["skipped"]:
        number = f"step {metrics['skipped']} of this kind"
        why = "loss or gradient is not finite" if metrics["tokens"] else "no token of its batch carries loss"
        logger.warning(f"step {step}: {why}; nothing was changed ({number}); {describe(step - 1)}")
    if metrics["spikes"] > before["spikes"]:
        logger.warning(f"step {step}: {_spike(metrics)} (jump {metrics['spikes']} of this run); {describe(step - 1)}")


def _spike(metrics: dict[str, float]) -> str:
    numbers = f"loss {metrics['loss']:.4f} or gradient norm {metrics['grad_norm']:.3g}"
    return f"{numbers} is {metrics['sigmas']:.1f} standard deviations above those of the last steps"


def _fetch(ready: list[tuple[dict[str, float], Metrics]], clock: float) -> tuple[list[dict[str, float]], float]:
    """Wait for the numbers of some steps. Their time is that since the last fetch, shared evenly: with steps back to back, that of a
    step."""
    values = [known | _flat(jax.device_get(metrics)) for known, metrics in ready]
    if not values:
        return [], clock
    now = time.perf_counter()
    step_s = (now - clock) / len(values)
    # Tokens that are only read take as long as those that are learned.
    return [each | {"step_s": step_s, "tokens_per_s": each.get("tokens_read", each["tokens"]) / step_s} for each in values], now


def _flat(metrics: Metrics) -> dict[str, float]:
    """One number a name, without those that were not measured at this step."""
    ratios = {f"update_ratio/{role}": value for role, value in metrics.get("update_ratio", {}).items()}
    numbers = {name: value for name, value in metrics.items() if name != "update_ratio"} | ratios
    optional = {"sigmas", *ratios}
    return {name: np.asarray(value).item() for name, value in numbers.items() if name not in optional or not np.isnan(value)}


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


class Interrupt:
    """Whether the process was asked to stop, and after which step it will."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._asked_at = -1
        self._due = False

    def due(self, done: int) -> bool:
        """True if the run should end after `done` steps. The answer for one step never changes, so all who ask act alike."""
        if done != self._asked_at:
            self._asked_at, self._due = done, self.signal is not None
        return self._due

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as shells say it."""
        return 128 + (self.signal or 0)


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Inside, Ctrl-C and SIGTERM ask to stop after the step in progress; a second one stops at once."""
    interrupt = Interrupt()

    def ask(number: int, frame: Any) -> None:
        if interrupt.signal is not None:
            raise KeyboardInterrupt
        interrupt.signal = number
        logger.warning("asked to stop: finishing this step and saving (once more to stop at once)")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
