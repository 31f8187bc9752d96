"""Mixtral: Mistral's drawing with a mixture of experts in place of the MLP (Jiang et al. 2024, arXiv:2401.04088).

x ─┬─ norm ─ attention ─(+)─┬─ norm ─ router ─ experts ─(+)─ …  norm ─ unembed
   └────────────────────────┘└────────────────────────────┘

What all mixtures here share stands in this file, for `qwen3_moe`, `olmoe` and `gpt_oss` to begin from: the numbers they have in common,
the block, and the way from tokens to hidden states. Each family says what its blocks are made of.
"""

# ------------------------------------------------------------------------------------------- config

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array, Float, Int, Key
from pydantic import BaseModel, Field, model_validator

from lm import rope
from lm.attention import Attention
from lm.base import AbstractBlock, AbstractLM, Aux, add_aux, aligned, facts_or_default, mark
from lm.cache import LayerCache
from lm.hf import Names, Stored, expert
from lm.hf_config import ConfigReader, check_heads, read_rope, write_rope
from lm.layers import Embedding, ExpertLinear, GatedMLP, Linear, RMSNorm, dropout
from lm.masks import Facts
from lm.moe import BALANCE, ROUTER_Z, Experts, MoE, Router
from lm.quant import Quantised


class SparseConfig(BaseModel, frozen=True, extra="forbid"):
    """Numbers that every mixture has. Hugging Face's name stands behind each."""

    vocab: int = Field(gt=0)  # vocab_size
    d_model: int = Field(gt=0)  # hidden_size
    n_layers: int = Field(gt=0)  # num_hidden_layers
    n_heads: int = Field(gt=0)  # num_attention_heads
    n_kv_heads: int = Field(gt=0)  # num_key_value_heads
    head_dim: int = Field(gt=0)  # head_dim
    d_ff: int = Field(gt=0)  # of one expert; intermediate_size
    n_experts: int = Field(gt=0)  # num_local_experts
    top_k: int = Field(gt=0)  # experts a token goes to; num_experts_per_tok
    context: int = Field(gt=0)  # max_position_embeddings
    rope_base: float = Field(10_000.0, gt=0)  # rope_theta
    rope_scaling: rope.Scaling | None = Field(None, discriminator="kind")  # rope_scaling
    norm_eps: float = Field(1e-5, gt=0)  # rms_norm_eps
    tied: bool = False  # tie_word_embeddings
    init_std: float = Field(0.02, gt=0)  # initializer_range
    dropout: float = Field(0.0, ge=0, lt=1)  # of embedding and residual branches, in training; not a key of theirs, so never exported
    attention_dropout: float = Field(0.0, ge=0, lt=1)  # of attention probabilities, in training; attention_dropout
    balance: float = Field(0.001, ge=0)  # weight in the training loss of how unevenly tokens are sent; router_aux_loss_coef
    router_z: float = Field(0.0, ge=0)  # weight of the router's log² Z, in training; not a key of theirs, so never exported

    @model_validator(mode="after")
    def _whole(self) -> "SparseConfig":
        check_heads(self.n_heads, self.n_kv_heads, self.head_dim)
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k ({self.top_k}) must not pass n_experts ({self.n_experts}): a token goes to each expert once")
        return self


def read_shared(read: ConfigReader, *, rope_base: float, norm_eps: float, balance: float) -> dict[str, Any]:
    """What `SparseConfig` holds and all families call alike, but for sizes of heads and experts; the numbers are defaults where the key is
    absent."""
    context = read.take("max_position_embeddings")
    read.expect("hidden_act", "silu", default="silu")
    read.take("output_router_logits", False)  # whether `transformers` adds the balance loss in training; we always do, times its weight
    return {
        "vocab": read.take("vocab_size"),
        "d_model": read.take("hidden_size"),
        "n_layers": read.take("num_hidden_layers"),
        "n_heads": read.take("num_attention_heads"),
        "top_k": read.take("num_experts_per_tok"),
        "context": context,
        "norm_eps": read.take("rms_norm_eps", norm_eps),
        "tied": read.take("tie_word_embeddings", False),
        "init_std": read.take("initializer_range", 0.02),
        "attention_dropout": read.take("attention_dropout", 0.0),
        "balance": read.take("router_aux_loss_coef", balance),
        **read_rope(read, context, rope_base),
    }


