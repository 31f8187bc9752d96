"""One optimizer step: micro-batches, gradient, clipping, update, and what is said about it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, Key
from pydantic import Field

from data.pipeline import Batch
from lm.base import AbstractLM, Aux, leaves_by_path, mark, role
from lm.flight import Flight, put_on_flight
from lm.kernels import Ops
from lm.masks import Facts
from lm.quant import Quantised
from train.losses import Loss, next_token, token_log_probs
from train.optimizers import averaged_by_optimizer, check_patterns, is_meant, map_paths
from train.settings import Settings

SPIKE_WINDOW = 128  # steps that a jump is judged by, as in OLMo-core's SkipStepOptimizer


class StepConfig(Settings):
    """What belongs to one step beside the model and the optimizer."""

    micro_batches: int = Field(1, ge=1, description="pieces a batch is cut into to save memory; the result is that of the whole")
    clip_norm: float = Field(1.0, gt=0, description="gradients longer than this (global L2 norm) are scaled down to it")
    z_loss: float = Field(0.0, ge=0, description="weight of log² Z in the loss; 1e-4 in PaLM")
    loss_chunk: int = Field(1024, ge=1, description="tokens unembedded at a time; more is more memory")
    on_spike: Literal["warn", "skip", "stop"] = Field(
        "warn",
        description="where loss or gradient norm jumps: say so, say so and leave the weights as they are, or stop the run",
        json_schema_extra={"resumable": True},
    )
    spike_sigmas: float = Field(
        6.0, gt=0, description=f"a jump: this many standard deviations above the mean of the last {SPIKE_WINDOW} steps"
    )
    ratios_every: int = Field(10, ge=0, description="steps between measures of how large updates are beside their weights; 0: never")


class Stats(eqx.Module):
    """What a run remembers of its steps to judge the next one."""

    skipped: Int[Array, ""]  # steps that changed nothing: loss or gradient was not finite, or no token carried loss
    spikes: Int[Array, ""]  # steps whose loss or gradient norm jumped
    seen: Int[Array, ""]  # other steps
    losses: Float[Array, " window"]  # of the last of these, in a ring
    grad_norms: Float[Array, " window"]

    @staticmethod
    def empty() -> "Stats":
        # A zero each: a buffer can be donated only once.
        return Stats(*(jnp.zeros((), jnp.int32) for _ in range(3)), *(jnp.zeros(SPIKE_WINDOW) for _ in range(2)))

    def sigmas(self, loss: Array, grad_norm: Array) -> Float[Array, ""]:
        """How many standard deviations the loss or the gradient norm, whichever is more, lies above the mean of those remembered; NaN until
        there are enough. A deviation of a thousandth of the mean is the least that is believed."""

        def above(value: Array, past: Array) -> Array:
            mean = jnp.mean(past)
            return (value - mean) / jnp.maximum(jnp.std(past), 1e-3 * jnp.abs(mean) + 1e-12)

        worse = jnp.maximum(above(loss, self.losses), above(grad_norm, self.grad_norms))
        return jnp.where(self.seen >= SPIKE_WINDOW, worse, jnp.nan)

    def after(self, loss: Array, grad_norm: Array, finite: Array, spike: Array) -> "Stats":
        """With one more step. A jump is remembered like any step, so that a change that lasts stops being one."""
        place = self.seen % SPIKE_WINDOW

        def kept(ring: Array, value: Array) -> Array:
            return ring.at[place].set(jnp.where(finite, value, ring[place]))

        one = finite.astype(jnp.int32)
        counts = self.skipped + 1 - one, self.spikes + spike.astype(jnp.int32), self.seen + one
        return Stats(*counts, kept(self.losses, loss), kept(self.grad_norms, grad_norm))


class TrainState(eqx.Module):
    """All that changes from step to step, and `frozen`, which does not."""

    trainable: Any  # the model's floating arrays, fp32
    frozen: Any  # what is not trained; all None in full training
    average: Any  # of the trained arrays over the steps (`train.averages`); None where none is kept
    optimizer: Any
    step: Int[Array, ""]  # steps done
    stats: Stats

    @property
    def model(self) -> Any:
        """The model at the weights as trained."""
        return eqx.combine(self.trainable, self.frozen)

    @property
    def _trained(self) -> Any:
        """The model with True at what is trained."""
        return jax.tree.map(lambda leaf: leaf is not None, self.trainable, is_leaf=lambda leaf: leaf is None)

    @property
    def averaged(self) -> Any:
        """The model at the average of its weights: that of the step, or a schedule-free optimizer's own; `None` where there is neither."""
        average = self.average if self.average is not None else averaged_by_optimizer(self.optimizer, self.trainable)
        return None if average is None else eqx.combine(average, self.frozen)

    def items(self, *, by_reference: bool = False) -> dict[str, Any]:
        """What a checkpoint holds of this state.

        **Arguments:**

        - `by_reference`: leave out what is frozen, a base that lies elsewhere and that the record names, with its digest (`lm.Base`). There
          is `trainable` then, and `average` likewise; else `model` and `average` are whole, and each loads alone.
        """
        items = {"trainable": self.trainable} if by_reference else {"model": self.model}
        items |= {"optimizer": {"state": self.optimizer, "stats": self.stats}}
        if self.averaged is None:
            return items
        return items | {"average": eqx.filter(self.averaged, self._trained) if by_reference else self.averaged}

    def with_items(self, items: Mapping[str, Any], step: int) -> "TrainState":
        """The state (this one may be abstract) with what a checkpoint held. What was left out of it, `frozen`, stays this one's."""
        trainable, frozen = (items["trainable"], self.frozen) if "trainable" in items else eqx.partition(items["model"], self._trained)
        average = None if self.average is None else eqx.filter(items["average"], self._trained)
        optimizer, stats = items["optimizer"]["state"], items["optimizer"]["stats"]
        # Placed as the rest is: what a checkpoint gives is committed to its device, and so is all that the first step makes of it. A number
        # that is not would have the second step compiled again.
        done = jax.device_put(jnp.asarray(step, jnp.int32), stats.seen.sharding)
        return TrainState(trainable, frozen, average, optimizer, done, stats)


