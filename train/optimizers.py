"""How gradients become updates: the optimizers as optax transformations, which leaves each rule touches, and the learning-rate schedules.

The learning rate comes with each call of `update`, as an argument: a schedule is a plain function of the step number that can be plotted
before the run, and a change of it compiles nothing again. All optimizers are brought to updates of about the size of AdamW's, so that one
learning rate serves them all.

A leaf is meant by its *role* (`attn.q_proj.weight`, `embed.weight`) or by its path (`blocks/0/mlp/up_proj/weight`), with `*` for anything.
"""

import math
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from pydantic import Field, model_validator

from lm.base import leaves_by_path, role
from train.muon import scale_by_muon
from train.settings import Settings
from train.soap import scale_by_soap

# ------------------------------------------------------------------------------------------- optimizers


class OptimizerConfig(Settings):
    """The rule of the update, and which leaves it touches how. Learning rates over time are in `ScheduleConfig`."""

    name: Literal["muon", "normuon", "soap", "adamw", "lion", "adafactor", "schedule_free"] = Field(
        "muon",
        description="muon, normuon, soap: matrices of the blocks by that, the rest by AdamW; adafactor: almost no memory; "
        "schedule_free: AdamW whose running average replaces the fall of the learning rate",
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean of gradients, per step; schedule_free: pull towards the average")
    beta2: float = Field(
        0.95,
        ge=0,
        lt=1,
        description="decay of the mean of squared gradients, per step; Lion: of the mean (paper: 0.99); normuon: of the neurons' squares",
    )
    eps: float = Field(1e-8, gt=0, description="added to AdamW's root mean square")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's Nesterov momentum, per step")
    basis_every: int = Field(10, ge=1, description="soap: steps between looks at the directions it works in")
    weight_decay: float = Field(0.1, ge=0, description="pull of matrices in the blocks towards 0, times the learning rate, per step")
    cautious: bool = Field(False, description="weight decay only where the step, too, goes towards 0 (arXiv:2510.12402)")
    embed_rate: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="factor on the learning rate of the embedding; tied, of the head too"
    )
    learning_rate_of: dict[str, float] = Field({}, description="factors on the learning rate by role: embed.weight 0.3 'mlp.*' 2")
    weight_decay_of: dict[str, float] = Field({}, description="weight decay by role, in place of the general one: embed.weight 0.01")
    frozen: tuple[str, ...] = Field((), description="roles or paths that are not trained: embed.weight 'blocks/0/*'")

    @model_validator(mode="after")
    def _numbers_make_sense(self) -> "OptimizerConfig":
        for name in ("learning_rate_of", "weight_decay_of"):
            if bad := {pattern: number for pattern, number in getattr(self, name).items() if not 0 <= number < math.inf}:
                raise ValueError(f"{name} must be 0 or more for each role, got {bad}")
        if self.name == "schedule_free" and self.beta1 == 0:
            raise ValueError("schedule_free needs beta1 above 0: the average could not be found from the weights")
        return self

    @property
    def rates(self) -> dict[str, float]:
        """All factors on the learning rate, by role."""
        return ({} if self.embed_rate == 1 else {"embed.weight": self.embed_rate}) | self.learning_rate_of


