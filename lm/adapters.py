"""Low-rank adapters: a frozen matrix and a small trained one beside it.

`add_lora` wraps chosen `Linear`s of the blocks in `LoRA`; `trainable_filter` says which arrays are then trained; `merge` folds the adapters
into the matrices, `unmerge` takes them out. How they lie in files is `lm/adapter_files.py`.

    blocks/3/attn/q_proj/weight    becomes    blocks/3/attn/q_proj/base/weight     frozen; an array, or packed (QLoRA)
                                              blocks/3/attn/q_proj/down            trained, rank · d_in
                                              blocks/3/attn/q_proj/up              trained, d_out · rank
                                              blocks/3/attn/q_proj/magnitude       trained, d_out (DoRA)

The role of the frozen matrix is what it was, `attn.q_proj.weight`.
"""

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from lm.base import AbstractBlock, AbstractLM, Aux, leaves_by_path, role
from lm.kernels import REFERENCE, Ops
from lm.layers import ExpertLinear, Linear, dropout
from lm.masks import Facts
from lm.quant import Quantised, unpacked

Model = TypeVar("Model", bound=AbstractLM)

ALL_LINEARS = ("attn.*", "mlp.*")  # "QLoRA tuning on all linear layers is needed to match full finetuning" (arXiv:2305.14314, section 4)


class LoRA(eqx.Module):
    """x ↦ W x + s · up (down x) + b (Hu et al. 2021, arXiv:2106.09685, eq. 3), with s = α / rank, or α / √rank (rsLoRA: Kalajdzievski 2023,
    arXiv:2312.03732).

    With a `magnitude` m it is DoRA (Liu et al. 2024, arXiv:2402.09353, eq. 5): W x + s · up (down x), row by row times m over the length of
    the row of W + s · up down; no gradient flows through that length (section 4.3). The length is found without making that matrix:
    |w + s u D|² = |w|² + 2 s u·(D w) + s² u (D Dᵀ) u.
    """

    base: Linear
    down: Float[Array, "rank d_in"]  # A in the papers
    up: Float[Array, "d_out rank"]  # B; begins at 0, and with it the whole adapter
    magnitude: Float[Array, " d_out"] | None  # m; begins as the rows' lengths
    alpha: float = eqx.field(static=True)
    rslora: bool = eqx.field(static=True, default=False)
    dropout: float = eqx.field(static=True, default=0.0)  # of what `down` reads, where there is a key
    key: Key[Array, ""] | None = None  # of this pass's dropout: put there by `KeyedAdapters`, None at rest
    ops: Ops = eqx.field(static=True, default=REFERENCE)

    @staticmethod
    def init(
        base: Linear, rank: int, alpha: float, *, key: Key[Array, ""], rslora: bool = False, dora: bool = False, dropout: float = 0.0
    ) -> "LoRA":
        """An adapter that changes nothing yet. `down` is uniform within ± 1 / √d_in, as in PEFT."""
        d_out, d_in = base.weight.shape
        bound = d_in**-0.5
        down = jr.uniform(key, (rank, d_in), minval=-bound, maxval=bound)
        lora = LoRA(base, down, jnp.zeros((d_out, rank)), None, alpha, rslora, dropout)
        return eqx.tree_at(lambda each: each.magnitude, lora, lora.row_lengths(), is_leaf=lambda leaf: leaf is None) if dora else lora

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def __call__(self, x: Float[Array, "*batch {self.down.shape[1]}"]) -> Float[Array, "*batch {self.up.shape[0]}"]:
        x = x.astype(self.base.weight.dtype)
        y = self.ops.linear(x, self.base.weight)
        low = self.ops.linear(dropout(x, self.dropout, self.key).astype(self.down.dtype), self.down)
        y = y + (self.scale * self.ops.linear(low, self.up)).astype(y.dtype)
        if self.magnitude is not None:
            y = _scaled(y, self.magnitude / self.row_lengths(after=x))
        return y if self.base.bias is None else y + self.base.bias.astype(y.dtype)

    def row_lengths(self, after: Float[Array, "*batch d_in"] | None = None) -> Float[Array, " d_out"]:
        """The length of each row of W + s · up down, in fp32, without gradient. `after`: what a packed W waits for, lest it be unpacked
        before the layer runs."""
        down, up, weight = jax.lax.stop_gradient((self.down, self.up.astype(jnp.float32), self.base.weight))
        weight = weight.after(after) if isinstance(weight, Quantised) and after is not None else weight
        crossed = jnp.sum(up * self.ops.linear(down.astype(weight.dtype), weight, jnp.float32).T, axis=1)
        gram = self.ops.linear(down, down, jnp.float32)
        square = jnp.sum(jnp.square(unpacked(weight).astype(jnp.float32)), axis=1)
        square = square + 2 * self.scale * crossed + self.scale**2 * jnp.sum((up @ gram) * up, axis=1)
        return jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny))

    def merged(self) -> Linear:
        """The one matrix that computes the same, in the dtype of the base's products."""
        weight = unpacked(self.base.weight)
        wide = weight.astype(jnp.float32) + self.change()
        if self.magnitude is not None:
            wide = wide * (self.magnitude / self.row_lengths())[:, None]
        return eqx.tree_at(lambda linear: linear.weight, self.base, wide.astype(weight.dtype), is_leaf=_is_packed)

    def change(self) -> Float[Array, "d_out d_in"]:
        """s · up down, in fp32."""
        return self.scale * (self.up.astype(jnp.float32) @ self.down.astype(jnp.float32))

    @property
    def weight(self) -> Float[Array, "d_out d_in"]:
        """That matrix, made anew at each asking."""
        merged = self.merged().weight
        assert not isinstance(merged, Quantised), "merging unpacks"
        return merged


