"""Tiny models and batches whose sizes are all different, products too, so that a wrong axis cannot pass."""

from functools import lru_cache
from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import lm
from data.pipeline import Batch

SIZES = {"vocab": 97, "d_model": 24, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "head_dim": 8, "d_ff": 40, "context": 64}

EXPERTS = {"n_experts": 5, "top_k": 2, "d_ff": 28, "router_z": 0.01}
OWN_SIZES = {  # what a family has beside, or cannot have otherwise
    "gpt_oss": EXPERTS | {"window": 4, "sliding": (True, False, True)},
    "gpt_neox": {"rope_fraction": 0.5},  # of heads 4 wide: a pair
    "mixtral": EXPERTS,
    "olmoe": EXPERTS | {"head_dim": 4},
    "zmaj": {  # every switch
        **dict.fromkeys(("qk_norm", "embed_norm", "stream_lambdas", "value_residual"), True),
        **{"mlp": "relu2", "value_embeddings": 1, "logit_scale": 0.8, "logit_softcap": 7.0, "window_by_layer": (5, 9, None)},
    },
    "qwen3_moe": EXPERTS | {"d_ff_dense": 40, "dense_layers": (1,)},
}


def tiny_config(name: str, **changes):
    kind = lm.ARCHITECTURES[name].config
    sizes = {size: value for size, value in SIZES.items() if size in kind.model_fields}  # heads of a gpt2 are d_model / n_heads wide: 4
    return kind(**(sizes | {"tied": name != "llama", "init_std": 0.2} | OWN_SIZES.get(name, {}) | changes))


@lru_cache
def _tiny_arrays(name: str, seed: int, changes: tuple):
    config = tiny_config(name, **dict(changes))
    skeleton = eqx.filter_eval_shape(lambda key: lm.build(config, key=key), jr.key(0))  # nothing is computed, nothing compiled
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        mean, std = (1.0, 0.1) if jax.tree_util.keystr(path).endswith("scale") else (0.0, config.init_std)
        return rng.normal(mean, std, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, skeleton)


def tiny(name: str, seed: int = 0, **changes):
    """A random model with every array random: norms that are all ones would hide a forgotten scale. Its arrays are the caller's own, to be
    donated if need be."""
    return jax.tree.map(jnp.array, _tiny_arrays(name, seed, tuple(sorted(changes.items()))))


@eqx.filter_jit
def logits_of(model, tokens, facts=None, key=None):
    """`model(tokens, facts, key=key)` as one program. One operation after another, as in IPython, each is compiled for each new shape."""
    return model(tokens, facts, key=key)


def packed_batch(batch: int = 2, seq: int = 13, vocab: int = 97, seed: int = 0):
    """Rows of three documents and some padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (batch, seq)).astype(np.int32)
    targets = rng.integers(0, vocab, (batch, seq)).astype(np.int32)
    segments = np.zeros((batch, seq), np.int32)
    positions = np.zeros((batch, seq), np.int32)
    for row in range(batch):
        cuts = [0, 4 + row, 9, seq - 1 - row]
        for document, (start, stop) in enumerate(pairwise(cuts), start=1):
            segments[row, start:stop] = document
            positions[row, start:stop] = np.arange(stop - start)
    weights = (segments > 0).astype(np.float32)
    weights[0, 2] = 0.0
    return Batch(tokens=tokens, targets=targets, positions=positions, segments=segments, loss_weights=weights)


def facts_of(batch):
    return lm.Facts(jnp.asarray(batch.positions), jnp.asarray(batch.segments))