def build_optimizer(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Gradients in, updates out, to be added to the parameters: `update(gradients, state, params, learning_rate=rate)`.

    adamw: Loshchilov and Hutter 2019 (arXiv:1711.05101). muon, normuon: see `train.muon`. soap: see `train.soap`. lion: Chen et al. 2023
    (arXiv:2302.06675), its signs times 0.2. adafactor: Shazeer and Stern 2018 (arXiv:1804.04235): second moments of matrices of 128 and
    more kept as a row and a column, updates clipped to root mean square 1, then times 0.2; no first moment, no relative step size.
    schedule_free: see there.
    """
    decay = add_decay(config.weight_decay, config.weight_decay_of, cautious=config.cautious)
    if config.name == "schedule_free":
        return schedule_free(config, decay)
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)

    def of_matrices(rule: optax.GradientTransformation) -> optax.GradientTransformation:
        return optax.chain(optax.masked(rule, matrices), optax.masked(adam, _others))

    direction = {
        "adamw": adam,
        "muon": of_matrices(scale_by_muon(config.momentum)),
        "normuon": of_matrices(scale_by_muon(config.momentum, beta2=config.beta2)),
        "soap": of_matrices(scale_by_soap(config.beta1, config.beta2, config.eps, every=config.basis_every)),
        "lion": optax.chain(optax.scale_by_lion(config.beta1, config.beta2), optax.scale(0.2)),
        "adafactor": optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale(0.2)),
    }[config.name]
    return optax.chain(direction, decay, times_learning_rate(config.rates))


# ------------------------------------------------------------------------------------------- which leaf


def is_matrix(path: str, leaf: Any) -> bool:
    """A linear map inside a block, or those of all experts of a layer, stacked: what Muon orthogonalises and weight decay pulls on.
    Embeddings, norms and biases are not."""
    return "blocks/" in path and role(path).endswith("weight") and leaf.ndim in (2, 3)


def matrices(tree: Any) -> Any:
    """The same tree with True at each matrix of the blocks."""
    return map_paths(is_matrix, tree)


def _others(tree: Any) -> Any:
    return map_paths(lambda path, leaf: not is_matrix(path, leaf), tree)


def map_paths(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """`function(path, leaf)` at each leaf, the path as `leaves_by_path` writes it."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(jax.tree_util.keystr(path, simple=True, separator="/"), leaf), tree)


def is_meant(path: str, pattern: str) -> bool:
    """Whether a pattern means this leaf, by its role or by its path."""
    return fnmatchcase(role(path), pattern) or fnmatchcase(path, pattern)


def check_patterns(patterns: Collection[str], tree: Any, what: str) -> None:
    """A `ValueError` that lists the roles there are, if a pattern means no leaf."""
    paths = list(leaves_by_path(tree))
    if idle := [pattern for pattern in patterns if not any(is_meant(path, pattern) for path in paths)]:
        raise ValueError(f"{what}: nothing here is called {', '.join(idle)}; the roles are {', '.join(sorted(set(map(role, paths))))}")


def _number_of(path: str, numbers: Mapping[str, float], otherwise: float) -> float:
    """The number of the last pattern that means this leaf."""
    return next((number for pattern, number in reversed([*numbers.items()]) if is_meant(path, pattern)), otherwise)


# ------------------------------------------------------------------------------------------- decay and learning rate


def add_decay(weight_decay: float, by_role: Mapping[str, float], *, cautious: bool = False) -> optax.GradientTransformation:
    """Decoupled weight decay (arXiv:1711.05101): `decay * parameter` is added to the direction.

    `cautious`: only to entries where direction and parameter have one sign, so that the step alone would take them towards 0 (Chen et al.
    2025, arXiv:2510.12402, eq. 2): where the gradient wants a weight to grow, the decay does not hold it back.
    """

    def init(params: Any) -> optax.EmptyState:
        check_patterns(by_role, params, "weight_decay_of")
        return optax.EmptyState()

    def update(directions: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def decayed(path: str, direction: Array, parameter: Array) -> Array:
            decay = _number_of(path, by_role, weight_decay if is_matrix(path, parameter) else 0.0)
            if not decay:
                return direction
            pull = jnp.where(direction * parameter >= 0, parameter, 0.0) if cautious else parameter
            return direction + decay * pull

        paths = map_paths(lambda path, _: path, params)
        return jax.tree.map(decayed, paths, directions, params), state

    return optax.GradientTransformation(init, update)


def times_learning_rate(by_role: Mapping[str, float]) -> optax.GradientTransformationExtraArgs:
    """Directions to updates: times minus the learning rate, and the role's factor on it."""

    def init(params: Any) -> optax.EmptyState:
        check_patterns(by_role, params, "learning_rate_of")
        return optax.EmptyState()

    def update(directions: Any, state: Any, params: Any = None, *, learning_rate: Any, **_: Any) -> tuple[Any, Any]:
        return map_paths(lambda path, d: -(learning_rate * _number_of(path, by_role, 1.0) * d), directions), state

    return optax.GradientTransformationExtraArgs(init, update)


# ------------------------------------------------------------------------------------------- schedule-free AdamW


class ScheduleFreeState(NamedTuple):
    z: Any  # the sequence that moves, like the parameters
    inner: Any  # second moments
    weight: Array  # Σ γ² so far
    beta: Array  # of the interpolation


def schedule_free(config: OptimizerConfig, decay: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """AdamW without a schedule (Defazio et al. 2024, arXiv:2405.15682, algorithm 1).

    The parameters trained are y = (1 - β) z + β x: z takes AdamW's steps without a first moment, x is the average of all z weighted by γ²,
    the squared learning rate. x is what is evaluated and exported (`averaged_by_optimizer`); it is not stored but found from y and z, so
    the memory is AdamW's. The bias of the second moment is corrected there, as in AdamW; the paper has that factor in γ, and so, other than
    here, also in the decay and the weights of the average.
    """
    beta = config.beta1
    second_moment = optax.scale_by_rms(config.beta2, config.eps, eps_in_sqrt=False, bias_correction=True)
    direction = optax.chain(second_moment, decay, times_learning_rate(config.rates))

    def init(params: Any) -> ScheduleFreeState:
        # Copies: the state and the parameters are both given away to each step.
        return ScheduleFreeState(jax.tree.map(jnp.array, params), direction.init(params), jnp.zeros(()), jnp.asarray(beta, jnp.float32))

    def update(gradients: Any, state: ScheduleFreeState, params: Any = None, *, learning_rate: Any, **_: Any) -> tuple[Any, Any]:
        moves, inner = direction.update(gradients, state.inner, params, learning_rate=learning_rate)
        weight = state.weight + learning_rate**2
        share = jnp.where(weight > 0, learning_rate**2 / jnp.where(weight > 0, weight, 1.0), 0.0)
        z = jax.tree.map(jnp.add, state.z, moves)
        x = jax.tree.map(lambda y, old, new: (1 - share) * (y - (1 - beta) * old) / beta + share * new, params, state.z, z)
        updates = jax.tree.map(lambda x, z, y: (1 - beta) * z + beta * x - y, x, z, params)
        return updates, ScheduleFreeState(z, inner, weight, state.beta)

    return optax.GradientTransformationExtraArgs(init, update)


def averaged_by_optimizer(optimizer_state: Any, trainable: Any) -> Any | None:
    """The weights that a schedule-free optimizer means to be evaluated; `None` where the optimizer keeps no average."""
    if not isinstance(optimizer_state, ScheduleFreeState):
        return None
    beta = optimizer_state.beta
    return jax.tree.map(lambda y, z: (y - (1 - beta) * z) / beta, trainable, optimizer_state.z)


# ------------------------------------------------------------------------------------------- schedules


class ScheduleConfig(Settings):
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
