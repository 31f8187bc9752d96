"""Learning from pairs: of two answers to a prompt, one was preferred.

The losses are functions of log-probabilities, a number a pair, small enough to be read beside their papers. Below, π is the policy, ref the
reference it began from, y_w the chosen and y_l the rejected answer, and

    margin = [log π(y_w) - log ref(y_w)] - [log π(y_l) - log ref(y_l)],      log π(y) = Σ_t log π(y_t)

`preference_objective` makes of them what `train.step.make_step` minimises.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from pydantic import Field

from lm.flight import Flight
from lm.generate import Sampler
from lm.kernels import Ops
from train.losses import Loss
from train.policy import log_probs_of
from train.settings import Settings
from train.step import Objective, Told

Pairs = Float[Array, " pairs"]

# ------------------------------------------------------------------------------------------- the losses


def dpo_sigmoid(margin: Pairs, beta: float, label_smoothing: float = 0.0) -> Pairs:
    """-(1 - ε) log σ(β margin) - ε log σ(-β margin): DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7); with ε > 0 for pairs of which a
    share ε is believed to be the wrong way round (cDPO, Mitchell 2023)."""
    z = beta * margin
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(z) - label_smoothing * jax.nn.log_sigmoid(-z)


def dpo_hinge(margin: Pairs, beta: float) -> Pairs:
    """max(0, 1 - β margin): SLiC's hinge on DPO's margin (Zhao et al. 2023, arXiv:2305.10425, eq. 4; Liu et al. 2023, arXiv:2309.06657)."""
    return jax.nn.relu(1 - beta * margin)


def ipo(margin: Pairs, beta: float) -> Pairs:
    """(margin - 1/(2β))²: IPO (Azar et al. 2023, arXiv:2310.12036, eq. 17). The paper's margin is of whole answers; TRL divides each
    log-probability by its length, which `preference_objective` does where `per_token` is set."""
    return jnp.square(margin - 1 / (2 * beta))


def simpo(chosen: Pairs, rejected: Pairs, beta: float, gamma: float) -> Pairs:
    """-log σ(β (chosen - rejected) - γ) of log-probs a token, without a reference: SimPO (Meng et al. 2024, arXiv:2405.14734, eq. 6)."""
    return -jax.nn.log_sigmoid(beta * (chosen - rejected) - gamma)


def odds_ratio(chosen: Pairs, rejected: Pairs) -> Pairs:
    """-log σ(log odds(y_w) - log odds(y_l)), log odds(y) = log p - log(1 - p) with log p the mean log-prob a token: ORPO's second term
    (Hong et al. 2024, arXiv:2403.07691, eq. 7). The whole loss is nll(y_w) + λ times this (eq. 6)."""

    def log_odds(log_p: Array) -> Array:
        return log_p - jnp.log(-jnp.expm1(jnp.minimum(log_p, -1e-7)))  # p = 1 has no odds

    return -jax.nn.log_sigmoid(log_odds(chosen) - log_odds(rejected))


def kto(chosen: Pairs, rejected: Pairs, baseline: Array, beta: float, desirable: float = 1.0, undesirable: float = 1.0) -> Pairs:
    """λ_D (1 - σ(β (chosen - z))) + λ_U (1 - σ(β (z - rejected))): KTO (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8), here of a pair.

    **Arguments:**

    - `chosen`, `rejected`: log π - log ref of each answer; KTO judges each alone.
    - `baseline`: z, the KL from the reference; see `kto_baseline`. No gradient flows through it.
    """
    z = jax.lax.stop_gradient(baseline)
    return desirable * (1 - jax.nn.sigmoid(beta * (chosen - z))) + undesirable * (1 - jax.nn.sigmoid(beta * (z - rejected)))


def kto_baseline(ratios: Float[Array, " answers"]) -> Array:
    """max(0, mean of log π - log ref): an estimate of the KL. The paper takes answers matched with wrong prompts for it (section 4.1); the
    batch's own, taken here, need no further pass, but lie on one side where the chosen are far likelier than the rejected."""
    return jnp.maximum(0.0, jnp.mean(ratios))


def bradley_terry(chosen: Pairs, rejected: Pairs, margin: float = 0.0) -> Pairs:
    """-log σ(r(y_w) - r(y_l) - m): the likelihood of the preferences under rewards r (Bradley and Terry 1952; Ouyang et al. 2022,
    arXiv:2203.02155, eq. 1; the margin m as in Llama 2, arXiv:2307.09288, eq. 2)."""
    return -jax.nn.log_sigmoid(chosen - rejected - margin)


# ------------------------------------------------------------------------------------------- the objective


