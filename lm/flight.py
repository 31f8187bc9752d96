"""How the blocks are run: one after the other, as a scan, or rematerialised. Decided by the step, inside jit; the model at rest never
knows.

At rest `model.blocks` is a plain tuple. In flight, blocks of one structure may be stacked into a `Stack`, which is itself a block, and each
may be wrapped in `Remat`, which is one too. Where kinds of blocks take turns (in Gemma 3, five with a window and one without), a `Chain`
holds one turn and the turns are stacked. Numbers are the same in every flight, dropout included (`tests/lm/test_flight.py`).
"""

from collections.abc import Iterator
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array
from pydantic import BaseModel

from lm.adapters import KeyedAdapters, LoRA, has_dropout
from lm.base import AbstractBlock, Aux, add_aux
from lm.kernels import Ops, with_ops
from lm.layers import ExpertLinear, Linear
from lm.masks import Facts
from lm.quant import Quantised


@runtime_checkable
class HasBlocks(Protocol):
    """What can be put on flight: an `AbstractLM`, or a module that holds one and shows its blocks."""

    @property
    def blocks(self) -> tuple[Any, ...]: ...


Model = TypeVar("Model", bound=HasBlocks)

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,  # keep only the block's input
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep what the linear maps gave, redo the rest
}


class Flight(BaseModel, frozen=True, extra="forbid"):
    """How a pass is carried out. `layers` and `remat` change speed and memory, never the result; `dtype` also rounds."""

    layers: Literal["loop", "scan"] = "loop"  # scan compiles faster at depth and needs less memory; the loop runs faster on a CPU
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass recomputes instead of keeping
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the blocks' weights and matrix products; sums stay fp32


class Remat(AbstractBlock):
    """A block whose backward pass recomputes the forward one (Chen et al. 2016, arXiv:1604.06174)."""

    block: AbstractBlock
    policy: str = eqx.field(static=True)

    @property
    def depth(self) -> int:
        return self.block.depth

    def __call__(self, x: Any, facts: Facts, cache: Any = None, *, key: Array | None = None) -> tuple[Any, Any, Aux]:
        def run(block: AbstractBlock, x: Any, facts: Facts, cache: Any, key: Array | None) -> tuple[Any, Any, Aux]:
            return block(x, facts, cache, key=key)

        return eqx.filter_checkpoint(run, policy=REMAT_POLICIES[self.policy])(self.block, x, facts, cache, key)

    def empty_cache(self, batch: tuple[int, ...], slots: int, dtype: Any) -> Any:
        return self.block.empty_cache(batch, slots, dtype)


class Chain(AbstractBlock):
    """Blocks of one layer each, whatever their structure, run one after the other as one block."""

    blocks: tuple[AbstractBlock, ...]

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def __call__(self, x: Any, facts: Facts, cache: Any = None, *, key: Array | None = None) -> tuple[Any, Any, Aux]:
        caches: list[Any] = []
        aux: Aux = {}
        for i, block in enumerate(self.blocks):
            x, block_cache, block_aux = block(x, facts, None if cache is None else cache[i], key=None if key is None else key[i])
            caches.append(block_cache)
            aux = add_aux(aux, block_aux)
        return x, None if cache is None else tuple(caches), aux

    def empty_cache(self, batch: tuple[int, ...], slots: int, dtype: Any) -> Any:
        return tuple(block.empty_cache(batch, slots, dtype) for block in self.blocks)


