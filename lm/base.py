"""The two call signatures everything hangs on, and the glossary of axes.

    batch       any number of leading axes, also none: `*batch`
    seq         tokens of a row; queries, keys: the two sides of attention; slots: places in a cache
    d_model     width of the residual stream
    d_ff        hidden width of an MLP
    heads       query heads; kv_heads: key and value heads, a divisor of heads
    head_dim    width of one head
    vocab       rows of the embedding

A model is a tree of arrays. It holds a tuple of blocks and runs them in a `for` loop; what the blocks are made of, and whether several are
run as one scan (`lm/flight.py`), it never learns.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key

from lm import rope
from lm.cache import LayerCache
from lm.kernels import REFERENCE, Ops, soft_cap
from lm.masks import Facts, default_facts
from lm.quant import Quantised

Aux = dict[str, tuple[Array, Array]]  # what a block reports beside its output: name → (sum, count)


def mark(x: Array, name: str) -> Array:
    """The identity, at a named place ("attn.out"): rematerialisation policies, activation sharding and interventions find it by that
    name."""
    return checkpoint_name(x, name)


class AbstractBlock(eqx.Module, is_abstract=True):
    """One layer, or several made to look like one (`lm.flight.Stack`)."""

    @property
    def depth(self) -> int:
        """How many layers stand behind this block."""
        return 1

    @abstractmethod
    def __call__(self, x: Any, facts: Facts, cache: Any = None, *, key: Array | None = None) -> tuple[Any, Any, Aux]:
        """`(x, cache, aux)` after this block. `x` is the residual stream, an array; or a tree of arrays where a block hands on more than
        that (`lm.models.zmaj`). `key` is one key, or `depth` of them where depth is above 1; `None` means evaluation."""

    @abstractmethod
    def empty_cache(self, batch: tuple[int, ...], slots: int, dtype: Any) -> Any:
        """An empty memory for `slots` tokens a row."""


class AbstractLM(eqx.Module, is_abstract=True):
    """A decoder: `embed`, `blocks`, a final `norm`, and an `unembed` that is absent where it is tied to the embedding."""

    config: eqx.AbstractVar[Any]
    embed: eqx.AbstractVar[Any]
    blocks: eqx.AbstractVar[tuple[Any, ...]]

    @abstractmethod
    def hidden(
        self,
        tokens: Int[Array, "*batch seq"],
        facts: Facts | None = None,
        cache: tuple[Any, ...] | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "*batch seq d_model"], tuple[Any, ...] | None, Aux]:
        """The residual stream after the last norm, the caches after these tokens, and what the blocks reported.

        `key` draws the dropout; `None` means evaluation: nothing is dropped, whatever the config says.
        """

    @property
    @abstractmethod
    def unembedding(self) -> Float[Array, "vocab d_model"] | Quantised:
        """The matrix that turns hidden states into logits: the embedding itself when tied."""

    @property
    def logit_softcap(self) -> float | None:
        """Logits never pass ± this (Gemma 2, arXiv:2408.00118, section 2); `None`: they may."""
        return None

    def logits(self, hidden: Float[Array, "*batch d_model"], ops: Ops = REFERENCE) -> Float[Array, "*batch vocab"]:
        """Scores of every token in fp32, never rounded to the weights' dtype."""
        scores = ops.linear(hidden.astype(self.unembedding.dtype), self.unembedding, jnp.float32)
        return scores if self.logit_softcap is None else soft_cap(scores, self.logit_softcap)

    def __call__(
        self, tokens: Int[Array, "*batch seq"], facts: Facts | None = None, *, key: Key[Array, ""] | None = None
    ) -> Float[Array, "*batch seq vocab"]:
        """Logits of the next token at every place. Training never calls this (`train.losses` unembeds in chunks); people do."""
        return self.logits(self.hidden(tokens, facts, key=key)[0])

    def empty_cache(self, batch: tuple[int, ...], slots: int, dtype: Any = jnp.float32) -> tuple[Any, ...]:
        """One empty cache for each block."""
        rope.check_cache(getattr(self.config, "rope_scaling", None), slots)  # GPT-2 has none
        return tuple(block.empty_cache(batch, slots, dtype) for block in self.blocks)

    @property
    def aux_weights(self) -> Mapping[str, float]:
        """The weight in the training loss of the mean of each thing the blocks report (`Aux`); what has none is only reported."""
        return {}

    @property
    def n_params(self) -> int:
        """Numbers the model has, or would have where it is abstract; a packed matrix counts those it stands for, and not its scales."""
        nodes = jax.tree.leaves(self, is_leaf=lambda node: isinstance(node, Quantised))
        return sum(math.prod(node.shape) for node in nodes if isinstance(node, Quantised | jax.ShapeDtypeStruct) or eqx.is_array(node))

    @property
    def n_active_params(self) -> int:
        """Those that one token meets: all, but for experts it is not sent to."""
        return self.n_params


def facts_or_default(tokens: Int[Array, "*batch seq"], facts: Facts | None, cache: tuple[Any, ...] | None) -> Facts:
    """Plain text where the caller says nothing; with a cache, positions go on where it ends."""
    if facts is not None:
        return facts
    layer_cache = jax.tree.leaves(cache, is_leaf=lambda node: isinstance(node, LayerCache))
    # A Stack's caches are stacked, one index a layer, all equal.
    return default_facts(tokens, layer_cache[0].filled.reshape(-1)[0] if layer_cache else 0)


def aligned(blocks: tuple[Any, ...], cache: tuple[Any, ...] | None, key: Key[Array, ""] | None) -> Iterator[tuple[Any, Any, Array | None]]:
    """Each block with its cache and its key. Keys are split over the *layers*, so a stack of three draws the dropout its three layers
    would."""
    keys = None if key is None else jr.split(key, sum(block.depth for block in blocks))
    first = 0
    for i, block in enumerate(blocks):
        block_key = None if keys is None else keys[first] if block.depth == 1 else keys[first : first + block.depth]
        first += block.depth
        yield block, None if cache is None else cache[i], block_key


def add_aux(total: Aux, new: Aux) -> Aux:
    """Sums and counts add; a name seen for the first time is taken over."""
    merged = dict(total)
    for name, (value, count) in new.items():
        old_value, old_count = merged.get(name, (jnp.zeros(()), jnp.zeros(())))
        merged[name] = (old_value + value, old_count + count)
    return merged


_NOT_ROLES = frozenset({"block", "base", "mu", "nu", "momentum", "inner_state"})  # wrappers' and optimizers' own segments


def role(path: str) -> str:
    """What a leaf is for, wherever it stands: `blocks/3/attn/q_proj/weight` → `attn.q_proj.weight`, the embedding → `embed.weight`.

    Indices, wrappers and optimizer prefixes are dropped, so one name serves sharding, decay and Muon groups, LoRA targets and Hugging Face
    names.
    """
    segments = [segment for segment in path.split("/") if not segment.isdigit() and segment not in _NOT_ROLES]
    if "blocks" in segments:
        segments = segments[len(segments) - segments[::-1].index("blocks") :]
    if not segments:
        raise ValueError(f"leaf {path!r} has no role: expected a path such as blocks/3/attn/q_proj/weight or embed/weight")
    return ".".join(segments)


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Every array of a tree (or its abstract stand-in) under its path, `blocks/3/attn/q_proj/weight`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
