"""Granite: Llama's drawing with a number on each of four paths, the embedding, each branch into the residual stream, the scores of
attention, and the logits, as μP would set them (Granite Team, IBM 2024, "Granite 3.0 Language Models", section 3; Yang et al. 2022,
arXiv:2203.03466).

    x·e ─┬─ norm ─ attention ─·r─(+)─┬─ norm ─ SwiGLU ─·r─(+)─ …  norm ─ unembed ─ /l
         └────────────────────────────┘└───────────────────┘
"""

# ------------------------------------------------------------------------------------------- config

from typing import Any, ClassVar

import equinox as eqx
import jax.random as jr
from jaxtyping import Array, Float, Int, Key
from pydantic import BaseModel, Field, model_validator

from lm import rope
from lm.attention import Attention
from lm.base import AbstractBlock, AbstractLM, Aux, add_aux, aligned, facts_or_default, mark
from lm.cache import LayerCache
from lm.hf_config import ConfigReader, check_heads, read_decoder, refuse_native, write_decoder
from lm.layers import Embedding, GatedMLP, Linear, RMSNorm, dropout
from lm.masks import Facts
from lm.quant import Quantised


class GraniteConfig(BaseModel, frozen=True, extra="forbid"):
    """Numbers of a Granite. Hugging Face's name stands behind each."""

    model_type: ClassVar[str] = "granite"

    vocab: int = Field(gt=0)  # vocab_size
    d_model: int = Field(gt=0)  # hidden_size
    n_layers: int = Field(gt=0)  # num_hidden_layers
    n_heads: int = Field(gt=0)  # num_attention_heads
    n_kv_heads: int = Field(gt=0)  # num_key_value_heads
    head_dim: int = Field(gt=0)  # head_dim
    d_ff: int = Field(gt=0)  # intermediate_size
    context: int = Field(gt=0)  # max_position_embeddings
    rope_base: float = Field(10_000.0, gt=0)  # rope_theta
    rope_scaling: rope.Scaling | None = Field(None, discriminator="kind")  # rope_scaling
    rope_fraction: float = Field(1.0, gt=0, le=1)  # of head_dim that is rotated; native only
    norm_eps: float = Field(1e-5, gt=0)  # rms_norm_eps
    tied: bool = False  # tie_word_embeddings
    attention_bias: bool = False  # attention_bias
    mlp_bias: bool = False  # mlp_bias
    init_std: float = Field(0.02, gt=0)  # initializer_range
    dropout: float = Field(0.0, ge=0, lt=1)  # of embedding and residual branches, in training; not a Granite key, so never exported
    attention_dropout: float = Field(0.0, ge=0, lt=1)  # of attention probabilities, in training; attention_dropout
    attention_softcap: float | None = Field(None, gt=0)  # bounds the scores; native only
    logit_softcap: float | None = Field(None, gt=0)  # bounds the logits; native only
    embed_multiplier: float = Field(1.0, gt=0)  # of token vectors; embedding_multiplier
    attention_multiplier: float | None = Field(None, gt=0)  # of scores; attention_multiplier; None: 1 / √head_dim
    residual_multiplier: float = Field(1.0, gt=0)  # of what a branch adds to the stream; residual_multiplier
    logit_divisor: float = Field(1.0, gt=0)  # of logits; logits_scaling

    @model_validator(mode="after")
    def _whole(self) -> "GraniteConfig":
        rotary_dim = int(self.head_dim * self.rope_fraction)
        check_heads(self.n_heads, self.n_kv_heads, rotary_dim)
        rope.check_pairs(self.rope_scaling, rotary_dim // 2)
        return self

    @staticmethod
    def from_hf(config: dict[str, Any]) -> "GraniteConfig":
        """Read a `config.json`. Each key is used, known to be harmless, or refused by name."""
        read = ConfigReader(config, "granite")
        result = GraniteConfig(
            **read_decoder(read, context=2048),
            attention_bias=read.take("attention_bias", False),
            mlp_bias=read.take("mlp_bias", False),
            embed_multiplier=read.take("embedding_multiplier", 1.0),
            attention_multiplier=read.take("attention_multiplier", 1.0),
            residual_multiplier=read.take("residual_multiplier", 1.0),
            logit_divisor=read.take("logits_scaling", 1.0),
        )
        read.finish(harmless=set())
        return result

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` under which `transformers` computes the same function.

        **Raises:** `ValueError` naming the settings it has no key for.
        """
        refuse_native("granite", attention_softcap=self.attention_softcap, logit_softcap=self.logit_softcap)
        return {
            "architectures": ["GraniteForCausalLM"],
            "model_type": "granite",
            **write_decoder(self),
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "embedding_multiplier": self.embed_multiplier,
            "attention_multiplier": self.head_dim**-0.5 if self.attention_multiplier is None else self.attention_multiplier,
            "residual_multiplier": self.residual_multiplier,
            "logits_scaling": self.logit_divisor,
        }


# ------------------------------------------------------------------------------------------- block


class Block(AbstractBlock):
    """Attention, then MLP, each on a normed copy of the residual stream, made smaller and added back to it."""

    attn_norm: RMSNorm
    attn: Attention
    mlp_norm: RMSNorm
    mlp: GatedMLP
    residual_multiplier: float = eqx.field(static=True, default=1.0)
    dropout: float = eqx.field(static=True, default=0.0)

    @staticmethod
    def init(config: GraniteConfig, *, key: Key[Array, ""]) -> "Block":
        """All maps of one standard deviation: `residual_multiplier` does what smaller ones do elsewhere."""
        attn_key, mlp_key = jr.split(key)
        std = config.init_std
        return Block(
            attn_norm=RMSNorm.init(config.d_model, config.norm_eps),
            attn=Attention.init(
                config.d_model,
                config.n_heads,
                config.n_kv_heads,
                config.head_dim,
                std=std,
                out_std=std,
                key=attn_key,
                bias=config.attention_bias,
                scale=config.attention_multiplier,
                softcap=config.attention_softcap,
                dropout=config.attention_dropout,
            ),
            mlp_norm=RMSNorm.init(config.d_model, config.norm_eps),
            mlp=GatedMLP.init(config.d_model, config.d_ff, std=std, out_std=std, key=mlp_key, bias=config.mlp_bias),
            residual_multiplier=config.residual_multiplier,
            dropout=config.dropout,
        )

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
        x = (x + self.residual_multiplier * dropout(y, self.dropout, attn_key)).astype(x.dtype)  # the stream keeps its dtype
        y = mark(self.mlp(self.mlp_norm(x)), "mlp.out")
        x = (x + self.residual_multiplier * dropout(y, self.dropout, mlp_key)).astype(x.dtype)
        return mark(x, "block.out"), cache, {}

    def empty_cache(self, batch: tuple[int, ...], slots: int, dtype: Any) -> LayerCache:
        return self.attn.empty_cache(batch, slots, dtype)


# ------------------------------------------------------------------------------------------- model


class Granite(AbstractLM):
    """Embedding, blocks, a last norm, and the way back to the vocabulary."""

    config: GraniteConfig = eqx.field(static=True)
    embed: Embedding  # vocab → d_model
    blocks: tuple[Any, ...]
    norm: RMSNorm
    unembed: Linear | None  # d_model → vocab; None: tied to `embed`

    @staticmethod
    def init(config: GraniteConfig, *, key: Key[Array, ""]) -> "Granite":
        embed_key, unembed_key, blocks_key = jr.split(key, 3)
        return Granite(
            config=config,
            embed=Embedding.init(config.vocab, config.d_model, std=config.init_std, key=embed_key),
            blocks=tuple(Block.init(config, key=k) for k in jr.split(blocks_key, config.n_layers)),
            norm=RMSNorm.init(config.d_model, config.norm_eps),
            unembed=None if config.tied else Linear.init(config.d_model, config.vocab, std=config.init_std, key=unembed_key),
        )

    @property
    def unembedding(self) -> Float[Array, "vocab d_model"] | Quantised:
        return self.embed.weight if self.unembed is None else self.unembed.weight

    @property
    def logit_softcap(self) -> float | None:
        return self.config.logit_softcap

    def hidden(
        self,
        tokens: Int[Array, "*batch seq"],
        facts: Facts | None = None,
        cache: tuple[Any, ...] | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "*batch seq d_model"], tuple[Any, ...] | None, Aux]:
        facts = facts_or_default(tokens, facts, cache)
        c = self.config
        tables = rope.tables_of(facts.positions, c.head_dim, c.rope_base, c.rope_scaling, c.rope_fraction)
        facts = Facts(facts.positions, facts.segments, tables)
        embed_key, blocks_key = (None, None) if key is None else jr.split(key)

        x = mark(dropout(c.embed_multiplier * self.embed(tokens), c.dropout, embed_key), "embed.out")
        caches: list[Any] = []
        aux: Aux = {}
        for block, block_cache, block_key in aligned(self.blocks, cache, blocks_key):
            x, block_cache, block_aux = block(x, facts, block_cache, key=block_key)
            caches.append(block_cache)
            aux = add_aux(aux, block_aux)
        # Logits are linear in this: dividing here instead of there serves whoever unembeds, in chunks or at once.
        return self.norm(x) / c.logit_divisor, None if cache is None else tuple(caches), aux


# ------------------------------------------------------------------------------------------- presets

# Published shapes, from each repository's config.json.
PRESETS = {
    "granite-3.1-2b": GraniteConfig(
        vocab=49_155, d_model=2048, n_layers=40, n_heads=32, n_kv_heads=8, head_dim=64, d_ff=8192, context=131_072,
        rope_base=5_000_000.0, tied=True,
        embed_multiplier=12.0, attention_multiplier=0.015625, residual_multiplier=0.22, logit_divisor=8.0,
    ),
}  # fmt: skip

# ------------------------------------------------------------------------------------------- HF names

# role of our leaf → key in the file; {i} is the layer.
HF_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "attn_norm.scale": "model.layers.{i}.input_layernorm.weight",
    "attn.q_proj.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "attn.k_proj.weight": "model.layers.{i}.self_attn.k_proj.weight",
    "attn.v_proj.weight": "model.layers.{i}.self_attn.v_proj.weight",
    "attn.o_proj.weight": "model.layers.{i}.self_attn.o_proj.weight",
    "attn.q_proj.bias": "model.layers.{i}.self_attn.q_proj.bias",
    "attn.k_proj.bias": "model.layers.{i}.self_attn.k_proj.bias",
    "attn.v_proj.bias": "model.layers.{i}.self_attn.v_proj.bias",
    "attn.o_proj.bias": "model.layers.{i}.self_attn.o_proj.bias",
    "mlp_norm.scale": "model.layers.{i}.post_attention_layernorm.weight",
    "mlp.gate_proj.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "mlp.up_proj.weight": "model.layers.{i}.mlp.up_proj.weight",
    "mlp.down_proj.weight": "model.layers.{i}.mlp.down_proj.weight",
    "mlp.gate_proj.bias": "model.layers.{i}.mlp.gate_proj.bias",
    "mlp.up_proj.bias": "model.layers.{i}.mlp.up_proj.bias",
    "mlp.down_proj.bias": "model.layers.{i}.mlp.down_proj.bias",
    "norm.scale": "model.norm.weight",
    "unembed.weight": "lm_head.weight",
}
