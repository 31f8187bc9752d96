"""Learning from rewards: the policy-gradient objectives, in parts that are small enough to be read beside their papers.

    ratio       how much likelier a token (or an answer) has become since it was drawn
    surrogate   what is minimised for a token, from ratio and advantage
    normalise   how tokens become one number: a (sum, count) pair, as everywhere
    kl          how far the policy is from the reference, estimated at the drawn tokens

An `Algorithm` names one of each; `ALGORITHMS` holds those of the papers. `policy_objective` makes of it what `train.step.make_step`
minimises. One row of a batch is one answer: its prompt, what was drawn, and padding.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lm.flight import Flight
from lm.generate import Sampler
from lm.kernels import Ops
from lm.masks import Facts
from train.losses import Loss, token_log_probs
from train.step import Objective, Told

Tokens = Float[Array, "rows seq"]

# ------------------------------------------------------------------------------------------- ratios


def token_ratio(log_probs: Tokens, old_log_probs: Tokens, mask: Tokens) -> Tokens:
    """w_t = π(y_t) / π_old(y_t): Schulman et al. 2017 (PPO, arXiv:1707.06347), section 3. 1 where `mask` is 0."""
    return jnp.exp((log_probs - old_log_probs) * mask)


def sequence_ratio(log_probs: Tokens, old_log_probs: Tokens, mask: Tokens) -> Tokens:
    """s = (π(y) / π_old(y))^(1/|y|), the same at each token of the answer: GSPO (Zheng et al. 2025, arXiv:2507.18071, eq. 7)."""
    mean = jnp.sum((log_probs - old_log_probs) * mask, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1.0)
    return jnp.broadcast_to(jnp.exp(mean)[:, None], log_probs.shape)


def importance(old_log_probs: Tokens, sampler_log_probs: Tokens, mask: Tokens, cap: float) -> Tokens:
    """min(π_trainer(y_t) / π_sampler(y_t), cap) at the weights that drew: makes up for a sampler that computes otherwise than the trainer
    (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training", truncated importance sampling). Here the two
    are one program's arithmetic, so it is 1 to rounding."""
    return jnp.minimum(jnp.exp((old_log_probs - sampler_log_probs) * mask), cap)


# ------------------------------------------------------------------------------------------- surrogates


def clipped(ratio: Tokens, advantages: Tokens, low: float, high: float) -> Tokens:
    """-min(w A, clip(w, 1 - low, 1 + high) A): PPO's objective (arXiv:1707.06347, eq. 7), with bounds of their own above and below, DAPO's
    "clip-higher" (arXiv:2503.14476, section 3.1)."""
    return -jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - low, 1 + high) * advantages)


def score_function(log_probs: Tokens, ratio: Tokens, advantages: Tokens, cap: float) -> Tokens:
    """-sg(min(w, cap)) A log π: the gradient of REINFORCE (Williams 1992), with a truncated importance weight where the policy has moved
    since the draw; on the first update w is 1 and it is REINFORCE itself."""
    return -jax.lax.stop_gradient(jnp.minimum(ratio, cap)) * advantages * log_probs


# ------------------------------------------------------------------------------------------- normalisation


def by_token(values: Tokens, mask: Tokens, most: int) -> tuple[Array, Array]:
    """Σ over all tokens, over their number: every token counts alike (DAPO, arXiv:2503.14476, eq. 12)."""
    return jnp.sum(values * mask), jnp.sum(mask)


def by_sequence(values: Tokens, mask: Tokens, most: int) -> tuple[Array, Array]:
    """Σ of each answer's mean, over the answers: a token counts less in a long answer (GRPO, arXiv:2402.03300, eq. 3)."""
    lengths = jnp.sum(mask, axis=1)
    return jnp.sum(jnp.sum(values * mask, axis=1) / jnp.maximum(lengths, 1.0)), jnp.sum(lengths > 0).astype(jnp.float32)