@jax.checkpoint
def _scaled(y: Array, factors: Array) -> Array:
    """In fp32; what waits for the backward pass is y as it was."""
    return (y.astype(jnp.float32) * factors).astype(y.dtype)


def _is_packed(node: Any) -> bool:
    return isinstance(node, Quantised)


def _is_adapter(node: Any) -> bool:
    return isinstance(node, LoRA)


# ------------------------------------------------------------------------------------------- put on


def add_lora(
    model: Model,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Sequence[str] = ALL_LINEARS,
    key: Key[Array, ""],
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
) -> Model:
    """The same model with adapters beside some of its matrices. It computes what it computed before, until they are trained.

    **Arguments:**

    - `rank`: columns of `up` and rows of `down`. An adapter has rank · (d_in + d_out) numbers.
    - `alpha`: what the adapter is multiplied with, over `rank`, or over √`rank` with `rslora`.
    - `targets`: patterns on the role of a `Linear` in the blocks (`attn.q_proj`, `mlp.*`) or on its path (`blocks/0/attn/*`).
    - `dropout`: rate on the adapters' input, drawn in training steps only.
    - `rslora`, `dora`: see `LoRA`.

    **Raises:** `ValueError` for a pattern that means no linear map of the blocks (with the roles there are), experts, or a map that has an
    adapter already.
    """
    if rank < 1 or not alpha > 0 or not 0 <= dropout < 1:
        raise ValueError(f"an adapter needs rank >= 1, alpha > 0 and dropout in [0, 1); got rank {rank}, alpha {alpha}, dropout {dropout}")
    chosen = _targeted(model, targets)
    keys = dict(zip(chosen, jr.split(key, len(chosen)), strict=True))

    def wrapped(path: str, node: Any) -> Any:
        if path not in keys:
            return node
        return LoRA.init(node, rank, alpha, key=keys[path], rslora=rslora, dora=dora, dropout=dropout)

    return map_nodes(wrapped, model, _is_linear)


def _is_linear(node: Any) -> bool:
    return isinstance(node, Linear | ExpertLinear | LoRA)


def map_nodes(change: Callable[[str, Any], Any], model: Model, is_node: Callable[[Any], bool]) -> Model:
    """`change(path, node)` in place of each node of a kind."""

    def changed(path: Any, node: Any) -> Any:
        return change(jax.tree_util.keystr(path, simple=True, separator="/"), node) if is_node(node) else node

    return jax.tree_util.tree_map_with_path(changed, model, is_leaf=is_node)


def nodes(model: Any, is_node: Callable[[Any], bool]) -> dict[str, Any]:
    """Every node of a kind, under its path."""
    found = jax.tree_util.tree_leaves_with_path(model, is_leaf=is_node)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): node for path, node in found if is_node(node)}


def adapters_of(model: Any) -> dict[str, LoRA]:
    """The adapters of a model or a block, each under the path of the linear map it is put on."""
    return nodes(model, _is_adapter)


def _targeted(model: AbstractLM, targets: Sequence[str]) -> list[str]:
    """The paths of the linear maps that the patterns mean."""
    here = {path: node for path, node in nodes(model, _is_linear).items() if path.startswith("blocks/")}

    def meant(pattern: str) -> Iterator[str]:
        return (path for path in here if fnmatchcase(role(path), pattern) or fnmatchcase(path, pattern))

    by_pattern = {pattern: list(meant(pattern)) for pattern in targets}
    idle = [pattern for pattern, paths in by_pattern.items() if not paths]
    if idle or not targets:
        roles = sorted({role(path) for path, node in here.items() if isinstance(node, Linear)})
        raise ValueError(
            f"targets: no linear map of the blocks is called {', '.join(idle) or 'nothing at all'}; there are {', '.join(roles)} "
            "(or name paths, such as blocks/0/attn/*)"
        )
    chosen = [path for path in here if any(path in paths for paths in by_pattern.values())]
    experts = sorted({role(path) for path in chosen if isinstance(here[path], ExpertLinear)})
    if experts:
        raise ValueError(f"targets mean the stacked matrices of experts, which take no adapters: {', '.join(experts)}. Name the others")
    twice = [path for path in chosen if isinstance(here[path], LoRA)]
    if twice:
        raise ValueError(f"there are adapters already at {', '.join(twice[:3])}{' …' if len(twice) > 3 else ''}: merge them first")
    return chosen


