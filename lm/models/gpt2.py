"""GPT-2: the classic decoder, with learned or sinusoidal positions, LayerNorm, biases and a plain MLP (Radford et al. 2019, "Language
Models are Unsupervised Multitask Learners", section 2.3).

    tokens + positions ─┬─ norm ─ attention ─(+)─┬─ norm ─ MLP ─(+)─ …  norm ─ unembed
                        └────────────────────────┘└─────────────┘
"""

# ------------------------------------------------------------------------------------------- config

from typing import Any, ClassVar, Literal

import equinox as eqx
import jax.random as jr
from jaxtyping import Array, Float, Int, Key
from pydantic import BaseModel, Field, model_validator

from lm import rope
from lm.attention import Attention
from lm.base import AbstractBlock, AbstractLM, Aux, add_aux, aligned, facts_or_default, mark
from lm.cache import LayerCache
from lm.hf import Names, part, transposed
from lm.hf_config import ConfigReader, refuse_native
from lm.layers import MLP, Embedding, LayerNorm, Linear, activation_named, dropout
from lm.masks import Facts
from lm.quant import Quantised


class GPT2Config(BaseModel, frozen=True, extra="forbid"):
    """Numbers of a GPT-2. Hugging Face's name stands behind each."""

    model_type: ClassVar[str] = "gpt2"

    vocab: int = Field(gt=0)  # vocab_size
    d_model: int = Field(gt=0)  # n_embd
    n_layers: int = Field(gt=0)  # n_layer
    n_heads: int = Field(gt=0)  # n_head
    d_ff: int = Field(gt=0)  # n_inner
    context: int = Field(gt=0)  # n_positions
    positions: Literal["learned", "sinusoidal"] = "learned"  # sinusoidal (arXiv:1706.03762) is native only
    activation: str = "gelu_new"  # activation_function
    norm_eps: float = Field(1e-5, gt=0)  # layer_norm_epsilon
    tied: bool = True  # tie_word_embeddings
    init_std: float = Field(0.02, gt=0)  # initializer_range
    embed_dropout: float = Field(0.0, ge=0, lt=1)  # of token and position together, in training; embd_pdrop
    dropout: float = Field(0.0, ge=0, lt=1)  # of residual branches; resid_pdrop
    attention_dropout: float = Field(0.0, ge=0, lt=1)  # of attention probabilities; attn_pdrop
    attention_softcap: float | None = Field(None, gt=0)  # bounds the scores; native only
    logit_softcap: float | None = Field(None, gt=0)  # bounds the logits; native only

    @model_validator(mode="after")
    def _whole(self) -> "GPT2Config":
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model ({self.d_model}) must be a multiple of n_heads ({self.n_heads}): a head is d_model / n_heads wide")
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise ValueError(f"d_model ({self.d_model}) must be even: sinusoidal positions come in pairs")
        activation_named(self.activation)
        return self

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def n_kv_heads(self) -> int:
        return self.n_heads

    @staticmethod
    def from_hf(config: dict[str, Any]) -> "GPT2Config":
        """Read a `config.json`. Each key is used, known to be harmless, or refused by name."""
        read = ConfigReader(config, "gpt2")
        d_model = read.take("n_embd", 768)
        result = GPT2Config(
            vocab=read.take("vocab_size"),
            d_model=d_model,
            n_layers=read.take("n_layer", 12),
            n_heads=read.take("n_head", 12),
            d_ff=read.take("n_inner", 4 * d_model),
            context=read.take("n_positions", 1024),
            activation=read.take("activation_function", "gelu_new"),
            norm_eps=read.take("layer_norm_epsilon", 1e-5),
            tied=read.take("tie_word_embeddings", True),
            init_std=read.take("initializer_range", 0.02),
            embed_dropout=read.take("embd_pdrop", 0.1),
            dropout=read.take("resid_pdrop", 0.1),
            attention_dropout=read.take("attn_pdrop", 0.1),
        )
        read.expect("scale_attn_weights", True, default=True)
        read.expect("scale_attn_by_inverse_layer_idx", False, default=False)
        read.expect("add_cross_attention", False, default=False)
        # n_ctx: an old double of n_positions. reorder_and_upcast_attn: a matter of rounding. The others are of heads we do not build.
        summary = {f"summary_{name}" for name in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")}
        read.finish(harmless={"n_ctx", "reorder_and_upcast_attn", "task_specific_params", *summary})
        return result

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` under which `transformers` computes the same function.

        **Raises:** `ValueError` naming the settings it has no key for.
        """
        positions = None if self.positions == "learned" else self.positions
        refuse_native("gpt2", positions=positions, attention_softcap=self.attention_softcap, logit_softcap=self.logit_softcap)
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": self.vocab,
            "n_embd": self.d_model,
            "n_layer": self.n_layers,
            "n_head": self.n_heads,
            "n_inner": self.d_ff,
            "n_positions": self.context,
            "activation_function": self.activation,
            "layer_norm_epsilon": self.norm_eps,
            "tie_word_embeddings": self.tied,
            "initializer_range": self.init_std,
            "embd_pdrop": self.embed_dropout,
            "resid_pdrop": self.dropout,
            "attn_pdrop": self.attention_dropout,
            "bos_token_id": None,  # the tokenizer's to say; left out, transformers would take those of the published GPT-2
            "eos_token_id": None,
        }


# ------------------------------------------------------------------------------------------- block


class Block(AbstractBlock):
    """Attention, then MLP, each on a normed copy of the residual stream and added back to it."""

    attn_norm: LayerNorm
    attn: Attention
    mlp_norm: LayerNorm
    mlp: MLP
    dropout: float = eqx.field(static=True, default=0.0)

    @staticmethod
    def init(config: GPT2Config, *, key: Key[Array, ""]) -> "Block":
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
                bias=True,
                softcap=config.attention_softcap,
                dropout=config.attention_dropout,
            ),
            mlp_norm=LayerNorm.init(config.d_model, config.norm_eps),
            mlp=MLP.init(config.d_model, config.d_ff, std=std, out_std=out_std, key=mlp_key, activation=activation, bias=True),
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


class GPT2(AbstractLM):
    """Embeddings of token and position, blocks, a last norm, and the way back to the vocabulary."""

    config: GPT2Config = eqx.field(static=True)
    embed: Embedding  # vocab → d_model
    position_embed: Embedding | None  # context → d_model; None: sinusoidal
    blocks: tuple[Any, ...]
    norm: LayerNorm
    unembed: Linear | None  # d_model → vocab; None: tied to `embed`

    @staticmethod
    def init(config: GPT2Config, *, key: Key[Array, ""]) -> "GPT2":
        embed_key, position_key, unembed_key, blocks_key = jr.split(key, 4)
        std, learned = config.init_std, config.positions == "learned"
        return GPT2(
            config=config,
            embed=Embedding.init(config.vocab, config.d_model, std=std, key=embed_key),
            position_embed=Embedding.init(config.context, config.d_model, std=std, key=position_key) if learned else None,
            blocks=tuple(Block.init(config, key=k) for k in jr.split(blocks_key, config.n_layers)),
            norm=LayerNorm.init(config.d_model, config.norm_eps),
            unembed=None if config.tied else Linear.init(config.d_model, config.vocab, std=std, key=unembed_key),
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
        embed_key, blocks_key = (None, None) if key is None else jr.split(key)

        if self.position_embed is None:
            place = rope.sinusoidal(facts.positions, self.config.d_model)
        else:
            place = self.position_embed(facts.positions)
        x = mark(dropout(self.embed(tokens) + place, self.config.embed_dropout, embed_key), "embed.out")
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
    "gpt2": GPT2Config(vocab=50_257, d_model=768, n_layers=12, n_heads=12, d_ff=3072, context=1024),
    "gpt2-medium": GPT2Config(vocab=50_257, d_model=1024, n_layers=24, n_heads=16, d_ff=4096, context=1024),
}

# ------------------------------------------------------------------------------------------- HF names

# role of our leaf → key in the file; {i} is the layer. GPT-2's linear maps are kept (in, out), and queries, keys and values as one.
HF_NAMES: Names = {
    "embed.weight": "transformer.wte.weight",
    "position_embed.weight": "transformer.wpe.weight",
    "attn_norm.scale": "transformer.h.{i}.ln_1.weight",
    "attn_norm.bias": "transformer.h.{i}.ln_1.bias",
    "attn.q_proj.weight": part(0, transposed("transformer.h.{i}.attn.c_attn.weight")),
    "attn.k_proj.weight": part(1, transposed("transformer.h.{i}.attn.c_attn.weight")),
    "attn.v_proj.weight": part(2, transposed("transformer.h.{i}.attn.c_attn.weight")),
    "attn.q_proj.bias": part(0, "transformer.h.{i}.attn.c_attn.bias"),
    "attn.k_proj.bias": part(1, "transformer.h.{i}.attn.c_attn.bias"),
    "attn.v_proj.bias": part(2, "transformer.h.{i}.attn.c_attn.bias"),
    "attn.o_proj.weight": transposed("transformer.h.{i}.attn.c_proj.weight"),
    "attn.o_proj.bias": "transformer.h.{i}.attn.c_proj.bias",
    "mlp_norm.scale": "transformer.h.{i}.ln_2.weight",
    "mlp_norm.bias": "transformer.h.{i}.ln_2.bias",
    "mlp.up_proj.weight": transposed("transformer.h.{i}.mlp.c_fc.weight"),
    "mlp.up_proj.bias": "transformer.h.{i}.mlp.c_fc.bias",
    "mlp.down_proj.weight": transposed("transformer.h.{i}.mlp.c_proj.weight"),
    "mlp.down_proj.bias": "transformer.h.{i}.mlp.c_proj.bias",
    "norm.scale": "transformer.ln_f.weight",
    "norm.bias": "transformer.ln_f.bias",
    "unembed.weight": "lm_head.weight",
}


def current_key(key: str) -> str | None:
    """Today's name of a key: OpenAI's own files lack the prefix, and hold each layer's causal mask beside its weights."""
    if key.endswith((".attn.bias", ".attn.masked_bias")):
        return None
    return key if key.startswith(("transformer.", "lm_head.")) else f"transformer.{key}"
