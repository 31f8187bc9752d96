"""Gemma: Llama's drawing with GeGLU, scaled embeddings and norms whose files hold what is above 1 (Gemma Team 2024, arXiv:2403.08295,
section 2).

    √d_model · tokens ─┬─ norm ─ attention ─(+)─┬─ norm ─ GeGLU ─(+)─ …  norm ─ unembed
                       └────────────────────────┘└───────────────┘
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
from lm.hf_config import ConfigReader, check_heads, read_rope, refuse_native, write_rope
from lm.layers import Embedding, GatedMLP, Linear, RMSNorm, gelu_tanh
from lm.masks import Facts
from lm.quant import Quantised


class GemmaConfig(BaseModel, frozen=True, extra="forbid"):
    """Numbers of a Gemma. Hugging Face's name stands behind each."""

    model_type: ClassVar[str] = "gemma"

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
    norm_eps: float = Field(1e-6, gt=0)  # rms_norm_eps
    tied: bool = True  # tie_word_embeddings
    attention_bias: bool = False  # attention_bias
    init_std: float = Field(0.02, gt=0)  # initializer_range
    attention_dropout: float = Field(0.0, ge=0, lt=1)  # of attention probabilities, in training; attention_dropout
    attention_softcap: float | None = Field(None, gt=0)  # bounds the scores; native only
    logit_softcap: float | None = Field(None, gt=0)  # bounds the logits; native only

    @model_validator(mode="after")
    def _whole(self) -> "GemmaConfig":
        check_heads(self.n_heads, self.n_kv_heads, self.head_dim)
        return self

    @staticmethod
    def from_hf(config: dict[str, Any]) -> "GemmaConfig":
        """Read a `config.json`. Each key is used, known to be harmless, or refused by name."""
        read = ConfigReader(config, "gemma")
        n_heads, context = read.take("num_attention_heads"), read.take("max_position_embeddings", 8192)
        result = GemmaConfig(
            vocab=read.take("vocab_size"),
            d_model=read.take("hidden_size"),
            n_layers=read.take("num_hidden_layers"),
            n_heads=n_heads,
            n_kv_heads=read.take("num_key_value_heads", 16),
            head_dim=read.take("head_dim", 256),
            d_ff=read.take("intermediate_size"),
            context=context,
            norm_eps=read.take("rms_norm_eps", 1e-6),
            tied=read.take("tie_word_embeddings", True),
            attention_bias=read.take("attention_bias", False),
            init_std=read.take("initializer_range", 0.02),
            attention_dropout=read.take("attention_dropout", 0.0),
            **read_rope(read, context),
        )
        read.expect("hidden_activation", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
        if read.take("hidden_act", None) != "gelu":  # published files say so and mean the tanh, as transformers knows
            read.expect("hidden_act", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
        read.expect("use_bidirectional_attention", False, default=False)
        read.finish(harmless=set())
        return result

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` under which `transformers` computes the same function.

        **Raises:** `ValueError` naming the settings it has no key for.
        """
        refuse_native(self.model_type, attention_softcap=self.attention_softcap, logit_softcap=self.logit_softcap)
        return {
            "architectures": ["GemmaForCausalLM"],
            "model_type": "gemma",
            "vocab_size": self.vocab,
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.d_ff,
            "max_position_embeddings": self.context,
            **write_rope(
                self.model_type,
                **self.model_dump(include={"rope_base", "head_dim", "context"}),
                rope_scaling=self.rope_scaling,
                rope_fraction=1.0,
            ),
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied,
            "attention_bias": self.attention_bias,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",  # the name in transformers 4
            "initializer_range": self.init_std,
            "attention_dropout": self.attention_dropout,
        }


# ------------------------------------------------------------------------------------------- block


class Block(AbstractBlock):
    """Attention, then MLP, each on a normed copy of the residual stream and added back to it. The norms' files hold scale - 1."""

    attn_norm: RMSNorm
    attn: Attention
    mlp_norm: RMSNorm
    mlp: GatedMLP

    @staticmethod
    def init(config: GemmaConfig, *, key: Key[Array, ""]) -> "Block":
        """Maps that write into the stream start smaller by √(2 · n_layers), so that its variance does not grow with depth (Radford et al.
        2019)."""
        attn_key, mlp_key = jr.split(key)
        std, out_std = config.init_std, config.init_std / (2 * config.n_layers) ** 0.5
        return Block(
            attn_norm=RMSNorm.init(config.d_model, config.norm_eps, offset=1.0),
            attn=Attention.init(
                config.d_model,
                config.n_heads,
                config.n_kv_heads,
                config.head_dim,
                std=std,
                out_std=out_std,
                key=attn_key,
                bias=config.attention_bias,
                softcap=config.attention_softcap,
                dropout=config.attention_dropout,
            ),
            mlp_norm=RMSNorm.init(config.d_model, config.norm_eps, offset=1.0),
            mlp=GatedMLP.init(config.d_model, config.d_ff, std=std, out_std=out_std, key=mlp_key, activation=gelu_tanh),
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
        x = (x + y).astype(x.dtype)  # the stream keeps its dtype whatever the weights'
        y = mark(self.mlp(self.mlp_norm(x)), "mlp.out")
        x = (x + y).astype(x.dtype)
        return mark(x, "block.out"), cache, {}

    def empty_cache(self, batch: tuple[int, ...], slots: int, dtype: Any) -> LayerCache:
        return self.attn.empty_cache(batch, slots, dtype)


# ------------------------------------------------------------------------------------------- model


class Gemma(AbstractLM):
    """Embedding, blocks, a last norm, and the way back to the vocabulary."""

    config: GemmaConfig = eqx.field(static=True)
    embed: Embedding  # vocab → d_model
    blocks: tuple[Any, ...]
    norm: RMSNorm
    unembed: Linear | None  # d_model → vocab; None: tied to `embed`

    @staticmethod
    def init(config: GemmaConfig, *, key: Key[Array, ""]) -> "Gemma":
        embed_key, unembed_key, blocks_key = jr.split(key, 3)
        return Gemma(
            config=config,
            embed=Embedding.init(config.vocab, config.d_model, std=config.init_std, key=embed_key),
            blocks=tuple(Block.init(config, key=k) for k in jr.split(blocks_key, config.n_layers)),
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
    "gemma-2b": GemmaConfig(
        vocab=256_000, d_model=2048, n_layers=18, n_heads=8, n_kv_heads=1, head_dim=256, d_ff=16_384, context=8192,
    ),
    "gemma-7b": GemmaConfig(
        vocab=256_000, d_model=3072, n_layers=28, n_heads=16, n_kv_heads=16, head_dim=256, d_ff=24_576, context=8192,
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
    "norm.scale": "model.norm.weight",
    "unembed.weight": "lm_head.weight",
}
