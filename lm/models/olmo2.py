"""OLMo 2 and 3: norms behind each half only, and one over all queries and one over all keys of a token together (OLMo Team 2025,
arXiv:2501.00656, section 2). OLMo 3 adds windows in three layers of four (Olmo Team 2025, "Olmo 3").

    x ─┬─ attention, q and k normed ─ norm ─(+)─┬─ SwiGLU ─ norm ─(+)─ …  norm ─ unembed
       └────────────────────────────────────────┘└─────────────────┘
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
from lm.hf_config import (
    ConfigReader,
    LayerKind,
    check_heads,
    check_layer_types,
    every_full,
    read_rope,
    read_rope_of_kinds,
    refuse_native,
    write_rope,
)
from lm.layers import Embedding, GatedMLP, Linear, RMSNorm
from lm.masks import Facts
from lm.quant import Quantised

OLMO3_BASE = 500_000.0  # of RoPE, where an OLMo 3's config.json gives none


class Olmo2Config(BaseModel, frozen=True, extra="forbid"):
    """Numbers of an OLMo 2. Hugging Face's name stands behind each."""

    model_type: ClassVar[str] = "olmo2"

    vocab: int = Field(gt=0)  # vocab_size
    d_model: int = Field(gt=0)  # hidden_size
    n_layers: int = Field(gt=0)  # num_hidden_layers
    n_heads: int = Field(gt=0)  # num_attention_heads
    n_kv_heads: int = Field(gt=0)  # num_key_value_heads
    head_dim: int = Field(gt=0)  # head_dim
    d_ff: int = Field(gt=0)  # intermediate_size
    context: int = Field(gt=0)  # max_position_embeddings
    rope_base: float = Field(500_000.0, gt=0)  # rope_theta
    rope_scaling: rope.Scaling | None = Field(None, discriminator="kind")  # rope_scaling
    norm_eps: float = Field(1e-6, gt=0)  # rms_norm_eps
    tied: bool = False  # tie_word_embeddings
    attention_bias: bool = False  # attention_bias
    init_std: float = Field(0.02, gt=0)  # initializer_range
    attention_dropout: float = Field(0.0, ge=0, lt=1)  # of attention probabilities, in training; attention_dropout
    attention_softcap: float | None = Field(None, gt=0)  # bounds the scores; native only
    logit_softcap: float | None = Field(None, gt=0)  # bounds the logits; native only

    @model_validator(mode="after")
    def _whole(self) -> "Olmo2Config":
        check_heads(self.n_heads, self.n_kv_heads, self.head_dim)
        check_layer_types(self.kinds, self.n_layers)
        return self

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Of the layers."""
        return every_full(1, self.n_layers)

    @property
    def windows(self) -> dict[LayerKind, int | None]:
        """How many positions a query sees, itself included."""
        return {"full_attention": None}

    @property
    def ropes(self) -> dict[LayerKind, tuple[float, rope.Scaling | None]]:
        """Base and scaling."""
        return {"full_attention": (self.rope_base, self.rope_scaling)}

    @staticmethod
    def from_hf(config: dict[str, Any]) -> "Olmo2Config":
        """Read a `config.json`. Each key is used, known to be harmless, or refused by name."""
        read = ConfigReader(config, "olmo2")
        numbers = _numbers(read)
        result = Olmo2Config(**numbers, **read_rope(read, numbers["context"]))
        read.finish(harmless=set())
        return result

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` under which `transformers` computes the same function.

        **Raises:** `ValueError` naming the settings it has no key for.
        """
        refuse_native(self.model_type, attention_softcap=self.attention_softcap, logit_softcap=self.logit_softcap)
        return {
            "architectures": [f"{self.model_type.capitalize()}ForCausalLM"],
            "model_type": self.model_type,
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
            "hidden_act": "silu",
            "initializer_range": self.init_std,
            "attention_dropout": self.attention_dropout,
        }


