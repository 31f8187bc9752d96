"""Weights in fewer bits than they are computed with, for generating: a token drawn for one sequence reads every weight once, so half the
bytes is nearly half the time.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

INT8_MOST = 127  # symmetric: -128 is left out


class Quantised(eqx.Module):
    """A matrix as int8 with one scale a row: row ≈ scale · values, scale = max |row| / 127 (row-wise absmax quantisation, Dettmers et al.
    2022, arXiv:2208.07339, section 2). No entry moves by more than scale / 2. It stands where a `Linear` or an `Embedding` has its weight.

    Bytes: d_out · d_in + 4 · d_out.
    """

    values: Int8[Array, "d_out d_in"]
    scales: Float[Array, " d_out"]
    dtype: Any = eqx.field(static=True)  # of products with it, and of the rows it is asked for

    @staticmethod
    def of(weight: Float[Array, "d_out d_in"], dtype: Any = None) -> "Quantised":
        """Rounded to the nearest. `dtype`, of products, is the weight's where not given."""
        wide = weight.astype(jnp.float32)
        scales = jnp.max(jnp.abs(wide), axis=1) / INT8_MOST
        values = jnp.round(wide / jnp.where(scales > 0, scales, 1)[:, None])  # a row of zeros has scale 0
        return Quantised(values.astype(jnp.int8), scales, jnp.dtype(dtype or weight.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def rows(self, indices: Int[Array, "*batch"]) -> Float[Array, "*batch d_in"]:
        """Some rows, unpacked."""
        return (self.values[indices].astype(jnp.float32) * self.scales[indices][..., None]).astype(self.dtype)

    def unpacked(self) -> Float[Array, "d_out d_in"]:
        """The whole matrix."""
        return (self.values.astype(jnp.float32) * self.scales[:, None]).astype(self.dtype)
