"""A mixture of experts in place of the MLP: a router sends each token to a few of many small MLPs and adds up what they give.

`MoE` holds a `Router` and `Experts`, whose matrices are stacked: one leaf `[experts, d_out, d_in]` for all experts of a layer. No token is
ever dropped, however unevenly they are sent (Gale et al. 2022, arXiv:2211.15841; how that is done with fixed shapes, `lm.kernels_experts`
tells). Padding is sent nowhere and counted nowhere.

What keeps the router from sending everything to a few experts leaves as `aux`, (sum, count) over tokens: `BALANCE` and `ROUTER_Z`. The
training step adds them to the loss, each times the model's `aux_weights`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, Key

from lm.kernels import REFERENCE, Ops
from lm.layers import ExpertLinear
from lm.masks import PADDING

BALANCE = "router_balance"
ROUTER_Z = "router_z"

Gate = Callable[[Any, Any], Any]  # (gate, up) → what goes down


def swiglu(gate: Float[Array, "*shape"], up: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """silu(gate) · up (Shazeer 2020, arXiv:2002.05202, eq. 6)."""
    return jax.nn.silu(gate) * up


@dataclass(frozen=True)
class ClampedSwiGLU:
    """gate · σ(α gate) · (up + 1), with gate at most `limit` and up within ± it (gpt-oss; OpenAI 2025, arXiv:2508.10925; the
    numbers are those of their code)."""

    alpha: float = 1.702  # with it x σ(α x) is nearly GELU (arXiv:1606.08415)
    limit: float = 7.0

    def __call__(self, gate: Float[Array, "*shape"], up: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return gate * jax.nn.sigmoid(self.alpha * gate) * (up + 1)


class Router(eqx.Module):
    """token ↦ the experts it goes to, and how much each counts. All in fp32, weights too: a rounded score sends tokens elsewhere."""

    weight: Float[Array, "experts d_model"]
    bias: Float[Array, " experts"] | None
    top_k: int = eqx.field(static=True)  # experts a token goes to
    normalised: bool = eqx.field(static=True)  # their weights sum to 1: the softmax is over the chosen only
    ops: Ops = eqx.field(static=True, default=REFERENCE)

    @staticmethod
    def init(d_model: int, experts: int, top_k: int, *, normalised: bool, std: float, key: Key[Array, ""], bias: bool = False) -> "Router":
        return Router(std * jr.normal(key, (experts, d_model)), jnp.zeros(experts) if bias else None, top_k, normalised)

    def __check_init__(self) -> None:
        if not 1 <= self.top_k <= self.weight.shape[0]:
            raise ValueError(f"top_k must lie between 1 and the number of experts ({self.weight.shape[0]}), got {self.top_k}")

    def __call__(
        self, x: Float[Array, "tokens d_model"]
    ) -> tuple[Float[Array, "tokens experts"], Float[Array, "tokens k"], Int[Array, "tokens k"]]:
        """(logits, weights of the chosen, the chosen). Not normalised, weights are the probabilities among all experts."""
        logits = self.ops.linear(x.astype(jnp.float32), self.weight.astype(jnp.float32))
        if self.bias is not None:
            logits = logits + self.bias.astype(jnp.float32)
        best, chosen = jax.lax.top_k(logits, self.top_k)
        if self.normalised:
            return logits, jax.nn.softmax(best, axis=-1), chosen
        return logits, jnp.exp(best - jax.nn.logsumexp(logits, axis=-1, keepdims=True)), chosen


class Experts(eqx.Module):
    """Gated MLPs, one an expert: down(glu(gate(x), up(x)))."""

    gate_proj: ExpertLinear  # d_model → d_ff
    up_proj: ExpertLinear  # d_model → d_ff
    down_proj: ExpertLinear  # d_ff → d_model
    glu: Gate = eqx.field(static=True, default=swiglu)

    @staticmethod
    def init(
        d_model: int,
        d_ff: int,
        experts: int,
        *,
        std: float,
        out_std: float,
        key: Key[Array, ""],
        glu: Gate = swiglu,
        bias: bool = False,
    ) -> "Experts":
        """`out_std` is the standard deviation of `down_proj`, which writes into the residual stream."""
        gate_key, up_key, down_key = jr.split(key, 3)
        return Experts(
            ExpertLinear.init(d_model, d_ff, experts, std=std, key=gate_key, bias=bias),
            ExpertLinear.init(d_model, d_ff, experts, std=std, key=up_key, bias=bias),
            ExpertLinear.init(d_ff, d_model, experts, std=out_std, key=down_key, bias=bias),
            glu,
        )

    def __call__(self, x: Float[Array, "rows d_model"], sizes: Int[Array, " experts"]) -> Float[Array, "rows d_model"]:
        """Rows sorted by expert, `sizes` of them for each; rows left over are nobody's, and what they give means nothing."""
        return self.down_proj(self.glu(self.gate_proj(x, sizes), self.up_proj(x, sizes)), sizes)