Metrics = dict[str, Any]
Step = Callable[..., tuple[TrainState, Metrics]]


class Told(NamedTuple):
    """What an objective says of a batch, or of a micro-batch."""

    loss: Loss
    means: Aux  # name → (sum, count): a metric of that name is the mean over the batch
    peaks: dict[str, Array]  # a metric of that name is the largest


# (model in flight, batch, dropout key). One that is a module with arrays of its own, a teacher's (`train.distillation`), has them given to
# the compiled step as arguments; they are neither trained nor donated.
Objective = Callable[[Any, Any, Array], Told]


def init_state(
    model: eqx.Module,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    frozen: Sequence[str] = (),
    trainable: Any = None,
    average: bool = False,
) -> TrainState:
    """The state before the first step.

    **Arguments:**

    - `model`: an `AbstractLM`, or a module that holds one.
    - `frozen`: roles or paths of what is not trained (`train.optimizers`); every other floating array is.
    - `trainable`: a tree of bools like the model, such as `lm.trainable_filter` gives: what is trained, less what is `frozen`. `None`:
      every floating array.
    - `average`: keep an average of the weights.

    **Raises:** `ValueError` where nothing is left to train, or where packed numbers would be.
    """
    check_patterns(frozen, model, "frozen")
    asked = jax.tree.map(eqx.is_inexact_array, model) if trainable is None else trainable
    trained = map_paths(lambda path, is_asked: is_asked and not any(is_meant(path, pattern) for pattern in frozen), asked)
    trainable, rest = eqx.partition(model, trained)
    packed = [node for node in jax.tree.leaves(trainable, is_leaf=_is_packed) if _is_packed(node) and jax.tree.leaves(node)]
    if packed:
        raise ValueError(
            f"{len(packed)} matrices of this model are packed ({type(packed[0]).__name__}), and packed numbers are not trained: put "
            "adapters on (lm.add_lora) and give trainable=lm.trainable_filter(model), or train the model it was packed from"
        )
    if not jax.tree.leaves(trainable):
        raise ValueError(f"frozen ({', '.join(frozen)}) leaves nothing to train")
    mean = jax.tree.map(jnp.array, trainable) if average else None
    return TrainState(trainable, rest, mean, optimizer.init(trainable), jnp.zeros((), jnp.int32), Stats.empty())


def _is_packed(node: Any) -> bool:
    return isinstance(node, Quantised)


