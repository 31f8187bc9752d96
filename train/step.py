"""One optimizer step: micro-batches, gradient, clipping, update, and what is said about it."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, Key
from pydantic import BaseModel, Field

from data.pipeline import Batch
from lm.base import AbstractLM
from lm.flight import Flight, put_on_flight
from lm.kernels import Ops
from lm.masks import Facts
from train.losses import Loss, next_token, token_log_probs


class StepConfig(BaseModel, frozen=True, extra="forbid"):
    """What belongs to one step beside the model and the optimizer."""

    micro_batches: int = Field(1, ge=1, description="pieces a batch is cut into to save memory; the result is that of the whole")
    clip_norm: float = Field(1.0, gt=0, description="gradients longer than this (global L2 norm) are scaled down to it")
    z_loss: float = Field(0.0, ge=0, description="weight of log² Z in the loss; 1e-4 in PaLM")
    loss_chunk: int = Field(1024, ge=1, description="tokens unembedded at a time; more is more memory")


class TrainState(eqx.Module):
    """All that changes from step to step, and `frozen`, which does not."""

    trainable: Any  # the model's floating arrays, fp32
    frozen: Any  # what is not trained; all None in full training
    optimizer: Any
    step: Int[Array, ""]  # steps done
    skipped: Int[Array, ""]  # of these, how many changed nothing because loss or gradient was not finite

    @property
    def model(self) -> Any:
        return eqx.combine(self.trainable, self.frozen)


Metrics = dict[str, Array]
Step = Callable[[TrainState, Batch, float], tuple[TrainState, Metrics]]


def init_state(model: AbstractLM, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step: every floating array is trained."""
    trainable, frozen = eqx.partition(model, eqx.is_inexact_array)
    # Two zeros, not one twice: a buffer can be donated only once.
    return TrainState(trainable, frozen, optimizer.init(trainable), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def make_step(optimizer: optax.GradientTransformation, config: StepConfig, flight: Flight, ops: Ops, dropout_key: Key[Array, ""]) -> Step:
    """`step(state, batch, learning_rate) -> (state, metrics)`, compiled at its first call. The state passed in is donated: use the one
    returned.

    Metrics: `loss` (nats a token), `grad_norm` (before clipping), `tokens` (supervised), `skipped` (so far).
    """

    def loss_of(trainable: Any, frozen: Any, batch: Batch, key: Array) -> tuple[Array, Loss]:
        flying = put_on_flight(eqx.combine(trainable, frozen), flight, ops)
        facts = Facts(jnp.asarray(batch.positions), jnp.asarray(batch.segments))
        hidden, _, _ = flying.hidden(jnp.asarray(batch.tokens), facts, key=key)
        loss = next_token(
            hidden,
            flying.unembedding,
            jnp.asarray(batch.targets),
            jnp.asarray(batch.loss_weights),
            ops=ops,
            dtype=jnp.dtype(flight.dtype),
            z_loss=config.z_loss,
            softcap=flying.logit_softcap,
            chunk=config.loss_chunk,
        )
        return loss.total, loss

    def gradient_of(state: TrainState, batch: Batch, key: Array) -> tuple[Any, Loss]:
        """Sum of the gradients of all tokens, over micro-batches."""
        gradient = jax.grad(loss_of, has_aux=True)
        if config.micro_batches == 1:
            return gradient(state.trainable, state.frozen, batch, jr.fold_in(key, 0))

        def of_micro_batch(sums: Any, numbered: tuple[Array, Batch]) -> tuple[Any, None]:
            i, micro = numbered
            return jax.tree.map(jnp.add, sums, gradient(state.trainable, state.frozen, micro, jr.fold_in(key, i))), None

        k = config.micro_batches
        micro_batches = jax.tree.map(lambda x: x.reshape(k, x.shape[0] // k, *x.shape[1:]), batch)
        zero = jnp.zeros((), jnp.float32)
        start = (jax.tree.map(jnp.zeros_like, state.trainable), Loss(zero, zero, zero))
        return jax.lax.scan(of_micro_batch, start, (jnp.arange(k), micro_batches))[0]

    def step(changing: TrainState, frozen: Any, batch: Batch, learning_rate: Float[Array, ""]) -> tuple[TrainState, Metrics]:
        state = TrainState(changing.trainable, frozen, changing.optimizer, changing.step, changing.skipped)
        sums, loss = gradient_of(state, batch, jr.fold_in(dropout_key, state.step))
        count = jnp.maximum(loss.count, 1.0)
        norm = optax.tree.norm(sums) / count
        scale = jnp.minimum(1.0, config.clip_norm / (norm + 1e-6)) / count
        gradients = jax.tree.map(lambda g: g * scale, sums)

        directions, optimizer_state = optimizer.update(gradients, state.optimizer, state.trainable)
        trainable = jax.tree.map(lambda p, d: p - (learning_rate * d).astype(p.dtype), state.trainable, directions)
        finite = jnp.isfinite(loss.total) & jnp.isfinite(norm)
        trainable, optimizer_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (trainable, optimizer_state), (state.trainable, state.optimizer)
        )
        skipped = state.skipped + jnp.where(finite, 0, 1).astype(jnp.int32)
        metrics = {"loss": loss.cross_entropy / count, "grad_norm": norm, "tokens": loss.count, "skipped": skipped}
        return TrainState(trainable, None, optimizer_state, state.step + 1, skipped), metrics

    compiled = jax.jit(step, donate_argnums=0)  # what is frozen is not donated: it is needed again

    def checked(state: TrainState, batch: Batch, learning_rate: float) -> tuple[TrainState, Metrics]:
        if batch.tokens.shape[0] % config.micro_batches:
            raise ValueError(f"batch ({batch.tokens.shape[0]} rows) must be a multiple of micro_batches ({config.micro_batches})")
        changing = TrainState(state.trainable, None, state.optimizer, state.step, state.skipped)
        done, metrics = compiled(changing, state.frozen, batch, jnp.asarray(learning_rate, jnp.float32))
        return TrainState(done.trainable, state.frozen, done.optimizer, done.step, done.skipped), metrics

    return checked


def make_token_nats(flight: Flight, ops: Ops, chunk: int = 1024) -> Callable[[AbstractLM, Batch], Float[Array, "batch seq"]]:
    """`token_nats(model, batch)`: -log p(target) of every place in nats, dropout off. Weights are not applied: the caller knows what it
    counts."""

    @jax.jit
    def token_nats(model: AbstractLM, batch: Batch) -> Array:
        flying = put_on_flight(model, flight, ops)
        facts = Facts(jnp.asarray(batch.positions), jnp.asarray(batch.segments))
        hidden, _, _ = flying.hidden(jnp.asarray(batch.tokens), facts)
        settings: dict[str, Any] = {"ops": ops, "dtype": jnp.dtype(flight.dtype), "softcap": flying.logit_softcap, "chunk": chunk}
        return -token_log_probs(hidden, flying.unembedding, jnp.asarray(batch.targets), **settings)

    return lambda model, batch: token_nats(model, jax.tree.map(jnp.asarray, batch))
