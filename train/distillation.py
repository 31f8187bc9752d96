"""Learning from a teacher: a model that says, at each place, how likely every token is, where a text says only which one came.

    targets     the teacher's distribution over the whole vocabulary, or its k likeliest tokens and one bucket for the rest
    divergence  how far the student's distribution is from it, nats a token; a function of two arrays of log-probabilities
    objective   (1 - s) T² divergence + s (-log p(next token)), what `train.step.make_step` minimises

p is the teacher's distribution, q the student's, both of logits divided by the temperature T (Hinton et al. 2015, arXiv:1503.02531, eq. 1).
The gradient of a divergence by the logits shrinks as 1/T², hence the factor T² (section 2 there), which leaves the weight beside the
next-token loss as it is when T changes. Which text is read decides the rest: given rows, or what the student itself has written
("on-policy", Agarwal et al. 2023, GKD, arXiv:2306.13649, section 3; no gradient flows through the drawing). GKD takes the mean of each
answer's mean; here every token counts alike, and the step divides once by their number.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from pydantic import Field

from data.pipeline import Batch
from lm.base import AbstractLM
from lm.flight import Flight, put_on_flight
from lm.kernels import Ops
from lm.masks import Facts
from lm.quant import unpacked
from train.chunked import each_token, over_chunks
from train.losses import CHUNK, Loss, capped, target_logit
from train.settings import Settings
from train.step import Told, with_aux

LogProbs = Float[Array, "*tokens outcomes"]  # of all outcomes of a token, which together are certain
Values = Float[Array, "*tokens"]

# ------------------------------------------------------------------------------------------- divergences


def forward_kl(student: LogProbs, teacher: LogProbs) -> Values:
    """KL(p‖q) = Σ p (log p - log q). Hinton et al. 2015 (arXiv:1503.02531, section 2) minimise the cross entropy -Σ p log q, which has the
    same gradient. The student is to find likely all that the teacher does."""
    return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)


def reverse_kl(student: LogProbs, teacher: LogProbs) -> Values:
    """KL(q‖p) = Σ q (log q - log p): Gu et al. 2023 (MiniLLM, arXiv:2306.08543, section 2), here token by token as in GKD. The student is
    to find unlikely what the teacher does, and may leave out some of the rest."""
    return forward_kl(teacher, student)


def jensen_shannon(student: LogProbs, teacher: LogProbs, beta: float) -> Values:
    """β KL(p‖m) + (1 - β) KL(q‖m) with m = β p + (1 - β) q: the generalised Jensen-Shannon divergence of GKD (arXiv:2306.13649, section 2).
    Divided by β it goes to KL(p‖q) as β goes to 0, divided by 1 - β to KL(q‖p) as it goes to 1."""
    middle = jnp.logaddexp(teacher + jnp.log(beta), student + jnp.log1p(-beta))
    return beta * forward_kl(middle, teacher) + (1 - beta) * forward_kl(middle, student)


# ------------------------------------------------------------------------------------------- k tokens and the rest


def coarsened(logits: Float[Array, "*tokens vocab"], ids: Int[Array, "*tokens k"]) -> Float[Array, "*tokens k_and_rest"]:
    """Log-probabilities of k tokens, and last of all the other tokens together.

    A divergence of two distributions so coarsened is a true one, 0 where they are equal, and never more than that of the whole ones. To
    leave the rest out, or to scale the k up to 1, would teach that nothing else is ever said.
    """
    log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    of_rest = jnp.put_along_axis(logits, ids, -jnp.inf, axis=-1, inplace=False)
    rest = jax.nn.logsumexp(of_rest, axis=-1, keepdims=True)
    return jnp.concatenate([jnp.take_along_axis(logits, ids, axis=-1), rest], axis=-1) - log_z


class TaughtBatch(NamedTuple):
    """A `Batch` and what the teacher said at each of its places."""

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    loss_weights: np.ndarray
    ids: np.ndarray  # int32 `[batch, seq, k]`, the teacher's likeliest tokens, the likeliest first
    log_probs: np.ndarray  # float16 `[batch, seq, k + 1]`, of these and of all others together, at the temperature of the run


# ------------------------------------------------------------------------------------------- the objective


class DistillationConfig(Settings):
    """What is minimised."""

    kind: Literal["forward", "reverse", "jsd"] = Field("forward", description="KL(teacher‖student), KL(student‖teacher), or between them")
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False, description="both models' logits are divided by it; above 1: flatter")
    beta: float = Field(0.5, gt=0, lt=1, description="jsd only: near 0 as forward, near 1 as reverse")
    next_token: float = Field(0.0, ge=0, lt=1, description="share of the next-token loss in what is minimised; the rest is the teacher's")

    def divergence(self, student: LogProbs, teacher: LogProbs) -> Values:
        if self.kind == "jsd":
            return jensen_shannon(student, teacher, self.beta)
        return (forward_kl if self.kind == "forward" else reverse_kl)(student, teacher)


class Teacher(eqx.Module):
    """A model that is only read, packed or not, and how it is run. Its own softcap, dtype and kernels: it may be of another family."""

    model: AbstractLM
    flight: Flight = eqx.field(static=True)
    ops: Ops = eqx.field(static=True)

    def read(self, batch: Any) -> tuple[Array, Array]:
        """Its hidden states, and its unembedding in the dtype of its flight."""
        flying = put_on_flight(self.model, self.flight, self.ops)
        hidden, _, _ = flying.hidden(jnp.asarray(batch.tokens), Facts(jnp.asarray(batch.positions), jnp.asarray(batch.segments)))
        return jax.lax.stop_gradient((hidden, unpacked(flying.unembedding).astype(self.flight.dtype)))

    def logits(self, hidden: Array, unembedding: Array) -> Array:
        """Of some tokens, from what `read` gave."""
        return capped(self.ops.linear(hidden.astype(unembedding.dtype), unembedding, jnp.float32), self.model.logit_softcap)


class Distillation(eqx.Module):
    """An objective of `train.step.make_step`. With a teacher it takes a `Batch` and reads it with both models; without one a `TaughtBatch`.

    Told beside the loss, as means over the tokens with weight: `divergence` (nats, without T²), `next_token` (nats, of the target) and
    `agreement` (share of tokens where both find the same one likeliest).
    """

    teacher: Teacher | None
    config: DistillationConfig = eqx.field(static=True)
    flight: Flight = eqx.field(static=True)  # of the student
    ops: Ops = eqx.field(static=True)
    chunk: int = eqx.field(static=True, default=CHUNK)

    def __call__(self, model: Any, batch: Any, key: Array | None) -> Told:
        if (self.teacher is None) != isinstance(batch, TaughtBatch):
            raise ValueError("give either a teacher and a Batch, or a TaughtBatch, which holds what the teacher said, and no teacher")
        hidden, _, aux = model.hidden(jnp.asarray(batch.tokens), Facts(jnp.asarray(batch.positions), jnp.asarray(batch.segments)), key=key)
        known, shared = {"targets": jnp.asarray(batch.targets)}, None
        if self.teacher is None:
            known |= {"ids": jnp.asarray(batch.ids), "log_probs": jnp.asarray(batch.log_probs)}
        else:
            known["hidden"], shared = self.teacher.read(batch)
        weights = jnp.asarray(batch.loss_weights)
        how: dict[str, Any] = {"ops": self.ops, "dtype": jnp.dtype(self.flight.dtype), "softcap": model.logit_softcap, "chunk": self.chunk}
        total, told = over_chunks(_Minimised(self.config, self._targets), hidden, model.unembedding, weights, known, shared, **how)
        count = jnp.sum(weights)
        loss = Loss(total, jax.lax.stop_gradient(total), count)
        return Told(with_aux(loss, model, aux), aux | {name: (value, count) for name, value in told.items()}, {})

    def _targets(self, logits: Array, known: Any, shared: Any) -> tuple[Array, Array, Array]:
        """Log-probabilities of student and teacher over the same outcomes, and the token that the teacher finds likeliest."""
        scaled = logits / self.config.temperature
        if self.teacher is None:
            # In fp16 they are a little off a sum of 1, which softmax mends.
            taught = jax.nn.log_softmax(known["log_probs"].astype(jnp.float32), axis=-1)
            return coarsened(scaled, known["ids"]), taught, known["ids"][:, 0]
        theirs = self.teacher.logits(known["hidden"], shared)
        taught = jax.nn.log_softmax(theirs / self.config.temperature, axis=-1)
        return jax.nn.log_softmax(scaled, axis=-1), taught, jnp.argmax(theirs, axis=-1)


@dataclass(frozen=True, eq=False)
class _Minimised:
    """What is minimised for each token (`train.chunked.Scores`)."""

    config: DistillationConfig
    targets_of: Callable[[Array, Any, Any], tuple[Array, Array, Array]]

    def __call__(self, logits: Array, known: Any, shared: Any) -> tuple[Array, dict[str, Array]]:
        student, teacher, likeliest = self.targets_of(logits, known, shared)
        divergence = self.config.divergence(student, teacher)
        next_token = jax.nn.logsumexp(logits, axis=-1) - target_logit(logits, known["targets"])
        value = self.config.temperature**2 * divergence
        if share := self.config.next_token:
            value = (1 - share) * value + share * next_token
        agreement = (jnp.argmax(logits, axis=-1) == likeliest).astype(jnp.float32)
        return value, {"divergence": divergence, "next_token": next_token, "agreement": agreement}


# ------------------------------------------------------------------------------------------- looks, and what is kept of a teacher


def make_comparison(flight: Flight, ops: Ops, chunk: int = CHUNK) -> Callable[[AbstractLM, Teacher, Batch], dict[str, Array]]:
    """`compare(student, teacher, batch)`: of every place `nats` and `teacher_nats` (-log p of the target by either), `kl` (KL(p‖q), nats)
    and `agreement`, at temperature 1 and without dropout. Weights are not applied."""

    def scores(logits: Array, known: Any, shared: Any) -> tuple[Array, dict[str, Array]]:
        teacher, unembedding = shared
        theirs = teacher.logits(known["hidden"], unembedding)
        nats, of_teacher = (jax.nn.logsumexp(x, axis=-1) - target_logit(x, known["targets"]) for x in (logits, theirs))
        kl = forward_kl(jax.nn.log_softmax(logits, axis=-1), jax.nn.log_softmax(theirs, axis=-1))
        agreement = (jnp.argmax(logits, axis=-1) == jnp.argmax(theirs, axis=-1)).astype(jnp.float32)
        return kl, {"nats": nats, "teacher_nats": of_teacher, "kl": kl, "agreement": agreement}

    @eqx.filter_jit
    def compare(student: AbstractLM, teacher: Teacher, batch: Batch) -> dict[str, Array]:
        flying = put_on_flight(student, flight, ops)
        hidden, _, _ = flying.hidden(jnp.asarray(batch.tokens), Facts(jnp.asarray(batch.positions), jnp.asarray(batch.segments)))
        theirs, unembedding = teacher.read(batch)
        known = {"targets": batch.targets, "hidden": theirs}
        how: dict[str, Any] = {"ops": ops, "dtype": jnp.dtype(flight.dtype), "softcap": flying.logit_softcap, "chunk": chunk}
        return each_token(scores, hidden, flying.unembedding, known, (teacher, unembedding), **how)

    return lambda student, teacher, batch: compare(student, teacher, jax.tree.map(jnp.asarray, batch))


def make_top_k(k: int, temperature: float, vocab: int, chunk: int = CHUNK) -> Callable[[Teacher, Batch], tuple[np.ndarray, np.ndarray]]:
    """`top_k(teacher, batch)`: `ids` and `log_probs` of a `TaughtBatch`, for every place of the batch.

    **Raises:** `ValueError` where k is not below the vocabulary: there would be no rest.
    """
    if not 1 <= k < vocab:
        raise ValueError(f"top-k must be from 1 to one less than the vocabulary, {vocab - 1}; got {k}")

    def scores(logits: Array, known: Any, shared: Any) -> tuple[Array, dict[str, Array]]:
        _, ids = jax.lax.top_k(logits, k)
        log_probs = jnp.maximum(coarsened(logits / temperature, ids), jnp.finfo(jnp.float16).min)
        return log_probs[:, 0], {"ids": ids, "log_probs": log_probs.astype(jnp.float16)}

    @eqx.filter_jit
    def top_k(teacher: Teacher, batch: Batch) -> dict[str, Array]:
        hidden, unembedding = teacher.read(batch)
        how: dict[str, Any] = {"ops": teacher.ops, "dtype": unembedding.dtype, "softcap": teacher.model.logit_softcap, "chunk": chunk}
        return each_token(scores, hidden, unembedding, {}, **how)

    def kept(teacher: Teacher, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        told = jax.device_get(top_k(teacher, jax.tree.map(jnp.asarray, batch)))
        return told["ids"], told["log_probs"]

    return kept