def make_step(
    optimizer: optax.GradientTransformationExtraArgs,
    config: StepConfig,
    flight: Flight,
    ops: Ops,
    dropout_key: Key[Array, ""],
    *,
    donate: bool = True,
    measured: bool = False,
    objective: Objective | None = None,
) -> "CompiledStep":
    """`step(state, batch, learning_rate, average_rate=0.0) -> (state, metrics)`, compiled at its first call. The state passed in is donated
    (unless `donate` is false): use the one returned.

    Metrics: `loss` (nats a token), `grad_norm` (before clipping), `tokens` (supervised), `skipped` and `spikes` (so far), `sigmas` (how
    far this step is from the last ones, see `Stats.sigmas`), and `update_ratio`: for each role the length of the update over that of its
    weights, NaN at steps where it is not measured. Also the mean of what the model's blocks report, by its name, such as `router_balance`
    and `router_z` (`lm.moe`). Where `measured`, for fine-tuning: `token_accuracy` and `entropy` (nats a token) over supervised tokens,
    `tokens_read` (all but padding), and the shares `supervised_share` (of the tokens read) and `padding_share` (of all places).

    What is minimised is the mean over supervised tokens of the cross entropy, plus `z_loss`, plus the model's `aux_weights` times those
    means. A mean of a micro-batch is its own, and counts by the supervised tokens it has.

    `objective` takes its place where it is given, and says itself what a batch holds and what `loss` and `tokens` (its count) are of:
    preferences (`train.preference`), policy gradients (`train.policy`), a teacher (`train.distillation`).
    """
    minimised = objective or next_token_objective(config, flight, ops, measured=measured)
    held, form = eqx.partition(minimised, eqx.is_array)

    def loss_of(trainable: Any, frozen: Any, held: Any, batch: Any, key: Array) -> tuple[Array, Told]:
        told = eqx.combine(held, form)(put_on_flight(eqx.combine(trainable, frozen), flight, ops), batch, key)
        return told.loss.total, told

    def gradient_of(state: TrainState, held: Any, batch: Any, key: Array) -> tuple[Any, Told]:
        """Sum of the gradients of all tokens, over micro-batches."""
        gradient = jax.grad(loss_of, has_aux=True)
        if config.micro_batches == 1:
            return gradient(state.trainable, state.frozen, held, batch, jr.fold_in(key, 0))

        def of_micro_batch(sums: Any, numbered: tuple[Array, Any]) -> tuple[Any, Told]:
            i, micro = numbered
            more, told = gradient(state.trainable, state.frozen, held, micro, jr.fold_in(key, i))
            return jax.tree.map(jnp.add, sums, more), told

        k = config.micro_batches
        micro_batches = jax.tree.map(lambda x: x.reshape(k, x.shape[0] // k, *x.shape[1:]), batch)
        start = jax.tree.map(jnp.zeros_like, state.trainable)
        sums, told = jax.lax.scan(of_micro_batch, start, (jnp.arange(k), micro_batches))
        peaks = jax.tree.map(jnp.max, told.peaks)
        return sums, jax.tree.map(jnp.sum, told)._replace(peaks=peaks)

    def step(
        changing: TrainState, frozen: Any, held: Any, batch: Any, learning_rate: Float[Array, ""], average_rate: Float[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        state = replace(changing, frozen=frozen)
        sums, (loss, aux, peaks) = gradient_of(state, held, batch, jr.fold_in(dropout_key, state.step))
        sums = map_paths(lambda path, g: mark(g, f"gradient/{path}"), sums)  # `train.debug` finds them by these names
        count = jnp.maximum(loss.count, 1.0)
        norm = optax.tree.norm(sums) / count
        scale = jnp.minimum(1.0, config.clip_norm / (norm + 1e-6)) / count
        gradients = jax.tree.map(lambda g: g * scale, sums)

        mean_loss = loss.cross_entropy / count
        sigmas = state.stats.sigmas(mean_loss, norm)
        finite = jnp.isfinite(loss.total) & jnp.isfinite(norm) & (loss.count > 0)
        spike = finite & (sigmas > config.spike_sigmas)
        taken = finite if config.on_spike == "warn" else finite & ~spike

        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trainable, learning_rate=learning_rate)
        trainable = optax.apply_updates(state.trainable, updates)
        average = jax.tree.map(
            lambda mean, now: mean + average_rate * (now - mean), state.average, None if state.average is None else trainable
        )
        trainable, optimizer_state, average = jax.tree.map(
            lambda new, old: jnp.where(taken, new, old),
            (trainable, optimizer_state, average),
            (state.trainable, state.optimizer, state.average),
        )
        stats = state.stats.after(mean_loss, norm, finite, spike)
        metrics = {"loss": mean_loss, "grad_norm": norm, "tokens": loss.count, "skipped": stats.skipped, "spikes": stats.spikes}
        metrics |= {"sigmas": sigmas}
        metrics |= {name: total / jnp.maximum(told, 1.0) for name, (total, told) in aux.items()} | peaks
        if measured:
            assert loss.correct is not None
            assert loss.entropy is not None
            read = jnp.sum(batch.segments > 0)
            metrics |= {"token_accuracy": loss.correct / count, "entropy": loss.entropy / count, "tokens_read": read}
            metrics |= {"supervised_share": loss.count / jnp.maximum(read, 1), "padding_share": 1 - read / batch.segments.size}
        if config.ratios_every:
            due = (state.step + 1) % config.ratios_every == 0
            # Measured at every step, which costs nothing that shows: a `cond` would keep a copy of the weights for it.
            ratios = update_ratios(updates, state.trainable)
            metrics["update_ratio"] = {name: jnp.where(due, ratio, jnp.nan) for name, ratio in ratios.items()}
        return TrainState(trainable, None, average, optimizer_state, state.step + 1, stats), metrics

    # What is frozen, or held by the objective, is not donated: it is needed again.
    return CompiledStep(jax.jit(step, donate_argnums=0 if donate else ()), config.micro_batches, held)


def next_token_objective(config: StepConfig, flight: Flight, ops: Ops, *, measured: bool = False) -> Objective:
    """Cross entropy of the next token, z-loss, and what the model's blocks ask for (`AbstractLM.aux_weights`). `measured`: also count right
    guesses and sum the entropy."""

    def objective(model: Any, batch: Batch, key: Array) -> Told:
        facts = Facts(jnp.asarray(batch.positions), jnp.asarray(batch.segments))
        hidden, _, aux = model.hidden(jnp.asarray(batch.tokens), facts, key=key)
        loss = next_token(
            hidden,
            model.unembedding,
            jnp.asarray(batch.targets),
            jnp.asarray(batch.loss_weights),
            ops=ops,
            dtype=jnp.dtype(flight.dtype),
            z_loss=config.z_loss,
            softcap=model.logit_softcap,
            chunk=config.loss_chunk,
            measured=measured,
        )
        return Told(with_aux(loss, model, aux), aux, {})

    return objective


def with_aux(loss: Loss, model: Any, aux: Aux) -> Loss:
    """The loss with what the model's blocks ask for (`AbstractLM.aux_weights`) added to what is minimised."""
    means = {name: total / jnp.maximum(count, 1.0) for name, (total, count) in aux.items()}
    pull = sum((weight * means[name] for name, weight in model.aux_weights.items()), jnp.zeros(()))
    return loss._replace(total=loss.total + loss.count * pull)  # the step divides by the count of the whole batch


@dataclass(frozen=True)
class CompiledStep:
    """What `make_step` gives: a function, with a way to look at its program."""

    jitted: Any  # (changing state, frozen, held, batch, learning rate, average rate) → (changing state, metrics)
    micro_batches: int
    held: Any  # arrays of the objective; all None where it has none

    def __call__(self, state: TrainState, batch: Any, learning_rate: float, average_rate: float = 0.0) -> tuple[TrainState, Metrics]:
        if batch.tokens.shape[0] % self.micro_batches:
            raise ValueError(f"batch ({batch.tokens.shape[0]} rows) must be a multiple of micro_batches ({self.micro_batches})")
        rates = jnp.asarray(learning_rate, jnp.float32), jnp.asarray(average_rate, jnp.float32)
        done, metrics = self.jitted(replace(state, frozen=None), state.frozen, self.held, batch, *rates)
        return replace(done, frozen=state.frozen), metrics

    def lower(self, state: TrainState, batch: Any) -> Any:
        """The program for a state and a batch, which may be abstract (`jax.ShapeDtypeStruct`), not yet compiled: a `jax.stages.Lowered`."""
        rate = jax.ShapeDtypeStruct((), jnp.float32)
        changing = eqx.tree_at(lambda s: s.frozen, state, None)  # `replace` would check that its arrays are arrays
        return self.jitted.lower(changing, state.frozen, self.held, batch, rate, rate)


def update_ratios(updates: Any, weights: Any) -> dict[str, Array]:
    """For each role, over all layers: the length of the update over that of the weights, NaN while they are 0 (an adapter's `up`). With
    AdamW around 1e-3 is usual; Muon begins far above. What is far from its usual learns nothing, or is about to break."""

    def lengths(tree: Any) -> dict[str, Array]:
        squares: dict[str, Array] = {}
        for path, leaf in leaves_by_path(tree).items():
            squares[role(path)] = squares.get(role(path), jnp.zeros(())) + jnp.sum(jnp.square(leaf.astype(jnp.float32)))
        return {name: jnp.sqrt(total) for name, total in squares.items()}

    of_weights = lengths(weights)
    return {name: length / jnp.where(of_weights[name] > 0, of_weights[name], jnp.nan) for name, length in lengths(updates).items()}


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