def _numbers(read: ConfigReader) -> dict[str, Any]:
    """What the files of OLMo 2 and OLMo 3 have in common."""
    n_heads, d_model = read.take("num_attention_heads"), read.take("hidden_size")
    read.expect("hidden_act", "silu", default="silu")
    return {
        "vocab": read.take("vocab_size"),
        "d_model": d_model,
        "n_layers": read.take("num_hidden_layers"),
        "n_heads": n_heads,
        "n_kv_heads": read.take("num_key_value_heads", n_heads),
        "head_dim": read.take("head_dim", d_model // n_heads),
        "d_ff": read.take("intermediate_size"),
        "context": read.take("max_position_embeddings", 2048),
        "norm_eps": read.take("rms_norm_eps", 1e-5),
        "tied": read.take("tie_word_embeddings", False),
        "attention_bias": read.take("attention_bias", False),
        "init_std": read.take("initializer_range", 0.02),
        "attention_dropout": read.take("attention_dropout", 0.0),
    }


class Olmo3Config(Olmo2Config, frozen=True, extra="forbid"):
    """Numbers of an OLMo 3: those of an OLMo 2, and the layers that see a window only. RoPE is scaled in the others alone."""

    model_type: ClassVar[str] = "olmo3"

    window: int = Field(4096, gt=0)  # positions a query of a sliding layer sees, itself included; sliding_window
    layer_types: tuple[LayerKind, ...] = Field(default_factory=lambda given: every_full(4, given["n_layers"]))  # layer_types
    rope_base_local: float = Field(OLMO3_BASE, gt=0)  # of sliding layers; rope_theta, as for the others in all published files

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        return self.layer_types

    @property
    def windows(self) -> dict[LayerKind, int | None]:
        return super().windows | {"sliding_attention": self.window}

    @property
    def ropes(self) -> dict[LayerKind, tuple[float, rope.Scaling | None]]:
        return super().ropes | {"sliding_attention": (self.rope_base_local, None)}

    @staticmethod
    def from_hf(config: dict[str, Any]) -> "Olmo3Config":
        """Read a `config.json`. Each key is used, known to be harmless, or refused by name."""
        read = ConfigReader(config, "olmo3")
        numbers = _numbers(read)
        base = read.take("rope_theta", OLMO3_BASE)
        local = read.take("rope_parameters", {}).get("sliding_attention") or {}
        if base != OLMO3_BASE and "rope_theta" not in local:
            raise ValueError(
                f"config.json has rope_theta = {base} and no base for sliding layers: there transformers 4 would take the same and "
                f'transformers 5 {OLMO3_BASE}. Say which, as rope_parameters = {{"sliding_attention": {{"rope_theta": …}}}}'
            )
        result = Olmo3Config(
            **numbers,
            window=read.take("sliding_window", 4096),
            layer_types=read.take("layer_types", every_full(4, numbers["n_layers"])),
            **read_rope_of_kinds(
                read, numbers["context"], {"full_attention": ("rope_theta", OLMO3_BASE), "sliding_attention": ("rope_theta", OLMO3_BASE)}
            ),
        )
        read.finish(harmless=set())
        return result

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` under which `transformers` computes the same function. The top level alone (transformers 4) has one base for
        both kinds of layers; a model with two needs `rope_parameters` (transformers 5).

        **Raises:** `ValueError` naming the settings it has no key for.
        """
        written = super().to_hf()
        full = {"rope_type": "default", "rope_theta": written["rope_theta"]} | written.get("rope_scaling", {})
        sliding = {"rope_type": "default", "rope_theta": self.rope_base_local}
        return written | {
            "sliding_window": self.window,
            "layer_types": list(self.layer_types),
            "rope_parameters": {"full_attention": full, "sliding_attention": sliding},
        }


# ------------------------------------------------------------------------------------------- block


class Block(AbstractBlock):
    """Attention, then MLP, each on the residual stream as it is, normed, and added back to it."""

    kind: LayerKind = eqx.field(static=True)  # which of the rotary tables it takes
    attn: Attention
    attn_out_norm: RMSNorm
    mlp: GatedMLP
    mlp_out_norm: RMSNorm

    @staticmethod
    def init(config: Olmo2Config, kind: LayerKind, *, key: Key[Array, ""]) -> "Block":
        """Maps that write into the stream start as all others do: the norm behind them undoes any scale."""
        attn_key, mlp_key = jr.split(key)
        std = config.init_std
        return Block(
            kind=kind,
            attn=Attention.init(
                config.d_model,
                config.n_heads,
                config.n_kv_heads,
                config.head_dim,
                std=std,
                out_std=std,
                key=attn_key,
                bias=config.attention_bias,
                qk_norm_eps=config.norm_eps,
                qk_norm_over="heads",
                window=config.windows[kind],
                softcap=config.attention_softcap,
                dropout=config.attention_dropout,
            ),
            attn_out_norm=RMSNorm.init(config.d_model, config.norm_eps),
            mlp=GatedMLP.init(config.d_model, config.d_ff, std=std, out_std=std, key=mlp_key),
            mlp_out_norm=RMSNorm.init(config.d_model, config.norm_eps),
        )

    def __call__(
        self,
        x: Float[Array, "*batch seq d_model"],
        facts: Facts,
        cache: LayerCache | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "*batch seq d_model"], LayerCache | None, Aux]:
        facts = Facts(facts.positions, facts.segments, facts.rope[self.kind])
        y, cache = self.attn(x, facts, cache, key=key)
        x = (x + self.attn_out_norm(y)).astype(x.dtype)  # the stream keeps its dtype whatever the weights'
        y = mark(self.mlp(x), "mlp.out")
        x = (x + self.mlp_out_norm(y)).astype(x.dtype)
        return mark(x, "block.out"), cache, {}

    def empty_cache(self, batch: tuple[int, ...], slots: int, dtype: Any) -> LayerCache:
        return self.attn.empty_cache(batch, slots, dtype)


# ------------------------------------------------------------------------------------------- model


class Olmo2(AbstractLM):
    """Embedding, blocks, a last norm, and the way back to the vocabulary."""

    config: Olmo2Config = eqx.field(static=True)
    embed: Embedding  # vocab → d_model
    blocks: tuple[Any, ...]
    norm: RMSNorm
    unembed: Linear | None  # d_model → vocab; None: tied to `embed`

    @staticmethod
    def init(config: Olmo2Config, *, key: Key[Array, ""]) -> "Olmo2":
        embed_key, unembed_key, blocks_key = jr.split(key, 3)
        keys = jr.split(blocks_key, config.n_layers)
        return Olmo2(
            config=config,
            embed=Embedding.init(config.vocab, config.d_model, std=config.init_std, key=embed_key),
            blocks=tuple(Block.init(config, kind, key=k) for kind, k in zip(config.kinds, keys, strict=True)),
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
        tables = {kind: rope.tables_of(facts.positions, self.config.head_dim, *each, 1.0) for kind, each in self.config.ropes.items()}
        facts = Facts(facts.positions, facts.segments, tables)

        x = mark(self.embed(tokens), "embed.out")
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
    "olmo-2-1b": Olmo2Config(
        vocab=100_352, d_model=2048, n_layers=16, n_heads=16, n_kv_heads=16, head_dim=128, d_ff=8192, context=4096,
    ),
    "olmo-2-7b": Olmo2Config(
        vocab=100_352, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128, d_ff=11_008, context=4096,
    ),
    "olmo-2-13b": Olmo2Config(
        vocab=100_352, d_model=5120, n_layers=40, n_heads=40, n_kv_heads=40, head_dim=128, d_ff=13_824, context=4096,
    ),
}  # fmt: skip
OLMO3_PRESETS = {
    "olmo-3-7b": Olmo3Config(
        vocab=100_278, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128, d_ff=11_008, context=65_536,
        rope_scaling=rope.Yarn(factor=8, original_context=8192, attention_factor=1.2079441541679836),
    ),
}  # fmt: skip

# ------------------------------------------------------------------------------------------- HF names

# role of our leaf → key in the file; {i} is the layer.
HF_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
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
    "attn_out_norm.scale": "model.layers.{i}.post_attention_layernorm.weight",
    "mlp.gate_proj.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "mlp.up_proj.weight": "model.layers.{i}.mlp.up_proj.weight",
    "mlp.down_proj.weight": "model.layers.{i}.mlp.down_proj.weight",
    "mlp_out_norm.scale": "model.layers.{i}.post_feedforward_layernorm.weight",
    "norm.scale": "model.norm.weight",
    "unembed.weight": "lm_head.weight",
}
