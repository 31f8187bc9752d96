"""The small parts every drawing is made of: linear maps, embeddings, norms, MLPs, dropout.

Fields are arrays and the few facts the arrays cannot tell; sizes are read off the arrays, so they stay true after surgery. Each class has
an `init` that draws random weights; the plain constructor takes ready arrays. Weights keep Hugging Face's layout, `(out, in)`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Key

from lm.kernels import REFERENCE, Ops
from lm.quant import Quantised, check_kind, pack, unpacked

Activation = Callable[[Array], Array]
Tree = TypeVar("Tree")


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x Φ(x), Φ the distribution function of the normal law, exactly (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """GELU with Φ written by a tanh: ½ x (1 + tanh(√(2/π) (x + 0.044715 x³))), as in GPT-2 (arXiv:1606.08415, section 2)."""
    return jax.nn.gelu(x, approximate=True)


def relu2(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """max(x, 0)² (So et al. 2021, arXiv:2109.08668)."""
    return jnp.square(jax.nn.relu(x))


# Hugging Face's names for `hidden_act`. Three of them are one function.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": gelu,
    "gelu_fast": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": jax.nn.relu,
    "relu2": relu2,
    "silu": jax.nn.silu,
}


def activation_named(name: str) -> Activation:
    """The activation of that Hugging Face name, or an error that lists them."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not known; known are {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


class Linear(eqx.Module):
    """x ↦ x Wᵀ + b. The input is cast to the weight's dtype: the step chooses precision by casting weights, and nothing else."""

    weight: Float[Array, "d_out d_in"] | Quantised
    bias: Float[Array, " d_out"] | None = None
    ops: Ops = eqx.field(static=True, default=REFERENCE)

    @staticmethod
    def init(d_in: int, d_out: int, *, std: float, key: Key[Array, ""], bias: bool = False) -> "Linear":
        """Weights normal with standard deviation `std`, bias zero."""
        return Linear(std * jr.normal(key, (d_out, d_in)), jnp.zeros(d_out) if bias else None)

    def __call__(self, x: Float[Array, "*batch {self.weight.shape[1]}"]) -> Float[Array, "*batch {self.weight.shape[0]}"]:
        y = self.ops.linear(x.astype(self.weight.dtype), self.weight)
        return y if self.bias is None else y + self.bias.astype(y.dtype)


class ExpertLinear(eqx.Module):
    """x ↦ x Wᵀ + b with a W and a b for each expert, rows sorted by expert (`lm.moe`).

    The bias stays fp32 where a step casts the weight: rows look theirs up, and the gradient of a bf16 lookup loses its sum.
    """

    weight: Float[Array, "experts d_out d_in"]
    bias: Float[Array, "experts d_out"] | None = None
    ops: Ops = eqx.field(static=True, default=REFERENCE)

    @staticmethod
    def init(d_in: int, d_out: int, experts: int, *, std: float, key: Key[Array, ""], bias: bool = False) -> "ExpertLinear":
        """Weights normal with standard deviation `std`, bias zero."""
        return ExpertLinear(std * jr.normal(key, (experts, d_out, d_in)), jnp.zeros((experts, d_out)) if bias else None)

    def __call__(
        self, x: Float[Array, "rows {self.weight.shape[2]}"], sizes: Int[Array, "{self.weight.shape[0]}"]
    ) -> Float[Array, "rows {self.weight.shape[1]}"]:
        y = self.ops.expert_linear(x.astype(self.weight.dtype), self.weight, sizes)
        if self.bias is None:
            return y
        return (y + jnp.repeat(self.bias, sizes, axis=0, total_repeat_length=len(x))).astype(y.dtype)


class Embedding(eqx.Module):
    """token ↦ its row. Ids at or past the vocabulary read the last row, as JAX gathers do: check them where they enter."""

    weight: Float[Array, "vocab d_model"] | Quantised

    @staticmethod
    def init(vocab: int, d_model: int, *, std: float, key: Key[Array, ""]) -> "Embedding":
        return Embedding(std * jr.normal(key, (vocab, d_model)))

    def __call__(self, tokens: Int[Array, "*batch seq"]) -> Float[Array, "*batch seq {self.weight.shape[1]}"]:
        return self.weight.rows(tokens) if isinstance(self.weight, Quantised) else self.weight[tokens]


class RMSNorm(eqx.Module):
    """x / rms(x) · (offset + scale) over the last axis, in fp32 (arXiv:1910.07467)."""

    scale: Float[Array, " d"]
    eps: float = eqx.field(static=True)
    offset: float = eqx.field(static=True, default=0.0)  # 1 in Gemma, whose files hold what is above 1
    ops: Ops = eqx.field(static=True, default=REFERENCE)

    @staticmethod
    def init(d: int, eps: float, offset: float = 0.0) -> "RMSNorm":
        """A norm that multiplies by 1."""
        return RMSNorm(jnp.full(d, 1.0 - offset), eps, offset)

    def __call__(self, x: Float[Array, "*batch {self.scale.shape[0]}"]) -> Float[Array, "*batch {self.scale.shape[0]}"]:
        scale = self.scale if self.offset == 0 else self.offset + self.scale.astype(jnp.float32)  # in bf16, 1 + w would be rounded
        return self.ops.rms_norm(x, scale, self.eps)


class LayerNorm(eqx.Module):
    """(x - mean) / √(variance + eps) · scale + bias over the last axis, in fp32 (Ba et al. 2016, arXiv:1607.06450)."""

    scale: Float[Array, " d"]
    bias: Float[Array, " d"] | None
    eps: float = eqx.field(static=True)

    @staticmethod
    def init(d: int, eps: float, *, bias: bool = True) -> "LayerNorm":
        return LayerNorm(jnp.ones(d), jnp.zeros(d) if bias else None, eps)

    def __call__(self, x: Float[Array, "*batch {self.scale.shape[0]}"]) -> Float[Array, "*batch {self.scale.shape[0]}"]:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps) * self.scale
        return (y if self.bias is None else y + self.bias).astype(x.dtype)


