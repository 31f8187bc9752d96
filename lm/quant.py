"""Weights in fewer bits than they are computed with: for generating, where a token drawn for one sequence reads every weight once, and for
the frozen base of an adapter (`lm.adapters`).

A `Quantised` stands where a `Linear` or an `Embedding` has its matrix. Each kind keeps small whole numbers and scales:

    Int8Rows     8 bits an entry, a scale a row
    Int4Groups   4 bits an entry, evenly spaced, a scale for each `group` neighbours of a row
    NF4Blocks    4 bits an entry, spaced as a normal law's quantiles, a scale for each block of a row, itself in 8 bits if asked

Rows that are no multiple of the group are filled up with zeros, which cost their bytes. Which matrices of a model become what is said in
`lm.layers.quantised`.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8, UInt8

INT8_MOST = 127  # symmetric: -128 is left out
INT4_LEAST = -8  # the sixteen whole numbers are -8 … 7
GROUP = 32  # entries that share a scale in `Int4Groups`, where nothing else is asked
NF4_BLOCK = 64  # the same in `NF4Blocks` (arXiv:2305.14314, section 3)
DOUBLE_BLOCK = 256  # scales that share a scale (same place)

# The sixteen NF4 numbers: quantiles of the normal law, brought to [-1, 1], with an exact 0 (Dettmers et al. 2023, arXiv:2305.14314,
# appendix E).
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


class Quantised(eqx.Module):
    """A packed matrix `d_out d_in`. Its own arrays are never trained."""

    dtype: eqx.AbstractVar[Any]  # static: of products with it, and of the rows it is asked for

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """(d_out, d_in)."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What `pack` was told, so that a file can say it."""

    @abstractmethod
    def rows(self, indices: Int[Array, "*batch"]) -> Float[Array, "*batch d_in"]:
        """Some rows, unpacked."""

    @abstractmethod
    def factors(self) -> tuple[Float[Array, "d_out d_in"], Float[Array, " d_out"] | None]:
        """A matrix in `dtype` and what its rows are multiplied with (`None`: 1): x Wᵀ = (x matrixᵀ) · scales. The integers of int8 are
        exact in bf16; times their scale they would be rounded."""

    @property
    def ndim(self) -> int:
        return 2

    @property
    def n_bytes(self) -> int:
        """What it takes in memory."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def unpacked(self) -> Float[Array, "d_out d_in"]:
        """The whole matrix."""
        matrix, scales = self.factors()
        return matrix if scales is None else (matrix.astype(jnp.float32) * scales[:, None]).astype(self.dtype)

    def after(self, array: Float[Array, "*shape"]) -> "Quantised":
        """The same numbers, not to be had before `array` is: XLA for CPUs finds that a backward pass, or a second look, unpacks what has
        been unpacked, and keeps all of it in between. An optimization barrier is gone before it looks; a term that is 0 unless the array is
        NaN is not."""
        term = jnp.isnan(jax.lax.stop_gradient(array)[(0,) * array.ndim])
        return jax.tree.map(lambda leaf: leaf + term.astype(leaf.dtype), self)

    def astype(self, dtype: Any) -> "Quantised":
        """The same numbers, for products in another dtype."""
        new = object.__new__(type(self))  # as Equinox's own unflatten does: the arrays may be stacked, or abstract
        for field in fields(self):
            object.__setattr__(new, field.name, jnp.dtype(dtype) if field.name == "dtype" else getattr(self, field.name))
        return new


def unpacked(weight: Float[Array, "d_out d_in"] | Quantised) -> Float[Array, "d_out d_in"]:
    """The matrix, packed or not."""
    return weight.unpacked() if isinstance(weight, Quantised) else weight


class Int8Rows(Quantised):
    """row ≈ scale · values, scale = max |row| / 127 (row-wise absmax quantisation, Dettmers et al. 2022, arXiv:2208.07339, section 2). No
    entry moves by more than scale / 2.

    Bytes: d_out · d_in + 4 · d_out.
    """

    values: Int8[Array, "d_out d_in"]
    scales: Float[Array, " d_out"]
    dtype: Any = eqx.field(static=True)

    @staticmethod
    def of(weight: Float[Array, "d_out d_in"], dtype: Any = None) -> "Int8Rows":
        """Rounded to the nearest. `dtype`, of products, is the weight's where not given."""
        wide = weight.astype(jnp.float32)
        scales = jnp.max(jnp.abs(wide), axis=1) / INT8_MOST
        values = jnp.round(wide / jnp.where(scales > 0, scales, 1)[:, None])  # a row of zeros has scale 0
        return Int8Rows(values=values.astype(jnp.int8), scales=scales, dtype=jnp.dtype(dtype or weight.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def record(self) -> dict[str, Any]:
        return {"kind": "int8", "dtype": str(self.dtype)}

    def rows(self, indices: Int[Array, "*batch"]) -> Float[Array, "*batch d_in"]:
        return (self.values[indices].astype(jnp.float32) * self.scales[indices][..., None]).astype(self.dtype)

    def factors(self) -> tuple[Float[Array, "d_out d_in"], Float[Array, " d_out"] | None]:
        return self.values.astype(self.dtype), self.scales


class Nibbles(Quantised):
    """Two entries a byte. Of a group of G neighbours in a row, byte k holds entry k in its lower half and entry k + G/2 in its upper one:

        group of 8    a b c d e f g h
        bytes         ea fb gc hd

    so that either half of the bytes, unpacked, is a run of neighbours.
    """

    codes: eqx.AbstractVar[Array]  # UInt8, d_out bytes
    d_in: eqx.AbstractVar[int]  # static: of a row before it was filled up

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape[0], self.d_in

    @property
    @abstractmethod
    def group(self) -> int:
        """Entries that share a scale."""

    @abstractmethod
    def numbers(self, codes: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The number each code of 0 … 15 stands for, in fp32."""

    @abstractmethod
    def group_scales(self) -> Float[Array, "d_out groups"]:
        """The scale of each group, in fp32."""

    def halves(self) -> tuple[Float[Array, "d_out groups half"], Float[Array, "d_out groups half"]]:
        """The numbers, not yet scaled, of the first and the second half of each group."""
        codes = self.codes.reshape(len(self.codes), -1, self.group // 2)
        return self.numbers(codes & 15), self.numbers(codes >> 4)

    def rows(self, indices: Int[Array, "*batch"]) -> Float[Array, "*batch d_in"]:
        return self._unpacked(self.codes[indices], self.group_scales()[indices])

    def factors(self) -> tuple[Float[Array, "d_out d_in"], Float[Array, " d_out"] | None]:
        return self._unpacked(self.codes, self.group_scales()), None

    def _unpacked(self, codes: UInt8[Array, "*batch bytes"], scales: Float[Array, "*batch groups"]) -> Float[Array, "*batch d_in"]:
        """In one pass over the numbers: pieces put side by side would each be written down first."""
        nibbles = codes.reshape(*scales.shape, 1, self.group // 2) >> jnp.array([[0], [4]], jnp.uint8) & 15
        wide = (self.numbers(nibbles) * scales[..., None, None]).astype(self.dtype)
        return wide.reshape(*codes.shape[:-1], -1)[..., : self.d_in]


class Int4Groups(Nibbles):
    """group ≈ scale · (code - 8), sixteen evenly spaced numbers. The scale, one of two for each group, is the one that leaves the
    smaller square error: the entry farthest from 0 becomes -8 exactly, or the farthest on either side fits within -8 … 7. A zero point in
    place of the fixed 8 costs half a byte a group more and gained less than a smaller group for the same bytes (docs/quantised.md).

    Bytes: d_out · d_in · (1/2 + 2 / group), d_in rounded up to a multiple of the group.
    """

    codes: UInt8[Array, "d_out bytes"]
    scales: Float[Array, "d_out groups"]  # bf16; codes are chosen for the scale as rounded
    d_in: int = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    @property
    def group(self) -> int:
        return 2 * self.codes.shape[-1] // self.scales.shape[-1]

    def record(self) -> dict[str, Any]:
        return {"kind": "int4", "group": self.group, "dtype": str(self.dtype)}

    def numbers(self, codes: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
        return codes.astype(jnp.float32) + INT4_LEAST

    def group_scales(self) -> Float[Array, "d_out groups"]:
        return self.scales.astype(jnp.float32)


class DoubleScales(eqx.Module):
    """Scales in 8 bits: scale ≈ mean + factor · code, a factor for each block of 256 ("double quantisation", arXiv:2305.14314, section 3,
    there with an 8-bit float for the code). 8.125 bits a scale in place of 32."""

    codes: Int8[Array, "blocks size"]
    factors: Float[Array, " blocks"]
    mean: Float[Array, ""]

    @staticmethod
    def of(scales: Float[Array, "d_out groups"]) -> "DoubleScales":
        mean = jnp.mean(scales)
        centred = jnp.pad(jnp.ravel(scales - mean), (0, -scales.size % DOUBLE_BLOCK)).reshape(-1, DOUBLE_BLOCK)
        packed = Int8Rows.of(centred)
        return DoubleScales(packed.values, packed.scales, mean)

    def unpacked(self, shape: tuple[int, int]) -> Float[Array, "d_out groups"]:
        wide = self.mean + self.codes.astype(jnp.float32) * self.factors[:, None]
        return wide.reshape(-1)[: shape[0] * shape[1]].reshape(shape)


class NF4Blocks(Nibbles):
    """block ≈ scale · NF4[code], scale = max |block| (Dettmers et al. 2023, arXiv:2305.14314, eq. 4): weights of a layer are nearly normal,
    so that each of the sixteen numbers is used about equally often. bitsandbytes counts its blocks over the whole matrix, here they do not
    cross rows; where d_in is a multiple of the block that is the same.

    Bytes: d_out · d_in · (1/2 + 4 / 64), with double quantisation (1/2 + 1.016 / 64).
    """

    codes: UInt8[Array, "d_out bytes"]
    scales: Float[Array, "d_out blocks"] | DoubleScales
    block: int = eqx.field(static=True)
    d_in: int = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    @property
    def group(self) -> int:
        return self.block

    def record(self) -> dict[str, Any]:
        return {"kind": "nf4", "group": self.block, "double": isinstance(self.scales, DoubleScales), "dtype": str(self.dtype)}

    def numbers(self, codes: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
        """By a tree of selections on the codes' bits: a table look-up is one entry at a time on a CPU. What is selected are the bits of
        the numbers, so that constants stay scalars: whole arrays of them would be made before a scan of layers, all sixteen, and kept."""
        wide = codes.astype(jnp.uint32)
        chosen: list[Any] = [*NF4.view(np.uint32)]
        for bit in range(4):
            is_set = -(wide >> bit & 1)  # all ones, or none
            chosen = [is_set & (low ^ high) ^ low for low, high in zip(chosen[::2], chosen[1::2], strict=True)]
        return jax.lax.bitcast_convert_type(chosen[0], jnp.float32)

    def group_scales(self) -> Float[Array, "d_out groups"]:
        if not isinstance(self.scales, DoubleScales):
            return self.scales
        return self.scales.unpacked((len(self.codes), 2 * self.codes.shape[1] // self.block))


# ------------------------------------------------------------------------------------------- packing


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _packed(weight: Array, kind: str, group: int, double: bool, dtype: Any) -> Quantised:
    if kind == "int8":
        return Int8Rows.of(weight, dtype)
    d_out, d_in = weight.shape
    groups = jnp.pad(weight.astype(jnp.float32), ((0, 0), (0, -d_in % group))).reshape(d_out, -1, group)
    if kind == "int4":
        scales = _int4_scales(groups)
        codes = _int4_codes(groups, scales) - INT4_LEAST
        return Int4Groups(_in_bytes(codes), scales.astype(jnp.bfloat16), d_in, dtype)
    scales = jnp.max(jnp.abs(groups), axis=-1)
    kept = DoubleScales.of(scales) if double else scales
    scales = kept.unpacked((d_out, groups.shape[1])) if isinstance(kept, DoubleScales) else kept
    unit = groups / jnp.where(scales > 0, scales, 1)[..., None]
    codes = jnp.sum(unit[..., None] > (NF4[1:] + NF4[:-1]) / 2, axis=-1)  # how many of the midpoints lie below
    return NF4Blocks(codes=_in_bytes(codes), scales=kept, block=group, d_in=d_in, dtype=dtype)


def _int4_codes(groups: Array, scales: Array) -> Array:
    return jnp.clip(jnp.round(groups / jnp.where(scales != 0, scales, 1)[..., None]), INT4_LEAST, INT4_LEAST + 15)


def _int4_scales(groups: Float[Array, "d_out groups size"]) -> Float[Array, "d_out groups"]:
    """Of the two candidates the one with the smaller square error, as bf16 has it."""
    low, high = jnp.min(groups, axis=-1), jnp.max(groups, axis=-1)
    farthest = jnp.where(high > -low, high, low)
    candidates = [farthest / INT4_LEAST, jnp.maximum(high / (INT4_LEAST + 15), low / INT4_LEAST)]
    candidates = [scales.astype(jnp.bfloat16).astype(jnp.float32) for scales in candidates]
    errors = [jnp.sum(jnp.square(_int4_codes(groups, scales) * scales[..., None] - groups), axis=-1) for scales in candidates]
    return jnp.where(errors[0] <= errors[1], candidates[0], candidates[1])


def _in_bytes(codes: Array) -> UInt8[Array, "d_out bytes"]:
    """`d_out groups size` of 0 … 15 → bytes, as `Nibbles` has them."""
    first, second = jnp.split(codes.astype(jnp.uint8), 2, axis=-1)
    return (first | second << 4).reshape(len(codes), -1)


KINDS = ("int8", "int4", "nf4")


def pack(weight: Float[Array, "d_out d_in"], kind: str, *, group: int | None = None, double: bool = False, dtype: Any = None) -> Quantised:
    """A matrix in one of `KINDS`.

    **Arguments:**

    - `group`: neighbours in a row that share a scale, an even number; `None`: 32 in int4, 64 in nf4. int8 has one scale a row.
    - `double`: nf4's scales in 8 bits too.
    - `dtype`: of products with it; `None`: the weight's.
    """
    check_kind(kind, group, double)
    size = group or {"int8": 0, "int4": GROUP, "nf4": NF4_BLOCK}[kind]
    return _packed(weight, kind, size, double, jnp.dtype(dtype or weight.dtype))


def check_kind(kind: str, group: int | None, double: bool) -> None:
    """Settings `pack` cannot do, in words."""
    if kind not in KINDS:
        raise ValueError(f"weights can be packed as {', '.join(KINDS)}; got {kind!r}")
    if kind == "int8" and group is not None:
        raise ValueError(f"int8 has one scale a row, not one for each {group} entries: leave the group out, or ask for int4")
    if group is not None and (group < 2 or group % 2):
        raise ValueError(f"a group must be an even number of entries, 2 or more (32, 64 and 128 are usual); got {group}")
    if double and kind != "nf4":
        raise ValueError(f"double quantisation is nf4's; {kind} has its scales as they are")


def repacked(weight: Float[Array, "d_out d_in"], record: Mapping[str, Any]) -> Quantised:
    """`pack` with the settings a `Quantised.record` tells."""
    settings = dict(record)
    return pack(weight, settings.pop("kind"), **settings)


# ------------------------------------------------------------------------------------------- others' formats

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
