"""Llama: RMSNorm before each half, rotary positions, grouped keys, SwiGLU (Touvron et al. 2023, arXiv:2302.13971; GQA since
arXiv:2307.09288).

    x ─┬─ norm ─ attention ─(+)─┬─ norm ─ SwiGLU ─(+)─ …  norm ─ unembed
       └────────────────────────┘└────────────────┘
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
from lm.hf_config import ConfigReader, check_heads, read_rope, refuse_native, write_rope
from lm.layers import Embedding, GatedMLP, Linear, RMSNorm, dropout
from lm.masks import Facts
from lm.quant import Quantised


class LlamaConfig(BaseModel, frozen=True, extra="forbid"):
    """Numbers of a Llama. Hugging Face's name stands behind each."""

    model_type: ClassVar[str] = "llama"

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
    init_std: float = Field(0.02, gt=0)  # initializer_range
    dropout: float = Field(0.0, ge=0, lt=1)  # of embedding and residual branches, in training; not a Llama key, so never exported
    attention_dropout: float = Field(0.0, ge=0, lt=1)  # of attention probabilities, in training; attention_dropout
    attention_softcap: float | None = Field(None, gt=0)  # bounds the scores; native only
    logit_softcap: float | None = Field(None, gt=0)  # bounds the logits; native only

    # A number for each layer in place of one for all; native only.
    n_heads_by_layer: tuple[int, ...] | None = None
    d_ff_by_layer: tuple[int, ...] | None = None
    window_by_layer: tuple[int | None, ...] | None = None  # positions a query sees, itself included; None: all

    @model_validator(mode="after")
    def _whole(self) -> "LlamaConfig":
        for n_heads in self.n_heads_by_layer or (self.n_heads,):
            check_heads(n_heads, self.n_kv_heads, int(self.head_dim * self.rope_fraction))
        for name in ("n_heads_by_layer", "d_ff_by_layer", "window_by_layer"):
            numbers = getattr(self, name)
            if numbers is not None and (len(numbers) != self.n_layers or any(n is not None and n < 1 for n in numbers)):
                raise ValueError(f"{name} must be {self.n_layers} numbers above 0, one for each of n_layers; got {numbers}")
        return self

    @staticmethod
    def from_hf(config: dict[str, Any]) -> "LlamaConfig":
        """Read a `config.json`. Each key is used, known to be harmless, or refused by name."""
        read = ConfigReader(config, "llama")
        n_heads, d_model = read.take("num_attention_heads"), read.take("hidden_size")
        context = read.take("max_position_embeddings", 2048)
        result = LlamaConfig(
            vocab=read.take("vocab_size"),
            d_model=d_model,
            n_layers=read.take("num_hidden_layers"),
            n_heads=n_heads,
            n_kv_heads=read.take("num_key_value_heads", n_heads),
            head_dim=read.take("head_dim", d_model // n_heads),
            d_ff=read.take("intermediate_size"),
            context=context,
            norm_eps=read.take("rms_norm_eps", 1e-6),
            tied=read.take("tie_word_embeddings", False),
            attention_bias=read.take("attention_bias", False),
            init_std=read.take("initializer_range", 0.02),
            attention_dropout=read.take("attention_dropout", 0.0),
            **read_rope(read, context),
        )
        read.expect("hidden_act", "silu", default="silu")
        read.expect("mlp_bias", False, default=False)
        read.finish(harmless={"pretraining_tp"})  # of a deleted code path
        return result

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` under which `transformers` computes the same function.

        **Raises:** `ValueError` naming the settings it has no key for.
        """
        native = ("attention_softcap", "logit_softcap", "n_heads_by_layer", "d_ff_by_layer", "window_by_layer")
        refuse_native("llama", **{name: getattr(self, name) for name in native})
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
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
                **self.model_dump(include={"rope_base", "rope_fraction", "head_dim", "context"}),
                rope_scaling=self.rope_scaling,
            ),
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied,
            "attention_bias": self.attention_bias,
            "mlp_bias": False,
            "hidden_act": "silu",
            "initializer_range": self.init_std,
            "attention_dropout": self.attention_dropout,
        }


# ------------------------------------------------------------------------------------------- block


class Block(AbstractBlock):
    """Attention, then MLP, each on a normed copy of the residual stream and added back to it."""

    attn_norm: RMSNorm
    attn: Attention
    mlp_norm: RMSNorm
    mlp: GatedMLP
    dropout: float = eqx.field(static=True, default=0.0)

    @staticmethod
    def init(config: LlamaConfig, layer: int, *, key: Key[Array, ""]) -> "Block":
        """Maps that write into the stream start smaller by √(2 · n_layers), so that its variance does not grow with depth (Radford et al.
        2019)."""
        attn_key, mlp_key = jr.split(key)
        out_std = config.init_std / (2 * config.n_layers) ** 0.5
        n_heads = config.n_heads_by_layer[layer] if config.n_heads_by_layer else config.n_heads
        d_ff = config.d_ff_by_layer[layer] if config.d_ff_by_layer else config.d_ff
        return Block(
            attn_norm=RMSNorm.init(config.d_model, config.norm_eps),
            attn=Attention.init(
                config.d_model,
                n_heads,
                config.n_kv_heads,
                config.head_dim,
                std=config.init_std,
                out_std=out_std,
                key=attn_key,
                bias=config.attention_bias,
                window=config.window_by_layer[layer] if config.window_by_layer else None,
                softcap=config.attention_softcap,
                dropout=config.attention_dropout,
            ),
            mlp_norm=RMSNorm.init(config.d_model, config.norm_eps),
            mlp=GatedMLP.init(config.d_model, d_ff, std=config.init_std, out_std=out_std, key=mlp_key),
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
        x = (x + dropout(y, self.dropout, attn_key)).astype(x.dtype)  # the stream keeps its dtype whatever the weights'
        y = mark(self.mlp(self.mlp_norm(x)), "mlp.out")
        x = (x + dropout(y, self.dropout, mlp_key)).astype(x.dtype)
        return mark(x, "block.out"), cache, {}

    def empty_cache(self, batch: tuple[int, ...], slots: int, dtype: Any) -> LayerCache:
        return self.attn.empty_cache(batch, slots, dtype)


# ------------------------------------------------------------------------------------------- model


class Llama(AbstractLM):
    """Embedding, blocks, a last norm, and the way back to the vocabulary."""

    config: LlamaConfig = eqx.field(static=True)
    embed: Embedding  # vocab → d_model
    blocks: tuple[Any, ...]
    norm: RMSNorm
    unembed: Linear | None  # d_model → vocab; None: tied to `embed`

    @staticmethod
    def init(config: LlamaConfig, *, key: Key[Array, ""]) -> "Llama":
        embed_key, unembed_key, blocks_key = jr.split(key, 3)
        return Llama(
            config=config,
            embed=Embedding.init(config.vocab, config.d_model, std=config.init_std, key=embed_key),
            blocks=tuple(Block.init(config, i, key=k) for i, k in enumerate(jr.split(blocks_key, config.n_layers))),
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

        x = mark(dropout(self.embed(tokens), self.config.dropout, embed_key), "embed.out")
        caches: list[Any] = []
        aux: Aux = {}
        for block, block_cache, block_key in aligned(self.blocks, cache, blocks_key):
            x, block_cache, block_aux = block(x, facts, block_cache, key=block_key)
            caches.append(block_cache)
            aux = add_aux(aux, block_aux)
        return self.norm(x), None if cache is None else tuple(caches), aux


# ------------------------------------------------------------------------------------------- presets

# Published shapes, from each repository's config.json.
PRESETS = {
    "smollm2-135m": LlamaConfig(
        vocab=49_152, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, d_ff=1536, context=8192,
        rope_base=100_000.0, tied=True,
    ),
    "tinyllama-1.1b": LlamaConfig(
        vocab=32_000, d_model=2048, n_layers=22, n_heads=32, n_kv_heads=4, head_dim=64, d_ff=5632, context=2048,
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