class MLP(eqx.Module):
    """down(act(up(x))), the plain two-layer perceptron of Vaswani et al. 2017 (arXiv:1706.03762, eq. 2)."""

    up_proj: Linear  # d_model → d_ff
    down_proj: Linear  # d_ff → d_model
    activation: Activation = eqx.field(static=True, default=gelu)

    @staticmethod
    def init(
        d_model: int, d_ff: int, *, std: float, out_std: float, key: Key[Array, ""], activation: Activation = gelu, bias: bool = False
    ) -> "MLP":
        """`out_std` is the standard deviation of `down_proj`, which writes into the residual stream."""
        up_key, down_key = jr.split(key)
        return MLP(
            Linear.init(d_model, d_ff, std=std, key=up_key, bias=bias),
            Linear.init(d_ff, d_model, std=out_std, key=down_key, bias=bias),
            activation,
        )

    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
        return self.down_proj(self.activation(self.up_proj(x)))


class GatedMLP(eqx.Module):
    """down(act(gate(x)) · up(x)): with SiLU this is SwiGLU, with GELU GeGLU (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

    gate_proj: Linear  # d_model → d_ff
    up_proj: Linear  # d_model → d_ff
    down_proj: Linear  # d_ff → d_model
    activation: Activation = eqx.field(static=True, default=jax.nn.silu)

    @staticmethod
    def init(
        d_model: int,
        d_ff: int,
        *,
        std: float,
        out_std: float,
        key: Key[Array, ""],
        activation: Activation = jax.nn.silu,
        bias: bool = False,
    ) -> "GatedMLP":
        """`out_std` is the standard deviation of `down_proj`, which writes into the residual stream."""
        gate_key, up_key, down_key = jr.split(key, 3)
        return GatedMLP(
            Linear.init(d_model, d_ff, std=std, key=gate_key, bias=bias),
            Linear.init(d_model, d_ff, std=std, key=up_key, bias=bias),
            Linear.init(d_ff, d_model, std=out_std, key=down_key, bias=bias),
            activation,
        )

    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


def dropout(x: Float[Array, "*shape"], rate: float, key: Key[Array, ""] | None) -> Float[Array, "*shape"]:
    """Zero each entry with probability `rate` and scale the rest by 1 / (1 - rate) (Srivastava et al. 2014).

    `key=None` means evaluation: nothing is dropped. Training always passes a key.
    """
    if rate == 0.0 or key is None:
        return x
    kept = jr.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), 0).astype(x.dtype)


def with_matrices(model: Tree, change: Callable[[str, Array], Any]) -> Tree:
    """The same model with the matrix of every `Linear` and every `Embedding` changed, and the stacked ones of experts; norms, biases,
    routers and all else are shared. `change` is given the path of the layer (`blocks/3/attn/q_proj`) and its matrix. What is packed already
    stays so."""

    def has_matrix(node: Any) -> bool:
        return isinstance(node, Linear | ExpertLinear | Embedding)

    def changed(path: Any, node: Any) -> Any:
        if not has_matrix(node) or isinstance(node.weight, Quantised):
            return node
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return eqx.tree_at(lambda layer: layer.weight, node, change(name, node.weight))

    return jax.tree_util.tree_map_with_path(changed, model, is_leaf=has_matrix)


def cast(model: Tree, dtype: Any) -> Tree:
    """The same model with its matrices in `dtype`; packed ones stay packed, and are multiplied in it."""
    model = with_matrices(model, lambda _, weight: weight.astype(dtype))
    return jax.tree.map(lambda node: node.astype(dtype) if _is_packed(node) else node, model, is_leaf=_is_packed)


def _is_packed(node: Any) -> bool:
    return isinstance(node, Quantised)


def quantised(model: Tree, kind: str = "int8", *, group: int | None = None, double: bool = False, dtype: Any = None) -> Tree:
    """The same model with its matrices packed (`lm.quant`). Those of the `Linear`s in the blocks become `kind`; embedding and unembedding
    become int8 whatever the kind: a row of theirs is one token's, and four bits cost them more than they save. Norms, biases and routers
    stay as they are, and so do adapters.

    Such a model generates, is evaluated, saved and loaded, and is the frozen base of adapters (`lm.add_lora`). It is not trained itself,
    and packed once it cannot be had back: keep the one it was made from.

    **Arguments:**

    - `kind`: `int8`, `int4` or `nf4`.
    - `group`, `double`: of 4-bit kinds, see `lm.quant.pack`.
    - `dtype`: of products with the matrices; theirs where not given. A `Flight` has its own word on it.

    **Raises:** `ValueError` for a model with experts: `lm.quant` has one matrix a leaf.
    """
    check_kind(kind, group, double)

    def packed(path: str, weight: Array) -> Quantised:
        if weight.ndim != 2:
            raise ValueError(
                f"{path} holds the matrices of {weight.shape[0]} experts in one leaf, and only single ones can be packed: cast the model "
                "to bf16 instead"
            )
        if "blocks" not in path.split("/"):
            return pack(weight, "int8", dtype=dtype)
        return pack(weight, kind, group=group, double=double, dtype=dtype)

    return with_matrices(model, packed)


def dequantised(model: Tree) -> Tree:
    """The same model with each packed matrix as an array, in the dtype of its products: it computes what it computed, and can be saved for
    `transformers`. What the rounding took is not had back."""
    return jax.tree.map(lambda node: unpacked(node) if _is_packed(node) else node, model, is_leaf=_is_packed)