def by_constant(values: Tokens, mask: Tokens, most: int) -> tuple[Array, Array]:
    """Σ over all tokens / `most`, over the answers, whatever their lengths: an unbiased policy gradient (Dr. GRPO, arXiv:2503.20783,
    section 3.2; `most` is the longest an answer may be)."""
    return jnp.sum(values * mask) / most, jnp.sum(jnp.any(mask > 0, axis=1)).astype(jnp.float32)


# ------------------------------------------------------------------------------------------- distance from the reference


def k1(log_probs: Tokens, reference: Tokens) -> Tokens:
    """log π - log π_ref: unbiased for KL(π ‖ π_ref) and noisy (Schulman 2020, "Approximating KL divergence"). As a loss its gradient has
    mean 0, so here it is taken from the reward instead."""
    return log_probs - reference


def k2(log_probs: Tokens, reference: Tokens) -> Tokens:
    """½ (log π - log π_ref)²: biased, low variance; its gradient is that of the KL (Schulman 2020)."""
    return 0.5 * jnp.square(log_probs - reference)


def k3(log_probs: Tokens, reference: Tokens) -> Tokens:
    """r - 1 - log r with r = π_ref / π: unbiased and never negative (Schulman 2020; GRPO, arXiv:2402.03300, eq. 4)."""
    return jnp.expm1(reference - log_probs) - (reference - log_probs)


KL = {"k1": k1, "k2": k2, "k3": k3}

# ------------------------------------------------------------------------------------------- algorithms


@dataclass(frozen=True)
class Algorithm:
    """One choice of each part. `train.advantages` has the advantages by these names."""

    advantage: Literal["reinforce", "rloo", "grpo", "dr_grpo"]
    ratio: Literal["token", "sequence"] = "token"
    clip_low: float = math.inf  # the surrogate is clipped at 1 - clip_low and 1 + clip_high; inf: the score function, not clipped
    clip_high: float = math.inf
    normalise: Literal["token", "sequence", "constant"] = "token"
    dynamic_sampling: bool = False  # draw other prompts for groups whose rewards are all the same
    overlong: bool = False  # take reward from answers that come near the longest allowed
    paper: str = ""

    @property
    def is_clipped(self) -> bool:
        return math.isfinite(self.clip_low)


ALGORITHMS = {
    "reinforce": Algorithm("reinforce", paper="Williams 1992"),
    "rloo": Algorithm("rloo", paper="arXiv:2402.14740"),
    "grpo": Algorithm("grpo", clip_low=0.2, clip_high=0.2, normalise="sequence", paper="arXiv:2402.03300"),
    "dr_grpo": Algorithm("dr_grpo", clip_low=0.2, clip_high=0.2, normalise="constant", paper="arXiv:2503.20783"),
    "dapo": Algorithm("grpo", clip_low=0.2, clip_high=0.28, dynamic_sampling=True, overlong=True, paper="arXiv:2503.14476"),
    "gspo": Algorithm("grpo", "sequence", clip_low=3e-4, clip_high=4e-4, normalise="sequence", paper="arXiv:2507.18071"),
}

RATIOS = {"token": token_ratio, "sequence": sequence_ratio}
NORMALISATIONS = {"token": by_token, "sequence": by_sequence, "constant": by_constant}


class PolicyBatch(NamedTuple):
    """Rows of one answer each, `[rows, seq]`. Everything about a token stands where it is the *target*."""

    tokens: np.ndarray  # int32, prompt and answer
    targets: np.ndarray  # int32, the token after each
    positions: np.ndarray
    segments: np.ndarray  # 1, 0 in padding
    loss_weights: np.ndarray  # 1 where the target was drawn by the policy; 0 in prompts, tools' replies, left-out answers, padding
    advantages: np.ndarray  # float32
    sampler_log_probs: np.ndarray  # as drawn
    old_log_probs: np.ndarray  # by the trainer, at the weights that drew
    reference_log_probs: np.ndarray | None  # None where there is no reference


