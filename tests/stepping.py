"""Training steps on tiny models, compiled once for all tests of a process."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from tiny import tiny

import lm
from lm.flight import Flight
from train.optimizers import OptimizerConfig, build_optimizer
from train.step import StepConfig, make_step

# Remembers the gradient it was given, to be looked at, and moves against it.
RECORDER = optax.GradientTransformationExtraArgs(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, state, params, *, learning_rate: (jax.tree.map(lambda g: -learning_rate * g, gradient), gradient),
)


def small(n_layers=1, **changes):
    return tiny("llama", n_layers=n_layers, **changes)


@lru_cache  # one step compiles once for all tests
def step_for(optimizer, flight=Flight(), ops=lm.REFERENCE, **config):  # noqa: B008
    return make_step(optimizer, StepConfig(**config), flight, ops, jr.key(5))


ADAMW, *_, SCHEDULE_FREE = OPTIMIZERS = [
    build_optimizer(OptimizerConfig(name=name)) for name in ("adamw", "muon", "lion", "adafactor", "schedule_free")
]


def copied(tree):
    """Its own arrays: a step takes those it is given."""
    return jax.tree.map(jnp.array, tree)


def assert_close(one, other, rtol):
    """Every leaf, to a fraction of its largest entry."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
