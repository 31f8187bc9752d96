"""A drawing of our own: Llama's, with a switch for each thing that is known to help small models. With all of them off it is Llama's, with
`qk_norm` Qwen3's, and is exported as such; what `transformers` has no model for goes into a folder of ours (`lm.native`).

    x₀ = norm(embed) ─ x ─ λ₁x + λ₂x₀ ─┬─ norm ─ attention, v = λ₁v + λ₂v₁ + λ₃·table[token] ─(+)─┬─ norm ─ MLP ─(+)─ … norm ─ unembed ─ cap
                                       └───────────────────────────────────────────────────────┘└────────────┘

`x₀` and the tables' rows are known before the first block and come as facts; the first block's values v₁ are handed on from block to block
beside the stream (`Stream`). Sources: modded-nanogpt (Jordan et al. 2024, github.com/KellerJordan/modded-nanogpt), but where a switch names
its own.
"""

# ------------------------------------------------------------------------------------------- config

from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from einops import rearrange
from jaxtyping import Array, Float, Int, Key
from pydantic import BaseModel, Field, model_validator

from lm import rope
from lm.attention import Attention
from lm.base import AbstractBlock, AbstractLM, Aux, add_aux, aligned, facts_or_default, mark
from lm.cache import LayerCache
from lm.hf_config import check_heads, refuse_native
from lm.layers import MLP, Embedding, GatedMLP, Linear, RMSNorm, dropout, relu2
from lm.masks import Facts
from lm.models import llama, qwen3
from lm.quant import Quantised