# ------------------------------------------------------------------------------------------- trained and frozen


def trainable_filter(model: Model, also: Sequence[str] = ()) -> Model:
    """The same tree with True at each array that is trained, False elsewhere: the adapters' own, and the floating ones whose role or path
    one of `also` means (`embed.weight` of a vocabulary that has grown, `norm.scale`, `*_norm.scale`).

    **Raises:** `ValueError` for a model without adapters, and for a pattern of `also` that means nothing, or packed numbers.
    """
    adapters = adapters_of(model)
    if not adapters:
        raise ValueError("this model has no adapters: put some on with lm.add_lora")
    own = {f"{path}/{name}" for path in adapters for name in ("down", "up", "magnitude")}
    packed = {f"{path}/{inner}" for path, node in nodes(model, _is_packed).items() for inner in leaves_by_path(node)}
    leaves = leaves_by_path(model)
    meant = {pattern: {path for path in leaves if fnmatchcase(role(path), pattern) or fnmatchcase(path, pattern)} for pattern in also}
    for pattern, paths in meant.items():
        if not paths:
            raise ValueError(f"also: nothing here is called {pattern}; the roles are {', '.join(sorted(set(map(role, leaves))))}")
        if paths & packed:
            raise ValueError(f"also: {pattern} means packed numbers ({sorted(paths & packed)[0]}), which are not trained")
    trained = own.union(*meant.values())

    def is_trained(path: Any, leaf: Any) -> bool:  # the leaf may be abstract
        return jnp.issubdtype(leaf.dtype, jnp.inexact) and jax.tree_util.keystr(path, simple=True, separator="/") in trained

    return jax.tree_util.tree_map_with_path(is_trained, model)


def without_adapters(model: Model) -> Model:
    """The model with its adapters taken off, sharing its arrays: what it was before `add_lora`, DoRA's magnitudes included."""
    return map_nodes(lambda _, lora: lora.base, model, lambda node: isinstance(node, LoRA))


def merge(model: Model) -> Model:
    """The same function without adapters: each is folded into its matrix, in the matrix's dtype. A packed matrix comes back as an array of
    its products' dtype: packed again (`lm.quantised`) it would lose of the adapter what is smaller than half a step."""
    return map_nodes(lambda _, lora: lora.merged(), model, _is_adapter)


def unmerge(merged: Model, adapters: Model) -> Model:
    """The model with its adapters, from the merged one and the adapters alone: the matrices are the merged ones less what the adapters add,
    equal to those before the merge but for rounding.

    **Arguments:**

    - `adapters`: the model with adapters, or what `eqx.filter(model, lm.trainable_filter(model))` leaves of it.

    **Raises:** `ValueError` for DoRA: once merged, the length of a row is that of its magnitude, and what it was is gone.
    """
    found = adapters_of(adapters)
    if any(lora.magnitude is not None for lora in found.values()):
        raise ValueError("DoRA cannot be unmerged: the lengths of the rows before are gone. Keep the model as it was before the merge")

    def restored(path: str, node: Any) -> Any:
        if path not in found:
            return node
        lora = found[path]
        weight = (node.weight.astype(jnp.float32) - lora.change()).astype(node.weight.dtype)
        return eqx.tree_at(lambda each: each.base, lora, eqx.tree_at(lambda linear: linear.weight, node, weight))

    return map_nodes(restored, merged, _is_linear)


# ------------------------------------------------------------------------------------------- dropout


def has_dropout(block: Any) -> bool:
    """Whether a block holds adapters that draw."""
    return any(_is_adapter(node) and node.dropout > 0 for node in jax.tree.leaves(block, is_leaf=_is_adapter))


class KeyedAdapters(AbstractBlock):
    """A block whose adapters are each given a key of its own for the pass: a `Linear` is called without one. Put on by `lm.flight`."""

    block: AbstractBlock

    @property
    def depth(self) -> int:
        return self.block.depth

    def __call__(self, x: Any, facts: Facts, cache: Any = None, *, key: Array | None = None) -> tuple[Any, Any, Aux]:
        if key is None:
            return self.block(x, facts, cache)
        own_key, adapters_key = jr.split(key)
        found = adapters_of(self.block)
        keys = jr.split(adapters_key, len(found))
        keyed = eqx.tree_at(
            lambda block: [lora.key for lora in adapters_of(block).values()], self.block, list(keys), is_leaf=lambda leaf: leaf is None
        )
        return keyed(x, facts, cache, key=own_key)

    def empty_cache(self, batch: tuple[int, ...], slots: int, dtype: Any) -> Any:
        return self.block.empty_cache(batch, slots, dtype)
