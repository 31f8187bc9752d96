"""What the `cpu` backend computes in its own way, with hand-written backward passes: linear maps, norm and rotation; attention has a module
of its own, `lm.kernels_cpu_attention`.

XLA's fast matrix products for processors want both operands in row-major order and, in bf16, an fp32 result. The products of a forward pass
come so; those autodiff writes for the backward pass do not, and fall back to a kernel at a third of the speed. So both passes are written
here in the form the fast products take. `lm.kernels` puts them in its table, beside the reference each of them equals.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int8

from lm.quant import Int8Rows, Nibbles, Quantised

FEW = 3  # rows below which a product is limited by reading the weights
FEW_PACKED = 9  # the same for packed weights: the fast product would need them unpacked first


def by_rows(x: Array) -> Array:
    """The same values, really laid out row by row. Without it XLA turns a transpose into a change of layout, and the product behind it
    misses the fast kernels (fp32 at a quarter of the speed, or at run time "Unsupported element type for DotThunk")."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def batched(a: Array, b: Array, axis_of_a: int, axis_of_b: int) -> Array:
    """The products of two stacks of matrices, each summed over one axis of both, in fp32."""
    return jax.lax.dot_general(a, b, (((axis_of_a,), (axis_of_b,)), ((0,), (0,))), preferred_element_type=jnp.float32)


# ------------------------------------------------------------------------------------------- linear


def _dot(a: Array, b: Array, axis_of_a: int, axis_of_b: int) -> Array:
    """The product of two matrices summed over one axis of each, in fp32."""
    return jax.lax.dot_general(a, b, (((axis_of_a,), (axis_of_b,)), ((), ())), preferred_element_type=jnp.float32)


def _few_rows(x: Float[Array, "n d_in"], weight: Float[Array, "d_out d_in"] | Int8[Array, "d_out d_in"]) -> Float[Array, "n d_out"]:
    """x Wᵀ as a multiplication and a sum: it reads the weights as fast as memory gives them, where the fast product, made for many rows,
    reads bf16 at a sixth of that speed."""
    return jnp.sum(weight.astype(jnp.float32) * x.astype(jnp.float32)[:, None, :], axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear_packed(x: Float[Array, "*batch d_in"], weight: Quantised, dtype: Any = None) -> Float[Array, "*batch d_out"]:
    """x Wᵀ for packed weights, which get no gradient. Many rows are multiplied by the unpacked matrix; for a few the packed numbers are
    read as they lie."""
    flat = x.reshape(-1, x.shape[-1])
    if len(flat) < FEW_PACKED:
        y = _few_rows_packed(flat, weight)
    else:
        matrix, scales = weight.factors()
        y = _dot(flat, matrix, 1, 1)
        y = y if scales is None else y * scales
    return y.astype(dtype or x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def _few_rows_packed(x: Float[Array, "n d_in"], weight: Quantised) -> Float[Array, "n d_out"]:
    if isinstance(weight, Int8Rows):
        return _few_rows(x, weight.values) * weight.scales
    assert isinstance(weight, Nibbles)
    lower, upper = weight.halves()
    padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -x.shape[1] % weight.group)))
    first, second = jnp.split(padded.reshape(len(x), 1, -1, weight.group), 2, axis=-1)
    return jnp.sum(jnp.sum(lower * first + upper * second, axis=-1) * weight.group_scales(), axis=-1)


def _packed_forward(x: Array, weight: Quantised, dtype: Any) -> tuple[Array, tuple[Quantised, Any]]:
    return linear_packed(x, weight, dtype), (weight, jnp.zeros((), x.dtype))


def _packed_backward(dtype: Any, saved: tuple[Quantised, Any], dy: Array) -> tuple[Array, None]:
    weight, of_x = saved
    matrix, scales = weight.after(dy).factors()
    flat = dy.reshape(-1, dy.shape[-1])
    flat = flat if scales is None else flat * scales
    return _dot(flat.astype(matrix.dtype), matrix, 1, 0).astype(of_x.dtype).reshape(*dy.shape[:-1], -1), None


linear_packed.defvjp(_packed_forward, _packed_backward)