class ZmajConfig(BaseModel, frozen=True, extra="forbid"):
    """Numbers as those of a Qwen3, then the switches. There is no `from_hf`: a `config.json` of this type is that of a folder of ours."""

    model_type: ClassVar[str] = "zmaj"

    vocab: int = Field(gt=0)
    d_model: int = Field(gt=0)
    n_layers: int = Field(gt=0)
    n_heads: int = Field(gt=0)
    n_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    d_ff: int = Field(gt=0)
    context: int = Field(gt=0)
    rope_base: float = Field(10_000.0, gt=0)
    rope_scaling: rope.Scaling | None = Field(None, discriminator="kind")
    norm_eps: float = Field(1e-6, gt=0)
    tied: bool = False
    init_std: float = Field(0.02, gt=0)
    embed_init_std: float | None = Field(None, gt=0)  # of embedding and head; None: init_std
    dropout: float = Field(0.0, ge=0, lt=1)  # of embedding and residual branches, in training
    attention_dropout: float = Field(0.0, ge=0, lt=1)  # of attention probabilities, in training
    window_by_layer: tuple[int | None, ...] | None = None  # positions a query of a layer sees; see `window_pattern`

    qk_norm: bool = False  # RMSNorm on each head's queries and keys (arXiv:2302.05442), as in Qwen3
    zero_init: bool = False  # maps that write into the stream begin at 0: each block as the identity (arXiv:2203.03466, appendix D.2)
    mlp: Literal["gated_silu", "relu2"] = "gated_silu"  # down(silu(gate x) · up x), or down(relu(up x)²) (arXiv:2109.08668)
    embed_norm: bool = False  # RMSNorm behind the embedding
    stream_lambdas: bool = False  # each block takes λ₁ · stream + λ₂ · x₀, x₀ what the first took; they begin at 1 and 0
    value_residual: bool = False  # layers mix the first one's values into theirs (arXiv:2410.17897, learnable ResFormer)
    value_embeddings: int = Field(0, ge=0)  # tables of values by token: one each for the first so many layers, the same for the last
    logit_scale: float = Field(1.0, gt=0)  # of the unembedding's input; 1/width in muP (arXiv:2203.03466)
    logit_softcap: float | None = Field(None, gt=0)  # logits never pass ± this (arXiv:2408.00118, section 2)

    @model_validator(mode="after")
    def _fits_together(self) -> "ZmajConfig":
        check_heads(self.n_heads, self.n_kv_heads, self.head_dim)
        rope.check_pairs(self.rope_scaling, self.head_dim // 2)
        windows = self.window_by_layer
        if windows is not None and (len(windows) != self.n_layers or any(n is not None and n < 1 for n in windows)):
            raise ValueError(f"window_by_layer must be {self.n_layers} numbers above 0, one for each of n_layers; got {windows}")
        if 2 * self.value_embeddings > self.n_layers:
            raise ValueError(
                f"value_embeddings ({self.value_embeddings}) may be at most half of n_layers ({self.n_layers}): a table serves two layers"
            )
        return self

    def table_of(self, layer: int) -> int | None:
        """The table of value embeddings that a layer reads: the first layers take them in order, the last ones likewise."""
        from_end = self.n_layers - layer
        return layer if layer < self.value_embeddings else self.value_embeddings - from_end if from_end <= self.value_embeddings else None

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of the Qwen3, or without `qk_norm` of the Llama, that computes the same function.

        **Raises:** `NotInTransformers` naming the switches that no such model has.
        """
        plain = {name: field.default for name, field in type(self).model_fields.items() if name in _SWITCHES}
        on = {name: getattr(self, name) for name in plain if getattr(self, name) != plain[name]}
        like: Any = qwen3.Qwen3Config if self.qk_norm else llama.LlamaConfig
        refuse_native(like.model_type, **on)
        shared = {
            name: getattr(self, name)
            for name in type(self).model_fields
            if name not in {*_SWITCHES, "qk_norm", "zero_init", "embed_init_std"}
        }
        return like(**shared).to_hf()


_SWITCHES = ("mlp", "embed_norm", "stream_lambdas", "value_residual", "value_embeddings", "logit_scale", "logit_softcap")


def window_pattern(pattern: str, window: int, n_layers: int) -> tuple[int | None, ...]:
    """`window_by_layer` from letters that are repeated over the layers: S a layer with the window, L one that sees all. The last layer
    sees all, whatever its letter.

    **Raises:** `ValueError` for other letters, and for none.
    """
    if not pattern or set(pattern) - {"S", "L"}:
        raise ValueError(f"a window pattern is made of S (short, the window) and L (long, everything), as in SSSL; got {pattern!r}")
    short = [pattern[layer % len(pattern)] == "S" and layer < n_layers - 1 for layer in range(n_layers)]
    return tuple(window if each else None for each in short)


# ------------------------------------------------------------------------------------------- block


class Stream(NamedTuple):
    """What a block hands on where values of the first layer are mixed into those of the others."""

    x: Float[Array, "*batch seq d_model"]
    first_values: Float[Array, "*batch kv_heads seq head_dim"] | None  # None before the first block


class Given(NamedTuple):
    """What is known of the tokens before the first block (`Facts.own`)."""

    x0: Float[Array, "*batch seq d_model"]
    values: tuple[Float[Array, "*batch kv_heads seq head_dim"], ...]  # rows of each table


class Block(AbstractBlock):
    """Attention, then MLP, each on a normed copy of the residual stream and added back to it."""

    attn_norm: RMSNorm
    attn: Attention
    mlp_norm: RMSNorm
    mlp: GatedMLP | MLP
    stream_lambdas: Float[Array, "2"] | None  # of the stream and of x₀; None: the stream as it comes
    value_lambdas: Float[Array, " sources"] | None  # of its own values, the first layer's, its table's; None: its own as they are
    table: int | None = eqx.field(static=True, default=None)  # of value embeddings
    dropout: float = eqx.field(static=True, default=0.0)

    @staticmethod
    def init(config: ZmajConfig, layer: int, *, key: Key[Array, ""]) -> "Block":
        """Maps that write into the stream start smaller by √(2 · n_layers) (Radford et al. 2019), or at 0. Half of a layer's values is its
        own at the start, the other half in equal parts the others'."""
        attn_key, mlp_key = jr.split(key)
        std, out_std = config.init_std, 0.0 if config.zero_init else config.init_std / (2 * config.n_layers) ** 0.5
        others = (config.value_residual and layer > 0) + (config.table_of(layer) is not None)
        mlp: dict[str, Any] = {"std": std, "out_std": out_std, "key": mlp_key}
        return Block(
            attn_norm=RMSNorm.init(config.d_model, config.norm_eps),
            attn=Attention.init(
                config.d_model,
                config.n_heads,
                config.n_kv_heads,
                config.head_dim,
                std=std,
                out_std=out_std,
                key=attn_key,
                window=config.window_by_layer[layer] if config.window_by_layer else None,
                dropout=config.attention_dropout,
                qk_norm_eps=config.norm_eps if config.qk_norm else None,
            ),
            mlp_norm=RMSNorm.init(config.d_model, config.norm_eps),
            mlp=MLP.init(config.d_model, config.d_ff, activation=relu2, **mlp)
            if config.mlp == "relu2"
            else GatedMLP.init(config.d_model, config.d_ff, **mlp),
            stream_lambdas=jnp.array([1.0, 0.0]) if config.stream_lambdas else None,
            value_lambdas=jnp.array([0.5, *[0.5 / others] * others]) if others else None,
            table=config.table_of(layer),
            dropout=config.dropout,
        )

    def __call__(
        self,
        x: Float[Array, "*batch seq d_model"] | Stream,
        facts: Facts,
        cache: LayerCache | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "*batch seq d_model"] | Stream, LayerCache | None, Aux]:
        attn_key, mlp_key, probabilities_key = (None, None, None) if key is None else jr.split(key, 3)
        stream, first_values = x if isinstance(x, Stream) else (x, None)
        if self.stream_lambdas is not None:
            stream = (self.stream_lambdas[0] * stream + self.stream_lambdas[1] * facts.own.x0).astype(stream.dtype)
        y = self.attn_norm(stream)
        own_values = self.attn.values(y)
        values = self.mixed_values(own_values, first_values, facts)
        y, cache = self.attn(y, facts, cache, key=probabilities_key, values=values)
        stream = (stream + dropout(y, self.dropout, attn_key)).astype(stream.dtype)  # the stream keeps its dtype whatever the weights'
        y = mark(self.mlp(self.mlp_norm(stream)), "mlp.out")
        stream = mark((stream + dropout(y, self.dropout, mlp_key)).astype(stream.dtype), "block.out")
        if isinstance(x, Stream):
            return Stream(stream, own_values if first_values is None else first_values), cache, {}
        return stream, cache, {}

    def mixed_values(
        self,
        own: Float[Array, "*batch kv_heads seq head_dim"],
        first: Float[Array, "*batch kv_heads seq head_dim"] | None,
        facts: Facts,
    ) -> Float[Array, "*batch kv_heads seq head_dim"]:
        """What attention mixes, and the cache remembers."""
        if self.value_lambdas is None:
            return own
        sources = [own] + ([] if first is None else [first]) + ([] if self.table is None else [facts.own.values[self.table]])
        if len(sources) != len(self.value_lambdas):
            raise ValueError(f"this block mixes {len(self.value_lambdas)} kinds of values and got {len(sources)}: has it become the first?")
        return sum(weight * source for weight, source in zip(self.value_lambdas, sources, strict=True)).astype(own.dtype)

    def empty_cache(self, batch: tuple[int, ...], slots: int, dtype: Any) -> LayerCache:
        return self.attn.empty_cache(batch, slots, dtype)


