"""Gemma 2: norms before and after each half, windows in every second layer, soft-caps, GeGLU (Gemma Team 2024, arXiv:2408.00118,
section 2).

    √d_model · tokens ─┬─ norm ─ attention ─ norm ─(+)─┬─ norm ─ GeGLU ─ norm ─(+)─ …  norm ─ unembed ─ soft-cap
                       └───────────────────────────────┘└──────────────────────┘
"""

# ------------------------------------------------------------------------------------------- config

from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Key
from pydantic import BaseModel, Field, model_validator

from lm import rope
from lm.attention import Attention
from lm.base import AbstractBlock, AbstractLM, Aux, add_aux, aligned, facts_or_default, mark
from lm.cache import LayerCache
from lm.hf_config import ConfigReader, LayerKind, check_heads, check_layer_types, every_full, read_rope, write_rope
from lm.layers import Embedding, GatedMLP, Linear, RMSNorm, gelu_tanh
from lm.masks import Facts
from lm.quant import Quantised


class Gemma2Config(BaseModel, frozen=True, extra="forbid"):
    """Numbers of a Gemma 2. Hugging Face's name stands behind each."""

    model_type: ClassVar[str] = "gemma2"

    vocab: int = Field(gt=0)  # vocab_size
    d_model: int = Field(gt=0)  # hidden_size
    n_layers: int = Field(gt=0)  # num_hidden_layers
    n_heads: int = Field(gt=0)  # num_attention_heads
    n_kv_heads: int = Field(gt=0)  # num_key_value_heads
    head_dim: int = Field(gt=0)  # head_dim
    d_ff: int = Field(gt=0)  # intermediate_size
    context: int = Field(gt=0)  # max_position_embeddings
    window: int = Field(4096, gt=0)  # positions a query of a sliding layer sees, itself included; sliding_window
    layer_types: tuple[LayerKind, ...] = Field(default_factory=lambda given: every_full(2, given["n_layers"]))  # layer_types
    query_pre_attn_scalar: int = Field(default_factory=lambda given: given["head_dim"], gt=0)  # scores are q · k / √this
    rope_base: float = Field(10_000.0, gt=0)  # rope_theta
    rope_scaling: rope.Scaling | None = Field(None, discriminator="kind")  # rope_scaling
    norm_eps: float = Field(1e-6, gt=0)  # rms_norm_eps
    tied: bool = True  # tie_word_embeddings
    attention_bias: bool = False  # attention_bias
    init_std: float = Field(0.02, gt=0)  # initializer_range
    attention_dropout: float = Field(0.0, ge=0, lt=1)  # of attention probabilities, in training; attention_dropout
    attention_softcap: float | None = Field(50.0, gt=0)  # bounds the scores; attn_logit_softcapping
    logit_softcap: float | None = Field(30.0, gt=0)  # bounds the logits; final_logit_softcapping

    @model_validator(mode="after")
    def _whole(self) -> "Gemma2Config":
        check_heads(self.n_heads, self.n_kv_heads, self.head_dim)
        check_layer_types(self.layer_types, self.n_layers)
        return self

    @staticmethod
    def from_hf(config: dict[str, Any]) -> "Gemma2Config":
        """Read a `config.json`. Each key is used, known to be harmless, or refused by name."""
        read = ConfigReader(config, "gemma2")
        n_layers, context = read.take("num_hidden_layers"), read.take("max_position_embeddings", 8192)
        result = Gemma2Config(
            vocab=read.take("vocab_size"),
            d_model=read.take("hidden_size"),
            n_layers=n_layers,
            n_heads=read.take("num_attention_heads"),
            n_kv_heads=read.take("num_key_value_heads", 4),
            head_dim=read.take("head_dim", 256),
            d_ff=read.take("intermediate_size"),
            context=context,
            window=read.take("sliding_window", 4096),
            layer_types=read.take("layer_types", every_full(2, n_layers)),
            query_pre_attn_scalar=read.take("query_pre_attn_scalar", 256),
            norm_eps=read.take("rms_norm_eps", 1e-6),
            tied=read.take("tie_word_embeddings", True),
            attention_bias=read.take("attention_bias", False),
            init_std=read.take("initializer_range", 0.02),
            attention_dropout=read.take("attention_dropout", 0.0),
            attention_softcap=read.take_or_null("attn_logit_softcapping", 50.0),
            logit_softcap=read.take_or_null("final_logit_softcapping", 30.0),
            **read_rope(read, context),
        )
        read.expect("hidden_activation", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
        read.expect("use_bidirectional_attention", False, default=False)
        # cache_implementation: of generation. hidden_act, sliding_window_size: earlier names, which transformers does not read.
        read.finish(harmless={"cache_implementation", "hidden_act", "sliding_window_size"})
        return result

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` under which `transformers` computes the same function.

        **Raises:** `ValueError` naming the settings it has no key for.
        """
        return {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            "vocab_size": self.vocab,
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.d_ff,
            "max_position_embeddings": self.context,
            "sliding_window": self.window,
            "layer_types": list(self.layer_types),
            "query_pre_attn_scalar": self.query_pre_attn_scalar,
            **write_rope(
                self.model_type,
                **self.model_dump(include={"rope_base", "head_dim", "context"}),
                rope_scaling=self.rope_scaling,
                rope_fraction=1.0,
            ),
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied,
            "attention_bias": self.attention_bias,
            "hidden_activation": "gelu_pytorch_tanh",
            "initializer_range": self.init_std,
            "attention_dropout": self.attention_dropout,
            "attn_logit_softcapping": self.attention_softcap,  # null: none
            "final_logit_softcapping": self.logit_softcap,
        }


# ------------------------------------------------------------------------------------------- block


class Block(AbstractBlock):
    """Attention, then MLP, each between two norms and added to the residual stream. The norms' files hold scale - 1."""

    attn_norm: RMSNorm
    attn: Attention
    attn_out_norm: RMSNorm
    mlp_norm: RMSNorm
    mlp: GatedMLP
    mlp_out_norm: RMSNorm

    @staticmethod
    def init(config: Gemma2Config, kind: LayerKind, *, key: Key[Array, ""]) -> "Block":
        """Maps that write into the stream start as all others do: the norm behind them undoes any scale."""
        attn_key, mlp_key = jr.split(key)
        std = config.init_std
        return Block(
            attn_norm=RMSNorm.init(config.d_model, config.norm_eps, offset=1.0),
            attn=Attention.init(
                config.d_model,
                config.n_heads,
                config.n_kv_heads,
                config.head_dim,
                std=std,
                out_std=std,
                key=attn_key,
                bias=config.attention_bias,
                scale=config.query_pre_attn_scalar**-0.5,
                window=config.window if kind == "sliding_attention" else None,
                softcap=config.attention_softcap,
                dropout=config.attention_dropout,
            ),
            attn_out_norm=RMSNorm.init(config.d_model, config.norm_eps, offset=1.0),
            mlp_norm=RMSNorm.init(config.d_model, config.norm_eps, offset=1.0),
            mlp=GatedMLP.init(config.d_model, config.d_ff, std=std, out_std=std, key=mlp_key, activation=gelu_tanh),
            mlp_out_norm=RMSNorm.init(config.d_model, config.norm_eps, offset=1.0),
        )

    def __call__(
        self,
        x: Float[Array, "*batch seq d_model"],
        facts: Facts,
        cache: LayerCache | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "*batch seq d_model"], LayerCache | None, Aux]:
        y, cache = self.attn(self.attn_norm(x), facts, cache, key=key)
        x = (x + self.attn_out_norm(y)).astype(x.dtype)  # the stream keeps its dtype whatever the weights'
        y = mark(self.mlp(self.mlp_norm(x)), "mlp.out")
        x = (x + self.mlp_out_norm(y)).astype(x.dtype)
        return mark(x, "block.out"), cache, {}

    def empty_cache(self, batch: tuple[int, ...], slots: int, dtype: Any) -> LayerCache:
        return self.attn.empty_cache(batch, slots, dtype)


# ------------------------------------------------------------------------------------------- model


class Gemma2(AbstractLM):
    """Embedding, blocks, a last norm, and the way back to the vocabulary."""

    config: Gemma2Config = eqx.field(static=True)
    embed: Embedding  # vocab → d_model
    blocks: tuple[Any, ...]
    norm: RMSNorm
    unembed: Linear | None  # d_model → vocab; None: tied to `embed`

    @staticmethod
    def init(config: Gemma2Config, *, key: Key[Array, ""]) -> "Gemma2":
        embed_key, unembed_key, blocks_key = jr.split(key, 3)
        keys = jr.split(blocks_key, config.n_layers)
        return Gemma2(
            config=config,
            embed=Embedding.init(config.vocab, config.d_model, std=config.init_std, key=embed_key),
            blocks=tuple(Block.init(config, kind, key=k) for kind, k in zip(config.layer_types, keys, strict=True)),
            norm=RMSNorm.init(config.d_model, config.norm_eps, offset=1.0),
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
        tables = rope.tables_of(facts.positions, c.head_dim, c.rope_base, c.rope_scaling, 1.0)
        facts = Facts(facts.positions, facts.segments, tables)

        x = self.embed(tokens)
        x = mark(x * jnp.asarray(c.d_model**0.5, x.dtype), "embed.out")  # the root is rounded to the embedding's dtype, as in training
        caches: list[Any] = []
        aux: Aux = {}
        for block, block_cache, block_key in aligned(self.blocks, cache, key):
            x, block_cache, block_aux = block(x, facts, block_cache, key=block_key)
            caches.append(block_cache)
            aux = add_aux(aux, block_aux)
        return self.norm(x), None if cache is None else tuple(caches), aux


# ------------------------------------------------------------------------------------------- presets

# Published shapes, from each repository's config.json.
PRESETS = {
    "gemma-2-2b": Gemma2Config(
        vocab=256_000, d_model=2304, n_layers=26, n_heads=8, n_kv_heads=4, head_dim=256, d_ff=9216, context=8192,
    ),
    "gemma-2-9b": Gemma2Config(
        vocab=256_000, d_model=3584, n_layers=42, n_heads=16, n_kv_heads=8, head_dim=256, d_ff=14_336, context=8192,
    ),
    "gemma-2-27b": Gemma2Config(
        vocab=256_000, d_model=4608, n_layers=46, n_heads=32, n_kv_heads=16, head_dim=128, d_ff=36_864, context=8192,
        query_pre_attn_scalar=144,
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
    "attn_out_norm.scale": "model.layers.{i}.post_attention_layernorm.weight",
    "mlp_norm.scale": "model.layers.{i}.pre_feedforward_layernorm.weight",
    "mlp.gate_proj.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "mlp.up_proj.weight": "model.layers.{i}.mlp.up_proj.weight",
    "mlp.down_proj.weight": "model.layers.{i}.mlp.down_proj.weight",
    "mlp_out_norm.scale": "model.layers.{i}.post_feedforward_layernorm.weight",
    "norm.scale": "model.norm.weight",
    "unembed.weight": "lm_head.weight",
}