def policy_objective(
    algorithm: Algorithm,
    flight: Flight,
    ops: Ops,
    *,
    sampler: Sampler,
    most: int,
    importance_cap: float = 2.0,
    kl_weight: float = 0.0,
    kl: Literal["k1", "k2", "k3"] = "k3",
    chunk: int = 1024,
) -> Objective:
    """What a step minimises on a `PolicyBatch`, with the head in fp32.

    Told beside it, as means over the drawn tokens: `ratio` and its largest value `ratio_max`, `clipped_low` and `clipped_high` (shares of
    tokens whose gradient the clip has taken away), `importance`, `approx_kl` (k3 from the weights that drew), and `kl` where there is a
    reference.

    **Arguments:**

    - `most`: the longest an answer may be, in tokens (`by_constant`).
    - `importance_cap`: see `importance`; also the truncation in `score_function`.
    - `kl_weight`: of k2 or k3 in the loss. With k1 it belongs into the reward, before the advantages, and not here.
    """
    drawn_by = log_probs_of(flight, ops, sampler=sampler, chunk=chunk)

    def objective(model: Any, batch: PolicyBatch, key: Array) -> Told:
        if kl_weight and kl != "k1" and batch.reference_log_probs is None:
            raise ValueError(
                f"a KL of weight {kl_weight} needs reference_log_probs in the batch, and there are none: ask for no KL, or give them"
            )
        log_probs = drawn_by(model, batch, key)
        b = jax.tree.map(jnp.asarray, batch)
        mask, advantages = b.loss_weights, b.advantages
        ratio = RATIOS[algorithm.ratio](log_probs, b.old_log_probs, mask)
        weight = importance(b.old_log_probs, b.sampler_log_probs, mask, importance_cap)
        if algorithm.is_clipped:
            values = clipped(ratio, advantages, algorithm.clip_low, algorithm.clip_high)
        else:
            values = score_function(log_probs, ratio, advantages, importance_cap)
        values = weight * values
        if kl_weight and kl != "k1":
            values = values + kl_weight * KL[kl](log_probs, b.reference_log_probs)
        total, count = NORMALISATIONS[algorithm.normalise](values, mask, most)

        tokens = jnp.sum(mask)
        low = (ratio < 1 - algorithm.clip_low) & (advantages < 0)
        high = (ratio > 1 + algorithm.clip_high) & (advantages > 0)
        means = {"ratio": ratio, "clipped_low": low, "clipped_high": high, "importance": weight}
        means |= {"approx_kl": k3(b.old_log_probs * mask, log_probs * mask)}
        if b.reference_log_probs is not None:
            means |= {"kl": KL[kl](log_probs, b.reference_log_probs)}
        aux = {name: (jnp.sum(value * mask), tokens) for name, value in means.items()}
        told = Loss(total, jax.lax.stop_gradient(total), jax.lax.stop_gradient(count))
        return Told(told, jax.lax.stop_gradient(aux), {"ratio_max": jax.lax.stop_gradient(jnp.max(jnp.where(mask > 0, ratio, 0.0)))})

    return objective


def log_probs_of(flight: Flight, ops: Ops, *, sampler: Sampler, chunk: int = 1024) -> Callable[..., Tokens]:
    """`log_probs(flying model, batch, key)`: log p(target) of every place under the sampler's distribution, head and softmax in fp32."""

    def log_probs(model: Any, batch: Any, key: Array | None = None) -> Array:
        facts = Facts(jnp.asarray(batch.positions), jnp.asarray(batch.segments))
        hidden, _, _ = model.hidden(jnp.asarray(batch.tokens), facts, key=key)
        targets = jnp.asarray(batch.targets)
        return token_log_probs(hidden, model.unembedding, targets, ops=ops, softcap=model.logit_softcap, chunk=chunk, sampler=sampler)

    return log_probs
