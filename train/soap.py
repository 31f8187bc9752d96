"""SOAP: Adam in the directions that Shampoo would turn a matrix's gradient to (Vyas et al. 2024, arXiv:2409.11321)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


class SoapState(NamedTuple):
    """Of each matrix `… rows columns`."""

    mean: Any  # of gradients, like the parameters
    square: Any  # mean square of turned gradients, like the parameters
    left: Any  # mean of G Gᵀ, `… rows rows`
    right: Any  # mean of Gᵀ G, `… columns columns`
    left_basis: Any  # its eigenvectors, nearly; columns
    right_basis: Any
    done: Int[Array, ""]  # updates


def scale_by_soap(beta1: float, beta2: float, eps: float, *, every: int = 10) -> optax.GradientTransformation:
    """Algorithm 3: the gradient is turned into the eigenvectors of the running means of G Gᵀ and Gᵀ G, Adam's rule is applied there to the
    mean gradient turned likewise, and what comes is turned back.

    The first step only finds the eigenvectors and moves nothing, as in the authors' code: in those of a single gradient that gradient is
    diagonal, and Adam would make as much of the rounding beside the diagonal. Later they are followed every `every` steps, by one power
    iteration and a QR decomposition (algorithm 4). Memory beside Adam's two moments: twice the square of each side.
    """

    def init(params: Any) -> SoapState:
        def square(p: Array, axis: int) -> Array:
            return jnp.zeros((*p.shape[:-2], p.shape[axis], p.shape[axis]), p.dtype)

        def zeros() -> Any:
            return jax.tree.map(jnp.zeros_like, params)

        def sides() -> tuple[Any, Any]:
            return jax.tree.map(lambda p: square(p, -2), params), jax.tree.map(lambda p: square(p, -1), params)

        (left, right), (left_basis, right_basis) = sides(), sides()  # arrays of their own, to be donated
        return SoapState(zeros(), zeros(), left, right, left_basis, right_basis, jnp.zeros((), jnp.int32))

    def update(gradients: Any, state: SoapState, params: Any = None) -> tuple[Any, SoapState]:
        begun = state.done > 0
        bases = state.left_basis, state.right_basis
        turned = jax.tree.map(lambda g, ql, qr: ql.mT @ g @ qr, gradients, *bases)
        mean = jax.tree.map(lambda m, g: begun * (beta1 * m + (1 - beta1) * g), state.mean, gradients)
        square = jax.tree.map(lambda v, g: begun * (beta2 * v + (1 - beta2) * jnp.square(g)), state.square, turned)
        steps = jnp.maximum(state.done, 1)  # that moved something, this one included

        def direction(m: Array, v: Array, ql: Array, qr: Array) -> Array:
            root = jnp.sqrt(v / (1 - beta2**steps)) + eps
            return ql @ ((ql.mT @ m @ qr) / (1 - beta1**steps) / root) @ qr.mT

        directions = jax.tree.map(direction, mean, square, *bases)
        left = jax.tree.map(lambda old, g: beta2 * old + (1 - beta2) * g @ g.mT, state.left, gradients)
        right = jax.tree.map(lambda old, g: beta2 * old + (1 - beta2) * g.mT @ g, state.right, gradients)
        which = jnp.where(begun, jnp.where(state.done % every == 0, 1, 2), 0)
        left_basis, right_basis = jax.lax.switch(which, (_found, _followed, _kept), (left, right), bases)
        return directions, SoapState(mean, square, left, right, left_basis, right_basis, state.done + 1)

    return optax.GradientTransformation(init, update)


Sides = tuple[Any, Any]  # of all matrices, left and right


def _found(means: Sides, bases: Sides) -> Sides:
    """The eigenvectors, from nothing."""
    return jax.tree.map(lambda mean: jnp.linalg.eigh(mean)[1], means)


def _followed(means: Sides, bases: Sides) -> Sides:
    """The eigenvectors, from those of some steps ago: Q of mean · basis = Q R."""

    def step(mean: Float[Array, "*experts d d"], basis: Float[Array, "*experts d d"]) -> Array:
        return jnp.linalg.qr(mean @ basis)[0]

    return jax.tree.map(step, means, bases)


def _kept(means: Sides, bases: Sides) -> Sides:
    return bases
