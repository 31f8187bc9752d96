"""How gradients become updates: AdamW and Muon as optax transformations, and the learning-rate schedules.

The transformations here carry no learning rate. The step multiplies by one it is given, so a schedule is a plain function of the step
number that can be plotted before the run, and a change of it compiles nothing again.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float
from pydantic import BaseModel, Field

from lm.base import role

# ------------------------------------------------------------------------------------------- optimizers


class OptimizerConfig(BaseModel, frozen=True, extra="forbid"):
    """The rule of the update. Learning rates are in `ScheduleConfig`."""

    name: Literal["adamw", "muon"] = Field(
        "muon", description="muon: matrices of the blocks by Muon, the rest by AdamW; adamw: all by AdamW"
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of AdamW's mean of gradients, per step")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of AdamW's mean of squared gradients, per step")
    eps: float = Field(1e-8, gt=0, description="added to AdamW's root mean square")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's Nesterov momentum, per step")
    weight_decay: float = Field(0.1, ge=0, description="pull of matrices in the blocks towards 0, times the learning rate, per step")


def is_matrix(path: str, leaf: Any) -> bool:
    """A linear map inside a block: what Muon orthogonalises and weight decay pulls on. Embeddings, norms and biases are not."""
    return "blocks/" in path and role(path).endswith("weight") and leaf.ndim == 2


def matrices(tree: Any) -> Any:
    """The same tree with True at each matrix of the blocks."""

    def at(path: Any, leaf: Any) -> bool:
        return is_matrix(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)

    return jax.tree_util.tree_map_with_path(at, tree)


def build_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Gradients in, the direction to move *against* out: `params -= learning_rate * direction`."""
    decay = optax.add_decayed_weights(config.weight_decay, mask=matrices)
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    if config.name == "adamw":
        return optax.chain(adam, decay)
    others = optax.masked(adam, lambda tree: jax.tree.map(lambda is_one: not is_one, matrices(tree)))
    return optax.chain(optax.masked(scale_by_muon(config.momentum), matrices), others, decay)


class MuonState(NamedTuple):
    momentum: Any  # like the parameters, fp32


def scale_by_muon(momentum: float = 0.95, steps: int = 5) -> optax.GradientTransformation:
    """Momentum, orthogonalised (Jordan et al. 2024, "Muon: An optimizer for hidden layers"), with the update's root mean square brought to
    0.2 as AdamW's is (Liu et al. 2025, arXiv:2502.16982, eq. 4), so both share one learning rate.

    Matrices of one shape are stacked and orthogonalised together: a leaf at a time compiles and runs several times as long.
    """

    def init(params: Any) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(gradients: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        velocity = jax.tree.map(lambda m, g: momentum * m + g, state.momentum, gradients)
        nesterov = jax.tree.map(lambda m, g: g + momentum * m, velocity, gradients)
        leaves, treedef = jax.tree.flatten(nesterov)
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for i, leaf in enumerate(leaves):
            by_shape.setdefault((min(leaf.shape), max(leaf.shape)), []).append(i)
        for (_, longer), members in by_shape.items():
            wide = [leaves[i] if leaves[i].shape[0] <= leaves[i].shape[1] else leaves[i].T for i in members]
            # Really laid out so: XLA else turns the transpose of a lone tall matrix into a change of layout, for which a CPU has no bf16
            # product ("Unsupported element type for DotThunk", at run time).
            stacked = with_layout_constraint(jnp.stack(wide), Layout((0, 1, 2)))
            directions = 0.2 * math.sqrt(longer) * orthogonalise(stacked, steps)
            for i, direction in zip(members, directions, strict=True):
                leaves[i] = direction if leaves[i].shape[0] <= leaves[i].shape[1] else direction.T
        return jax.tree.unflatten(treedef, leaves), MuonState(velocity)

    return optax.GradientTransformation(init, update)


def orthogonalise(x: Float[Array, "n rows columns"], steps: int = 5) -> Float[Array, "n rows columns"]:
    """U Vᵀ of each matrix U S Vᵀ, nearly: singular values land in about 0.7 … 1.2 after five quintic Newton-Schulz steps, whose
    coefficients trade exactness for speed (Jordan et al. 2024). Needs rows <= columns. Products have bf16 operands and fp32 sums."""

    def product(a: Array, b: Array, contract: tuple[int, int]) -> Array:
        dimensions = (((contract[0],), (contract[1],)), ((0,), (0,)))
        return jax.lax.dot_general(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), dimensions, preferred_element_type=jnp.float32)

    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-7)
    for _ in range(steps):
        gram = product(x, x, (2, 2))
        polynomial = -4.7750 * gram + 2.0315 * product(gram, gram, (2, 1))
        x = 3.4445 * x + product(polynomial, x, (2, 1))
    return x


# ------------------------------------------------------------------------------------------- schedules


class ScheduleConfig(BaseModel, frozen=True, extra="forbid"):
    """The learning rate over the run: a linear warm-up, then the chosen shape."""

    shape: Literal["linear", "cosine", "constant", "wsd"] = Field(
        "linear", description="after the warm-up: to the end in a line or half a cosine, not at all, or flat and then a line (WSD)"
    )
    peak: float = Field(5e-3, gt=0, description="highest learning rate")
    warmup: float = Field(0.03, ge=0, lt=1, description="fraction of the steps spent rising from 0")
    decay: float = Field(0.2, gt=0, le=1, description="wsd only: fraction of the steps spent falling at the end")
    final: float = Field(0.0, ge=0, le=1, description="last learning rate, as a fraction of the peak")


def learning_rate(config: ScheduleConfig, total_steps: int) -> Callable[[int], float]:
    """The learning rate of step 0, 1, …, total_steps - 1. The first is above 0, and the last has come all but one step down to `final`.

    linear: as in Bergsma et al. 2025 (arXiv:2502.15938); cosine: Loshchilov and Hutter 2017 (arXiv:1608.03983); wsd: Hu et al. 2024
    (arXiv:2404.06395).
    """
    warmup_steps = math.ceil(config.warmup * total_steps)
    falling_steps = {
        "linear": total_steps - warmup_steps,
        "cosine": total_steps - warmup_steps,
        "constant": 0,
        "wsd": min(math.ceil(config.decay * total_steps), total_steps - warmup_steps),
    }[config.shape]

    def at(step: int) -> float:
        if step < warmup_steps:
            return config.peak * (step + 1) / warmup_steps
        left = total_steps - step
        if left >= falling_steps or falling_steps == 0:
            return config.peak
        fraction = left / falling_steps
        if config.shape == "cosine":
            fraction = 0.5 * (1 - math.cos(math.pi * fraction))
        return config.peak * (config.final + (1 - config.final) * fraction)

    return at
