"""Qwen3, dense: Llama's drawing with RMSNorms on queries and keys and a head width of its own (Yang et al. 2025, arXiv:2505.09388).

x ─┬─ norm ─ attention, q and k normed ─(+)─┬─ norm ─ SwiGLU ─(+)─ …  norm ─ unembed
   └────────────────────────────────────────┘└────────────────┘
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
from lm.hf_config import ConfigReader, check_heads, read_decoder, read_windows, refuse_native, write_decoder, write_windows
from lm.layers import Embedding, GatedMLP, Linear, RMSNorm, dropout
from lm.masks import Facts
from lm.quant import Quantised


class Qwen3Config(BaseModel, frozen=True, extra="forbid"):
    """Numbers of a Qwen3. Hugging Face's name stands behind each."""

    model_type: ClassVar[str] = "qwen3"

    vocab: int = Field(gt=0)  # vocab_size
    d_model: int = Field(gt=0)  # hidden_size
    n_layers: int = Field(gt=0)  # num_hidden_layers
    n_heads: int = Field(gt=0)  # num_attention_heads
    n_kv_heads: int = Field(gt=0)  # num_key_value_heads
    head_dim: int = Field(gt=0)  # head_dim
    d_ff: int = Field(gt=0)  # intermediate_size
    context: int = Field(gt=0)  # max_position_embeddings
    rope_base: float = Field(1_000_000.0, gt=0)  # rope_theta
    rope_scaling: rope.Scaling | None = Field(None, discriminator="kind")  # rope_scaling
    rope_fraction: float = Field(1.0, gt=0, le=1)  # of head_dim that is rotated; native only
    norm_eps: float = Field(1e-6, gt=0)  # rms_norm_eps
    tied: bool = False  # tie_word_embeddings
    attention_bias: bool = False  # attention_bias
    init_std: float = Field(0.02, gt=0)  # initializer_range
    dropout: float = Field(0.0, ge=0, lt=1)  # of embedding and residual branches, in training; not a Qwen3 key, so never exported
    attention_dropout: float = Field(0.0, ge=0, lt=1)  # of attention probabilities, in training; attention_dropout
    attention_softcap: float | None = Field(None, gt=0)  # bounds the scores; native only
    logit_softcap: float | None = Field(None, gt=0)  # bounds the logits; native only
    window_by_layer: tuple[int | None, ...] | None = None  # positions a query of a layer sees; sliding_window, layer_types

    @model_validator(mode="after")
    def _heads(self) -> "Qwen3Config":
        rotary_dim = int(self.head_dim * self.rope_fraction)
        check_heads(self.n_heads, self.n_kv_heads, rotary_dim)
        rope.check_pairs(self.rope_scaling, rotary_dim // 2)
        windows = self.window_by_layer
        if windows is not None and (len(windows) != self.n_layers or any(n is not None and n < 1 for n in windows)):
            raise ValueError(f"window_by_layer must be {self.n_layers} numbers above 0, one for each of n_layers; got {windows}")
        return self

    @staticmethod
    def from_hf(config: dict[str, Any]) -> "Qwen3Config":
        """Read a `config.json`. Each key is used, known to be harmless, or refused by name."""
        read = ConfigReader(config, "qwen3")
        numbers = read_decoder(read, context=32_768, head_dim=128)
        first = read.take("max_window_layers", 28)
        result = Qwen3Config(
            **numbers,
            attention_bias=read.take("attention_bias", False),
            window_by_layer=read_windows(read, numbers["n_layers"], lambda layer: layer >= first, window=4096),
        )
        read.finish(harmless=set())
        return result

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` under which `transformers` computes the same function.

        **Raises:** `ValueError` naming the settings it has no key for.
        """
        refuse_native("qwen3", attention_softcap=self.attention_softcap, logit_softcap=self.logit_softcap)
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            **write_decoder(self),
            "attention_bias": self.attention_bias,
            **write_windows("qwen3", self.window_by_layer, self.n_layers),
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
    def init(config: Qwen3Config, layer: int, *, key: Key[Array, ""]) -> "Block":
        """Maps that write into the stream start smaller by √(2 · n_layers), so that its variance does not grow with depth (Radford et al.
        2019)."""
        attn_key, mlp_key = jr.split(key)
        out_std = config.init_std / (2 * config.n_layers) ** 0.5
        return Block(
            attn_norm=RMSNorm.init(config.d_model, config.norm_eps),
            attn=Attention.init(
                config.d_model,
                config.n_heads,
                config.n_kv_heads,
                config.head_dim,
                std=config.init_std,
                out_std=out_std,
                key=attn_key,
                bias=config.attention_bias,
                window=config.window_by_layer[layer] if config.window_by_layer else None,
                softcap=config.attention_softcap,
                dropout=config.attention_dropout,
                qk_norm_eps=config.norm_eps,
            ),
            mlp_norm=RMSNorm.init(config.d_model, config.norm_eps),
            mlp=GatedMLP.init(config.d_model, config.d_ff, std=config.init_std, out_std=out_std, key=mlp_key),
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


class Qwen3(AbstractLM):
    """Embedding, blocks, a last norm, and the way back to the vocabulary."""

    config: Qwen3Config = eqx.field(static=True)
    embed: Embedding  # vocab → d_model
    blocks: tuple[Any, ...]
    norm: RMSNorm
    unembed: Linear | None  # d_model → vocab; None: tied to `embed`

    @staticmethod
    def init(config: Qwen3Config, *, key: Key[Array, ""]) -> "Qwen3":
        embed_key, unembed_key, blocks_key = jr.split(key, 3)
        return Qwen3(
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
    "qwen3-0.6b": Qwen3Config(
        vocab=151_936, d_model=1024, n_layers=28, n_heads=16, n_kv_heads=8, head_dim=128, d_ff=3072, context=40_960, tied=True,
    ),
    "qwen3-1.7b": Qwen3Config(
        vocab=151_936, d_model=2048, n_layers=28, n_heads=16, n_kv_heads=8, head_dim=128, d_ff=6144, context=40_960, tied=True,
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
    "attn.q_norm.scale": "model.layers.{i}.self_attn.q_norm.weight",
    "attn.k_norm.scale": "model.layers.{i}.self_attn.k_norm.weight",
    "mlp_norm.scale": "model.layers.{i}.post_attention_layernorm.weight",
    "mlp.gate_proj.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "mlp.up_proj.weight": "model.layers.{i}.mlp.up_proj.weight",
    "mlp.down_proj.weight": "model.layers.{i}.mlp.down_proj.weight",
    "norm.scale": "model.norm.weight",
    "unembed.weight": "lm_head.weight",
}
