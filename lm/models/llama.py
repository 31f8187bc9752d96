"""Llama: RMSNorm before each half, rotary positions, grouped keys, SwiGLU (Touvron et al. 2023, arXiv:2302.13971; GQA since
arXiv:2307.09288).

Mistral, Qwen2, SmolLM3 and Phi-3 are the same drawing, each with a config of its own that says which parts of it they have.

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
from lm.hf_config import ConfigReader, check_heads, read_decoder, refuse_native, write_decoder
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
    attention_out_bias: bool | None = None  # of o_proj alone; None: as the three others; native only
    mlp_bias: bool = False  # mlp_bias
    init_std: float = Field(0.02, gt=0)  # initializer_range
    dropout: float = Field(0.0, ge=0, lt=1)  # of embedding and residual branches, in training; not a Llama key, so never exported
    attention_dropout: float = Field(0.0, ge=0, lt=1)  # of attention probabilities, in training; attention_dropout
    attention_softcap: float | None = Field(None, gt=0)  # bounds the scores; native only
    logit_softcap: float | None = Field(None, gt=0)  # bounds the logits; native only

    # One for each layer in place of one for all; native only, where no kin has keys for it.
    n_heads_by_layer: tuple[int, ...] | None = None
    d_ff_by_layer: tuple[int, ...] | None = None
    window_by_layer: tuple[int | None, ...] | None = None  # positions a query sees, itself included; None: all
    rope_by_layer: tuple[bool, ...] | None = None  # False: a layer without positions (NoPE, arXiv:2305.19466)

    @model_validator(mode="after")
    def _whole(self) -> "LlamaConfig":
        rotary_dim = int(self.head_dim * self.rope_fraction)
        for n_heads in self.n_heads_by_layer or (self.n_heads,):
            check_heads(n_heads, self.n_kv_heads, rotary_dim)
        rope.check_pairs(self.rope_scaling, rotary_dim // 2)
        for name in ("n_heads_by_layer", "d_ff_by_layer", "window_by_layer"):
            numbers = getattr(self, name)
            if numbers is not None and (len(numbers) != self.n_layers or any(n is not None and n < 1 for n in numbers)):
                raise ValueError(f"{name} must be {self.n_layers} numbers above 0, one for each of n_layers; got {numbers}")
        if self.rope_by_layer is not None and len(self.rope_by_layer) != self.n_layers:
            raise ValueError(f"rope_by_layer must be {self.n_layers} of true or false, one for each of n_layers; got {self.rope_by_layer}")
        return self

    def refuse_all_but(self, *known: str) -> None:
        """Refuse to write what the family's `config.json` has no keys for: any setting that some of Llama's kin lack, save the `known`
        ones, must be the family's own."""
        of_some = ("attention_bias", "attention_out_bias", "mlp_bias", "attention_softcap", "logit_softcap")
        of_layers = ("n_heads_by_layer", "d_ff_by_layer", "window_by_layer", "rope_by_layer")
        own = {name: type(self).model_fields[name].default for name in (*of_some, *of_layers) if name not in known}
        other = {name: getattr(self, name) for name in own if getattr(self, name) != own[name]}
        refuse_native(self.model_type, **other)

    @staticmethod
    def from_hf(config: dict[str, Any]) -> "LlamaConfig":
        """Read a `config.json`. Each key is used, known to be harmless, or refused by name."""
        read = ConfigReader(config, "llama")
        result = LlamaConfig(
            **read_decoder(read, context=2048),
            attention_bias=read.take("attention_bias", False),
            mlp_bias=read.take("mlp_bias", False),
        )
        read.finish(harmless={"pretraining_tp"})  # of a deleted code path
        return result

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` under which `transformers` computes the same function.

        **Raises:** `ValueError` naming the settings it has no key for.
        """
        self.refuse_all_but("attention_bias", "mlp_bias")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **write_decoder(self),
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
        }


# ------------------------------------------------------------------------------------------- block


class Block(AbstractBlock):
    """Attention, then MLP, each on a normed copy of the residual stream and added back to it."""

    attn_norm: RMSNorm
    attn: Attention
    mlp_norm: RMSNorm
    mlp: GatedMLP
    rope: bool = eqx.field(static=True, default=True)  # False: attention is told nothing of positions but their order
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
                out_bias=config.attention_out_bias,
                window=config.window_by_layer[layer] if config.window_by_layer else None,
                softcap=config.attention_softcap,
                dropout=config.attention_dropout,
            ),
            mlp_norm=RMSNorm.init(config.d_model, config.norm_eps),
            mlp=GatedMLP.init(config.d_model, d_ff, std=config.init_std, out_std=out_std, key=mlp_key, bias=config.mlp_bias),
            rope=config.rope_by_layer is None or config.rope_by_layer[layer],
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
        seen = facts if self.rope else Facts(facts.positions, facts.segments)
        y, cache = self.attn(self.attn_norm(x), seen, cache, key=probabilities_key)
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
    "llama-2-7b": LlamaConfig(
        vocab=32_000, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128, d_ff=11_008, context=4096,
    ),
    "llama-3.2-1b": LlamaConfig(
        vocab=128_256, d_model=2048, n_layers=16, n_heads=32, n_kv_heads=8, head_dim=64, d_ff=8192, context=131_072,
        rope_base=500_000.0, tied=True,
        rope_scaling=rope.Llama3(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192),
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


def current_key(key: str) -> str | None:
    """Today's name of a key: files of 2023 hold each layer's inverse wavelengths beside its weights."""
    return None if key.endswith(".rotary_emb.inv_freq") else key
