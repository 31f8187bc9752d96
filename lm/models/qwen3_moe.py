"""Qwen3 with experts: Qwen3's attention, and in most layers a mixture in place of the MLP (Yang et al. 2025, arXiv:2505.09388, section 2).

x ─┬─ norm ─ attention, q and k normed ─(+)─┬─ norm ─ router ─ experts, or SwiGLU ─(+)─ …  norm ─ unembed
   └────────────────────────────────────────┘└──────────────────────────────────────┘

Block and model are those of `lm/models/mixtral.py`.
"""

# ------------------------------------------------------------------------------------------- config

from typing import Any, ClassVar

import jax.random as jr
from jaxtyping import Array, Key
from pydantic import Field

from lm.attention import Attention
from lm.hf import Names, expert
from lm.hf_config import ConfigReader
from lm.layers import GatedMLP
from lm.models.mixtral import SHARED_NAMES, AbstractSparse, Block, SparseConfig, out_std, read_shared, write_shared
from lm.moe import Experts, MoE, Router


class Qwen3MoeConfig(SparseConfig, frozen=True, extra="forbid"):
    """Numbers of a Qwen3 with experts. `d_ff`, of one expert, is `moe_intermediate_size` here, and `n_experts` is `num_experts`."""

    model_type: ClassVar[str] = "qwen3_moe"

    d_ff_dense: int = Field(gt=0)  # of layers without experts; intermediate_size
    sparse_step: int = Field(1, gt=0)  # every so many layers have experts, the last of each so many; decoder_sparse_step
    dense_layers: tuple[int, ...] = ()  # further layers without, counted from 0; mlp_only_layers
    normalised: bool = True  # the weights of a token's experts sum to 1; norm_topk_prob
    attention_bias: bool = False  # attention_bias
    window: int | None = Field(None, gt=0)  # positions a query sees, itself included; sliding_window with use_sliding_window

    @staticmethod
    def from_hf(config: dict[str, Any]) -> "Qwen3MoeConfig":
        """Read a `config.json`. Each key is used, known to be harmless, or refused by name."""
        read = ConfigReader(config, "qwen3_moe")
        shared = read_shared(read, rope_base=10_000.0, norm_eps=1e-6, balance=0.001)
        window = read.take("sliding_window", None)
        result = Qwen3MoeConfig(
            **shared,
            n_kv_heads=read.take("num_key_value_heads", 4),
            head_dim=read.take("head_dim", shared["d_model"] // shared["n_heads"]),
            d_ff=read.take("moe_intermediate_size", 768),
            n_experts=read.take("num_experts", read.take("num_local_experts", 128)),
            d_ff_dense=read.take("intermediate_size"),
            sparse_step=read.take("decoder_sparse_step", 1),
            dense_layers=tuple(read.take("mlp_only_layers", ())),
            normalised=read.take("norm_topk_prob", False),
            attention_bias=read.take("attention_bias", False),
            window=window if read.take("use_sliding_window", False) else None,
        )
        read.finish(harmless={"max_window_layers"})  # of the dense Qwen3; here all layers have the window, or none
        return result

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` under which `transformers` computes the same function."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            **write_shared(self),
            "head_dim": self.head_dim,
            "moe_intermediate_size": self.d_ff,
            "num_experts": self.n_experts,
            "intermediate_size": self.d_ff_dense,
            "decoder_sparse_step": self.sparse_step,
            "mlp_only_layers": list(self.dense_layers),
            "norm_topk_prob": self.normalised,
            "attention_bias": self.attention_bias,
            "sliding_window": self.window,
            "use_sliding_window": self.window is not None,
        }


# ------------------------------------------------------------------------------------------- block and model


class Qwen3Moe(AbstractSparse):
    """Experts in every `sparse_step`-th layer that is not listed as dense."""

    @staticmethod
    def block(config: Qwen3MoeConfig, layer: int, *, key: Key[Array, ""]) -> Block:
        attn_key, router_key, mlp_key = jr.split(key, 3)
        c, out = config, out_std(config)
        attn = Attention.init(
            c.d_model,
            c.n_heads,
            c.n_kv_heads,
            c.head_dim,
            std=c.init_std,
            out_std=out,
            bias=c.attention_bias,
            qk_norm_eps=c.norm_eps,
            window=c.window,
            dropout=c.attention_dropout,
            key=attn_key,
        )
        if layer in c.dense_layers or (layer + 1) % c.sparse_step:
            return Block.of(c, attn, GatedMLP.init(c.d_model, c.d_ff_dense, std=c.init_std, out_std=out, key=mlp_key))
        router = Router.init(c.d_model, c.n_experts, c.top_k, normalised=c.normalised, std=c.init_std, key=router_key)
        return Block.of(c, attn, MoE(router, Experts.init(c.d_model, c.d_ff, c.n_experts, std=c.init_std, out_std=out, key=mlp_key)))


# ------------------------------------------------------------------------------------------- presets

# Published shapes, from each repository's config.json.
PRESETS = {
    "qwen3-30b-a3b": Qwen3MoeConfig(
        vocab=151_936, d_model=2048, n_layers=48, n_heads=32, n_kv_heads=4, head_dim=128, d_ff=768, n_experts=128, top_k=8,
        d_ff_dense=6144, context=40_960, rope_base=1_000_000.0, norm_eps=1e-6,
    ),
}  # fmt: skip

# ------------------------------------------------------------------------------------------- HF names

# role of our leaf → key in the file; {i} is the layer, {e} the expert.
HF_NAMES: Names = SHARED_NAMES | {
    "attn.q_proj.bias": "model.layers.{i}.self_attn.q_proj.bias",
    "attn.k_proj.bias": "model.layers.{i}.self_attn.k_proj.bias",
    "attn.v_proj.bias": "model.layers.{i}.self_attn.v_proj.bias",
    "attn.o_proj.bias": "model.layers.{i}.self_attn.o_proj.bias",
    "attn.q_norm.scale": "model.layers.{i}.self_attn.q_norm.weight",
    "attn.k_norm.scale": "model.layers.{i}.self_attn.k_norm.weight",
    "mlp.gate_proj.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "mlp.up_proj.weight": "model.layers.{i}.mlp.up_proj.weight",
    "mlp.down_proj.weight": "model.layers.{i}.mlp.down_proj.weight",
    "mlp.router.weight": "model.layers.{i}.mlp.gate.weight",
    "mlp.experts.gate_proj.weight": expert("model.layers.{i}.mlp.experts.{e}.gate_proj.weight"),
    "mlp.experts.up_proj.weight": expert("model.layers.{i}.mlp.experts.{e}.up_proj.weight"),
    "mlp.experts.down_proj.weight": expert("model.layers.{i}.mlp.experts.{e}.down_proj.weight"),
}