class MoE(eqx.Module):
    """Σ over the chosen experts of weight · expert(x) (Shazeer et al. 2017, arXiv:1701.06538, eq. 1)."""

    router: Router
    experts: Experts

    def __call__(
        self, x: Float[Array, "*batch seq d_model"], segments: Int[Array, "*#batch seq"]
    ) -> tuple[Float[Array, "*batch seq d_model"], dict[str, tuple[Array, Array]]]:
        """(output, aux). All tokens of the batch are sent out together; `segments` tells which are padding."""
        flat = x.reshape(-1, x.shape[-1])
        real = jnp.broadcast_to(segments, x.shape[:-1]).reshape(-1) != PADDING
        logits, weights, chosen = self.router(flat)
        n_experts, k = logits.shape[-1], chosen.shape[-1]

        # Each token k times over, sorted by expert; padding behind all of them.
        expert = jnp.where(real[:, None], chosen, n_experts).reshape(-1)
        order = jnp.argsort(expert)
        sizes = jnp.bincount(expert, length=n_experts).astype(jnp.int32)  # padding, past the end, is not counted
        sent = jnp.repeat(flat, k, axis=0).at[order].get(unique_indices=True)
        back = self.experts(sent, sizes)

        y = jnp.zeros_like(back).at[order].set(back, unique_indices=True).reshape(-1, k, x.shape[-1])
        y = jnp.where(real[:, None, None], y.astype(jnp.float32) * weights[..., None], 0)
        return jnp.sum(y, axis=1).astype(x.dtype).reshape(x.shape), router_losses(logits, chosen, real)


def router_losses(
    logits: Float[Array, "tokens experts"], chosen: Int[Array, "tokens k"], real: Bool[Array, " tokens"]
) -> dict[str, tuple[Array, Array]]:
    """What the router is to keep small, as (sum, count) over tokens that are not padding.

    `BALANCE`: N Σ f P over the N experts, f the tokens sent to one over all tokens, P its mean probability (Fedus et al. 2021,
    arXiv:2101.03961, eq. 4 to 6; with k choices a token Σ f = k, as in OLMoE, arXiv:2409.02060). Least, k, where both are even. No
    gradient flows through f. It is a product of means over the tokens at hand: those of a micro-batch, where a batch is cut into such.

    `ROUTER_Z`: the square of log Σ exp(logits) (Zoph et al. 2022, arXiv:2202.08906, eq. 5).
    """
    n_experts = logits.shape[-1]
    count = jnp.sum(real).astype(jnp.float32)
    mean = real / jnp.maximum(count, 1.0)  # of each token in a mean
    sent = jnp.sum(jax.nn.one_hot(chosen, n_experts), axis=1)
    share, probability = mean @ sent, mean @ jax.nn.softmax(logits, axis=-1)
    balance = n_experts * jnp.sum(jax.lax.stop_gradient(share) * probability)
    z = jnp.where(real, jnp.square(jax.nn.logsumexp(logits, axis=-1)), 0.0)
    return {BALANCE: (balance * count, count), ROUTER_Z: (jnp.sum(z), count)}