class PreferenceConfig(Settings):
    """Which loss, and its numbers."""

    loss: Literal["sigmoid", "hinge", "ipo", "simpo", "orpo", "kto"] = Field("sigmoid", description="sigmoid is DPO itself")
    beta: float = Field(0.1, gt=0, description="how dear it is to leave the reference; of simpo, the scale of the margin (paper: 2)")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="sigmoid only: share of pairs believed to be the wrong way round")
    gamma: float = Field(0.5, ge=0, description="simpo only: the margin asked for")
    orpo_weight: float = Field(0.1, ge=0, description="orpo only: weight of the odds ratio beside the likelihood of the chosen")
    desirable: float = Field(1.0, gt=0, description="kto only: weight of chosen answers")
    undesirable: float = Field(1.0, gt=0, description="kto only: weight of rejected answers")
    per_token: bool = Field(False, description="log-probs divided by the answer's length (simpo and orpo always do)")
    sft_weight: float = Field(0.0, ge=0, description="of the mean -log p a token of the chosen answers, added to the loss")

    @property
    def needs_reference(self) -> bool:
        return self.loss not in ("simpo", "orpo")


class PreferenceBatch(NamedTuple):
    """Pairs of rows, `[2 · pairs, seq]`: each chosen answer, and right behind it the rejected one. Micro-batches keep pairs together."""

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    loss_weights: np.ndarray  # 1 where the target belongs to the answer
    reference: np.ndarray  # `[2 · pairs]`, Σ_t log ref(y_t) of the answer; 0 where no reference is needed


def preference_objective(config: PreferenceConfig, flight: Flight, ops: Ops, *, chunk: int = 1024) -> Objective:
    """What a step minimises on a `PreferenceBatch`: the mean over its pairs.

    Told beside it, as TRL's DPOTrainer: `rewards_chosen`, `rewards_rejected` (β times log π - log ref; of simpo and orpo, β times log π a
    token), `margin` (their difference), `accuracy` (share of pairs where it is above 0), `log_probs_chosen`, `log_probs_rejected` (of whole
    answers), `nll_chosen` (nats a token)."""
    of_tokens = log_probs_of(flight, ops, sampler=Sampler(), chunk=chunk)

    def objective(model: Any, batch: PreferenceBatch, key: Array) -> Told:
        mask = jnp.asarray(batch.loss_weights)
        sums = jnp.sum(of_tokens(model, batch, key) * mask, axis=1)
        lengths = jnp.maximum(jnp.sum(mask, axis=1), 1.0)
        losses, rewards = _of_pairs(config, sums, jnp.asarray(batch.reference), lengths)
        nll = -sums[::2] / lengths[::2]
        losses = losses + (config.sft_weight + (config.loss == "orpo")) * nll
        pairs = jnp.asarray(len(losses), jnp.float32)
        margin = rewards[::2] - rewards[1::2]
        means = {"rewards_chosen": rewards[::2], "rewards_rejected": rewards[1::2], "margin": margin, "accuracy": margin > 0}
        means |= {"log_probs_chosen": sums[::2], "log_probs_rejected": sums[1::2], "nll_chosen": nll}
        aux = {name: (jax.lax.stop_gradient(jnp.sum(value)).astype(jnp.float32), pairs) for name, value in means.items()}
        total = jnp.sum(losses)
        return Told(Loss(total, jax.lax.stop_gradient(total), pairs), aux, {})

    return objective


def _of_pairs(config: PreferenceConfig, sums: Array, reference: Array, lengths: Array) -> tuple[Array, Array]:
    """The loss of each pair, and the implicit reward of each answer."""
    per_token = config.per_token or not config.needs_reference
    score = (sums - reference if config.needs_reference else sums) / (lengths if per_token else 1.0)
    chosen, rejected = score[::2], score[1::2]
    losses = {
        "sigmoid": lambda: dpo_sigmoid(chosen - rejected, config.beta, config.label_smoothing),
        "hinge": lambda: dpo_hinge(chosen - rejected, config.beta),
        "ipo": lambda: ipo(chosen - rejected, config.beta),
        "simpo": lambda: simpo(chosen, rejected, config.beta, config.gamma),
        "orpo": lambda: config.orpo_weight * odds_ratio(chosen, rejected),
        "kto": lambda: kto(chosen, rejected, kto_baseline(score), config.beta, config.desirable, config.undesirable),
    }
    return losses[config.loss](), config.beta * score


def sequence_log_probs(batch: PreferenceBatch, log_probs: Callable[[Any, Any], np.ndarray], model: Any) -> np.ndarray:
    """Σ_t log p(y_t) of each answer under a model: what a reference is precomputed as."""
    return np.sum(log_probs(model, batch) * batch.loss_weights, axis=1)
