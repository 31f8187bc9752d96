"""The arithmetic, behind named backends.

A layer does not know how its matrix product or its attention is computed: it holds a static `ops`, a table of functions that a *flight* may
swap inside jit (`with_ops`). The tree at rest always carries `REFERENCE`: plain JAX, readable, differentiable as often as you like. Another
backend computes the same function faster on some device, with a hand-written backward pass, and so serves neither `jax.jvp` nor
`jax.hessian`.

Shapes are those of the glossary in `lm/base.py`; weights are `(out, in)` as in Hugging Face files.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from lm import kernels_cpu, kernels_cpu_attention, kernels_experts
from lm.masks import Facts, may_attend
from lm.quant import Quantised

# ------------------------------------------------------------------------------------------- reference


def linear(
    x: Float[Array, "*batch d_in"], weight: Float[Array, "d_out d_in"] | Quantised, dtype: Any = None
) -> Float[Array, "*batch d_out"]:
    """x Wᵀ, accumulated in fp32 whatever the operands, returned in `dtype` (`None`: that of `x`). Packed weights are unpacked here, and in
    the backward pass once more: what waits for it is the packed form."""
    flat = x.reshape(-1, x.shape[-1])
    y = _packed_product(flat, weight) if isinstance(weight, Quantised) else _product(flat, weight)
    return y.astype(dtype or x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def _product(x: Array, weight: Array) -> Array:
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


@jax.checkpoint
def _packed_product(x: Array, weight: Quantised) -> Array:
    matrix, scales = weight.factors()
    y = _product(x, matrix)
    return y if scales is None else y * scales


def input_gradient(dy: Float[Array, "n d_out"], weight: Float[Array, "d_out d_in"]) -> Float[Array, "n d_in"]:
    """dy W in fp32: the gradient `linear` sends to its input."""
    return jax.lax.dot_general(dy, weight, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def weight_gradient(dy: Float[Array, "n d_out"], x: Float[Array, "n d_in"]) -> Float[Array, "d_out d_in"]:
    """dyᵀ x in fp32: the gradient `linear` sends to its weight."""
    return jax.lax.dot_general(dy, x, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def rms_norm(x: Float[Array, "*batch d"], scale: Float[Array, " d"], eps: float) -> Float[Array, "*batch d"]:
    """x / rms(x) * scale, computed in fp32 (Zhang and Sennrich 2019, arXiv:1910.07467). eps stands inside the root, as in Hugging Face's
    models: their weights were trained so."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype)


