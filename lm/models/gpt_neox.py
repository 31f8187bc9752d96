"""GPT-NeoX and Pythia: attention and MLP side by side on the same stream, LayerNorms and biases, a part of each head rotated (Black et al.
2022, arXiv:2204.06745, section 2.1; Biderman et al. 2023, arXiv:2304.01373).

    x ─┬─ norm ─ attention ─(+)─ …  norm ─ unembed          one after the other, as in GPT-2, where `parallel` is off
       ├─ norm ─ MLP ───────(+)
       └────────────────────┘
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
from lm.hf import Names, part
from lm.hf_config import ConfigReader, check_heads, read_rope, refuse_native, write_rope
from lm.layers import MLP, Embedding, LayerNorm, Linear, activation_named, dropout
from lm.masks import Facts
from lm.quant import Quantised


class GPTNeoXConfig(BaseModel, frozen=True, extra="forbid"):
    """Numbers of a GPT-NeoX. Hugging Face's name stands behind each."""

    model_type: ClassVar[str] = "gpt_neox"

    vocab: int = Field(gt=0)  # vocab_size
    d_model: int = Field(gt=0)  # hidden_size
    n_layers: int = Field(gt=0)  # num_hidden_layers
    n_heads: int = Field(gt=0)  # num_attention_heads
    d_ff: int = Field(gt=0)  # intermediate_size
    context: int = Field(gt=0)  # max_position_embeddings
    parallel: bool = True  # attention and MLP on the same stream; use_parallel_residual
    rope_base: float = Field(10_000.0, gt=0)  # rotary_emb_base
    rope_scaling: rope.Scaling | None = Field(None, discriminator="kind")  # rope_scaling
    rope_fraction: float = Field(0.25, gt=0, le=1)  # of head_dim that is rotated; rotary_pct
    activation: str = "gelu"  # hidden_act
    norm_eps: float = Field(1e-5, gt=0)  # layer_norm_eps
    tied: bool = False  # tie_word_embeddings
    attention_bias: bool = True  # attention_bias
    init_std: float = Field(0.02, gt=0)  # initializer_range
    dropout: float = Field(0.0, ge=0, lt=1)  # of embedding and residual branches, in training; hidden_dropout
    attention_dropout: float = Field(0.0, ge=0, lt=1)  # of attention probabilities; attention_dropout
    attention_softcap: float | None = Field(None, gt=0)  # bounds the scores; native only
    logit_softcap: float | None = Field(None, gt=0)  # bounds the logits; native only

    @model_validator(mode="after")
    def _whole(self) -> "GPTNeoXConfig":
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model ({self.d_model}) must be a multiple of n_heads ({self.n_heads}): a head is d_model / n_heads wide")
        rotary_dim = int(self.head_dim * self.rope_fraction)
        check_heads(self.n_heads, self.n_kv_heads, rotary_dim)
        rope.check_pairs(self.rope_scaling, rotary_dim // 2)
        activation_named(self.activation)
        return self

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def n_kv_heads(self) -> int:
        return self.n_heads

    @staticmethod
    def from_hf(config: dict[str, Any]) -> "GPTNeoXConfig":
        """Read a `config.json`. Each key is used, known to be harmless, or refused by name."""
        read = ConfigReader(config, "gpt_neox")
        context = read.take("max_position_embeddings", 2048)
        result = GPTNeoXConfig(
            vocab=read.take("vocab_size"),
            d_model=read.take("hidden_size"),
            n_layers=read.take("num_hidden_layers"),
            n_heads=read.take("num_attention_heads"),
            d_ff=read.take("intermediate_size"),
            context=context,
            parallel=read.take("use_parallel_residual", True),
            activation=read.take("hidden_act", "gelu"),
            norm_eps=read.take("layer_norm_eps", 1e-5),
            tied=read.take("tie_word_embeddings", False),
            attention_bias=read.take("attention_bias", True),
            init_std=read.take("initializer_range", 0.02),
            dropout=read.take("hidden_dropout", 0.0),
            attention_dropout=read.take("attention_dropout", 0.0),
            **read_rope(read, context, base_key="rotary_emb_base", fraction=0.25, fraction_key="rotary_pct"),
        )
        read.expect("is_decoder", False, default=False)
        read.finish(harmless={"classifier_dropout"})  # of a head we do not build
        return result

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` under which `transformers` computes the same function.

        **Raises:** `ValueError` naming the settings it has no key for.
        """
        refuse_native("gpt_neox", attention_softcap=self.attention_softcap, logit_softcap=self.logit_softcap)
        return {
            "architectures": ["GPTNeoXForCausalLM"],
            "model_type": "gpt_neox",
            "vocab_size": self.vocab,
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "intermediate_size": self.d_ff,
            "max_position_embeddings": self.context,
            "use_parallel_residual": self.parallel,
            **write_rope(
                self.model_type,
                rope_base=self.rope_base,
                rope_scaling=self.rope_scaling,
                rope_fraction=self.rope_fraction,
                head_dim=self.head_dim,
                context=self.context,
                base_key="rotary_emb_base",
                fraction_key="rotary_pct",
            ),
            "hidden_act": self.activation,
            "layer_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied,
            "attention_bias": self.attention_bias,
            "initializer_range": self.init_std,
            "hidden_dropout": self.dropout,
            "attention_dropout": self.attention_dropout,
        }


# ------------------------------------------------------------------------------------------- block


class Block(AbstractBlock):
    """Attention and MLP, each on a normed copy of the residual stream and added back to it: both on the same stream, or the MLP on what
    attention has made of it."""

    attn_norm: LayerNorm
    attn: Attention
    mlp_norm: LayerNorm
    mlp: MLP
    parallel: bool = eqx.field(static=True, default=True)
    dropout: float = eqx.field(static=True, default=0.0)

    @staticmethod
    def init(config: GPTNeoXConfig, *, key: Key[Array, ""]) -> "Block":
        """Maps that write into the stream start smaller by √(2 · n_layers), so that its variance does not grow with depth (Radford et al.
        2019)."""
        attn_key, mlp_key = jr.split(key)
        std, out_std = config.init_std, config.init_std / (2 * config.n_layers) ** 0.5
        activation = activation_named(config.activation)
        return Block(
            attn_norm=LayerNorm.init(config.d_model, config.norm_eps),
            attn=Attention.init(
                config.d_model,
                config.n_heads,
                config.n_heads,
                config.head_dim,
                std=std,
                out_std=out_std,
                key=attn_key,
                bias=config.attention_bias,
                softcap=config.attention_softcap,
                dropout=config.attention_dropout,
            ),
            mlp_norm=LayerNorm.init(config.d_model, config.norm_eps),
            mlp=MLP.init(config.d_model, config.d_ff, std=std, out_std=out_std, key=mlp_key, activation=activation, bias=True),
            parallel=config.parallel,
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
        attended = (x + dropout(y, self.dropout, attn_key)).astype(x.dtype)  # the stream keeps its dtype whatever the weights'
        y = mark(self.mlp(self.mlp_norm(x if self.parallel else attended)), "mlp.out")
        x = (attended + dropout(y, self.dropout, mlp_key)).astype(x.dtype)
        return mark(x, "block.out"), cache, {}

    def empty_cache(self, batch: tuple[int, ...], slots: int, dtype: Any) -> LayerCache:
        return self.attn.empty_cache(batch, slots, dtype)


# ------------------------------------------------------------------------------------------- model


class GPTNeoX(AbstractLM):
    """Embedding, blocks, a last norm, and the way back to the vocabulary."""

    config: GPTNeoXConfig = eqx.field(static=True)
    embed: Embedding  # vocab → d_model
    blocks: tuple[Any, ...]
    norm: LayerNorm
    unembed: Linear | None  # d_model → vocab; None: tied to `embed`

    @staticmethod
    def init(config: GPTNeoXConfig, *, key: Key[Array, ""]) -> "GPTNeoX":
        embed_key, unembed_key, blocks_key = jr.split(key, 3)
        return GPTNeoX(
            config=config,
            embed=Embedding.init(config.vocab, config.d_model, std=config.init_std, key=embed_key),
            blocks=tuple(Block.init(config, key=k) for k in jr.split(blocks_key, config.n_layers)),
            norm=LayerNorm.init(config.d_model, config.norm_eps),
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

        x = mark(dropout(self.embed(tokens), c.dropout, embed_key), "embed.out")
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
    "pythia-70m": GPTNeoXConfig(vocab=50_304, d_model=512, n_layers=6, n_heads=8, d_ff=2048, context=2048),
    "pythia-160m": GPTNeoXConfig(vocab=50_304, d_model=768, n_layers=12, n_heads=12, d_ff=3072, context=2048),
    "pythia-1.4b": GPTNeoXConfig(vocab=50_304, d_model=2048, n_layers=24, n_heads=16, d_ff=8192, context=2048),
}

# ------------------------------------------------------------------------------------------- HF names

# role of our leaf → key in the file; {i} is the layer. Queries, keys and values are one tensor, in which those of a head stand together.
HF_NAMES: Names = {
    "embed.weight": "gpt_neox.embed_in.weight",
    "attn_norm.scale": "gpt_neox.layers.{i}.input_layernorm.weight",
    "attn_norm.bias": "gpt_neox.layers.{i}.input_layernorm.bias",
    "attn.q_proj.weight": part(0, "gpt_neox.layers.{i}.attention.query_key_value.weight", rows="head_dim"),
    "attn.k_proj.weight": part(1, "gpt_neox.layers.{i}.attention.query_key_value.weight", rows="head_dim"),
    "attn.v_proj.weight": part(2, "gpt_neox.layers.{i}.attention.query_key_value.weight", rows="head_dim"),
    "attn.q_proj.bias": part(0, "gpt_neox.layers.{i}.attention.query_key_value.bias", rows="head_dim"),
    "attn.k_proj.bias": part(1, "gpt_neox.layers.{i}.attention.query_key_value.bias", rows="head_dim"),
    "attn.v_proj.bias": part(2, "gpt_neox.layers.{i}.attention.query_key_value.bias", rows="head_dim"),
    "attn.o_proj.weight": "gpt_neox.layers.{i}.attention.dense.weight",
    "attn.o_proj.bias": "gpt_neox.layers.{i}.attention.dense.bias",
    "mlp_norm.scale": "gpt_neox.layers.{i}.post_attention_layernorm.weight",
    "mlp_norm.bias": "gpt_neox.layers.{i}.post_attention_layernorm.bias",
    "mlp.up_proj.weight": "gpt_neox.layers.{i}.mlp.dense_h_to_4h.weight",
    "mlp.up_proj.bias": "gpt_neox.layers.{i}.mlp.dense_h_to_4h.bias",
    "mlp.down_proj.weight": "gpt_neox.layers.{i}.mlp.dense_4h_to_h.weight",
    "mlp.down_proj.bias": "gpt_neox.layers.{i}.mlp.dense_4h_to_h.bias",
    "norm.scale": "gpt_neox.final_layer_norm.weight",
    "norm.bias": "gpt_neox.final_layer_norm.bias",
    "unembed.weight": "embed_out.weight",
}


def current_key(key: str) -> str | None:
    """Today's name of a key: the files of Pythia hold each layer's causal mask and inverse wavelengths beside its weights."""
    return None if key.endswith((".attention.bias", ".attention.masked_bias", ".attention.rotary_emb.inv_freq")) else key