class Stack(AbstractBlock):
    """`n` blocks of one structure, their arrays stacked along a leading axis and scanned."""

    blocks: AbstractBlock  # arrays `n ...`
    n: int = eqx.field(static=True)

    @staticmethod
    def of(blocks: tuple[AbstractBlock, ...]) -> "Stack":
        arrays, statics = zip(*(eqx.partition(block, eqx.is_array) for block in blocks), strict=True)
        if not all(eqx.tree_equal(static, statics[0]) for static in statics):
            raise ValueError("a Stack needs blocks of one structure; these differ: fly them as a loop")
        return Stack(eqx.combine(jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays), statics[0]), len(blocks))

    @property
    def depth(self) -> int:
        return self.n * self.blocks.depth

    def __call__(self, x: Any, facts: Facts, cache: Any = None, *, key: Array | None = None) -> tuple[Any, Any, Aux]:
        arrays, static = eqx.partition(self.blocks, eqx.is_array)
        if key is not None and self.blocks.depth > 1:
            key = key.reshape(self.n, self.blocks.depth)

        def body(x: Any, layer: tuple[Any, Any, Any]) -> tuple[Any, tuple[Any, Aux]]:
            layer_arrays, layer_cache, layer_key = layer
            x, layer_cache, aux = eqx.combine(layer_arrays, static)(x, facts, layer_cache, key=layer_key)
            return x, (layer_cache, aux)

        x, (cache, aux) = jax.lax.scan(body, x, (arrays, cache, key), length=self.n)
        return x, cache, jax.tree.map(lambda each: jnp.sum(each, axis=0), aux)

    def empty_cache(self, batch: tuple[int, ...], slots: int, dtype: Any) -> Any:
        layer = jax.tree.map(lambda leaf: leaf[0] if eqx.is_array(leaf) else leaf, self.blocks)
        empty = layer.empty_cache(batch, slots, dtype)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (self.n, *leaf.shape)), empty)


def cast_linears(blocks: tuple[Any, ...], dtype: Any) -> tuple[Any, ...]:
    """Every `Linear`, adapter and the experts' matrices in `dtype`; packed weights stay packed and are multiplied in it. Norms, routers and
    biases of experts stay as they are. The embedding is no part of the blocks: a bf16 lookup would have a bf16 scatter-add for its
    gradient, where frequent tokens lose their sum."""

    def is_linear(node: Any) -> bool:
        return isinstance(node, Linear | LoRA | ExpertLinear)

    def all_of(node: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(dtype), node, is_leaf=lambda leaf: isinstance(leaf, Quantised))

    def cast(node: Any) -> Any:
        if isinstance(node, ExpertLinear):
            return eqx.tree_at(lambda layer: layer.weight, node, node.weight.astype(dtype))
        if isinstance(node, LoRA):  # a magnitude is nearly its row's length, and what it learns would be rounded off
            return eqx.tree_at(lambda lora: (lora.base, lora.down, lora.up), node, tuple(map(all_of, (node.base, node.down, node.up))))
        return all_of(node) if isinstance(node, Linear) else node

    return jax.tree.map(cast, blocks, is_leaf=is_linear)


def _stacked(blocks: tuple[AbstractBlock, ...]) -> Iterator[AbstractBlock]:
    """Blocks that repeat as Stacks, the others as they are. From each block on, the period that covers most is taken: 1 where neighbours
    are alike, 6 where every sixth differs."""

    def structure(block: AbstractBlock) -> tuple[Any, ...]:  # shapes and dtypes included
        leaves, treedef = jax.tree.flatten(block)
        return treedef, *[(leaf.shape, leaf.dtype) for leaf in leaves]

    structures = [structure(block) for block in blocks]

    def turns(first: int, period: int) -> int:
        """How often the next `period` blocks come, one time after the other."""
        pattern = structures[first : first + period]
        n = 1
        while structures[first + n * period : first + (n + 1) * period] == pattern:
            n += 1
        return n

    first = 0
    while first < len(blocks):
        covered, period = 1, 1
        for candidate in range(1, (len(blocks) - first) // 2 + 1):
            n = turns(first, candidate)
            if n > 1 and n * candidate > covered:
                covered, period = n * candidate, candidate
        if covered == 1:
            yield blocks[first]
        else:
            units = [blocks[at : at + period] for at in range(first, first + covered, period)]
            yield Stack.of(tuple(unit[0] if period == 1 else Chain(unit) for unit in units))
        first += covered


def put_on_flight(model: Model, flight: Flight, ops: Ops) -> Model:
    """The same model, ready to run: linears cast, kernels swapped, blocks wrapped and stacked. Call it inside jit, on every step: the casts
    are cheap and gradients come back to the tree at rest. Cast first, stack second: the copy then moves two bytes a parameter."""
    blocks: tuple[Any, ...] = cast_linears(with_ops(model.blocks, ops), jnp.dtype(flight.dtype))
    blocks = tuple(KeyedAdapters(block) if has_dropout(block) else block for block in blocks)
    if flight.remat != "none":
        blocks = tuple(Remat(block, flight.remat) for block in blocks)
    if flight.layers == "scan":
        blocks = tuple(_stacked(blocks))
    flying = with_ops(eqx.tree_at(lambda m: m.blocks, model, blocks), ops)
    return flying