def rotate(
    x: Float[Array, "*batch heads seq head_dim"],
    cos: Float[Array, "*batch seq head_dim"],
    sin: Float[Array, "*batch seq head_dim"],
) -> Float[Array, "*batch heads seq head_dim"]:
    """Turn each pair (i, i + head_dim/2) by its position's angle: the "rotate-half" layout of GPT-NeoX and Llama weights in Hugging Face
    files (Su et al. 2021, arXiv:2104.09864, eq. 34, with the pairs laid out in halves)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    rotated = x.astype(jnp.float32) * cos[..., None, :, :] + turned * sin[..., None, :, :]
    return rotated.astype(x.dtype)


def soft_cap(x: Float[Array, "*shape"], cap: float) -> Float[Array, "*shape"]:
    """cap · tanh(x / cap): nearly x where small, never beyond ±cap (Gemma 2, arXiv:2408.00118, section 2)."""
    return cap * jnp.tanh(x / cap)


def attention(
    q: Float[Array, "*batch heads queries head_dim"],
    k: Float[Array, "*batch kv_heads keys head_dim"],
    v: Float[Array, "*batch kv_heads keys head_dim"],
    query_facts: Facts,
    key_facts: Facts,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    *,
    key: Key[Array, ""] | None = None,
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "*batch heads queries head_dim"]:
    """softmax(scale · q kᵀ, where `may_attend`) v (Vaswani et al. 2017, arXiv:1706.03762, eq. 1); scores and softmax in fp32.

    `softcap` bends scores s to softcap · tanh(s / softcap) before the mask (Gemma 2, arXiv:2408.00118, section 2). `dropout` zeroes
    probabilities, after the softmax, and scales up the rest; only where there is a `key`. `sinks` gives each head one score more, of a
    place whose value is 0: it takes probability and gives nothing (OpenAI 2025, gpt-oss model card, arXiv:2508.10925).

    With fewer `kv_heads` than `heads`, each key head serves heads / kv_heads neighbouring query heads (GQA, Ainslie et al. 2023,
    arXiv:2305.13245). The whole score matrix stands in memory: this is the reference the faster ones are tested against.
    """
    *batch, heads, queries, head_dim = q.shape
    kv_heads = k.shape[-3]
    grouped = q.reshape(*batch, kv_heads, heads // kv_heads, queries, head_dim)
    scores = jnp.einsum("...hgqd,...hkd->...hgqk", grouped, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = soft_cap(scores, softcap)
    allowed = may_attend(query_facts, key_facts, window)[..., None, None, :, :]
    scores = jnp.where(allowed, scores, jnp.finfo(jnp.float32).min)
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        sink = sinks.astype(jnp.float32).reshape(kv_heads, heads // kv_heads, 1, 1)
        column = jnp.broadcast_to(sink, (*scores.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, column], axis=-1), axis=-1)[..., :-1]
    if dropout > 0.0 and key is not None:
        weights = jnp.where(jr.bernoulli(key, 1.0 - dropout, weights.shape), weights / (1.0 - dropout), 0.0)
    weights = weights.astype(v.dtype)
    mixed = jnp.einsum("...hgqk,...hkd->...hgqd", weights, v, preferred_element_type=jnp.float32)
    return mixed.astype(q.dtype).reshape(*batch, heads, queries, head_dim)


# ------------------------------------------------------------------------------------------- jax.nn


def _jax_nn_attention(implementation: Literal["xla", "cudnn"]) -> Callable[..., Array]:
    """`jax.nn.dot_product_attention` under our signature: `xla` runs anywhere, `cudnn` is the flash kernel of NVIDIA cards (bf16 or fp16
    only)."""

    def attention(
        q: Array,
        k: Array,
        v: Array,
        query_facts: Facts,
        key_facts: Facts,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        dropout: float = 0.0,
        *,
        key: Array | None = None,
        sinks: Array | None = None,
    ) -> Array:
        if sinks is not None:
            raise ValueError(f"backend {implementation!r} has no attention sinks: use 'reference' or 'cpu'")
        if softcap is not None:
            raise ValueError(f"backend {implementation!r} cannot soft-cap scores (softcap = {softcap}): use 'reference' or 'cpu'")
        _refuse_dropout(implementation, dropout, key)
        *batch, heads, queries, head_dim = q.shape

        def four_axes(x: Array) -> Array:  # *batch heads seq head_dim -> batch seq heads head_dim
            return jnp.swapaxes(x.reshape(-1, *x.shape[-3:]), 1, 2)

        allowed = may_attend(query_facts, key_facts, window)
        mask = allowed.reshape(-1, 1, *allowed.shape[-2:])
        out = jax.nn.dot_product_attention(four_axes(q), four_axes(k), four_axes(v), mask=mask, scale=scale, implementation=implementation)
        return jnp.swapaxes(out, 1, 2).reshape(*batch, heads, queries, head_dim)

    return attention


def _refuse_dropout(backend: str, dropout: float, key: Array | None) -> None:
    """Dropout of attention probabilities asks for the probabilities, which fast backends never write down."""
    if dropout > 0.0 and key is not None:
        raise ValueError(f"backend {backend!r} cannot drop attention probabilities (rate {dropout}): use 'reference', or a rate of 0")


# ------------------------------------------------------------------------------------------- CPU


def _cpu_linear(x: Array, weight: Array | Quantised, dtype: Any = None) -> Array:
    if isinstance(weight, Quantised):
        return kernels_cpu.linear_packed(x, weight, dtype)
    return kernels_cpu.linear(x, weight, dtype)


def _cpu_attention(
    q: Array,
    k: Array,
    v: Array,
    query_facts: Facts,
    key_facts: Facts,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    *,
    key: Array | None = None,
    sinks: Array | None = None,
) -> Array:
    """The blocked kernel where a row looks at itself, as in training. Where queries look into a cache, told by there being more keys than
    queries, a loop over the slots that were written, if there are many; for a few the reference is faster. (A prompt that fills its cache
    to the last slot is again a row that looks at itself.)"""
    _refuse_dropout("cpu", dropout, key)
    if q.shape[-2] != k.shape[-2]:
        if k.shape[-2] <= 2 * kernels_cpu_attention.SLOTS:
            return attention(q, k, v, query_facts, key_facts, scale, window, softcap, sinks=sinks)
        return kernels_cpu_attention.cached_attention(q, k, v, query_facts, key_facts, scale, window, softcap, sinks)
    return kernels_cpu_attention.attention(q, k, v, query_facts.segments, scale, window, softcap, sinks)


# ------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Ops:
    """One way to compute what the layers need; compared and hashed by its name, since it is part of a compiled program's identity."""

    name: str
    linear: Callable[..., Array] = linear
    input_gradient: Callable[..., Array] = input_gradient  # of `linear`, for losses that write their own backward pass
    weight_gradient: Callable[..., Array] = weight_gradient
    attention: Callable[..., Array] = attention
    expert_linear: Callable[..., Array] = kernels_experts.expert_linear
    rms_norm: Callable[..., Array] = rms_norm
    rotate: Callable[..., Array] = rotate

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ops) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)


REFERENCE = Ops("reference")

# Asked for by name; `train.backends` tells which suits a device and a model. A name that cannot run there fails when the program is
# compiled, with JAX's words.
BACKENDS: dict[str, Ops] = {
    "reference": REFERENCE,
    "xla": Ops("xla", attention=_jax_nn_attention("xla")),
    "cudnn": Ops("cudnn", attention=_jax_nn_attention("cudnn")),
    "cpu": Ops(
        "cpu",
        linear=_cpu_linear,
        weight_gradient=kernels_cpu.weight_gradient,
        attention=_cpu_attention,
        expert_linear=kernels_experts.expert_linear_by_hand,
        rms_norm=kernels_cpu.rms_norm,
        rotate=kernels_cpu.rotate,
    ),
}

Tree = TypeVar("Tree")


def with_ops(tree: Tree, ops: Ops) -> Tree:
    """The same tree with every layer's `ops` replaced. Arrays are shared, nothing is computed; meant for inside jit, but harmless
    outside."""

    def swap(node: Any) -> Any:
        if isinstance(node, eqx.Module):
            new = object.__new__(type(node))  # as Equinox's own unflatten does: no __init__, no checks on what is only carried over
            for field in fields(node):
                value = getattr(node, field.name)
                if field.name == "ops":
                    value = ops
                elif not field.metadata.get("static", False):
                    value = swap(value)
                object.__setattr__(new, field.name, value)
            return new
        if isinstance(node, tuple | list) and not hasattr(node, "_fields"):
            return type(node)(swap(child) for child in node)
        if isinstance(node, dict):
            return {name: swap(child) for name, child in node.items()}
        return node

    return swap(tree)
