"""Fingerprints of trees of arrays: equal on any mesh, different after any flipped bit.

`digest` is one of a whole tree, `leaf_digests` one for each leaf. They seal checkpoints, say which weights a run began from, and tell an
adapter its base.
"""

import json
from hashlib import sha256
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, UInt32


def digest(tree: PyTree) -> str:
    """A fingerprint of every leaf's path, dtype, shape and bits: equal on any mesh, different after any single flipped bit."""
    return digest_of(leaf_digests(tree))


def leaf_digests(tree: PyTree) -> dict[str, str]:
    """For each leaf, by path: `dtype[shape] fold`. All are computed when this returns, so that the arrays may then be given away."""
    leaves = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for path, leaf in leaves.items():
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise TypeError(
                f"leaf {path!r} is a {type(leaf).__name__}; a checkpoint holds arrays only: "
                "pass eqx.filter(tree, eqx.is_array), and put numbers into arrays or into the record."
            )
    folds = jax.device_get({path: _fold(_words(leaf)) for path, leaf in leaves.items()})
    return {path: f"{layout(leaf)} {folds[path][0]:08x}{folds[path][1]:08x}" for path, leaf in leaves.items()}


@jax.jit
def _fold(x: Array) -> UInt32[Array, "2"]:
    """Two 32-bit sums over all elements of mix(bits, index): sums of integers, so that no order, and no mesh, changes them.

    mix is a bijection of the bits for each index, so one changed element changes each sum for certain; the two sums use
    unlike constants, so that other damage, exchanged elements say, passes with a chance of about 2^-64. Compiled once
    per shape, not per leaf."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == bool:
        bits = x.astype(jnp.uint32)
    else:
        width = (jnp.finfo if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo)(x.dtype).bits
        # 64 bits become two words, along a new last axis.
        bits = jax.lax.bitcast_convert_type(x, f"uint{min(width, 32)}").astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = index * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.stack([jnp.sum(_mix(bits, index, seed), dtype=jnp.uint32) for seed in (0x9E3779B9, 0x7FEB352D)])


def _mix(bits: Array, index: Array, seed: int) -> Array:
    """Xor with a number drawn by the index, then MurmurHash3's finaliser (Appleby 2011): each of its steps can be undone."""
    x = bits ^ (index * np.uint32(0x85EBCA6B) + np.uint32(seed))
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B ^ (seed & 0xFFFE))
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _words(leaf: Array | np.ndarray) -> Array | np.ndarray:
    """numpy's 64-bit leaves as two 32-bit words an element, since jax would cut them to 32 bits."""
    if isinstance(leaf, np.ndarray) and leaf.dtype.itemsize == 8:
        return np.ascontiguousarray(leaf).reshape(*leaf.shape, 1).view(np.uint32)
    return leaf


def has_no_elements(leaf_digest: str) -> bool:
    return "0" in leaf_digest.partition("[")[2].partition("]")[0].split(",")


def digest_of(listed: dict[str, Any]) -> str:
    return sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def layout(leaf: Array | np.ndarray | jax.ShapeDtypeStruct) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def path_of(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