# ------------------------------------------------------------------------------------------- model


class Zmaj(AbstractLM):
    """Embedding, blocks, a last norm, and the way back to the vocabulary."""

    config: ZmajConfig = eqx.field(static=True)
    embed: Embedding  # vocab → d_model
    embed_norm: RMSNorm | None
    value_embeds: tuple[Embedding, ...]  # vocab → kv_heads · head_dim
    blocks: tuple[Any, ...]
    norm: RMSNorm
    unembed: Linear | None  # d_model → vocab; None: tied to `embed`

    @staticmethod
    def init(config: ZmajConfig, *, key: Key[Array, ""]) -> "Zmaj":
        """Rows of the tables begin as long as values are: √d_model · init_std an entry, what `v_proj` makes of a normed vector."""
        embed_key, unembed_key, blocks_key = jr.split(key, 3)
        width, value_std = config.n_kv_heads * config.head_dim, config.init_std * config.d_model**0.5
        embed_std = config.init_std if config.embed_init_std is None else config.embed_init_std
        tables = jr.split(jr.fold_in(embed_key, 1), config.value_embeddings)
        return Zmaj(
            config=config,
            embed=Embedding.init(config.vocab, config.d_model, std=embed_std, key=embed_key),
            embed_norm=RMSNorm.init(config.d_model, config.norm_eps) if config.embed_norm else None,
            value_embeds=tuple(Embedding.init(config.vocab, width, std=value_std, key=k) for k in tables),
            blocks=tuple(Block.init(config, i, key=k) for i, k in enumerate(jr.split(blocks_key, config.n_layers))),
            norm=RMSNorm.init(config.d_model, config.norm_eps),
            unembed=None if config.tied else Linear.init(config.d_model, config.vocab, std=embed_std, key=unembed_key),
        )

    @property
    def unembedding(self) -> Float[Array, "vocab d_model"] | Quantised:
        return self.embed.weight if self.unembed is None else self.unembed.weight

    @property
    def logit_softcap(self) -> float | None:
        return self.config.logit_softcap

    @property
    def n_active_params(self) -> int:
        """All but the tables, which are looked up and multiply nothing; of an embedding with a head beside it likewise."""
        looked_up = [*self.value_embeds, *([] if self.unembed is None else [self.embed])]
        return self.n_params - sum(table.weight.shape[0] * table.weight.shape[1] for table in looked_up)

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
        embed_key, blocks_key = (None, None) if key is None else jr.split(key)

        x0 = self.embed(tokens) if self.embed_norm is None else self.embed_norm(self.embed(tokens))
        x0 = mark(dropout(x0, c.dropout, embed_key), "embed.out")
        rows = [rearrange(table(tokens), "... seq (heads d) -> ... heads seq d", d=c.head_dim) for table in self.value_embeds]
        facts = Facts(facts.positions, facts.segments, tables, Given(x0, tuple(rows)))
        x: Any = Stream(x0, None) if c.value_residual else x0
        caches: list[Any] = []
        aux: Aux = {}
        for block, block_cache, block_key in aligned(self.blocks, cache, blocks_key):
            x, block_cache, block_aux = block(x, facts, block_cache, key=block_key)
            caches.append(block_cache)
            aux = add_aux(aux, block_aux)
        hidden = self.norm(x.x if c.value_residual else x)
        return hidden if c.logit_scale == 1 else c.logit_scale * hidden, None if cache is None else tuple(caches), aux


# ------------------------------------------------------------------------------------------- presets

# None: what is trained with this drawing has its sizes in the recipes.
PRESETS: dict[str, ZmajConfig] = {}

# ------------------------------------------------------------------------------------------- HF names

# Of the parts that a Llama or Qwen3 has too; the others never lie in such a file.
HF_NAMES = qwen3.HF_NAMES
