"""Weights in fewer bits than they are computed with, for generating: a token drawn for one sequence reads every weight once, so half the
bytes is nearly half the time.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8, UInt8

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


# The sixteen E2M1 numbers by their bits: sign, two of exponent, one of mantissa (OCP Microscaling Formats Specification 1.0, 2023).
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def from_mxfp4(blocks: UInt8[np.ndarray, "*rows blocks 16"], scales: UInt8[np.ndarray, "*rows blocks"]) -> np.ndarray:
    """MXFP4 as gpt-oss files have it → bf16, `*rows 32·blocks`, exactly: 32 E2M1 numbers share one scale, a power of two (OCP Microscaling
    Formats Specification 1.0, 2023). A byte holds two numbers, the first in its lower half; a scale byte b means 2^(b - 127).

    **Raises:** `ValueError` where a scale is 255, the specification's NaN.
    """
    if np.any(scales == 255):
        raise ValueError(f"{np.sum(scales == 255)} of {scales.size} MXFP4 scales are NaN (255): the file is damaged")
    numbers = np.stack([_E2M1[blocks & 15], _E2M1[blocks >> 4]], axis=-1).reshape(*scales.shape, 32)
    wide = np.ldexp(numbers, scales[..., None].astype(np.int32) - 127)
    return wide.astype(jnp.bfloat16).reshape(*scales.shape[:-1], -1)
