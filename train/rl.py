"""Between rollouts and the step: the batch that is learned from, the proof that sampler and trainer are the same model, and what is told
of a batch of answers.

    rollouts ─ rewards ─ advantages ─► `policy_batch` ─► trainer's log-probs ─► `check_gap` ─► updates
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lm.flight import Flight, put_on_flight
from lm.generate import Sampler
from lm.kernels import Ops
from train.advantages import SAME
from train.policy import PolicyBatch, log_probs_of
from train.rollout import Rollouts

FP32_GAP = 1e-4  # nats; sampler and trainer in fp32 must agree on each token to this


class GapError(RuntimeError):
    """Sampler and trainer disagree on a token by more than rounding explains; the message shows it."""


@dataclass(frozen=True)
class Gap:
    """|log p by the trainer - log p by the sampler| over the drawn tokens of a batch, before its first update."""

    mean: float
    largest: float
    row: int  # of the largest
    column: int  # of the batch


def policy_batch(rollouts: Rollouts, advantages: np.ndarray, *, seq: int) -> PolicyBatch:
    """One row an answer: its prompt and what was written, padded on the right to `seq` targets.

        tokens          <bos> 4 7 + 3 8 = 8 5         ·
        targets         4 7 + 3 8 = 8 5 <eos>         ·
        loss_weights    0 0 0 0 0 0 1 1 1             0

    **Arguments:**

    - `advantages`: `[rows]`; NaN leaves an answer out.
    """
    rows = len(rollouts)
    ints = {name: np.zeros((rows, seq), np.int32) for name in ("tokens", "targets", "positions", "segments")}
    floats = {name: np.zeros((rows, seq), np.float32) for name in ("loss_weights", "advantages", "sampler_log_probs")}
    for row in range(rows):
        prompt, length = rollouts.prompt_of(row), rollouts.length_of(row)
        whole = np.concatenate([prompt, rollouts.tokens[row, :length]])
        if (pairs := len(whole) - 1) > seq:
            raise ValueError(f"prompt and answer have {len(whole)} tokens, more than a row of {seq} targets holds")
        ints["tokens"][row, :pairs], ints["targets"][row, :pairs] = whole[:-1], whole[1:]
        ints["positions"][row, :pairs], ints["segments"][row, :pairs] = np.arange(pairs), 1
        if np.isnan(advantages[row]):
            continue
        written = slice(len(prompt) - 1, pairs)  # where an answer's token is the target
        drawn = rollouts.drawn[row, :length]
        floats["loss_weights"][row, written] = drawn
        floats["advantages"][row, written] = np.where(drawn, advantages[row], 0)
        floats["sampler_log_probs"][row, written] = rollouts.log_probs[row, :length]
    zeros = np.zeros((rows, seq), np.float32)
    return PolicyBatch(**ints, **floats, old_log_probs=zeros, reference_log_probs=None)


def make_log_probs(flight: Flight, ops: Ops, sampler: Sampler, *, rows: int, chunk: int = 1024) -> Callable[[Any, PolicyBatch], np.ndarray]:
    """`log_probs(model, batch)` by the trainer, without a gradient, 0 where nothing was drawn; `rows` at a time."""
    some = eqx.filter_jit(drawn_log_probs(flight, ops, sampler, chunk=chunk))

    def log_probs(model: Any, batch: PolicyBatch) -> np.ndarray:
        parts = [jax.tree.map(lambda x, at=at: jnp.asarray(x[at : at + rows]), batch) for at in range(0, len(batch.tokens), rows)]
        return np.concatenate([np.asarray(some(model, part)) for part in parts])

    return log_probs


def drawn_log_probs(flight: Flight, ops: Ops, sampler: Sampler, *, chunk: int = 1024) -> Callable[[Any, PolicyBatch], Array]:
    """What `make_log_probs` compiles: of some rows, all at once."""
    of_flying = log_probs_of(flight, ops, sampler=sampler, chunk=chunk)
    return lambda model, batch: of_flying(put_on_flight(model, flight, ops), batch) * batch.loss_weights


def gap_of(batch: PolicyBatch) -> Gap:
    """Of a batch whose `old_log_probs` are known."""
    difference = np.abs(batch.old_log_probs - batch.sampler_log_probs) * (batch.loss_weights > 0)
    row, column = np.unravel_index(int(np.argmax(np.where(np.isnan(difference), np.inf, difference))), difference.shape)
    tokens = max(1, int(np.sum(batch.loss_weights > 0)))
    return Gap(float(np.sum(difference)) / tokens, float(difference[row, column]), int(row), int(column))


def check_gap(batch: PolicyBatch, limit: float, readable: Callable[[np.ndarray], list[str]]) -> Gap:
    """The gap of a batch.

    **Arguments:**

    - `limit`: nats, on any token.
    - `readable`: the text of each of some tokens, for the error.

    **Raises:** `GapError` above the limit, with the token that shows it.
    """
    gap = gap_of(batch)
    if not gap.largest <= limit:
        before = readable(batch.tokens[gap.row, max(0, gap.column - 8) : gap.column + 1])
        token = readable(batch.targets[gap.row, gap.column : gap.column + 1])[0]
        place = gap.row, gap.column
        raise GapError(
            f"sampler and trainer disagree: token {token!r} (row {gap.row}, after {''.join(before)!r}) had log-prob "
            f"{batch.sampler_log_probs[place]:.6f} when it was drawn and has {batch.old_log_probs[place]:.6f} at the same weights, "
            f"{gap.largest:.2e} apart; the limit is {limit:.2e}, the mean over the batch {gap.mean:.2e}. They are not the same model: "
            "look for a difference in kernels, masks or dtypes, or calibrate the limit of this dtype anew"
        )
    return gap


def parts_of(batch: PolicyBatch, parts: int, seed: tuple[int, ...]) -> Iterator[PolicyBatch]:
    """The batch in so many parts of equal size, its rows shuffled where they are more than one."""
    rows = len(batch.tokens)
    order = np.arange(rows) if parts == 1 else np.random.default_rng(seed).permutation(rows)
    for some in np.split(order, parts):
        yield jax.tree.map(lambda field, some=some: field[some], batch)


# ------------------------------------------------------------------------------------------- what is told


def describe(rollouts: Rollouts, rewards: np.ndarray, by_reward: Mapping[str, np.ndarray], best: float) -> dict[str, float]:
    """Numbers on a batch of answers, for the log. `rewards` and each of `by_reward`: `[rows]`, NaN for what is left out; `best`: the
    reward of an answer that cannot be better."""
    groups = rewards.reshape(-1, rollouts.n)
    right, wrong = (np.nanmin(_filled(groups, np.inf), axis=1) >= best - SAME), (np.nanmax(_filled(groups, -np.inf), axis=1) <= SAME)
    lengths, ended = rollouts.lengths, rollouts.ended
    told = {
        "reward": float(np.nanmean(rewards)),
        "reward_std": float(np.nanstd(rewards)),
        "groups_all_right": float(np.mean(right)),
        "groups_all_wrong": float(np.mean(wrong)),
        "left_out": float(np.mean(np.isnan(rewards))),
        "length": float(np.mean(lengths)),
        "length_min": int(np.min(lengths)),
        "length_max": int(np.max(lengths)),
        "truncated": float(np.mean(~ended)),
        "entropy": float(np.sum(rollouts.entropies) / max(1, np.sum(rollouts.drawn))),
        "tokens_generated": int(np.sum(rollouts.drawn)),
    }
    if ended.any():
        told["length_terminated"] = float(np.mean(lengths[ended]))
    return told | {f"reward/{name}": float(np.nanmean(values)) for name, values in by_reward.items()}


def _filled(groups: np.ndarray, value: float) -> np.ndarray:
    """Left-out answers as `value`, so that they decide nothing; a group of nothing else is neither all right nor all wrong."""
    return np.where(np.isnan(groups), np.where(np.all(np.isnan(groups), axis=1, keepdims=True), -value, value), groups)
