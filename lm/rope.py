"""Rotary position embedding: positions in, cosines and sines out (Su et al. 2021, arXiv:2104.09864).

The tables are computed once a forward pass from the positions themselves and handed to every layer, so packed rows, left padding and a
decode step at position 31,007 need no case of their own. `lm.kernels.rotate` applies them.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def frequencies(head_dim: int, base: float) -> Float[Array, " half"]:
    """Radians a position, θ_i = base^(-2i / head_dim) for i in 0 … head_dim/2 - 1 (section 3.2.2)."""
    return base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)


def tables(
    positions: Int[Array, "*batch seq"], inverse_wavelengths: Float[Array, " half"]
) -> tuple[Float[Array, "*batch seq head_dim"], Float[Array, "*batch seq head_dim"]]:
    """cos and sin of position · frequency in fp32, each half repeated to the full head width (the rotate-half layout)."""
    angles = positions[..., None].astype(jnp.float32) * inverse_wavelengths
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)
