"""OLMoE: many small experts, and RMSNorms over all query heads together and all key heads together (Muennighoff et al. 2024,
arXiv:2409.02060).

x ─┬─ norm ─ attention, q and k normed ─(+)─┬─ norm ─ router ─ experts ─(+)─ …  norm ─ unembed
   └────────────────────────────────────────┘└────────────────────────────┘

Block and model are those of `lm/models/mixtral.py`.
"""

# ------------------------------------------------------------------------------------------- config

from typing import Any, ClassVar

import jax.random as jr
from jaxtyping import Array, Key
from pydantic import Field, model_validator

from lm.attention import Attention
from lm.hf import Names
from lm.hf_config import ConfigReader
from lm.models.mixtral import AbstractSparse, Block, SparseConfig, out_std, read_shared, write_shared
from lm.models.qwen3_moe import HF_NAMES as QWEN3_MOE_NAMES
from lm.moe import Experts, MoE, Router


class OlmoeConfig(SparseConfig, frozen=True, extra="forbid"):
    """Numbers of an OLMoE. `n_experts` is `num_experts` here; heads are d_model / n_heads wide."""

    model_type: ClassVar[str] = "olmoe"

    normalised: bool = False  # the weights of a token's experts sum to 1; norm_topk_prob
    attention_bias: bool = False  # attention_bias
    clip: float | None = Field(None, gt=0)  # entries of q, k and v never pass ± this; clip_qkv

    @model_validator(mode="after")
    def _head_dim_is_no_choice(self) -> "OlmoeConfig":
        if self.head_dim * self.n_heads != self.d_model:
            raise ValueError(f"head_dim ({self.head_dim}) must be d_model / n_heads ({self.d_model} / {self.n_heads}) in an OLMoE")
        return self

    @staticmethod
    def from_hf(config: dict[str, Any]) -> "OlmoeConfig":
        """Read a `config.json`. Each key is used, known to be harmless, or refused by name."""
        read = ConfigReader(config, "olmoe")
        shared = read_shared(read, rope_base=10_000.0, norm_eps=1e-5, balance=0.01)
        result = OlmoeConfig(
            **shared,
            n_kv_heads=read.take("num_key_value_heads", shared["n_heads"]),
            head_dim=read.take("head_dim", shared["d_model"] // shared["n_heads"]),
            d_ff=read.take("intermediate_size"),
            n_experts=read.take("num_experts", read.take("num_local_experts", 64)),
            normalised=read.take("norm_topk_prob", False),
            attention_bias=read.take("attention_bias", False),
            clip=read.take("clip_qkv", None),
        )
        read.finish(harmless=set())
        return result

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` under which `transformers` computes the same function."""
        return {
            "architectures": ["OlmoeForCausalLM"],
            **write_shared(self),
            "intermediate_size": self.d_ff,
            "num_experts": self.n_experts,
            "norm_topk_prob": self.normalised,
            "attention_bias": self.attention_bias,
            "clip_qkv": self.clip,
        }


# ------------------------------------------------------------------------------------------- block and model


class Olmoe(AbstractSparse):
    """Experts in every layer."""

    @staticmethod
    def block(config: OlmoeConfig, layer: int, *, key: Key[Array, ""]) -> Block:
        attn_key, router_key, experts_key = jr.split(key, 3)
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
            qk_norm_over="heads",
            clip=c.clip,
            dropout=c.attention_dropout,
            key=attn_key,
        )
        router = Router.init(c.d_model, c.n_experts, c.top_k, normalised=c.normalised, std=c.init_std, key=router_key)
        return Block.of(c, attn, MoE(router, Experts.init(c.d_model, c.d_ff, c.n_experts, std=c.init_std, out_std=out, key=experts_key)))


# ------------------------------------------------------------------------------------------- presets

# Published shapes, from each repository's config.json.
PRESETS = {
    "olmoe-1b-7b": OlmoeConfig(
        vocab=50_304, d_model=2048, n_layers=16, n_heads=16, n_kv_heads=16, head_dim=128, d_ff=1024, n_experts=64, top_k=8,
        context=4096, balance=0.01,
    ),
}  # fmt: skip

# ------------------------------------------------------------------------------------------- HF names

HF_NAMES: Names = {
    role: name for role, name in QWEN3_MOE_NAMES.items() if not role.startswith(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))
}
