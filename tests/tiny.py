"""Tiny models and batches whose sizes are all different, products too, so that a wrong axis cannot pass."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import lm
from lm.models.llama import LlamaConfig
from lm.models.qwen3 import Qwen3Config

SIZES = {"vocab": 97, "d_model": 24, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "head_dim": 8, "d_ff": 40, "context": 64}


def tiny_config(name: str, **changes):
    kind = {"llama": LlamaConfig, "qwen3": Qwen3Config}[name]
    return kind(**(SIZES | {"tied": name == "qwen3", "init_std": 0.2} | changes))


def tiny(name: str, seed: int = 0, **changes):
    """A random model with every array random: norms that are all ones would hide a forgotten scale."""
    model = lm.build(tiny_config(name, **changes), key=jr.key(seed))
    leaves, treedef = jax.tree.flatten(model)
    keys = jr.split(jr.key(seed + 1), len(leaves))
    noisy = [leaf + 0.1 * jr.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, noisy)


def packed_batch(batch: int = 2, seq: int = 13, vocab: int = 97, seed: int = 0):
    """Rows of three documents and some padding."""
    from data.pipeline import Batch

    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (batch, seq)).astype(np.int32)
    targets = rng.integers(0, vocab, (batch, seq)).astype(np.int32)
    segments = np.zeros((batch, seq), np.int32)
    positions = np.zeros((batch, seq), np.int32)
    for row in range(batch):
        cuts = [0, 4 + row, 9, seq - 1 - row]
        for document, (start, stop) in enumerate(zip(cuts[:-1], cuts[1:], strict=True), start=1):
            segments[row, start:stop] = document
            positions[row, start:stop] = np.arange(stop - start)
    weights = (segments > 0).astype(np.float32)
    weights[0, 2] = 0.0
    return Batch(tokens=tokens, targets=targets, positions=positions, segments=segments, loss_weights=weights)


def facts_of(batch):
    return lm.Facts(jnp.asarray(batch.positions), jnp.asarray(batch.segments))
