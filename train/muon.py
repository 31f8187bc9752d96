"""Muon: momentum whose matrix is made orthogonal, and NorMuon, which then makes its rows equally long over time.

`scale_by_muon` is both, for the matrices of the blocks (`train.optimizers` sends everything else to AdamW).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float


class MuonState(NamedTuple):
    momentum: Any  # like the parameters, fp32
    row_squares: Any  # NorMuon: of each row of a direction the mean square over time, `… rows 1`; None: no NorMuon


def scale_by_muon(momentum: float = 0.95, steps: int = 5, *, beta2: float | None = None) -> optax.GradientTransformation:
    """Momentum, orthogonalised (Jordan et al. 2024, "Muon: An optimizer for hidden layers"), with the update's root mean square brought to
    0.2 as AdamW's is (Liu et al. 2025, arXiv:2502.16982, eq. 4), so both share one learning rate.

    With a `beta2` it is NorMuon (Li et al. 2025, arXiv:2510.05491, algorithm 1): each row of the direction, a neuron (weights are (out,
    in)), is divided by the root of its mean square over time, decayed by `beta2` a step, and the whole is brought to root mean square
    0.2 again. The paper's momentum is plain, ours is Nesterov's in both.

    Matrices of one shape are stacked and orthogonalised together: a leaf at a time compiles and runs several times as long. A leaf of three
    axes, the experts of a layer, is so many matrices.
    """

    def init(params: Any) -> MuonState:
        rows = None if beta2 is None else jax.tree.map(lambda p: jnp.zeros((*p.shape[:-1], 1), p.dtype), params)
        return MuonState(jax.tree.map(jnp.zeros_like, params), rows)

    def update(gradients: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        velocity = jax.tree.map(lambda m, g: momentum * m + g, state.momentum, gradients)
        nesterov = jax.tree.map(lambda m, g: g + momentum * m, velocity, gradients)
        directions = _orthogonal(nesterov, steps)
        if beta2 is None:
            return directions, MuonState(velocity, None)
        squares = jax.tree.map(
            lambda old, d: beta2 * old + (1 - beta2) * jnp.mean(jnp.square(d), axis=-1, keepdims=True), state.row_squares, directions
        )
        return jax.tree.map(_normalised, directions, squares), MuonState(velocity, squares)

    return optax.GradientTransformation(init, update)


def _normalised(direction: Float[Array, "*experts rows columns"], squares: Float[Array, "*experts rows 1"]) -> Array:
    """Each row over its root mean square, each matrix then at root mean square 0.2. What the running means lack at the start, begun at 0,
    is one factor for all and goes with that."""
    even = direction / (jnp.sqrt(squares) + 1e-10)
    return 0.2 * even / (jnp.sqrt(jnp.mean(jnp.square(even), axis=(-2, -1), keepdims=True)) + 1e-10)


def _orthogonal(tree: Any, steps: int) -> Any:
    """Each matrix of a tree orthogonalised, at root mean square 0.2."""
    leaves, treedef = jax.tree.flatten(tree)
    shapes = [leaf.shape for leaf in leaves]
    leaves = [leaf.reshape(-1, *leaf.shape[-2:]) for leaf in leaves]
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, shape in enumerate(shapes):
        by_shape.setdefault((min(shape[-2:]), max(shape[-2:])), []).append(i)
    for (_, longer), members in by_shape.items():
        wide = [leaves[i] if shapes[i][-2] <= shapes[i][-1] else jnp.swapaxes(leaves[i], 1, 2) for i in members]
        # Really laid out so: XLA else turns the transpose of a lone tall matrix into a change of layout, for which a CPU has no bf16
        # product ("Unsupported element type for DotThunk", at run time).
        stacked = with_layout_constraint(jnp.concatenate(wide), Layout((0, 1, 2)))
        directions = 0.2 * math.sqrt(longer) * orthogonalise(stacked, steps)
        ends = np.cumsum([len(leaves[i]) for i in members])[:-1]
        for i, direction in zip(members, jnp.split(directions, ends), strict=True):
            upright = direction if shapes[i][-2] <= shapes[i][-1] else jnp.swapaxes(direction, 1, 2)
            leaves[i] = upright.reshape(shapes[i])
    return jax.tree.unflatten(treedef, leaves)


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