def write_shared(config: Any) -> dict[str, Any]:
    """The same keys, written."""
    return {
        "model_type": config.model_type,
        "vocab_size": config.vocab,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "num_experts_per_tok": config.top_k,
        "max_position_embeddings": config.context,
        **write_rope(
            config.model_type,
            rope_base=config.rope_base,
            rope_scaling=config.rope_scaling,
            rope_fraction=1.0,
            head_dim=config.head_dim,
            context=config.context,
        ),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "initializer_range": config.init_std,
        "attention_dropout": config.attention_dropout,
        "router_aux_loss_coef": config.balance,
    }


class MixtralConfig(SparseConfig, frozen=True, extra="forbid"):
    """Numbers of a Mixtral."""

    model_type: ClassVar[str] = "mixtral"

    window: int | None = Field(None, gt=0)  # positions a query sees, itself included; sliding_window

    @staticmethod
    def from_hf(config: dict[str, Any]) -> "MixtralConfig":
        """Read a `config.json`. Each key is used, known to be harmless, or refused by name."""
        read = ConfigReader(config, "mixtral")
        shared = read_shared(read, rope_base=1_000_000.0, norm_eps=1e-5, balance=0.001)
        result = MixtralConfig(
            **shared,
            n_kv_heads=read.take("num_key_value_heads", 8),
            head_dim=read.take("head_dim", shared["d_model"] // shared["n_heads"]),
            d_ff=read.take("intermediate_size"),
            n_experts=read.take("num_local_experts", 8),
            window=read.take("sliding_window", None),
        )
        read.expect("router_jitter_noise", 0.0, default=0.0)
        read.finish(harmless=set())
        return result

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` under which `transformers` computes the same function."""
        return {
            "architectures": ["MixtralForCausalLM"],
            **write_shared(self),
            "head_dim": self.head_dim,
            "intermediate_size": self.d_ff,
            "num_local_experts": self.n_experts,
            "sliding_window": self.window,
            "router_jitter_noise": 0.0,
        }


# ------------------------------------------------------------------------------------------- block


class Block(AbstractBlock):
    """Attention, then experts (or, in some layers of some families, one MLP), each on a normed copy of the residual stream and added back
    to it."""

    attn_norm: RMSNorm
    attn: Attention
    mlp_norm: RMSNorm
    mlp: MoE | GatedMLP
    dropout: float = eqx.field(static=True, default=0.0)

    @staticmethod
    def of(config: Any, attn: Attention, mlp: MoE | GatedMLP) -> "Block":
        norm = RMSNorm.init(config.d_model, config.norm_eps)
        return Block(norm, attn, RMSNorm.init(config.d_model, config.norm_eps), mlp, config.dropout)

    def __call__(
        self,
        x: Float[Array, "*batch seq d_model"],
        facts: Facts,
        cache: LayerCache | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "*batch seq d_model"], LayerCache | None, Aux]:
        attn_key, mlp_key, probabilities_key = (None, None, None) if key is None else jr.split(key, 3)
        y, cache = self.attn(self.attn_norm(x), facts, cache, key=probabilities_key)
        x = (x + dropout(y, self.dropout, attn_key)).astype(x.dtype)  # the stream keeps its dtype whatever the weights'
        normed = self.mlp_norm(x)
        y, aux = self.mlp(normed, facts.segments) if isinstance(self.mlp, MoE) else (self.mlp(normed), {})
        x = (x + dropout(mark(y, "mlp.out"), self.dropout, mlp_key)).astype(x.dtype)
        return mark(x, "block.out"), cache, aux

    def empty_cache(self, batch: tuple[int, ...], slots: int, dtype: Any) -> LayerCache:
        return self.attn.empty_cache(batch, slots, dtype)


def out_std(config: Any) -> float:
    """Maps that write into the stream start smaller by √(2 · n_layers), so that its variance does not grow with depth (Radford et al.
    2019)."""
    return config.init_std / (2 * config.n_layers) ** 0.5


# ------------------------------------------------------------------------------------------- model


class AbstractSparse(AbstractLM, is_abstract=True):
    """Embedding, blocks, a last norm, and the way back to the vocabulary."""

    config: Any = eqx.field(static=True)
    embed: Embedding  # vocab → d_model
    blocks: tuple[Any, ...]
    norm: RMSNorm
    unembed: Linear | None  # d_model → vocab; None: tied to `embed`

    @staticmethod
    @abstractmethod
    def block(config: Any, layer: int, *, key: Key[Array, ""]) -> Block:
        """A layer with random weights."""

    @classmethod
    def init(cls, config: Any, *, key: Key[Array, ""]) -> "AbstractSparse":
        embed_key, unembed_key, blocks_key = jr.split(key, 3)
        return cls(
            config=config,
            embed=Embedding.init(config.vocab, config.d_model, std=config.init_std, key=embed_key),
            blocks=tuple(cls.block(config, i, key=k) for i, k in enumerate(jr.split(blocks_key, config.n_layers))),
            norm=RMSNorm.init(config.d_model, config.norm_eps),
            unembed=None if config.tied else Linear.init(config.d_model, config.vocab, std=config.init_std, key=unembed_key),
        )

    @property
    def unembedding(self) -> Float[Array, "vocab d_model"] | Quantised:
        return self.embed.weight if self.unembed is None else self.unembed.weight

    @property
    def aux_weights(self) -> Mapping[str, float]:
        return {BALANCE: self.config.balance, ROUTER_Z: self.config.router_z}

    @property
    def n_active_params(self) -> int:
        def idle(node: Any) -> int:
            if not isinstance(node, ExpertLinear):
                return 0
            return sum(x.size for x in jax.tree.leaves(node)) * (self.config.n_experts - self.config.top_k) // self.config.n_experts

        return self.n_params - sum(map(idle, jax.tree.leaves(self, is_leaf=lambda node: isinstance(node, ExpertLinear))))

    def hidden(
        self,
        tokens: Int[Array, "*batch seq"],
        facts: Facts | None = None,
        cache: tuple[Any, ...] | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "*batch seq d_model"], tuple[Any, ...] | None, Aux]:
        facts = facts_or_default(tokens, facts, cache)
        tables = rope.tables_of(facts.positions, self.config.head_dim, self.config.rope_base, self.config.rope_scaling, 1.0)
        facts = Facts(facts.positions, facts.segments, tables)
        embed_key, blocks_key = (None, None) if key is None else jr.split(key)

        x = mark(dropout(self.embed(tokens), self.config.dropout, embed_key), "embed.out")
        caches: list[Any] = []
        aux: Aux = {}
        for block, block_cache, block_key in aligned(self.blocks, cache, blocks_key):
            x, block_cache, block_aux = block(x, facts, block_cache, key=block_key)
            caches.append(block_cache)
            aux = add_aux(aux, block_aux)
        return self.norm(x), None if cache is None else tuple(caches), aux


class Mixtral(AbstractSparse):
    """Experts in every layer; the weights of a token's experts sum to 1."""

    @staticmethod
    def block(config: MixtralConfig, layer: int, *, key: Key[Array, ""]) -> Block:
        attn_key, router_key, experts_key = jr.split(key, 3)
        c, out = config, out_std(config)
        return Block.of(
            c,
            Attention.init(
                c.d_model,
                c.n_heads,
                c.n_kv_heads,
                c.head_dim,
                std=c.init_std,
                out_std=out,
                window=c.window,
                dropout=c.attention_dropout,
                key=attn_key,
            ),
            MoE(
                Router.init(c.d_model, c.n_experts, c.top_k, normalised=True, std=c.init_std, key=router_key),
                Experts.init(c.d_model, c.d_ff, c.n_experts, std=c.init_std, out_std=out, key=experts_key),
            ),
        )


# ------------------------------------------------------------------------------------------- presets

# Published shapes, from each repository's config.json.
PRESETS = {
    "mixtral-8x7b": MixtralConfig(
        vocab=32_000, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, d_ff=14_336, n_experts=8, top_k=2,
        context=32_768, rope_base=1_000_000.0, balance=0.02,
    ),
}  # fmt: skip

# ------------------------------------------------------------------------------------------- HF names

# role of our leaf → key in the file; {i} is the layer, {e} the expert. The first are those of all families here.
SHARED_NAMES: dict[str, str | Stored] = {
    "embed.weight": "model.embed_tokens.weight",
    "attn_norm.scale": "model.layers.{i}.input_layernorm.weight",
    "attn.q_proj.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "attn.k_proj.weight": "model.layers.{i}.self_attn.k_proj.weight",
    "attn.v_proj.weight": "model.layers.{i}.self_attn.v_proj.weight",
    "attn.o_proj.weight": "model.layers.{i}.self_attn.o_proj.weight",
    "mlp_norm.scale": "model.layers.{i}.post_attention_layernorm.weight",
    "norm.scale": "model.norm.weight",
    "unembed.weight": "lm_head.weight",
}
HF_NAMES: Names = SHARED_NAMES | {
    "mlp.router.weight": "model.layers.{i}.block_sparse_moe.gate.weight",
    "mlp.experts.gate_proj.weight": expert("model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight"),
    "mlp.experts.up_proj.weight": expert("model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight"),
    "mlp.experts.down_proj.weight": expert("model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight"),
}