def weight_gradient(dy: Float[Array, "n d_out"], x: Float[Array, "n d_in"]) -> Float[Array, "d_out d_in"]:
    """dyᵀ x with the narrower side transposed in memory first."""
    if dy.shape[1] <= x.shape[1]:
        return _dot(by_rows(dy.T), x, 1, 0)
    return by_rows(by_rows(_dot(by_rows(x.T), dy, 1, 0)).T)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: Float[Array, "*batch d_in"], weight: Float[Array, "d_out d_in"], dtype: Any = None) -> Float[Array, "*batch d_out"]:
    """x Wᵀ as in the reference, with a backward pass that stays on the fast products. A few rows, as in decoding, have their own way."""
    flat = x.reshape(-1, x.shape[-1])
    y = _few_rows(flat, weight) if len(flat) < FEW else _dot(flat, weight, 1, 1)
    return y.astype(dtype or x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def _linear_forward(x: Array, weight: Array, dtype: Any) -> tuple[Array, tuple[Array, Array]]:
    return linear(x, weight, dtype), (x, weight)


def _linear_backward(dtype: Any, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, weight = saved
    flat_x = x.reshape(-1, x.shape[-1])
    flat_dy = dy.reshape(-1, dy.shape[-1]).astype(weight.dtype)
    dx = _dot(flat_dy, weight, 1, 0).astype(x.dtype).reshape(x.shape)
    return dx, weight_gradient(flat_dy, flat_x).astype(weight.dtype)


linear.defvjp(_linear_forward, _linear_backward)


# ------------------------------------------------------------------------------------------- norm and rotation


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "*batch d"], scale: Float[Array, " d"], eps: float) -> Float[Array, "*batch d"]:
    """x / rms(x) · scale as in the reference; only the gradient of the scale is taken another way."""
    return (_normalised(x, eps)[0] * scale.astype(jnp.float32)).astype(x.dtype)


def _normalised(x: Array, eps: float) -> tuple[Array, Array]:
    """x / rms(x) in fp32, and 1 / rms(x)."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return wide * inverse, inverse


def _rms_norm_forward(x: Array, scale: Array, eps: float) -> tuple[Array, tuple[Array, Array]]:
    return rms_norm(x, scale, eps), (x, scale)


def _rms_norm_backward(eps: float, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, scale = saved
    normalised, inverse = _normalised(x, eps)
    dy = dy.astype(jnp.float32)
    along = dy * scale.astype(jnp.float32)
    dx = inverse * (along - normalised * jnp.mean(along * normalised, axis=-1, keepdims=True))
    # A sum over all tokens is a slow loop down the columns; as a product with rows of ones it takes the fast path.
    d_scale_terms = (dy * normalised).reshape(-1, x.shape[-1])
    d_scale = _dot(jnp.ones((8, len(d_scale_terms)), jnp.float32), d_scale_terms, 1, 0)[0]
    return dx.astype(x.dtype), d_scale.astype(scale.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def rotate(
    x: Float[Array, "*batch heads seq head_dim"],
    cos: Float[Array, "*batch seq head_dim"],
    sin: Float[Array, "*batch seq head_dim"],
) -> Float[Array, "*batch heads seq head_dim"]:
    """The reference's rotation, with the minus sign moved from x into the small table: what is left of "rotate half" is a swap, which is
    its own backward pass."""
    cos, sin = jax.lax.optimization_barrier((cos, sin))  # else XLA takes the cosine anew for each head of each layer
    first, second = jnp.split(sin, 2, axis=-1)
    signed = jnp.concatenate([-first, second], axis=-1)
    wide = x.astype(jnp.float32)
    return (wide * cos[..., None, :, :] + _swap_halves(wide) * signed[..., None, :, :]).astype(x.dtype)


@jax.custom_vjp
def _swap_halves(x: Array) -> Array:
    first, second = jnp.split(x, 2, axis=-1)
    return by_rows(jnp.concatenate([second, first], axis=-1))  # written out: fused into what follows, XLA's loop is not vectorised


_swap_halves.defvjp(lambda x: (_swap_halves(x), None), lambda _, dy: (_swap_halves(dy),))
